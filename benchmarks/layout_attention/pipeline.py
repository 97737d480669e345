"""The cost of a layout in a pipeline:
`python -m dense_attn.benchmarks.layout_attention.pipeline --json FILE`.

One call of a U-Net of Stable Diffusion 1.5's shape and random weights on two 64 x 64 latents, as
classifier-free guidance makes it: plain, inside of `apply_layout` with its kernels and with its
reference, and with DenseDiffusion's formula in eager PyTorch in every attention layer. They take
turns; medians are compared, and the time in attention layers (projections included).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense_attn import Layout, _command, _files, _memory
from dense_attn.demo.step import official_attention
from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import apply_layout

from ..harness.header import describe_run

PROMPT = "a cat dog"
PHRASES, SPANS = ("cat", "dog"), [(2, 5), (5, 8)]  # as the small pipeline's tokenizer reads letters
BOXES = [(0.0, 0.3, 0.5, 1.0), (0.5, 0.0, 1.0, 0.7)]
STABLE_DIFFUSION = {
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, write."""
    program = "python -m dense_attn.benchmarks.layout_attention.pipeline"
    parser = argparse.ArgumentParser(program, description="Cost of a layout.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each way (5)")
    parser.add_argument(
        "--dry-run", action="store_true", help="a small U-Net, whose times mean nothing"
    )
    arguments = parser.parse_args(argv)
    if arguments.json is not None:
        _files.check(arguments.json)
    rows = measure(*_network(arguments.dry_run), arguments.rounds)
    _print_table(rows)
    if arguments.json is not None:
        header = describe_run(quick=False) | {"dry_run": arguments.dry_run, "regions": "two boxes"}
        _files.write(arguments.json, json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    return 0


def _print_table(rows: dict[str, dict[str, Any]]) -> None:
    plain, official = rows["plain"]["seconds"], rows["official"]["attention_seconds"]
    names = ("seconds", "of plain", "in attention", "official/this", "extra MB")
    print(f"{'':10} {names[0]:>8} {names[1]:>9} {names[2]:>13} {names[3]:>14} {names[4]:>9}")
    for name, row in rows.items():
        seconds, attention, extra = row["seconds"], row["attention_seconds"], row["extra_bytes"]
        ratios = f"{seconds / plain:.2f}x", f"{official / attention:.2f}x"
        megabytes = "-" if extra is None else f"{extra / 1e6:.0f}"
        print(
            f"{name:10} {seconds:8.3f} {ratios[0]:>9} {attention:13.3f} {ratios[1]:>14} "
            f"{megabytes:>9}"
        )


def _network(dry: bool) -> tuple[Any, Tensor, Tensor]:
    """A pipeline around the U-Net, latents and text tokens."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    pipe = tiny_pipeline(StableDiffusionPipeline, blocks=4)
    if not dry:
        pipe.unet = UNet2DConditionModel(sample_size=64, **STABLE_DIFFUSION).eval()
    pipe._guidance_scale = 7.5  # what a call of the pipeline sets
    side = 16 if dry else 64
    latents = torch.randn(1, 4, side, side).repeat(2, 1, 1, 1)
    return pipe, latents, torch.randn(2, 77, pipe.unet.config.cross_attention_dim)


@torch.no_grad()
def measure(pipe: Any, latents: Tensor, text: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """Medians of each way."""
    ways = {
        "plain": _plain,
        "dense_attn": partial(_with_layout, backend="auto"),
        "reference": partial(_with_layout, backend="reference"),
        "official": _official,
    }
    found: dict[str, dict[str, Any]] = {name: {"all": [], "attention": []} for name in ways}
    for turn in range(rounds + 1):  # the first is to warm up, and tells the memory
        for name, way in ways.items():
            with way(pipe, latents), _timed_attention(pipe.unet) as attention:
                pipe.scheduler.set_timesteps(50)  # a run begins
                step = pipe.scheduler.timesteps[0]
                call = partial(pipe.unet, latents, step, encoder_hidden_states=text)
                if turn == 0:
                    found[name]["extra_bytes"], _ = _memory.peak_extra_bytes(call)
                    continue
                start = time.perf_counter()
                call()
                found[name]["all"].append(time.perf_counter() - start)
                found[name]["attention"].append(sum(attention))
    for row in found.values():
        row["seconds"] = statistics.median(row.pop("all"))
        row["attention_seconds"] = statistics.median(row.pop("attention"))
    return found


@contextmanager
def _plain(pipe: Any, latents: Tensor) -> Iterator[None]:
    yield


@contextmanager
def _with_layout(pipe: Any, latents: Tensor, backend: str) -> Iterator[None]:
    masks = Layout.from_boxes(BOXES, tuple(latents.shape[2:])).masks
    regions = list(zip(PHRASES, masks))
    with apply_layout(pipe, PROMPT, regions, encode_phrases=False, backend=backend):
        yield


@contextmanager
def _official(pipe: Any, latents: Tensor) -> Iterator[None]:
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(_Official(latents.shape[2]))
    try:
        yield
    finally:
        pipe.unet.set_attn_processor(before)


class _Official:
    """Scores and masks in memory, made once for each size."""

    def __init__(self, side: int) -> None:
        self.layout = Layout.from_boxes(BOXES, (side, side), SPANS)
        self.made: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The layer's output."""
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        masks = self._masks(q.shape[2], keys.shape[1], encoder_hidden_states is not None)
        out = official_attention(q, k, v, *masks)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def _masks(self, num_queries: int, num_keys: int, cross: bool) -> tuple[Tensor, Tensor]:
        if (num_queries, cross) not in self.made:
            side = round(num_queries**0.5)
            words = self.layout.query_regions(side, side)
            other = self.layout.token_regions(num_keys) if cross else words
            strength = self.layout.strength(side, side, weight=1.0 if cross else 0.3, time=0.981)
            dense = ((words[:, None] & other[None, :]) != 0).float()[None]
            self.made[num_queries, cross] = dense, strength[:, None]
        return self.made[num_queries, cross]


@contextmanager
def _timed_attention(unet: torch.nn.Module) -> Iterator[list[float]]:
    """Seconds in each attention layer."""
    seconds: list[float] = []
    layers = [module for module in unet.modules() if hasattr(module, "get_processor")]

    def begin(*_: object) -> None:
        seconds.append(-time.perf_counter())

    def end(*_: object) -> None:
        seconds[-1] += time.perf_counter()

    handles = [layer.register_forward_pre_hook(begin) for layer in layers]
    handles += [layer.register_forward_hook(end) for layer in layers]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    raise SystemExit(_command.run("pipeline", main))
