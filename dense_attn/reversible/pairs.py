"""The pair of latents that a chain moves, in floats or on the integer grid."""

from __future__ import annotations

import warnings

from torch import Tensor

from dense_attn import _checks
from dense_attn.reversible import grid
from dense_attn.reversible.grid import from_grid, to_grid
from dense_attn.reversible.links import Chain, End, Link
from dense_attn.reversible.plan import Plan

_DRIFT = 1e-2  # of the latents, by which a float chain may miss its start on the way back


class FloatPair:
    """The two latents of a chain in floating point."""

    def __init__(self, plan: Plan, chain: Chain, x: Tensor, y: Tensor) -> None:
        self.kernels, self.chain, self.dtype, self.at = plan.kernels, chain, plan.dtype, 0
        self.x, self.y = slots(chain.start, x, y)
        if chain.first:
            self._mix(chain.first, None, 1.0, 0.0, True)

    def _mix(
        self, direction: str, eps: Tensor | None, keep: float, step: float, update_x: bool
    ) -> None:
        mix = self.kernels.edict_mix if direction == "mix" else self.kernels.edict_unmix
        self.x, self.y = mix(self.x, self.y, eps, keep, step, self.chain.mix, update_x)

    @property
    def fed(self) -> Tensor:
        """The latent that the network is given, in its dtype."""
        return (self.y if self.chain.links[self.at].update_x else self.x).to(self.dtype)

    def update(self, eps: Tensor) -> None:
        """Take one link of the chain."""
        link = self.chain.links[self.at]
        if link.then:
            self._mix(link.then, eps, link.keep, link.eps, link.update_x)
        else:
            updated, fed = (self.x, self.y) if link.update_x else (self.y, self.x)
            if link.other:
                numbers = link.keep, link.other, link.eps
                updated = self.kernels.leapfrog_step(updated, fed, eps, *numbers)
            else:
                updated = self.kernels.ddim_step(updated, eps, None, link.keep, link.eps, 1.0)
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
                rule = "the way back must lead to the latents of the start"
                advice = "gradients are inexact, use exact=True or a wider dtype"
                warnings.warn(f"{rule}, got a drift of {drift:.1e}: {advice}", stacklevel=2)
                return


class ExactPair:
    """The two latents of a chain as integers, and what the network is fed next."""

    def __init__(self, plan: Plan, chain: Chain, x: Tensor, y: Tensor) -> None:
        self.kernels, self.chain, self.dtype, self.at = plan.kernels, chain, plan.dtype, 0
        x, y = to_grid(x, chain.start.scale, "x"), to_grid(y, chain.start.scale, "y")
        self.x, self.y = slots(chain.start, x, y)
        link = next(iter(chain.links), None)
        if chain.first:
            try:
                self._shear(chain.first, None, 0.0, link, True)
            except grid.OffGridError as error:
                grid.refuse_given("x and y", chain, error)
        elif link:
            self.fed = from_grid(self.y if link.update_x else self.x, link.scale).to(self.dtype)

    def _shear(
        self, direction: str, eps: Tensor | None, step: float, then: Link, update_x: bool
    ) -> None:
        op = "exact_mix" if direction == "mix" else "exact_unmix"
        numbers = step, self.chain.mix, update_x, then.scale, not then.update_x, self.dtype
        self.x, self.y, self.fed = grid.call(self.kernels, op, self.x, self.y, eps, *numbers)

    def update(self, eps: Tensor) -> None:
        """Take one link of the chain."""
        links, at = self.chain.links, self.at
        link, then = links[at], links[at + 1 if at + 1 < len(links) else at]
        if link.then:
            self._shear(link.then, eps, link.grid_eps, then, link.update_x)
        else:
            self._leap(link, eps, then.scale)
        self.at += 1

    def _leap(self, link: Link, eps: Tensor, scale: float) -> None:
        z, near = (self.x, self.y) if link.update_x else (self.y, self.x)
        if link.grid_other:
            numbers = link.grid_other, link.grid_eps, scale, self.dtype
            z, self.fed = grid.call(self.kernels, "exact_leapfrog", z, near, eps, *numbers)
        else:
            numbers = link.grid_eps, scale, self.dtype
            z, self.fed = grid.call(self.kernels, "exact_couple", z, eps, *numbers)
        self.x, self.y = (z, near) if link.update_x else (near, z)

    def latents(self) -> tuple[Tensor, Tensor]:
        """The pair as the caller has it, float64."""
        grid.require_on_grid(self.chain, self.x, self.y)
        end = self.chain.end
        return slots(end, from_grid(self.x, end.scale), from_grid(self.y, end.scale))

    def missed(self, x: Tensor, y: Tensor) -> None:
        """Refuse when the way back has not led to the very integers that the chain was given."""
        grid.require_on_grid(self.chain, self.x, self.y)
        scale = self.chain.end.scale
        for z, expected in zip(slots(self.chain.end, self.x, self.y), (x, y)):
            apart = (z - to_grid(expected, scale, "x")).abs().max().item() if z.numel() else 0
            if apart:
                got = f"a way back that ends {apart} grid steps from the start"
                _checks.refuse("eps_fn", "be deterministic for exact inversion", got)


def start(plan: Plan, chain: Chain, x: Tensor, y: Tensor) -> FloatPair | ExactPair:
    """The pair at the start of the plan's chain, or of its inverse."""
    with plan.memory:
        return (ExactPair if plan.exact else FloatPair)(plan, chain, x, y)


def slots(end: End, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The latents as the chain holds them from how its end gives them, and the other way round."""
    return (y, x) if end.swapped else (x, y)
