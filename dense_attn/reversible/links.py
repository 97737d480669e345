"""Reversible samplers as chains of links, one call of the network each: their coefficients."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, repeat

from dense_attn import _checks
from dense_attn.reversible.moments import Moment, move
from dense_attn.reversible.schedule import Schedule

MOST_BITS, FEWEST_BITS = 26, 20  # of the grid, behind the binary point
_LIMIT_BITS, _LATENT_BITS = 50, 6  # |grid| <= 2^50 holds |latent| <= 64
_UNDO = {"": "", "mix": "unmix", "unmix": "mix"}


@dataclass(frozen=True)
class Link:
    """updated <- keep*updated + other*fed + eps*network(fed) in the pair (x, y); then the mix."""

    step: int  # the index of its timestep
    update_x: bool  # x is updated and y fed, or the other way round
    keep: float
    other: float
    eps: float
    grid_other: float  # other and eps on the grid, where keep is 1
    grid_eps: float
    scale: float  # the fed latent is scale*grid
    then: str = ""  # "mix" or "unmix"


@dataclass(frozen=True)
class End:
    """How the latents at one end are given: latent = scale*grid; y first when swapped."""

    scale: float
    swapped: bool = False


@dataclass(frozen=True)
class Chain:
    """The links from one end to the other."""

    links: tuple[Link, ...]
    start: End
    end: End
    mix: float = 1.0
    first: str = ""  # what comes before the links: "unmix" on the way from the image to the noise
    links_per_step: int = 1

    def inverse(self) -> Chain:
        """The chain that undoes this one: links last to first, each fed what it was fed here."""
        before = [self.first, *(link.then for link in self.links)]
        links = tuple(
            _undone(link, then) for link, then in zip(reversed(self.links), reversed(before[:-1]))
        )
        return replace(self, links=links, start=self.end, end=self.start, first=_UNDO[before[-1]])

    def from_one(self, step: int, a: float, b: float) -> Chain:
        """This chain for a pair (x, x): y first makes the step `a*x + b*network(x)`."""
        scale = self.start.scale
        link = Link(step, self.start.swapped, 1.0, a - 1, b, a - 1, b / scale, scale)
        return replace(self, links=(link, *self.links))


def _undone(link: Link, then: str) -> Link:
    return replace(
        link,
        keep=1 / link.keep,
        other=-link.other / link.keep,
        eps=-link.eps / link.keep,
        grid_other=-link.grid_other,
        grid_eps=-link.grid_eps,
        then=_UNDO[then],
    )


def build(
    method: str, schedule: Schedule, mix: float, gamma: float, alternate: bool, exact: bool
) -> Chain | None:
    """The chain of a method from the noise to the image; None for plain steps, which are none."""
    moments = schedule.moments
    if method == "edict":
        return edict(moments, mix, alternate, grid_bits(schedule, mix) if exact else 0)
    if method == "bdia":
        if exact and gamma != 1:
            _checks.refuse("gamma", "be 1 for exact=True", gamma)
        return bdia(moments, gamma, MOST_BITS if exact else 0)
    if method == "belm":
        if exact:
            rule = "be False for method='belm', which has no exact inverse on a grid"
            _checks.refuse("exact", rule, exact)
        schedule.require_noise_to_fall("for method='belm'")
        return belm(moments)
    return None


def edict(moments: Sequence[Moment], mix: float, alternate: bool, bits: int) -> Chain:
    """EDICT: two couplings and a mix a step; on the grid, p^mixes of z go aside."""
    num_steps = len(moments) - 1
    kept_aside = mix if bits else 1.0  # floats keep nothing aside
    factors = repeat(kept_aside, num_steps)
    powers = list(accumulate(factors, operator.mul, initial=2.0**-bits))  # products: IEEE's bits
    links = []
    for step, (now, prev) in enumerate(pairwise(moments)):
        a, b = move(now, prev)
        grid_eps = (prev.u - now.u) / powers[step]
        x_first = not (alternate and step % 2)
        for update_x, fed_at, then in ((x_first, now, ""), (not x_first, prev, "mix")):
            scale = math.sqrt(fed_at.signal) * powers[step]
            links.append(Link(step, update_x, a, 0.0, b, 0.0, grid_eps, scale, then))
    ends = (End(math.sqrt(moments[i].signal) * powers[i]) for i in (0, -1))
    return Chain(tuple(links), *ends, mix=mix, links_per_step=2)


def bdia(moments: Sequence[Moment], gamma: float, bits: int) -> Chain:
    """BDIA: `x_prev = gamma*x_next - gamma*D(t -> next) + D(t -> prev)`, D the plain step at x_t;
    of a flow with gamma 1, `x_prev = x_next + (sigma_prev - sigma_next)*network(x_t)`.
    """
    coefficients = []
    for after, now, prev in zip(moments, moments[1:], moments[2:]):
        (a_next, b_next), (a_prev, b_prev) = move(now, after), move(now, prev)
        coefficients.append((gamma, a_prev - gamma * a_next, b_prev - gamma * b_next))
    return _leapfrog(coefficients, bits)


def belm(moments: Sequence[Moment]) -> Chain:
    """O-BELM: the second-order leapfrog of z on steps of any length."""
    coefficients = []
    for after, now, prev in zip(moments, moments[1:], moments[2:]):
        step, step_before = now.u - prev.u, after.u - now.u
        ratio, scale = step / step_before, math.sqrt(prev.signal)
        keep = ratio**2 * math.sqrt(prev.signal / after.signal)
        other = (1 - ratio**2) * math.sqrt(prev.signal / now.signal)
        coefficients.append((keep, other, -step * (ratio + 1) * scale))
    return _leapfrog(coefficients, 0)


def _leapfrog(coefficients: Sequence[tuple[float, float, float]], bits: int) -> Chain:
    """Latents of even index in x, of odd ones in y: each replaces the latent before the last."""
    unit = 2.0**-bits
    links = [
        Link(step, step % 2 == 1, keep, other, eps, other, eps / unit, unit)
        for step, (keep, other, eps) in enumerate(coefficients, 1)
    ]
    return Chain(tuple(links), End(unit), End(unit, swapped=len(links) % 2 == 0))


def grid_bits(schedule: Schedule, mix: float) -> int:
    """Bits behind the binary point with which every state of an EDICT chain stays on the grid."""
    moments = schedule.moments
    num_steps = len(moments) - 1
    bits = _bits_left(moments, mix)
    if bits < FEWEST_BITS:
        if _bits_left(moments, 1.0) < FEWEST_BITS:
            schedule.refuse_noise("for exact=True")
        first, last = moments[0], moments[-1]
        fewer = ((n, [first, *[last] * n]) for n in range(num_steps, -1, -1))
        longest = next(n for n, some in fewer if _bits_left(some, mix) >= FEWEST_BITS)
        mixes = (m / 1000 for m in range(1, 1001))
        enough = next(m for m in mixes if _bits_left(moments, m) >= FEWEST_BITS)
        rule = f"be at most {longest} with mix={mix:g} and exact=True, or mix at least {enough:g}"
        _checks.refuse("timesteps", rule, f"{num_steps} steps")
    return min(bits, MOST_BITS)


def _bits_left(moments: Sequence[Moment], mix: float) -> int:
    growth = max(
        -0.5 * math.log2(at.signal) - mixes * math.log2(mix) for mixes, at in enumerate(moments)
    )
    return math.floor(_LIMIT_BITS - _LATENT_BITS - growth)
