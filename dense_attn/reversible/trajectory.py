"""Running a chain: the pair of latents in floats or on the integer grid, and the network between
its links.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dense_attn import _checks, _memory, _progress, reference
from dense_attn.reversible.links import Chain, End, Link

EpsFn = Callable[[Tensor, object], Tensor]
_OFF_GRID = re.compile(r"within the grid of 2\^50 steps, got (\S+) steps")
_ON_GRID = "be finite and keep the latents within the grid of 2^50 steps"
_PARTED = (
    "; EDICT parts a pair by mix^(-2*steps) on the way to the noise: "
    "a pair that was sampled, fewer steps or a mix nearer 1 may help"
)
_DRIFT = 1e-2  # of the latents, by which a float chain may miss its start on the way back


def laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor in memory of these strides: itself, or a copy."""
    if value.stride() == strides:
        return value
    return value.new_empty_strided(value.shape, strides).copy_(value)


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """x's own strides where it fills one block of memory, those of its copy otherwise."""
    return torch.empty_like(x, device="meta").stride()


def contiguous_strides(x: Tensor) -> tuple[int, ...]:
    """Those of a contiguous tensor of x's shape, axes of one included."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta").stride()


def refuse_transforms(**tensors: Tensor | None) -> None:
    """Refuse the derivatives that a chain would lose without a word."""
    if torch._C._are_functorch_transforms_active():  # what autograd.Function itself asks
        rule = "be called outside of torch.func's transforms"
        _checks.refuse("ReversibleSampler", rule, "a call inside one", NotImplementedError)
    for argument, tensor in tensors.items():
        _no_tangent(argument, tensor)


def _no_tangent(argument: str, value: Tensor | None) -> None:
    if value is None or forward_ad._current_level < 0:
        return
    with forward_ad._set_fwd_grad_enabled(True):
        if forward_ad.unpack_dual(value).tangent is None:
            return
    rule = "have no tangent, a chain is differentiated backwards alone"
    _checks.refuse(argument, rule, "a dual tensor", NotImplementedError)


def to_grid(x: Tensor, scale: float, argument: str) -> Tensor:
    """The integers of latents: round(x / scale), int64."""
    z = (x.double() / scale).round()
    largest = z.abs().max().item() if z.numel() else 0.0
    if not largest <= reference.GRID_LIMIT:
        rule = f"be finite and at most {reference.GRID_LIMIT * scale:.3g} in size for exact=True"
        _checks.refuse(argument, rule, f"{largest * scale:.3g}")
    return z.long()


def from_grid(z: Tensor, scale: float) -> Tensor:
    """The latents of integers, float64: `to_grid` gives the same integers back."""
    return z.double() * scale


@dataclass
class Plan:
    """All that a run needs beside the latents."""

    kernels: ModuleType
    chain: Chain
    eps_fn: EpsFn
    timesteps: Sequence[object]
    dtype: torch.dtype  # of what the network is fed
    exact: bool
    memory: _memory.Explained  # around all but eps_fn, whose own errors are the caller's
    progress: str = ""  # what the bar says


class FloatPair:
    """The two latents of a chain in floating point."""

    def __init__(self, plan: Plan, chain: Chain, x: Tensor, y: Tensor) -> None:
        self.kernels, self.chain, self.dtype, self.at = plan.kernels, chain, plan.dtype, 0
        self.x, self.y = slots(chain.start, x, y)
        if chain.first:
            self.x, self.y = self._op(f"edict_{chain.first}")(
                self.x, self.y, None, 1.0, 0.0, chain.mix, True
            )

    def _op(self, name: str) -> Callable:
        return getattr(self.kernels, name)

    @property
    def fed(self) -> Tensor:
        """The latent that the network is given, in its dtype."""
        return (self.y if self.chain.links[self.at].update_x else self.x).to(self.dtype)

    def update(self, eps: Tensor) -> None:
        """Take one link of the chain."""
        link = self.chain.links[self.at]
        if link.then:
            arguments = (eps, link.keep, link.eps, self.chain.mix, link.update_x)
            self.x, self.y = self._op(f"edict_{link.then}")(self.x, self.y, *arguments)
        else:
            updated, fed = (self.x, self.y) if link.update_x else (self.y, self.x)
            if link.other:
                updated = self._op("leapfrog_step")(
                    updated, fed, eps, link.keep, link.other, link.eps
                )
            else:
                updated = self._op("ddim_step")(updated, eps, None, link.keep, link.eps, 1.0)
            self.x, self.y = (updated, fed) if link.update_x else (fed, updated)
        self.at += 1

    def latents(self) -> tuple[Tensor, Tensor]:
        """The pair as the caller has it."""
        return slots(self.chain.end, self.x, self.y)

    def missed(self, x: Tensor, y: Tensor) -> None:
        """Warn when the way back has not led to the latents that the chain was given."""
        for got, expected in zip(self.latents(), (x, y)):
            if not got.numel():
                continue
            drift = (got - expected).abs().max().item()
            if not drift <= _DRIFT * expected.abs().max().item():
                text = f"the way back must lead to the latents of the start, got a drift of {drift:.1e}"
                warnings.warn(
                    f"{text}: gradients are inexact, use exact=True or a wider dtype", stacklevel=2
                )
                return


class ExactPair:
    """The two latents of a chain as integers, and what the network is fed next."""

    def __init__(self, plan: Plan, chain: Chain, x: Tensor, y: Tensor) -> None:
        self.kernels, self.chain, self.dtype, self.at = plan.kernels, chain, plan.dtype, 0
        x, y = to_grid(x, chain.start.scale, "x"), to_grid(y, chain.start.scale, "y")
        self.x, self.y = slots(chain.start, x, y)
        link = next(iter(chain.links), None)
        if chain.first:
            with off_grid_of("x and y", chain, "", ValueError):
                self._shear(chain.first, None, 0.0, link)
        elif link:
            self.fed = from_grid(self.y if link.update_x else self.x, link.scale).to(self.dtype)

    def _shear(
        self, direction: str, eps: Tensor | None, step: float, then: Link, update_x: bool = True
    ) -> None:
        arguments = (eps, step, self.chain.mix, update_x, then.scale, not then.update_x, self.dtype)
        self.x, self.y, self.fed = getattr(self.kernels, f"exact_{direction}")(
            self.x, self.y, *arguments
        )

    def update(self, eps: Tensor) -> None:
        """Take one link of the chain."""
        links = self.chain.links
        link, then = links[self.at], links[min(self.at + 1, len(links) - 1)]
        if link.then:
            self._shear(link.then, eps, link.grid_eps, then, link.update_x)
        else:
            updated, fed = (self.x, self.y) if link.update_x else (self.y, self.x)
            if link.grid_other:
                numbers = (link.grid_other, link.grid_eps, then.scale, self.dtype)
                updated, self.fed = self.kernels.exact_leapfrog(updated, fed, eps, *numbers)
            else:
                updated, self.fed = self.kernels.exact_couple(
                    updated, eps, link.grid_eps, then.scale, self.dtype
                )
            self.x, self.y = (updated, fed) if link.update_x else (fed, updated)
        self.at += 1

    def latents(self) -> tuple[Tensor, Tensor]:
        """The pair as the caller has it, float64."""
        self._refuse_off_grid()
        end = self.chain.end
        return slots(end, from_grid(self.x, end.scale), from_grid(self.y, end.scale))

    def missed(self, x: Tensor, y: Tensor) -> None:
        """Refuse when the way back has not led to the very integers that the chain was given."""
        self._refuse_off_grid()
        scale = self.chain.end.scale
        for z, expected in zip(slots(self.chain.end, self.x, self.y), (x, y)):
            apart = (z - to_grid(expected, scale, "x")).abs().max().item() if z.numel() else 0
            if apart:
                rule = "be deterministic for exact inversion"
                _checks.refuse(
                    "eps_fn", rule, f"a way back that ends {apart} grid steps from the start"
                )

    def _refuse_off_grid(self) -> None:
        """For kernels that mark what left the grid, where raising at the step would wait for a GPU
        at every step.
        """
        if any(z.numel() and z.abs().max().item() > reference.GRID_LIMIT for z in (self.x, self.y)):
            got = f"latents that left it on the way{_advice(self.chain)}"
            _checks.refuse("eps_fn's result", _ON_GRID, got, RuntimeError)


def _advice(chain: Chain) -> str:
    """What may keep a chain on the grid."""
    return _PARTED if chain.first == "unmix" and chain.mix < 1 else ""


@contextmanager
def off_grid_of(argument: str, chain: Chain, where: str, kind: type[Exception]) -> Iterator[None]:
    """What a kernel says of a number beyond the grid, in the words of the chain."""
    try:
        yield
    except RuntimeError as error:
        found = _OFF_GRID.search(str(error))
        if found is None:
            raise
        advice = _advice(chain) if math.isfinite(float(found[1])) else ""
        _checks.refuse(argument, _ON_GRID, f"{found[1]} grid steps{where}{advice}", kind)


def start(plan: Plan, chain: Chain, x: Tensor, y: Tensor) -> FloatPair | ExactPair:
    """The pair at the start of the plan's chain, or of its inverse."""
    with plan.memory:
        return (ExactPair if plan.exact else FloatPair)(plan, chain, x, y)


def slots(end: End, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The latents as the chain holds them from how its end gives them, and the other way round."""
    return (y, x) if end.swapped else (x, y)


def _autocast(kind: str) -> tuple[torch.dtype, bool, bool]:
    """The state of autocast on a kind of device, as torch.autocast takes it."""
    return (
        torch.get_autocast_dtype(kind),
        torch.is_autocast_enabled(kind),
        torch.is_autocast_cache_enabled(),
    )


class Network:
    """eps_fn with its results checked, called under the autocast of the place where this was
    made.
    """

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.plan, self.shape, self.device, self.strides = (
            plan,
            like.shape,
            like.device,
            dense_strides(like),
        )
        kinds = [
            kind for kind in {like.device.type, "cpu"} if torch.amp.is_autocast_available(kind)
        ]
        self.autocast = [(kind, _autocast(kind)) for kind in kinds]

    def __call__(self, fed: Tensor, step: int) -> Tensor:
        """The network's estimate at a step of the chain."""
        with ExitStack() as stack:
            for kind, state in self.autocast:
                if state != _autocast(kind):
                    stack.enter_context(torch.autocast(kind, *state))
            if (
                forward_ad._current_level >= 0
            ):  # an autograd.Function hides tangents from what it calls
                stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
            with self.plan.memory:
                own = fed.clone()  # which it may write to
            eps = self.plan.eps_fn(own, self.plan.timesteps[step])
        _checks.floats("eps_fn's result", eps)
        if eps.shape != self.shape:
            _checks.refuse(
                "eps_fn's result", f"have x's shape {tuple(self.shape)}", tuple(eps.shape)
            )
        if eps.device != self.device:
            _checks.refuse("eps_fn's result", f"be on x's device {self.device}", eps.device)
        with self.plan.memory:
            return laid_out(eps, self.strides)

    def repeated(self, fed: Tensor, step: int) -> Tensor:
        """The result of two calls, refused where they differ."""
        first, again = self(fed, step).clone(), self(fed, step)
        if not torch.equal(first, again) and first.isfinite().all() and again.isfinite().all():
            apart = (first.double() - again.double()).abs().max().item()
            _checks.refuse(
                "eps_fn",
                "be deterministic for exact inversion",
                f"two results that differ by {apart:.3g}",
            )
        return first

    def update(self, pair: FloatPair | ExactPair, eps: Tensor, step: int) -> None:
        """pair.update(eps), an overflow of the grid named by its step."""
        _no_tangent("eps_fn's result", eps)
        where = f" at step {step} (timestep {self.plan.timesteps[step]})"
        with self.plan.memory, off_grid_of("eps_fn's result", pair.chain, where, RuntimeError):
            pair.update(eps)


def run(plan: Plan, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The latents at the other end of the chain, without gradients."""
    network = Network(plan, x)
    pair = start(plan, plan.chain, x, y)
    per_step = plan.chain.links_per_step
    steps = len(plan.chain.links) // per_step
    with _progress.bar(steps, plan.progress, shown=bool(plan.progress)) as advance:
        for at, link in enumerate(plan.chain.links):
            call = network.repeated if plan.exact and at == 0 else network
            with plan.memory:
                fed = pair.fed
            network.update(pair, call(fed, link.step), link.step)
            if at % per_step == per_step - 1:
                advance()
    with plan.memory:
        return pair.latents()
