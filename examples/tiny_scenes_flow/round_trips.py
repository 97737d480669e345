"""The study of round trips: noise to latents and back to noise, on the grid and in floats."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dense_attn import _progress

from ..tiny_scenes.scenes import draw_scene
from ..tiny_scenes.score import markdown
from .chains import Network, sampler, sigmas
from .model import OneEncoder

METHODS = {"EDICT": "edict", "leapfrog": "bdia"}
WAYS = {  # the network's dtype, and whether latents live on the grid; else they have that dtype too
    "exact": (torch.float32, True),
    "exact, network in bfloat16": (torch.bfloat16, True),
    "float64": (torch.float64, False),
    "float32": (torch.float32, False),
    "float16": (torch.float16, False),
}


def study(
    pipe: OneEncoder, count: int = 16, lengths: Sequence[int] = (10, 28, 50)
) -> dict[str, Any]:
    """The errors of noise that was sampled and inverted, for chains of several lengths."""
    rng = random.Random(43)
    captions = [draw_scene(rng, 2).caption for _ in range(count)]
    rows: dict[str, dict[str, float | None]] = {}
    ways = [(*method, *way) for method in METHODS.items() for way in WAYS.items()]
    for name, method, kind, (dtype, exact) in _progress.track(ways, "round trips", "way"):
        pipe.to(dtype)
        try:
            rows[f"{name}, {kind}"] = {
                str(steps): _error(pipe, captions, method, steps, dtype, exact) for steps in lengths
            }
        finally:
            pipe.to(torch.float32)
    return {"prompts": count, "lengths": list(lengths), "rows": rows}


@torch.no_grad()
def _error(
    pipe: OneEncoder,
    captions: list[str],
    method: str,
    steps: int,
    dtype: torch.dtype,
    exact: bool,
) -> float | None:
    """The root mean square of the noise's error over the noise's own; None for what is no number.
    An exact chain's is that of every bit of its pair.
    """
    velocity, chain = Network(pipe, captions), sampler(sigmas(steps), method, exact=exact)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x.to(dtype), t)

    shape, generator = (len(captions), 12, 16, 16), torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    start = noise if exact else noise.to(dtype)
    ends = chain.sample(network, start, start.clone())
    if exact:  # the grid holds the noise to its rounding, so the pair it made is what comes back
        again = chain.sample(network, *chain.invert(network, *ends))
        errors = [(x - y).square().sum() for x, y in zip(again, ends)]
        return (torch.stack(errors).sum() / sum(y.square().sum() for y in ends)).sqrt().item()
    again = chain.invert(network, *ends)[0].double()
    error = (again - start.double()).square().mean().sqrt() / start.double().square().mean().sqrt()
    return error.item() if error.isfinite() else None


def table(result: dict[str, Any]) -> str:
    """The errors as Markdown."""
    title = f"error of the noise, {result['prompts']} prompts, steps"
    rows = [
        [name, *("no number" if error is None else f"{error:.1e}" for error in row.values())]
        for name, row in result["rows"].items()
    ]
    return markdown([title, *map(str, result["lengths"])], rows)
