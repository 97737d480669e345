"""A chain of 50 EDICT steps on a small U-Net: its time, and the network's share of it."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dense_attn

from ..harness import machine
from ..harness.machine import Mark
from ..harness.measure import OURS, Entry, Latest, Row, Setting, Trial, timed, tried, wanted, worst
from ..harness.measure import measure as measure_row
from .chains import EpsFn, alphas_cumprod, ddim, edict, final_alpha_cumprod, timesteps
from .unet import SmallUNet

WORKLOADS = {"edict-50": (1, 4, 64, 64)}  # name: shape of the latents
_STEPS, _MIX = 50, 0.93
_IDLE_ROUNDS = 9
Chain = Callable[[EpsFn, Tensor], tuple[Tensor, Tensor]]


class Clock:
    """An eps_fn that knows how long its network takes."""

    def __init__(self, network: Callable[..., Any]) -> None:
        self._network = network
        self._spans: list[tuple[Mark, Mark]] = []
        self.shares: list[float] = []  # of a chain's time, what was not the network's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = machine.current()
        start = here.mark()
        eps = self._network(*args, **kwargs)
        self._spans.append((start, here.mark()))
        return eps

    def walk(self, chain: Chain, x: Tensor) -> list[Tensor]:
        """The pair that a chain ends in."""
        here = machine.current()
        self._spans.clear()
        start = here.mark()
        pair = list(chain(self, x))
        end = here.mark()
        here.synchronize()
        inside = sum(here.between(*span) for span in self._spans)
        self.shares.append(1 - inside / here.between(start, end))
        return pair


def sampler(steps: int, mix: float = _MIX, **options: object) -> dense_attn.ReversibleSampler:
    """The library's sampler on the schedule of Stable Diffusion."""
    last = final_alpha_cumprod(steps)
    return dense_attn.ReversibleSampler(
        alphas_cumprod(), timesteps(steps), mix=mix, final_alpha_cumprod=last, **options
    )


CONTENDERS: dict[str, Chain] = {
    OURS: lambda eps_fn, x: sampler(_STEPS).sample(eps_fn, x),
    "dense_attn-float": lambda eps_fn, x: sampler(_STEPS, exact=False).sample(eps_fn, x),
    # As the authors of EDICT run it.
    "edict-float64": lambda eps_fn, x: edict(eps_fn, x, _STEPS, _MIX),
    "edict-float32": lambda eps_fn, x: edict(eps_fn, x, _STEPS, _MIX),
    "ddim-float32": lambda eps_fn, x: ddim(eps_fn, x, _STEPS),
}


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of all without names."""
    rows = (
        Entry(Setting(name, "fwd", "float32"), contender)
        for name in WORKLOADS
        for contender in CONTENDERS
    )
    return wanted(rows, quick, names, lambda entry: entry.contender in (OURS, "edict-float32"))


@Latest
def _prepared(setting: Setting) -> tuple[SmallUNet, Tensor, dict[str, tuple[Trial, Clock]]]:
    device, generator = machine.current().device, torch.Generator().manual_seed(0)
    x = torch.randn(WORKLOADS[setting.workload], generator=generator)
    return SmallUNet().to(device), x.to(device), {}


@Latest
def _expected(key: tuple[Setting, bool]) -> tuple[list[Tensor], list[Tensor]]:
    """The pair of EDICT, or of DDIM, in float64 and in float32, network and all."""
    network, x, _ = _prepared(key[0])
    chain = CONTENDERS["edict-float32" if key[1] else "ddim-float32"]
    return list(chain(copy.deepcopy(network).double(), x.double())), list(chain(network, x))


def trial(entry: Entry) -> tuple[Trial, Clock]:
    """Check where a chain ends, by the rule of accuracy."""
    network, x, trials = _prepared(entry.setting)
    if entry.contender not in trials:
        if entry.contender == "edict-float64":
            network, x = copy.deepcopy(network).double(), x.double()
        clock, run = Clock(network), CONTENDERS[entry.contender]
        expected = _expected((entry.setting, not entry.contender.startswith("ddim")))

        def check(got: list[Tensor]) -> tuple[float, float]:
            return worst(got, *expected, torch.float32)

        found = tried(lambda: clock.walk(run, x), check, in_graph=False)
        trials[entry.contender] = found, clock
    return trials[entry.contender]


def idle_seconds(entry: Entry) -> float:
    """Seconds of a chain whose network returns the same tensor at once."""
    _, x, _ = _prepared(entry.setting)
    eps, chain = torch.randn_like(x), CONTENDERS[entry.contender]
    rounds = (timed(lambda: chain(lambda x, t: eps, x)) for _ in range(_IDLE_ROUNDS))
    return statistics.median(seconds for _, seconds in rounds)


def measure(entry: Entry, benchmark: Any) -> Row:
    """The row of an entry; the library's own has eager EDICT in float32 as its partner.

    `share` is the part of the time that was not spent in the network, `share_idle` the time of the
    chain with a network that does nothing over its time with the real one.
    """
    network, x, _ = _prepared(entry.setting)
    row = entry.describe("chain", x.shape, "ReversibleSampler")
    parameters = sum(weight.numel() for weight in network.parameters())
    row |= {"steps": _STEPS, "mix": _MIX, "parameters": parameters}
    partner = Entry(entry.setting, "edict-float32" if entry.contender == OURS else OURS)
    with torch.no_grad():
        row = measure_row(row, lambda: trial(entry)[0], lambda: trial(partner)[0], benchmark)
        if "seconds" in row:
            row["share"] = statistics.median(trial(entry)[1].shares[-row["rounds"] :])
            row["share_idle"] = idle_seconds(entry) / row["seconds"]
    return row
