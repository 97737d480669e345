"""The attention layers of a Stable Diffusion 1.5 step at 512 x 512, run two ways and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import torch
from torch import Tensor

from dense_attn._memory import peak_extra_bytes
from dense_attn.layout_attention.layout import Layout
from dense_attn.layout_attention.op import layout_attention

NUM_HEADS, NUM_TOKENS = 8, 77
TIME = 0.981  # the first of 50 steps: t = 981 of 1000
WEIGHTS = {"self": 0.3, "cross": 1.0}  # DenseDiffusion's


@dataclass(frozen=True)
class Layer:
    """One kind of attention layer of the U-Net and how many of it a step runs."""

    grid: int  # image tokens are grid x grid
    head_dim: int
    count: int
    kind: str  # "self" or "cross"


SD15_LAYERS = tuple(
    Layer(grid, head_dim, count, kind)
    for grid, head_dim, count in ((64, 40, 5), (32, 80, 5), (16, 160, 5), (8, 160, 1))
    for kind in ("self", "cross")
)


@dataclass
class Measurement:
    """The measurements of one kind of layer; of a pair, 0 is the official way, 1 this library."""

    layer: Layer
    # beyond inputs and output; None where the system cannot tell
    peak_bytes: tuple[int | None, int | None]
    # one per layer
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    difference: float = 0.0  # largest of |ours - official|


def make_inputs(layer: Layer, seed: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v [B, H, tokens, D] like an image's: near and a few far places are alike.

    The keys of words resemble random places of the image. The layout plays no part: the model does
    not know it.
    """
    generator = torch.Generator().manual_seed(seed)
    randn = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    shape = (batch, NUM_HEADS, layer.grid**2, layer.head_dim)

    def noise(num_tokens: int) -> Tensor:
        return randn((*shape[:2], num_tokens, layer.head_dim))

    coarse = randn((batch * NUM_HEADS, 6, 6, 6))  # 6 "meanings" on a 6 x 6 grid
    meanings = torch.nn.functional.interpolate(
        coarse, (layer.grid, layer.grid), mode="bicubic", align_corners=True
    )
    mixing = randn((6, layer.head_dim)) / 6**0.5
    smooth = (meanings.flatten(2).transpose(1, 2) @ mixing).reshape(shape)
    q = 0.8 * smooth + 0.6 * noise(shape[2])
    if layer.kind == "self":
        return q, 0.8 * smooth + 0.6 * noise(shape[2]), noise(shape[2])
    places = torch.randint(shape[2], (NUM_TOKENS,), generator=generator, device="cpu")
    return q, 0.8 * smooth[:, :, places] + 0.6 * noise(NUM_TOKENS), noise(NUM_TOKENS)


def modulation_of(layer: Layer, layout: Layout) -> dict[str, Tensor]:
    """The layout's arguments to layout_attention, strength 0 for the unconditional half."""
    q_regions = layout.query_regions(layer.grid, layer.grid)
    order = layout.order(layer.grid, layer.grid)
    conditional = layout.strength(layer.grid, layer.grid, weight=WEIGHTS[layer.kind], time=TIME)
    strength = torch.stack((torch.zeros_like(conditional), conditional))  # [2, M]
    is_self = layer.kind == "self"
    return {
        "q_regions": q_regions,
        "k_regions": q_regions if is_self else layout.token_regions(NUM_TOKENS),
        "strength": strength[:, None],
        "q_order": order,
        "k_order": order if is_self else None,
    }


def official_attention(
    q: Tensor, k: Tensor, v: Tensor, dense_mask: Tensor, strength: Tensor
) -> Tensor:
    """Range modulation the way DenseDiffusion does it: every score and mask in memory.

    q, k, v [B, H, tokens, D], of which the second, conditional half of the batch is modulated (all
    of a batch of one); dense_mask float [1, M, N], made beforehand; strength [M, 1].
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # [B*H, tokens, D]
    empty = q.new_empty(len(q), seqlen_q, k.shape[1])
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
    conditional = scores[batch // 2 * num_heads :]  # [B/2*H, M, N]
    row_min = conditional.min(-1, keepdim=True)[0]
    row_max = conditional.max(-1, keepdim=True)[0]
    mask = dense_mask.repeat(len(conditional), 1, 1)
    conditional += (mask > 0) * strength * (row_max - conditional)
    conditional -= ~(mask > 0) * strength * (conditional - row_min)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, num_heads))


def measure(
    layout: Layout, layers: tuple[Layer, ...], backend: str = "auto"
) -> Iterator[Measurement]:
    """Run every layer both ways in turn, and yield its kind's measurement after each."""
    warm_up = layers[-1]  # the libraries' own first-call buffers belong to no layer
    for call in _both_ways(warm_up, layout, backend, seed=0):
        call()
    for layer in layers:
        calls = _both_ways(layer, layout, backend, seed=layer.grid)
        measurement = Measurement(layer, tuple(_beyond_output(call) for call in calls))
        for index in range(layer.count):
            calls = _both_ways(layer, layout, backend, seed=layer.grid + index)
            outs = []
            for call, seconds in zip(calls, measurement.seconds):
                out, elapsed = _timed(call)
                outs.append(out)
                seconds.append(elapsed)
            measurement.difference = max(
                measurement.difference, (outs[0] - outs[1]).abs().max().item()
            )
            yield measurement


def _both_ways(
    layer: Layer, layout: Layout, backend: str, seed: int
) -> tuple[Callable[[], Tensor], ...]:
    q, k, v = make_inputs(layer, seed)
    words = modulation_of(layer, layout)
    matched = (words["q_regions"][:, None] & words["k_regions"]) != 0  # [M, N]
    dense_mask = matched[None].float()
    strength = words["strength"][1].T  # [M, 1]
    return (
        lambda: official_attention(q, k, v, dense_mask, strength),
        lambda: layout_attention(q, k, v, **words, backend=backend),
    )


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result and the median time of a call: one run of a long one, up to five else."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 0.1:
        start = time.perf_counter()
        out = call()
        times.append(time.perf_counter() - start)
    return out, median(times)


def _beyond_output(call: Callable[[], Tensor]) -> int | None:
    peak, out = peak_extra_bytes(call)
    return None if peak is None else max(0, peak - out.nbytes)


def totals(measurements: list[Measurement]) -> tuple[float, float]:
    """Seconds of all layers, the official way and ours."""
    return tuple(sum(sum(m.seconds[way]) for m in measurements) for way in (0, 1))


def peaks(measurements: list[Measurement]) -> tuple[int | None, int | None]:
    """Extra bytes of the hungriest layer, the official way and ours."""
    return tuple(
        max((m.peak_bytes[way] for m in measurements), key=lambda size: size or 0) for way in (0, 1)
    )


def megabytes(size: int | None) -> str:
    """A size in MB (10^6 bytes) as text."""
    return "not known" if size is None else f"{size / 1e6:.{0 if size >= 1e8 else 1}f}"
