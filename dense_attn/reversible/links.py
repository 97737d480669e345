"""Reversible samplers as chains of links, one call of the network each: their coefficients, all in
float64.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, repeat

import torch
from torch import Tensor

from dense_attn import _checks

MOST_BITS, FEWEST_BITS = 26, 20  # of the grid, behind the binary point
_LIMIT_BITS, _LATENT_BITS = 50, 6  # |grid| <= 2^50 holds |latent| <= 64
_ROUNDING = 2.0**-8  # bfloat16's: by this part an entry may rise above its neighbour
_UNDO = {"": "", "mix": "unmix", "unmix": "mix"}


@dataclass(frozen=True)
class Link:
    """updated <- keep*updated + other*fed + eps*network(fed), of the pair (x, y); then the mix or
    its inverse.
    """

    step: int  # the index of its timestep
    update_x: bool  # x is updated and y fed, or the other way round
    keep: float
    other: float
    eps: float
    grid_other: float  # the same on the grid, where keep is 1
    grid_eps: float
    scale: float  # the fed latent is scale*grid
    then: str = ""  # "mix" or "unmix"


@dataclass(frozen=True)
class End:
    """How the latents of one end of a chain are given: latent = scale*grid; y first when
    swapped.
    """

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
        """The chain that undoes this one: its links last to first, each fed the very latent that it
        was fed here.
        """
        before = [self.first, *(link.then for link in self.links)]
        links = tuple(
            _undone(link, then) for link, then in zip(reversed(self.links), reversed(before[:-1]))
        )
        return replace(self, links=links, start=self.end, end=self.start, first=_UNDO[before[-1]])

    def from_one(self, step: int, a: float, b: float) -> Chain:
        """The same for a pair (x, x): y first makes the step `a*x + b*network(x)`."""
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


def alpha_bar(argument: str, value: float | Tensor, where: str = "") -> float:
    """Require a number or a 0-d tensor in (0, 1]."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        value = readable(argument, value).item()
    return above_0(argument, value, where, "be a number or a 0-d tensor")


def above_0(argument: str, value: float, where: str = "", rule: str = "be a number") -> float:
    """Require a number in (0, 1]."""
    number = _checks.number(argument, value, rule=rule, where=where)
    if not 0 < number <= 1:
        _checks.refuse(argument, "be in (0, 1]", f"{value}{where}")
    return number


def readable(argument: str, value: Tensor) -> Tensor:
    """Require a strided tensor with values."""
    if _checks.tensor(argument, value).is_meta:
        _checks.refuse(argument, "hold values", "a meta tensor")
    return value


def schedule(
    alphas_cumprod: Tensor | Sequence[float], timesteps: Sequence[int], final: object
) -> list[float]:
    """alpha_bar at each timestep, and where the last step goes; entries that no step uses may be
    anything.
    """
    if isinstance(alphas_cumprod, Tensor):
        if (
            readable("alphas_cumprod", alphas_cumprod).dim() != 1
            or not alphas_cumprod.is_floating_point()
        ):
            got = f"{_checks.name(alphas_cumprod.dtype)} {tuple(alphas_cumprod.shape)}"
            _checks.refuse("alphas_cumprod", "be one-dimensional, of floats", got)
        alphas_cumprod = alphas_cumprod.double().tolist()
    _iterable("alphas_cumprod", alphas_cumprod)
    alphas_cumprod = list(alphas_cumprod)
    if not alphas_cumprod:
        _checks.refuse("alphas_cumprod", "have at least one element", "none")
    if timesteps[0] >= len(alphas_cumprod):
        _checks.refuse(
            "timesteps", f"be below the {len(alphas_cumprod)} of alphas_cumprod", timesteps[0]
        )
    if final is None:
        timesteps = [*timesteps, 0]
    bars = [alpha_bar("alphas_cumprod", alphas_cumprod[t], f" at timestep {t}") for t in timesteps]
    for step, highest in enumerate(accumulate(bars[:-1], max), 1):
        if bars[step] < highest * (1 - _ROUNDING):
            at = timesteps[bars.index(highest)]
            got = (
                f"{highest:.6g} at timestep {at} and {bars[step]:.6g} at timestep {timesteps[step]}"
            )
            _checks.refuse("alphas_cumprod", "not rise with the timesteps used", got)
    return bars if final is None else [*bars, alpha_bar("final_alpha_cumprod", final)]


def descending(timesteps: Tensor | Sequence[int]) -> tuple[list[object], list[int]]:
    """The elements of timesteps as they come out of it, and as integers."""
    if isinstance(timesteps, Tensor) and readable("timesteps", timesteps).dim() != 1:
        _checks.refuse("timesteps", "be one-dimensional", tuple(timesteps.shape))
    _iterable("timesteps", timesteps)
    elements = list(timesteps)
    try:
        numbers = [_index(t) for t in elements]
    except TypeError:
        kind = _checks.name(timesteps.dtype) if isinstance(timesteps, Tensor) else elements
        _checks.refuse("timesteps", "be integers", kind, TypeError)
    if not numbers:
        _checks.refuse("timesteps", "have at least one element", "none")
    if any(a <= b for a, b in pairwise(numbers)) or numbers[-1] < 0:
        _checks.refuse("timesteps", "descend to 0 or above", numbers)
    return elements, numbers


def _index(t: object) -> int:
    """An integer; a TypeError for what is none, a bool among them."""
    if isinstance(t, Tensor):
        readable("timesteps", t)
    if isinstance(t, bool) or (isinstance(t, Tensor) and t.dtype == torch.bool):
        raise TypeError
    return operator.index(t)


def _iterable(argument: str, value: object) -> None:
    if not isinstance(value, Iterable) or isinstance(value, (Mapping, Set, str, bytes)):
        _checks.refuse(argument, "be a tensor or a sequence", type(value).__name__, TypeError)


def ddim(alpha_bar_t: float, alpha_bar_s: float) -> tuple[float, float]:
    """(a, b) of DDIM's `x_s = a*x_t + b*eps`, in either direction of time."""
    a = math.sqrt(alpha_bar_s / alpha_bar_t)
    return a, math.sqrt(1 - alpha_bar_s) - a * math.sqrt(1 - alpha_bar_t)


def sigma(alpha_bar: float) -> float:
    """Noise over signal: the time in which `x/sqrt(alpha_bar)` moves by eps."""
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def build(
    method: str, alpha_bars: Sequence[float], mix: float, gamma: float, alternate: bool, exact: bool
) -> Chain | None:
    """The chain of a method from the noise to the image; None for plain DDIM, which is none."""
    if method == "edict":
        return edict(alpha_bars, mix, alternate, grid_bits(alpha_bars, mix) if exact else 0)
    if method == "bdia":
        if exact and gamma != 1:
            _checks.refuse("gamma", "be 1 for exact=True", gamma)
        return bdia(alpha_bars, gamma, MOST_BITS if exact else 0)
    if method == "belm":
        if exact:
            _checks.refuse(
                "exact", "be False for method='belm', which has no exact inverse on a grid", exact
            )
        for step, (now, prev) in enumerate(pairwise(alpha_bars)):
            if prev <= now:
                rule = "grow at every step, the last one included, for method='belm'"
                _checks.refuse("alphas_cumprod", rule, f"{prev:.4g} after {now:.4g} at step {step}")
        return belm(alpha_bars)
    return None


def edict(alpha_bars: Sequence[float], mix: float, alternate: bool, bits: int) -> Chain:
    """EDICT: two couplings and a mix a step; on the grid, p^mixes of z = x/sqrt(alpha_bar) are kept
    aside.
    """
    num_steps = len(alpha_bars) - 1
    kept_aside = mix if bits else 1.0  # floats keep nothing aside
    powers = list(
        accumulate(repeat(kept_aside, num_steps), operator.mul, initial=2.0**-bits)
    )  # products: IEEE's bits
    links = []
    for step, (now, prev) in enumerate(pairwise(alpha_bars)):
        a, b = ddim(now, prev)
        grid_eps = (sigma(prev) - sigma(now)) / powers[step]
        x_first = not (alternate and step % 2)
        for update_x, fed_at, then in ((x_first, now, ""), (not x_first, prev, "mix")):
            scale = math.sqrt(fed_at) * powers[step]
            links.append(Link(step, update_x, a, 0.0, b, 0.0, grid_eps, scale, then))
    ends = (End(math.sqrt(alpha_bars[i]) * powers[i]) for i in (0, -1))
    return Chain(tuple(links), *ends, mix=mix, links_per_step=2)


def bdia(alpha_bars: Sequence[float], gamma: float, bits: int) -> Chain:
    """BDIA: `x_prev = gamma*x_next - gamma*D(t -> next) + D(t -> prev)`, where D is DDIM with the
    network at x_t.
    """
    coefficients = []
    for after, now, prev in zip(alpha_bars, alpha_bars[1:], alpha_bars[2:]):
        (a_next, b_next), (a_prev, b_prev) = ddim(now, after), ddim(now, prev)
        coefficients.append((gamma, a_prev - gamma * a_next, b_prev - gamma * b_next))
    return _leapfrog(coefficients, bits)


def belm(alpha_bars: Sequence[float]) -> Chain:
    """O-BELM: the second-order leapfrog of `z = x/sqrt(alpha_bar)` on steps that differ in
    length.
    """
    coefficients = []
    for after, now, prev in zip(alpha_bars, alpha_bars[1:], alpha_bars[2:]):
        step, step_before = sigma(now) - sigma(prev), sigma(after) - sigma(now)
        ratio = step / step_before
        keep, other = ratio**2 * math.sqrt(prev / after), (1 - ratio**2) * math.sqrt(prev / now)
        coefficients.append((keep, other, -step * (ratio + 1) * math.sqrt(prev)))
    return _leapfrog(coefficients, 0)


def _leapfrog(coefficients: Sequence[tuple[float, float, float]], bits: int) -> Chain:
    """Latents of even index live in x, those of odd index in y: each takes the place of the one
    before last.
    """
    unit = 2.0**-bits
    links = [
        Link(step, step % 2 == 1, keep, other, eps, other, eps / unit, unit)
        for step, (keep, other, eps) in enumerate(coefficients, 1)
    ]
    return Chain(tuple(links), End(unit), End(unit, swapped=len(links) % 2 == 0))


def grid_bits(alpha_bars: Sequence[float], mix: float) -> int:
    """Bits behind the binary point with which every state of an EDICT chain stays on the grid."""
    num_steps = len(alpha_bars) - 1
    bits = _bits_left(alpha_bars, mix)
    if bits < FEWEST_BITS:
        if _bits_left(alpha_bars, 1.0) < FEWEST_BITS:
            _checks.refuse("alphas_cumprod", "be larger for exact=True", min(alpha_bars))
        first, last = alpha_bars[0], alpha_bars[-1]
        longest = next(
            n
            for n in range(num_steps, -1, -1)
            if _bits_left([first, *[last] * n], mix) >= FEWEST_BITS
        )
        enough = next(
            m / 1000 for m in range(1, 1001) if _bits_left(alpha_bars, m / 1000) >= FEWEST_BITS
        )
        rule = f"be at most {longest} with mix={mix:g} and exact=True, or mix at least {enough:g}"
        _checks.refuse("timesteps", rule, f"{num_steps} steps")
    return min(bits, MOST_BITS)


def _bits_left(alpha_bars: Sequence[float], mix: float) -> int:
    growth = max(
        -0.5 * math.log2(abar) - mixes * math.log2(mix) for mixes, abar in enumerate(alpha_bars)
    )
    return math.floor(_LIMIT_BITS - _LATENT_BITS - growth)
