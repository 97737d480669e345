"""`verify` for semantic guidance and reversible steps: thresholds and grids bit for bit, floats by
the one rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dense_attn import _checks, reference
from dense_attn._backends import table
from dense_attn.reversible.sampler import ReversibleSampler
from dense_attn.verify.attention import further, judge, ratio_of, usable

DTYPES = _checks.DTYPES
CONCEPTS = 3
_SHAPE = (2, 4, 33, 31)
_ROOTS = torch.linspace(
    0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu"
)  # of the betas
_ALPHAS_CUMPROD = (1 - _ROOTS.square()).cumprod(0)
_CHAINS = {"edict": {"mix": 0.93}, "bdia": {}}


@dataclass(frozen=True)
class Verdict:
    """One row: numbers that must not exceed their limits, and a control that must exceed its
    own.
    """

    backend: str
    dtype: str
    what: str
    numbers: dict[
        str, float
    ]  # bits that differ (right when 0) or error / allowed (right when at most 1)
    limit: float  # of the numbers
    control: float  # the same number of a result that is wrong on purpose

    @property
    def passed(self) -> bool:
        """Whether the backend is right, and its control wrong."""
        return max(self.numbers.values()) <= self.limit < self.control


def _call(backend: str, op: str, *arguments: object, **named: object) -> tuple[Tensor, ...]:
    """Results of a backend's kernel on tensors of its device, on the CPU."""
    device = table.device_of(backend)
    there = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    named = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}
    results = getattr(table.NAMESPACES[backend], op)(*there, **named)
    return tuple(x.cpu() for x in ((results,) if isinstance(results, Tensor) else results))


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _differing(a: Tensor, b: Tensor) -> int:
    """How many elements are not the same bits, NaN being NaN."""
    return int((~((a == b) | (a.isnan() & b.isnan()))).sum())


def exact_quantile(magnitudes: Tensor, level: float) -> Tensor:
    """The rule of thresholds in Python's own floats, which are float64, rounded once: of rows [...,
    N], as [...].
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


def verify() -> Iterator[Verdict]:
    """One verdict for each available backend, dtype and kind of result."""
    for dtype in DTYPES:
        for backend in usable("sega_guidance", dtype):
            yield _thresholds(backend, dtype)
            yield from _guidance(backend, dtype)
        for backend in usable("ReversibleSampler", dtype):
            yield _float_step(backend, dtype)
            yield from (_round_trip(backend, dtype, method) for method in _CHAINS)


def _thresholds(backend: str, dtype: torch.dtype) -> Verdict:
    """Rows of 1 to 40,000 values, ties and a NaN among them, against their definition."""
    generator, differing, control = torch.Generator().manual_seed(0), 0, 0
    for count in (1, 2, 100, 4096, 40_000):
        x = _randn(generator, 3, count).to(dtype)
        x[0, : count // 2] = x[0, 0]
        x[2, -1] = torch.nan
        magnitudes = x.to(reference.accumulation_dtype(dtype)).abs()
        for level in (0.0, 0.5, 0.7, 0.9, 0.999, 1.0):
            expected = exact_quantile(magnitudes, level)
            masked, threshold = _call(backend, "percentile_mask", x, level)
            kept = torch.where(magnitudes >= expected[:, None], x, 0)
            differing += _differing(threshold, expected) + _differing(masked, kept)
            control += _differing(
                threshold, magnitudes.nan_to_num(nan=torch.inf).sort(-1).values[:, count // 3]
            )
    return Verdict(
        backend, _checks.name(dtype), "thresholds, masks", {"bits": differing}, 0, control
    )


def _guidance(backend: str, dtype: torch.dtype) -> Iterator[Verdict]:
    """A step with all concepts warm, and one with a mask, summed channels, a cooled and a reversed
    concept.
    """
    generator = torch.Generator().manual_seed(1)
    uncond, text, momentum = (_randn(generator, *_SHAPE) for _ in range(3))
    tensors = [uncond, text, _randn(generator, CONCEPTS, *_SHAPE), momentum]
    mask = _randn(generator, CONCEPTS, *_SHAPE).sigmoid()
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.1, "edit_mom_beta": 0.4}
    lists = {"edit_guidance_scale": [5.0, 3.0, 4.0], "edit_threshold": [0.9, 0.0, 0.95]}
    plain = {
        "weights": [1.0] * 3,
        "partials": [0.0] * 3,
        "all_warm": True,
        "reverse": [False] * 3,
    }
    mixed = {  # concept 1 warms up, concept 2 is over
        "weights": [1.0, 0.5, 0.0],
        "partials": [1.0, 0.0, 0.0],
        "all_warm": False,
    }
    for what, options in (
        ("guidance", {**plain, "user_mask": None, "sum_channels": False}),
        (
            "guidance, mixed",
            {**mixed, "reverse": [False, True, False], "user_mask": mask, "sum_channels": True},
        ),
    ):
        yield _guidance_verdict(backend, dtype, what, tensors, {**numbers, **lists, **options})


def _guidance_verdict(
    backend: str, dtype: torch.dtype, what: str, tensors: list[Tensor], options: dict[str, object]
) -> Verdict:
    wide = reference.accumulation_dtype(dtype)
    narrow = [*(x.to(dtype) for x in tensors[:3]), tensors[3].to(wide)]
    if options["user_mask"] is not None:
        options = {**options, "user_mask": options["user_mask"].to(wide)}
    step = partial(_call, backend, "sega_guidance", *narrow)
    eps, momentum, _ = step(**options)
    exact, plain = exact_and_plain(narrow, options)
    results = zip(("eps", "momentum"), (eps, momentum), exact, plain)
    numbers = {
        name: ratio_of(*judge(got, right, rough, got.dtype)) for name, got, right, rough in results
    }
    wrong, _, _ = step(**{**options, "edit_threshold": [0.8, 0.0, 0.95]})
    return Verdict(
        backend,
        _checks.name(dtype),
        what,
        numbers,
        1,
        ratio_of(*judge(wrong, exact[0], plain[0], dtype)),
    )


def exact_and_plain(
    tensors: list[Tensor], options: dict[str, object]
) -> tuple[list[Tensor], list[Tensor]]:
    """(eps, momentum) in float64 and in the dtype of the inputs, both with the entries that the
    latter keeps.

    A threshold is a discontinuity: float64 may keep an entry that float32 drops.
    """
    kept = _kept(tensors, options)
    exact = _combined([x.double() for x in tensors], options, kept)
    plain = list(reference.sega_guidance(*tensors, **options)[:2])
    if (
        tensors[0].dtype == torch.float64
    ):  # no wider number: what the other order of the concepts makes of it
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
    steered = (
        reference.sega_differences(
            uncond, edits, options["edit_guidance_scale"], options["reverse"]
        )
        * kept
    )
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
    return list(
        reference.sega_combine(uncond, text, steered, momentum, *(options[name] for name in names))
    )


def _float_step(backend: str, dtype: torch.dtype) -> Verdict:
    """A DDIM step with guidance, a mix, and a leapfrog, by the rule."""
    generator, numbers, control = torch.Generator().manual_seed(2), {}, 0.0
    tensors = [_randn(generator, *_SHAPE).to(dtype) for _ in range(3)]
    for op, arguments in (
        ("ddim_step", (1.01, -0.13, 7.5)),
        ("edict_mix", (1.01, -0.13, 0.93, True)),
        ("edict_unmix", (0.99, 0.13, 0.93, False)),
        ("leapfrog_step", (0.97, 0.05, -0.2)),
    ):
        got, plain = (_call(name, op, *tensors, *arguments) for name in (backend, "reference"))
        exact = _call("reference", op, *(x.double() for x in tensors), *arguments)
        numbers[op] = max(ratio_of(*judge(*results, dtype)) for results in zip(got, exact, plain))
        control = max(control, ratio_of(*judge(1.02 * got[0], exact[0], plain[0], dtype)))
    return Verdict(backend, _checks.name(dtype), "float steps", numbers, 1, control)


def _round_trip(backend: str, dtype: torch.dtype, method: str) -> Verdict:
    """50 exact steps there and back from either end with a network in the dtype, and against the
    reference.
    """
    timesteps = range(981, 0, -20)
    make = partial(
        ReversibleSampler, _ALPHAS_CUMPROD, timesteps, method=method, dtype=dtype, **_CHAINS[method]
    )
    sampler = make(backend=backend)
    noise = (
        _randn(torch.Generator().manual_seed(3), 1, 4, 9, 7).float().to(table.device_of(backend))
    )
    image = sampler.sample(_network, noise)
    found = sampler.invert(_network, *image)
    back = sampler.invert(_network, *sampler.sample(_network, *found))
    expected = make(backend="reference").sample(_network, noise)
    nudged = image[0].clone()
    nudged[0, 0, 0, 0] *= 1 + 1e-6  # a grid step or a few
    wrong = sampler.sample(_network, *sampler.invert(_network, nudged, image[1]))
    numbers = {
        "round trip": sum(map(_differing, sampler.sample(_network, *found), image))
        + sum(map(_differing, back, found)),
        "reference": sum(map(_differing, image, expected)),
    }
    control = sum(map(_differing, wrong, image))
    return Verdict(backend, _checks.name(dtype), f"{method}, 50 steps", numbers, 0, control)


def _network(x: Tensor, t: int) -> Tensor:
    return torch.tanh(x + 0.3 * x.roll(1, -1)) * (0.9 - 0.0003 * t)


def main() -> int:
    """Print the table; the number of rows that failed."""
    print(
        "\nbits: how many elements differ, right when 0; the rest: error / allowed, right when <= 1"
    )
    print(
        "control: the same for a result that is wrong on purpose; the check works when it fails\n"
    )
    failed = 0
    for verdict in verify():
        numbers = ", ".join(f"{name} {number:.2g}" for name, number in verdict.numbers.items())
        line = f"{verdict.backend:<10} {verdict.dtype:<9} {verdict.what:<18} {numbers}; control {verdict.control:.2g}"
        print(line + ("" if verdict.passed else "  FAILED"), flush=True)
        failed += not verdict.passed
    return failed
