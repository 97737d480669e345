"""The named workloads: shapes of real models, regions of a real label map, random inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dense_attn import Layout

from ..harness import machine

_ROOT = Path(__file__).resolve().parents[2]
_REAL_LAYOUTS = _ROOT.parent / "shared" / "data" / "layouts.npz"
_SHIPPED_LAYOUT = _ROOT / "examples" / "scene.png"
_TIME = 0.981  # the first of 50 steps, where DenseDiffusion is strongest
_PROMPT_TOKENS = 77


@dataclass(frozen=True)
class Workload:
    """A layer's attention: an image with itself ("self"), a prompt ("cross") or both ("joint")."""

    name: str
    kind: str
    num_heads: int
    grid: tuple[int, int]  # (height, width) of the image tokens
    head_dim: int
    # classifier-free guidance: the unconditional sample, not modulated, and the conditional one
    batch: int = 2
    text_tokens: int = _PROMPT_TOKENS
    groups: int = 1  # heads of q that meet one of k and v
    device: str = "cpu"  # the least that it takes
    flex: bool = False  # FlexAttention compiles anew for every shape: where a bar asks for it
    modulation: str = "range"
    stripes: int = 0  # regions side by side; 0: those of the label map
    dtypes: tuple[str, ...] = ()  # of a shape of the user's own; none: the suite's

    @property
    def own(self) -> bool:
        """Whether the user asked for the shape."""
        return bool(self.dtypes)

    @property
    def seqlen_q(self) -> int:
        return self.grid[0] * self.grid[1] + (self.text_tokens if self.kind == "joint" else 0)

    @property
    def seqlen_k(self) -> int:
        return self.text_tokens if self.kind == "cross" else self.seqlen_q

    @property
    def pairs(self) -> int:
        """Elements of the matrix of scores over batch and heads."""
        return self.batch * self.num_heads * self.seqlen_q * self.seqlen_k

    def gflop(self, backward: bool, alone: bool = False) -> float:
        """Work of plain attention: two products forward, five more backward (alone: those five)."""
        return (4 * (not alone) + 10 * backward) * self.pairs * self.head_dim / 1e9


def _stable_diffusion() -> list[Workload]:
    rows = [(64, 8, 40), (32, 8, 80), (16, 8, 160), (8, 8, 160)]
    sd15 = [
        Workload(f"sd15-{kind}-{side}", kind, heads, (side, side), dim)
        for kind in ("self", "cross")
        for side, heads, dim in rows
    ]
    sd15[0] = replace(sd15[0], flex=True)
    sdxl = [
        Workload(f"sdxl-{kind}-{side}", kind, heads, (side, side), 64)
        for kind in ("self", "cross")
        for side, heads in ((64, 10), (32, 20))
    ]
    return sd15 + sdxl


def _long() -> list[Workload]:
    """Images of 1k to 64k tokens; above 4k fewer heads, so that a call takes seconds: compare the
    time of a head.
    """

    def workload(log_tokens: int) -> Workload:
        grid = 2 ** (log_tokens // 2), 2 ** (log_tokens - log_tokens // 2)
        num_heads = max(1, min(8, 2**15 >> log_tokens))
        return Workload(f"long-self-{2**log_tokens // 1024}k", "self", num_heads, grid, 64, batch=1)

    return [workload(log_tokens) for log_tokens in range(10, 17)]


def _flux() -> list[Workload]:
    return [
        Workload(f"flux-joint-{16 * side}", "joint", 24, (side, side), 128, 1, 512, device="cuda")
        for side in (64, 128)
    ]


def _transformers() -> list[Workload]:
    """Diffusion transformers of every head dim, on CPUs at 512 pixels or what is as small."""
    large, small = (64, 64), (32, 32)
    return [
        Workload("pixart-self-32", "self", 16, small, 72),
        Workload("hunyuandit-self-32", "self", 16, small, 88),
        Workload("lumina2-joint-512", "joint", 24, small, 96, 1, 256, groups=3),
        Workload("sana-cross-32", "cross", 20, small, 112, text_tokens=300),
        Workload("flux-joint-512", "joint", 24, small, 128, 1, 512),
        Workload("auraflow-joint-512", "joint", 12, small, 256, 1, 256),
        # 81 frames, one below the other
        Workload("wan-cross-480p", "cross", 12, (21 * 30, 52), 128, 1, 512),
        Workload("qwen-joint-1328", "joint", 24, (83, 83), 128, 1, 128, device="cuda"),
        Workload("zimage-joint-1024", "joint", 30, large, 128, 1, 128, device="cuda"),
        Workload("krea2-gqa-1024", "joint", 48, large, 128, 1, 512, groups=4, device="cuda"),
    ]


_ALL = (*_stable_diffusion(), *_long(), *_flux(), *_transformers())
WORKLOADS = {workload.name: workload for workload in _ALL}
_GPU_FLEX = ("sd15-self-64", "sdxl-self-64", "flux-joint-1024", "long-self-16k")


def workloads() -> list[Workload]:
    """The workloads of this machine, as it runs them."""
    return on_a_gpu() if machine.on_gpu() else list(WORKLOADS.values())


def on_a_gpu() -> list[Workload]:
    """All workloads, as a GPU runs them: with every head."""
    flex = {name: x.own or name in _GPU_FLEX for name, x in WORKLOADS.items()}
    heads = {name: 8 for name in WORKLOADS if name.startswith("long")}
    return [
        replace(x, flex=flex[name], num_heads=heads.get(name, x.num_heads))
        for name, x in WORKLOADS.items()
    ]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradient that comes back to it."""

    q: Tensor  # [B, H, M, D]
    k: Tensor  # [B, H / G, N, D]
    v: Tensor  # [B, H / G, N, D]
    grad_out: Tensor  # [B, H, M, D]
    q_regions: Tensor  # int32 [M]
    k_regions: Tensor  # int32 [N]
    strength: Tensor  # [B, 1, M], 0 for the unconditional sample
    modulation: str = "range"


def make_inputs(workload: Workload, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random q, k, v and gradient; the layout's words and strengths by DenseDiffusion's rules."""
    device = machine.current().device
    generator = torch.Generator(device).manual_seed(seed)

    def randn(tokens: int, groups: int = 1) -> Tensor:
        shape = (workload.batch, workload.num_heads // groups, tokens, workload.head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)

    layout = own_layout(workload) if workload.own else label_layout()[1]
    text = layout.token_regions(workload.text_tokens)
    image = layout.query_regions(*workload.grid)
    both = torch.cat((text, image))
    q_regions = both if workload.kind == "joint" else image
    k_regions = {"self": image, "cross": text, "joint": both}[workload.kind]
    weight = 1.0 if workload.kind == "cross" else 0.3
    rows = layout.strength(*workload.grid, weight=weight, time=_TIME)
    strength = rows.new_zeros(workload.batch, 1, workload.seqlen_q)
    # Text rows of a joint sequence, which come first, are left alone.
    strength[workload.batch // 2 :, :, -len(rows) :] = rows
    moved = (x.to(device) for x in (q_regions, k_regions, strength))
    q, (k, v) = randn(workload.seqlen_q), (randn(workload.seqlen_k, workload.groups) for _ in "kv")
    return Inputs(q, k, v, randn(workload.seqlen_q), *moved, workload.modulation)


@cache
def label_layout() -> tuple[str, Layout]:
    """The origin of the label map, and its layout with the background as a region."""
    source, labels = _label_map()
    return source, _with_phrases(labels, _PROMPT_TOKENS)


def own_layout(workload: Workload) -> Layout:
    """The layout of a user's own shape: stripes, or the label map on its grid of tokens."""
    height, width = workload.grid
    if workload.stripes:
        stripes = np.arange(width)[None].repeat(height, 0) * workload.stripes // width
        return _with_phrases(stripes, workload.text_tokens)
    labels = _label_map()[1]
    rows, columns = (np.arange(n) * size // n for n, size in zip(workload.grid, labels.shape))
    return _with_phrases(labels[rows][:, columns], workload.text_tokens)


def _with_phrases(labels: np.ndarray, num_tokens: int) -> Layout:
    """A label map's regions with phrases: three tokens behind BOS, or equal parts of few tokens."""
    num_regions = len(np.unique(labels))
    spans = [(3 * r + 1, 3 * r + 4) for r in range(num_regions)]
    if spans[-1][1] > num_tokens:
        ends = [r * num_tokens // num_regions for r in range(num_regions + 1)]
        spans = list(pairwise(ends))
    return Layout.from_label_map(labels, spans, background=True)


def _label_map() -> tuple[str, np.ndarray]:
    if _REAL_LAYOUTS.exists():
        label_maps = np.load(_REAL_LAYOUTS)["label_maps"]
        return "the first layout of the DenseDiffusion benchmark", label_maps[0]
    try:
        from PIL import Image

        with Image.open(_SHIPPED_LAYOUT) as image:
            return f"examples/{_SHIPPED_LAYOUT.name}", np.array(image)
    except (ImportError, OSError):
        y, x = np.mgrid[:64, :64]
        disc = (y - 40) ** 2 + (x - 20) ** 2 < 200
        box = (y > 20) & (x > 40)
        return "synthetic (a disc and a box)", np.where(disc, 1, np.where(box, 2, 0))
