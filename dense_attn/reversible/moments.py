"""Times of a chain in one description, of DDIM and of flows: `x = scale*z`, `z += du*f(x, t)`."""

from __future__ import annotations

import math
from typing import NamedTuple


class Moment(NamedTuple):
    """A time of a chain: its latents are x = sqrt(signal)*z, and z moves by the change of u times
    the network's result.
    """

    signal: float  # the scale squared: alpha_bar, 1 for a flow
    noise: float  # sqrt(signal)*u
    u: float


def of_alpha_bar(alpha_bar: float) -> Moment:
    """DDIM's moment: u is noise over signal, the network's result the noise."""
    return Moment(alpha_bar, math.sqrt(1 - alpha_bar), math.sqrt((1 - alpha_bar) / alpha_bar))


def of_ratio(sigma: float) -> Moment:
    """DDIM's moment from noise over signal."""
    alpha_bar = 1 / (1 + sigma * sigma)
    return Moment(alpha_bar, sigma * math.sqrt(alpha_bar), sigma)


def of_flow(sigma: float) -> Moment:
    """A rectified flow's moment: u is sigma, the network's result the velocity."""
    return Moment(1.0, sigma, sigma)


def move(now: Moment, then: Moment) -> tuple[float, float]:
    """(a, b) of the step `x_then = a*x_now + b*f`, in either direction of time."""
    return _step(now.signal, now.noise, then.signal, then.noise)


def ddim(alpha_bar_t: float, alpha_bar_s: float) -> tuple[float, float]:
    """(a, b) of DDIM's `x_s = a*x_t + b*eps`; moments would cost a single step 2 us."""
    return _step(alpha_bar_t, math.sqrt(1 - alpha_bar_t), alpha_bar_s, math.sqrt(1 - alpha_bar_s))


def _step(
    signal: float, noise: float, signal_then: float, noise_then: float
) -> tuple[float, float]:
    a = math.sqrt(signal_then / signal)
    return a, noise_then - a * noise
