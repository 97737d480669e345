"""A step of semantic guidance, all concepts warm, beside the public pipeline's in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dense_attn
from dense_attn import reference

from ..harness import machine
from ..harness.measure import (
    OURS,
    Entry,
    Latest,
    Row,
    Setting,
    Trial,
    by_backend,
    of_here,
    tried,
    wanted,
    worst,
)
from ..harness.measure import measure as measure_row

WORKLOADS = {  # name: shape of eps_edits
    "sega-1-64": (1, 1, 4, 64, 64),
    "sega-3-64": (3, 1, 4, 64, 64),
    "sega-8-64": (8, 1, 4, 64, 64),
    "sega-3-64-batch2": (3, 2, 4, 64, 64),
    "sega-3-128": (3, 1, 4, 128, 128),
    "sega-3-128-16ch": (3, 1, 16, 128, 128),
    "sega-3-packed": (3, 1, 64, 4096),
    "sega-3-packed-tokens": (3, 1, 4096, 64),
    "sega-3-video": (3, 1, 16, 21, 60, 104),
}
# FLUX's latents of 1024 x 1024 pixels: channels of [B, 4096, 64] as its pipelines hold them
CHANNELS_LAST = {"sega-3-packed"}
_GUIDANCE, _MOMENTUM, _BETA = 7.5, 0.1, 0.4


@dataclass(frozen=True)
class Step:
    """The inputs of one step and the numbers of each concept."""

    eps_uncond: Tensor  # [B, C, ...]
    eps_text: Tensor  # [B, C, ...]
    eps_edits: Tensor  # [E, B, C, ...]
    momentum: Tensor  # [B, C, ...]
    scales: list[float]
    thresholds: list[float]
    weights: list[float]
    reverse: list[bool]


def make_step(shape: tuple[int, ...], seed: int = 0, channels_last: bool = False) -> Step:
    """Predictions that differ a little, as those of a network for several prompts do."""
    generator, device = torch.Generator().manual_seed(seed), machine.current().device
    randn = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
    concepts = range(shape[0])
    shared = randn(shape[1:])
    text, momentum = (shared + 0.1 * randn(shape[1:]) for _ in range(2))
    edits = shared + 0.1 * randn(shape)
    if channels_last:  # in memory; momentum is the library's own
        shared, text, edits = (x.mT.contiguous().mT for x in (shared, text, edits))
    return Step(
        *(x.to(device) for x in (shared, text, edits, 0.1 * momentum)),
        scales=[5.0 + concept for concept in concepts],
        thresholds=[0.9 + 0.01 * concept for concept in concepts],
        weights=[1.0 - 0.1 * concept for concept in concepts],
        reverse=[concept % 2 == 1 for concept in concepts],
    )


def ours(step: Step, backend: str = "auto") -> list[Tensor]:
    """(eps, momentum) by this library, of copies of packed latents, as its pipelines have them."""
    on = [True] * len(step.eps_edits)
    return list(
        dense_attn.sega_guidance(
            step.eps_uncond.contiguous(),
            step.eps_text.contiguous(),
            step.eps_edits.contiguous(),
            step.momentum,
            guidance_scale=_GUIDANCE,
            edit_guidance_scale=step.scales,
            edit_threshold=step.thresholds,
            edit_weights=step.weights,
            warm=on,
            enabled=on,
            reverse=step.reverse,
            edit_momentum_scale=_MOMENTUM,
            edit_mom_beta=_BETA,
            backend=backend,
        )
    )


def public_pipeline(step: Step) -> list[Tensor]:
    """(eps, momentum) by the operations of diffusers' SemanticStableDiffusionPipeline.

    Its copies of every estimate and of the guidance to the CPU, kept for the user, are left out:
    they would flatter us.
    """
    num_concepts, batch = step.eps_edits.shape[:2]
    trailing = [1] * (step.eps_uncond.dim() - 2)
    summed = tuple(range(1, step.eps_uncond.dim()))
    guidance = _GUIDANCE * (step.eps_text - step.eps_uncond)
    weights = torch.zeros(num_concepts, batch, device=step.eps_edits.device)
    kept = torch.zeros_like(step.eps_edits)
    warm = []
    for concept, edit in enumerate(step.eps_edits):
        warm.append(concept)
        difference = edit - step.eps_uncond
        weight = (guidance - edit).sum(dim=summed)  # the pipeline uses its shape alone
        weights[concept, :] = torch.full_like(weight, step.weights[concept])
        if step.reverse[concept]:
            difference = difference * -1
        difference = difference * step.scales[concept]
        magnitudes = torch.abs(difference).flatten(start_dim=2)
        threshold = torch.quantile(magnitudes, step.thresholds[concept], dim=2)
        large = torch.abs(difference) >= threshold.reshape(*threshold.shape, *trailing)
        kept[concept] = torch.where(large, difference, torch.zeros_like(difference))
    warm_indices = torch.tensor(warm).to(weights.device)
    if 0 < len(warm_indices) < num_concepts:
        some = torch.index_select(weights, 0, warm_indices).clamp(min=0)
        part = torch.index_select(kept, 0, warm_indices)
        guidance = guidance + torch.einsum("cb,cb...->b...", some / some.sum(dim=0), part)
    weights = torch.nan_to_num(torch.where(weights < 0, torch.zeros_like(weights), weights))
    steer = torch.einsum("cb,cb...->b...", weights, kept) + _MOMENTUM * step.momentum
    momentum = _BETA * step.momentum + (1 - _BETA) * steer
    if len(warm_indices) == num_concepts:
        guidance = guidance + steer
    return [step.eps_uncond + guidance, momentum]


CONTENDERS: dict[str, Callable[[Step], list[Tensor]]] = {OURS: ours, "diffusers": public_pipeline}
GPU_CONTENDERS = CONTENDERS | by_backend(ours)


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of all without names."""
    rows = (
        Entry(Setting(name, "fwd", "float32"), contender)
        for name in WORKLOADS
        for contender in of_here(CONTENDERS, GPU_CONTENDERS)
    )
    return wanted(rows, quick, names, lambda entry: entry.setting.workload == "sega-3-64")


@Latest
def _prepared(setting: Setting) -> tuple[Step, list[Tensor], list[Tensor], dict[str, Trial]]:
    name = setting.workload
    step = make_step(WORKLOADS[name], channels_last=name in CHANNELS_LAST)
    return step, *expected(step), {}


def expected(step: Step) -> tuple[list[Tensor], list[Tensor]]:
    """(eps, momentum) in float64 and float32, of the entries that float32's thresholds keep."""
    nothing = [0.0] * len(step.eps_edits)  # is added for concepts while others warm up
    steered = reference.sega_differences(step.eps_uncond, step.eps_edits, step.scales, step.reverse)
    rows = steered.abs().flatten(3)  # [E, B, C, values]
    levels = zip(rows, step.thresholds)
    thresholds = torch.stack([reference.quantile(x, level) for x, level in levels])
    dropped = (rows < thresholds.unsqueeze(-1)).reshape(steered.shape)

    def results(dtype: torch.dtype) -> list[Tensor]:
        tensors = (step.eps_uncond, step.eps_text, step.eps_edits, step.momentum)
        uncond, text, edits, momentum = (x.to(dtype) for x in tensors)
        kept = reference.sega_differences(uncond, edits, step.scales, step.reverse)
        kept = kept.masked_fill(dropped, 0)
        numbers = _GUIDANCE, step.weights, nothing, True, _MOMENTUM, _BETA
        return list(reference.sega_combine(uncond, text, kept, momentum, *numbers))

    return results(torch.float64), results(torch.float32)


def trial(entry: Entry) -> Trial:
    """Check a contender by the rule of accuracy, beyond which one wrongly kept entry is far."""
    step, exact, plain, trials = _prepared(entry.setting)
    if entry.contender not in trials:
        call = GPU_CONTENDERS[entry.contender]

        def check(got: list[Tensor]) -> tuple[float, float]:
            return worst(got, exact, plain, torch.float32)

        # The pipeline copies the places of the warm concepts from the host, which no graph holds.
        trials[entry.contender] = tried(lambda: call(step), check, in_graph=entry.ours)
    return trials[entry.contender]


def measure(entry: Entry, benchmark: Any) -> Row:
    """The row of an entry; the library's own has the public pipeline's step as its partner."""
    concepts, *shape = WORKLOADS[entry.setting.workload]
    row = entry.describe("sega", shape, "sega_guidance") | {"concepts": concepts}
    if "reason" in row:
        return row
    partner = Entry(entry.setting, "diffusers" if entry.contender == OURS else OURS)
    with torch.no_grad():
        return measure_row(row, lambda: trial(entry), lambda: trial(partner), benchmark)
