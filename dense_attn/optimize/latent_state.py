"""The state of an optimisation of latents: its start, its next step, and what one must be."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.reversible.sampler import ReversibleSampler

KINDS = {
    "step": int,
    "latents": (list, tuple),
    "momentum": (list, tuple),
    "norms": Tensor,
    "losses": (list, tuple),
    "generator": Tensor,
    "generator_device": str,
    "sampler": dict,
}
READ = {"edict": ("mix", "alternate"), "bdia": ("gamma",)}  # what these methods alone depend on
KEYS = {*KINDS, "previous"}
RULE = "be the state of an OptimizeResult"

State = dict[str, object]


def identity(sampler: ReversibleSampler) -> dict[str, object]:
    """The numbers that make a sampler's chain: not its backend, nor the dtype of the network."""
    names = ("method", "exact", *READ.get(sampler.method, ()))
    return {name: getattr(sampler, name) for name in names} | sampler.schedule.numbers()


def first(
    x: Tensor, sampler: ReversibleSampler, count: int, generator: torch.Generator | None
) -> tuple[State, torch.Generator]:
    """The state before the first step on latents that start as x, and the noise's generator."""
    if generator is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
        generator = torch.Generator(x.device).manual_seed(seed)
    latent = x.detach().to(_working(x.dtype)).clone()
    return {
        "step": 0,
        "latents": [latent] * count,
        "momentum": [],
        "norms": norms(latent),
        "losses": [],
        "generator": generator.get_state(),
        "generator_device": str(generator.device),
        "sampler": identity(sampler),
        "previous": None,
    }, generator


def resumed(
    state: State,
    x: Tensor,
    sampler: ReversibleSampler,
    count: int,
    generator: torch.Generator | None,
) -> tuple[State, torch.Generator]:
    """A state that was given, on x's device, and the generator set to where it stopped."""
    _check_kinds(state)
    _check_sampler(state["sampler"], identity(sampler))
    _check(state, x, count)
    return _moved(state, x.device), _generator_of(state, generator)


def norms(x: Tensor) -> Tensor:
    """The norm of each sample, [B]."""
    unit, scale = _scaled(x)
    return _lengths(unit) * scale


def normalized(x: Tensor, norms: Tensor) -> Tensor:
    """Each sample scaled to its norm; one of zeros stays."""
    unit, _ = _scaled(x)
    lengths = _lengths(unit)
    factor = torch.where(lengths > 0, norms / lengths, 1.0)
    return unit * factor.view(-1, *(1,) * (x.dim() - 1))


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Samples by powers of two, where no square overflows and no digit is lost; the powers, [B]."""
    largest = x.flatten(1).abs().amax(1)
    scale = torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1.0)
    return x / scale.view(-1, *(1,) * (x.dim() - 1)), scale


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _working(dtype: torch.dtype) -> torch.dtype:
    """The dtype latents are optimised in."""
    return torch.promote_types(dtype, torch.float32)


def _moved(state: State, device: torch.device) -> State:
    """The state with its latents, momentum and norms on a device."""
    moved = {**state, "norms": state["norms"].to(device)}
    for key in ("latents", "momentum"):
        moved[key] = [x.to(device) for x in state[key]]
    if state["previous"] is not None:
        moved["previous"] = _moved(state["previous"], device)
    return moved


def _generator_of(state: State, generator: torch.Generator | None) -> torch.Generator:
    """The generator given, or a new one, set to where the state's stopped."""
    named = state["generator_device"]
    try:
        device = torch.device(named)
        own = torch.Generator(device) if generator is None else generator
    except RuntimeError:  # no device, or none of this machine
        _refuse(repr(named), "generator_device")
    if own.device.type != device.type:
        _checks.refuse("generator", f"be on {device.type} like that of state", own.device)
    try:
        return own.set_state(state["generator"].cpu())
    except RuntimeError:
        _refuse(f"{state['generator'].numel()} bytes that no generator of {named} has", "generator")


def _check_kinds(state: State, of: str = "") -> None:
    """Require a dict with the keys of a state; `of` is the key that it stands under."""
    if not isinstance(state, dict):
        _refuse(type(state).__name__, of, kind=TypeError)
    if set(state) != KEYS:
        _refuse(f"a dict with the keys {sorted(map(str, state))}", of)
    for key, kinds in KINDS.items():
        if not isinstance(state[key], kinds) or isinstance(state[key], bool):
            _refuse(type(state[key]).__name__, of, key, kind=TypeError)


def _check_sampler(was: dict[str, object], now: dict[str, object]) -> None:
    """Require the chain that the state was reached with; a schedule may be rounded to float32."""
    rule = "be that of state, with {} {}"
    for key, value in now.items():
        before = was.get(key)
        if not isinstance(value, list) or not isinstance(before, list):
            if not _alike(before, value):
                _checks.refuse("sampler", rule.format(key, before), value)
            continue
        if len(before) != len(value):
            _checks.refuse("sampler", rule.format(len(before), key), len(value))
        for i, pair in enumerate(zip(before, value)):
            if not _alike(*pair):
                _checks.refuse("sampler", rule.format(f"{key}[{i}]", pair[0]), pair[1])


def _alike(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6)
    return isinstance(a, type(b)) and a == b


def _check(state: State, x: Tensor, count: int, of: str = "") -> None:
    """Require numbers that fit x and the number of free latents; `of` is the state's own key."""
    step, losses, previous = state["step"], state["losses"], state["previous"]
    if step < 0:
        _refuse(step, of, "step")
    if len(losses) != step or not all(isinstance(loss, (int, float)) for loss in losses):
        _refuse(f"what is not {step} numbers", of, "losses")
    if len(state["latents"]) != count:
        rule = f"hold {count} latents for this sampler and tie"
        _checks.refuse("state", rule, len(state["latents"]))
    if len(state["momentum"]) != (count if step else 0):
        _refuse(f"{len(state['momentum'])} tensors after {step} steps", of, "momentum")
    _check_tensors(state, x, of)
    if previous is not None:
        if of:
            _refuse("a state", of, "previous")
        _check_kinds(previous, "previous")
        _check(previous, x, count, "previous")
        if previous["step"] != step - 1:
            _refuse(previous["step"], "previous", "step")


def _check_tensors(state: State, x: Tensor, of: str) -> None:
    """Require latents and momentum of x's shape, a norm a sample, and bytes of a generator."""
    working = _working(x.dtype)
    for key in ("latents", "momentum"):
        for value in state[key]:
            if not isinstance(value, Tensor):
                _refuse(f"a list of {type(value).__name__}", of, key, kind=TypeError)
            if (value.shape, value.dtype) != (x.shape, working):
                rule = f"hold {_checks.name(working)} latents of shape {tuple(x.shape)}"
                _checks.refuse("state", rule, f"{_checks.name(value.dtype)} {tuple(value.shape)}")
            if not _holds_numbers(value) or not value.isfinite().all():
                _refuse("what is not finite", of, key)
    others = {"norms": (working, x.shape[:1]), "generator": (torch.uint8, state["generator"].shape)}
    for key, (dtype, shape) in others.items():
        value = state[key]
        if (value.shape, value.dtype) != (shape, dtype) or not _holds_numbers(value):
            _refuse(f"a {_checks.name(value.dtype)} tensor of shape {tuple(value.shape)}", of, key)
    if not (state["norms"] >= 0).all():
        _refuse("what is not at least 0", of, "norms")


def _holds_numbers(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_meta


def _refuse(got: object, *where: str, kind: type[Exception] = ValueError) -> NoReturn:
    """Refuse what a state is, or what it holds under a key."""
    key = " ".join(filter(None, where))
    _checks.refuse("state", RULE, f"one with {got} for {key}" if key else got, kind)
