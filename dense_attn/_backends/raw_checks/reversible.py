"""The checks of raw calls of reversible steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends.raw_checks._refusals import of_a_raw_call, one_of
from dense_attn.reference import GRID_LIMIT


@of_a_raw_call
def ddim_step(
    x: Tensor, eps: Tensor, eps_uncond: Tensor | None, a: float, b: float, guidance_scale: float
) -> None:
    """Refuse what the kernel cannot run on."""
    _floats("x", x, eps=eps, eps_uncond=eps_uncond)
    if eps_uncond is not None and eps_uncond.dtype != eps.dtype:
        rule = f"have eps' dtype {_checks.name(eps.dtype)}"
        _checks.refuse("eps_uncond", rule, _checks.name(eps_uncond.dtype))


@of_a_raw_call
def leapfrog_step(
    far: Tensor, near: Tensor, eps: Tensor, c_far: float, c_near: float, c_eps: float
) -> None:
    """Refuse what the kernel cannot run on."""
    _floats("far", far, near=near, eps=eps)


@of_a_raw_call
def edict_mix(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, mix: float, couple_x: bool
) -> None:
    """Refuse what the kernel cannot run on."""
    _floats("x", x, y=y, eps=eps)


edict_unmix = edict_mix


@of_a_raw_call
def exact_couple(z: Tensor, eps: Tensor, step: float, to_latent: float, dtype: torch.dtype) -> None:
    """Refuse what the kernel cannot run on."""
    _grid("z", z, dtype, eps=eps)


@of_a_raw_call
def exact_leapfrog(
    far: Tensor,
    near: Tensor,
    eps: Tensor,
    c_near: float,
    c_eps: float,
    to_latent: float,
    dtype: torch.dtype,
) -> None:
    """Refuse what the kernel cannot run on."""
    _grid("far", far, dtype, near=near, eps=eps)


@of_a_raw_call
def exact_mix(
    x: Tensor,
    y: Tensor,
    eps: Tensor | None,
    step: float,
    mix: float,
    couple_x: bool,
    to_latent: float,
    latent_x: bool,
    dtype: torch.dtype,
) -> None:
    """Refuse what the kernel cannot run on."""
    _grid("x", x, dtype, y=y, eps=eps)
    if mix == 0:
        _checks.refuse("mix", "not be 0", mix)


exact_unmix = exact_mix


@of_a_raw_call
def on_the_grid(*grids: Tensor) -> None:
    """Refuse what left the grid at once on the CPU; a GPU's caller looks when the chain ends, and
    waits only then.
    """
    if grids[0].device.type != "cpu":
        return
    for z in grids:
        outside = z[z.abs() > int(GRID_LIMIT)]
        if outside.numel() > 0:
            rule = "be finite and keep the latents within the grid of 2^50 steps"
            _checks.refuse("eps", rule, f"{outside[0].item():g} steps")


def looked_at(launch: Callable) -> Callable:
    """The launcher of a step on the grid, whose results, but for the latent, must be there."""

    @wraps(launch)
    def looking(*arguments: object) -> tuple[Tensor, ...]:
        results = launch(*arguments)
        on_the_grid(*results[:-1])
        return results

    return looking


def _floats(name: str, x: Tensor, **others: Tensor | None) -> None:
    """Require dense floats of one dtype, but eps, which may have one of its own."""
    _flat(name, x, others)
    one_of(name, x.dtype, _checks.DTYPES)
    for other, value in others.items():
        if value is None:
            continue
        if not other.startswith("eps") and value.dtype != x.dtype:
            rule = f"have {name}'s dtype {_checks.name(x.dtype)}"
            _checks.refuse(other, rule, _checks.name(value.dtype))
        one_of(other, value.dtype, _checks.DTYPES)


def _grid(name: str, z: Tensor, dtype: torch.dtype, **others: Tensor | None) -> None:
    """Require dense int64 coordinates, floats in eps, and a dtype that a latent may have."""
    _flat(name, z, others)
    one_of("dtype", dtype, _checks.DTYPES)
    for other, value in ((name, z), *others.items()):
        if other == "eps":
            if value is not None:
                one_of(other, value.dtype, _checks.DTYPES)
        elif value.dtype != torch.int64:
            _checks.refuse(other, "be int64", _checks.name(value.dtype))


def _flat(name: str, x: Tensor, others: dict[str, Tensor | None]) -> None:
    """Require dense memory, each element of one tensor beside those of the others."""
    shape, strides = x.shape, x.stride()
    if not (x.is_contiguous() or _is_dense(x)):
        _checks.refuse(name, "be dense", f"strides {strides}")
    for other, value in others.items():
        if value is None or value is x:
            continue
        if value.shape != shape:
            _checks.refuse(other, f"have {name}'s shape {tuple(shape)}", tuple(value.shape))
        if value.stride() != strides and not _same_memory(shape, strides, value.stride()):
            rule = f"be dense and have {name}'s strides {strides}"
            _checks.refuse(other, rule, f"strides {value.stride()}")
        _checks.same_device(other, value, x, name)


def _same_memory(shape: tuple[int, ...], strides: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether elements lie alike: an axis of one has no stride, a tensor without elements none."""
    if 0 in shape:
        return True
    return all(size == 1 or a == b for size, a, b in zip(shape, strides, others))


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of the axes."""
    filled = 1
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride != filled:
            return x.numel() == 0
        filled *= size
    return True
