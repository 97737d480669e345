"""`verify` for semantic guidance: thresholds and masks bit for bit, estimates by the rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dense_attn import _checks, reference
from dense_attn._backends import table

from .accuracy import DTYPES, Verdict, attempt, call, differing, further, randn, ratio, usable

CONCEPTS = 3
# Channels of one launch, those that Triton's registers do not hold, those that take several.
SHAPES = ((2, 4, 33, 31), (1, 2, 150, 150), (1, 2, 190, 190))


PLAIN = {  # all concepts warm
    "guidance_scale": 7.5,
    "edit_momentum_scale": 0.1,
    "edit_mom_beta": 0.4,
    "edit_guidance_scale": [5.0, 3.0, 4.0],
    "edit_threshold": [0.9, 0.0, 0.95],
    "weights": [1.0] * CONCEPTS,
    "partials": [0.0] * CONCEPTS,
    "all_warm": True,
    "reverse": [False] * CONCEPTS,
    "user_mask": False,
    "sum_channels": False,
}
MIXED = PLAIN | {  # every option
    "weights": [1.0, 0.5, 0.0],  # the last concept is over
    "partials": [1.0, 0.0, 0.0],  # the one between warms up
    "all_warm": False,
    "reverse": [False, True, False],
    "user_mask": True,
    "sum_channels": True,
}


def exact_quantile(magnitudes: Tensor, level: float) -> Tensor:
    """The thresholds [...] of rows [..., N], in Python's own floats, which are float64.

    They are rounded once, at the end.
    """
    ordered, rank = magnitudes.sort(-1).values, level * (magnitudes.shape[-1] - 1)
    below = math.floor(rank)
    pairs = zip(*(ordered[..., index].flatten().tolist() for index in (below, math.ceil(rank))))
    found = [
        lower if lower == upper else lower + (upper - lower) * (rank - below)
        for lower, upper in pairs
    ]
    wide = torch.tensor(found, dtype=torch.float64, device=magnitudes.device)
    rounded = wide.to(magnitudes.dtype).reshape(magnitudes.shape[:-1])
    return rounded.masked_fill(magnitudes.isnan().any(-1), torch.nan)


def verify(backends: Sequence[str]) -> Iterator[Verdict]:
    """One verdict for each of these backends that is available, dtype and kind of result."""
    for dtype in DTYPES:
        for backend in usable("sega_guidance", dtype, backends):
            yield attempt(_thresholds, backend, dtype, "thresholds, masks")
            for what, options in (("guidance", PLAIN), ("guidance, mixed", MIXED)):
                yield attempt(_guidance, backend, dtype, what, options)


def _thresholds(backend: str, dtype: torch.dtype, what: str) -> Verdict:
    """Rows of 1 to 40,000 values, ties and a NaN among them, against their definition."""
    generator, wrong, control = torch.Generator().manual_seed(0), 0, 0
    for count in (1, 2, 100, 4096, 40_000):
        x = randn(generator, 3, count).to(dtype)
        x[0, : count // 2] = x[0, 0]
        x[2, -1] = torch.nan
        magnitudes = x.to(reference.accumulation_dtype(dtype)).abs()
        for level in (0.0, 0.5, 0.7, 0.9, 0.999, 1.0):
            expected = exact_quantile(magnitudes, level)
            masked, threshold = call(backend, "percentile_mask", x, level)
            kept = torch.where(magnitudes >= expected[:, None], x, 0)
            wrong += differing(threshold, expected) + differing(masked, kept)
            ordered = magnitudes.nan_to_num(nan=torch.inf).sort(-1).values
            control += differing(threshold, ordered[:, count // 3])
    numbers = {"bits": wrong}
    return Verdict(backend, _checks.name(dtype), what, numbers, control, limit=0)


def _guidance(backend: str, dtype: torch.dtype, what: str, options: dict[str, object]) -> Verdict:
    """The worst of all shapes, and the control that is least wrong."""
    numbers, control = {"eps": 0.0, "momentum": 0.0}, math.inf
    for shape in SHAPES if table.device_of(backend) == "cuda" else SHAPES[:1]:
        tensors, given = _inputs(shape, dtype, options)
        step = partial(call, backend, "sega_guidance", *tensors)
        results, (exact, plain) = step(**given)[:2], exact_and_plain(tensors, given)
        for name, got, right, rough in zip(numbers, results, exact, plain):
            numbers[name] = max(numbers[name], ratio(got, right, rough, got.dtype))
        wrong = step(**given | {"edit_threshold": [0.8, 0.0, 0.95]})[0]
        control = min(control, ratio(wrong, exact[0], plain[0], dtype))
    return Verdict(backend, _checks.name(dtype), what, numbers, control)


def _inputs(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, object]
) -> tuple[list[Tensor], dict[str, object]]:
    """(eps_uncond, eps_text, eps_edits, momentum) and the options, with a mask if they ask for
    one.
    """
    generator, wide = torch.Generator().manual_seed(1), reference.accumulation_dtype(dtype)
    uncond, text, momentum = (randn(generator, *shape) for _ in range(3))
    edits, mask = (randn(generator, CONCEPTS, *shape) for _ in range(2))
    given = [*(x.to(dtype) for x in (uncond, text, edits)), momentum.to(wide)]
    masked = options["user_mask"]
    return given, options | {"user_mask": mask.sigmoid().to(wide) if masked else None}


def exact_and_plain(
    tensors: list[Tensor], options: dict[str, object]
) -> tuple[list[Tensor], list[Tensor]]:
    """(eps, momentum) in float64 and in the inputs' dtype, with the entries that the latter keeps.

    A threshold is a discontinuity: float64 may keep an entry that float32 drops.
    """
    kept = _kept(tensors, options)
    exact = _combined([x.double() for x in tensors], options, kept)
    plain = list(reference.sega_guidance(*tensors, **options)[:2])
    if tensors[0].dtype == torch.float64:
        # no wider number: what the other order of the concepts makes of it
        backwards = {
            name: value[::-1] if isinstance(value, list) else value
            for name, value in options.items()
        }
        if options["user_mask"] is not None:
            backwards["user_mask"] = options["user_mask"].flip(0)
        edits = tensors[2].flip(0)
        other = _combined([*tensors[:2], edits, tensors[3]], backwards, kept.flip(0))
        plain = [further(*results) for results in zip(plain, other, exact)]
    return exact, plain


def _kept(tensors: list[Tensor], options: dict[str, object]) -> Tensor:
    uncond, _, edits, _ = (x.to(reference.accumulation_dtype(tensors[0].dtype)) for x in tensors)
    steered = reference.sega_differences(
        uncond, edits, options["edit_guidance_scale"], options["reverse"]
    )
    magnitudes = reference.sega_magnitudes(steered, options["sum_channels"])
    levels = options["edit_threshold"]
    rows = [exact_quantile(x.flatten(2), level) for x, level in zip(magnitudes, levels)]
    return magnitudes >= torch.stack(rows)[..., None, None]


def _combined(tensors: list[Tensor], options: dict[str, object], kept: Tensor) -> list[Tensor]:
    uncond, text, edits, momentum = tensors
    scales, reverse = options["edit_guidance_scale"], options["reverse"]
    steered = reference.sega_differences(uncond, edits, scales, reverse) * kept
    if options["user_mask"] is not None:
        steered = steered * options["user_mask"].to(steered.dtype)
    names = (
        "guidance_scale",
        "weights",
        "partials",
        "all_warm",
        "edit_momentum_scale",
        "edit_mom_beta",
    )
    numbers = (options[name] for name in names)
    return list(reference.sega_combine(uncond, text, steered, momentum, *numbers))
