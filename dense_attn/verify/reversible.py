"""`verify` for reversible sampling: float steps by the rule, grids bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends import table
from dense_attn.reversible.sampler import ReversibleSampler

from .accuracy import DTYPES, Verdict, attempt, call, differing, randn, ratio, usable

SHAPE = (2, 4, 33, 31)
ROOTS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64, device="cpu")
ALPHAS_CUMPROD = (1 - ROOTS.square()).cumprod(0)  # Stable Diffusion's
STEPS = 50
CHAINS = {"edict": {"mix": 0.93}, "bdia": {}}


def verify(backends: Sequence[str]) -> Iterator[Verdict]:
    """One verdict for each of these backends that is available, dtype and kind of result."""
    for dtype in DTYPES:
        for backend in usable("ReversibleSampler", dtype, backends):
            yield attempt(_float_step, backend, dtype, "float steps")
            for method in CHAINS:
                yield attempt(_round_trip, backend, dtype, f"{method}, {STEPS} steps", method)


def _float_step(backend: str, dtype: torch.dtype, what: str) -> Verdict:
    """A DDIM step with guidance, a mix, and a leapfrog, by the rule."""
    generator, numbers, control = torch.Generator().manual_seed(2), {}, 0.0
    tensors = [randn(generator, *SHAPE).to(dtype) for _ in range(3)]
    for op, arguments in (
        ("ddim_step", (1.01, -0.13, 7.5)),
        ("edict_mix", (1.01, -0.13, 0.93, True)),
        ("edict_unmix", (0.99, 0.13, 0.93, False)),
        ("leapfrog_step", (0.97, 0.05, -0.2)),
    ):
        got, plain = (call(name, op, *tensors, *arguments) for name in (backend, "reference"))
        exact = call("reference", op, *(x.double() for x in tensors), *arguments)
        numbers[op] = max(ratio(*results, dtype) for results in zip(got, exact, plain))
        control = max(control, ratio(1.02 * got[0], exact[0], plain[0], dtype))
    return Verdict(backend, _checks.name(dtype), what, numbers, control)


def _round_trip(backend: str, dtype: torch.dtype, what: str, method: str) -> Verdict:
    """Exact steps there and back, from either end, and against the reference."""
    schedule = ALPHAS_CUMPROD, range(981, 0, -1000 // STEPS)
    make = partial(ReversibleSampler, *schedule, method=method, dtype=dtype, **CHAINS[method])
    sampler = make(backend=backend)
    noise = randn(torch.Generator().manual_seed(3), 1, 4, 9, 7).float()
    noise = noise.to(table.device_of(backend))
    image = sampler.sample(_network, noise)
    found = sampler.invert(_network, *image)
    again = sampler.sample(_network, *found)
    back = sampler.invert(_network, *again)
    expected = make(backend="reference").sample(_network, noise)
    nudged = image[0].clone()
    nudged[0, 0, 0, 0] *= 1 + 1e-6  # a grid step or a few
    wrong = sampler.sample(_network, *sampler.invert(_network, nudged, image[1]))
    numbers = {
        "round trip": sum(map(differing, again, image)) + sum(map(differing, back, found)),
        "reference": sum(map(differing, image, expected)),
    }
    control = sum(map(differing, wrong, image))
    return Verdict(backend, _checks.name(dtype), what, numbers, control, limit=0)


def _network(x: Tensor, t: int) -> Tensor:
    return torch.tanh(x + 0.3 * x.roll(1, -1)) * (0.9 - 0.0003 * t)
