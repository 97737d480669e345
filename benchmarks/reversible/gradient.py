"""The gradient of a loss on the image to the noise it came from: memory and time by steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..harness import machine
from ..harness.measure import OURS, Entry, Latest, Row, Setting, Trial, tried, wanted
from ..harness.measure import measure as measure_row
from .chain import sampler
from .chains import EpsFn, edict
from .unet import SmallUNet

WORKLOADS = {"gradient-10": 10, "gradient-50": 50, "gradient-200": 200}  # name: steps
CONTENDERS = (OURS, "dense_attn-float", "autograd", "checkpoint")
_SHAPE, _WIDTH, _MIX = (1, 4, 32, 32), 16, 0.93
_TOLERANCE = 1e-4  # of the largest element of the gradient
_MAX_BYTES = 12e9  # of activations


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of all without names."""
    rows = (
        Entry(Setting(name, "fwd+bwd", "float32"), who) for name in WORKLOADS for who in CONTENDERS
    )
    return wanted(rows, quick, names, lambda entry: entry.setting.workload == "gradient-10")


@Latest
def _prepared(setting: Setting) -> tuple[SmallUNet, list[Tensor], Tensor, dict[str, Trial]]:
    """The network, x_T and the loss's weights, the gradient in float64, and the trials so far."""
    generator = torch.Generator().manual_seed(0)
    device = machine.current().device
    network = SmallUNet(_WIDTH).to(device)
    tensors = [torch.randn(_SHAPE, generator=generator).to(device) for _ in range(3)]
    steps, wide = WORKLOADS[setting.workload], copy.deepcopy(network).double()
    exact = gradient("checkpoint", steps, wide, *(x.double() for x in tensors))
    return network, tensors, exact, {}


def gradient(
    contender: str, steps: int, network: EpsFn, x: Tensor, on_x: Tensor, on_y: Tensor
) -> Tensor:
    """d loss / d x_T of a loss that is linear in both images of the pair."""
    x = x.detach().requires_grad_()
    if contender.startswith(OURS):
        pair = sampler(steps, _MIX, exact=contender == OURS).sample(network, x)
    else:
        pair = edict(network, x, steps, _MIX, recompute=contender == "checkpoint")
    loss = sum((latent * weight).sum() for latent, weight in zip(pair, (on_x, on_y)))
    return torch.autograd.grad(loss, x)[0]


def trial(entry: Entry) -> Trial:
    """Check a gradient against float64."""
    network, tensors, exact, trials = _prepared(entry.setting)
    steps = WORKLOADS[entry.setting.workload]

    def run() -> list[Tensor]:
        return [gradient(entry.contender, steps, network, *tensors)]

    def check(got: list[Tensor]) -> tuple[float, float]:
        return (got[0] - exact).abs().max().item(), _TOLERANCE * exact.abs().max().item()

    if entry.contender not in trials:
        trials[entry.contender] = tried(run, check, in_graph=False)
    return trials[entry.contender]


def activations(network: EpsFn, x: Tensor) -> int:
    """Bytes that one call of the network keeps for its backward pass."""
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        kept[saved.data_ptr()] = saved.nbytes
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        eps = network(x.detach().requires_grad_(), 500)
    del eps
    return sum(kept.values())


def why_not(entry: Entry) -> str | None:
    """The reason why a row is not measured, or None."""
    if entry.contender != "autograd":
        return None
    network, tensors, *_ = _prepared(entry.setting)
    needed = 2 * WORKLOADS[entry.setting.workload] * activations(network, tensors[0])
    if needed > _MAX_BYTES:
        return f"about {needed / 1e9:.0f} GB of activations, more than {_MAX_BYTES / 1e9:.0f}"
    return None


def measure(entry: Entry, benchmark: Any) -> Row:
    """The row of an entry; the library's own has per-step checkpointing as its partner."""
    row = entry.describe("gradient", _SHAPE, "ReversibleSampler")
    row["steps"] = WORKLOADS[entry.setting.workload]
    reason = why_not(entry)
    if reason is not None:
        return row | {"reason": reason}
    partner = Entry(entry.setting, "checkpoint" if entry.contender == OURS else OURS)
    row = measure_row(row, lambda: trial(entry), lambda: trial(partner), benchmark)
    if "wrong" in row and entry.contender == "dense_attn-float" and not float32_can(row["steps"]):
        del row["wrong"]
        row["reason"] = f"inverted in float32 the chain loses its digits: {row['reason']}"
    return row


def float32_can(steps: int) -> bool:
    """Whether rounding errors, times mix^-2 a step on the way back, stay below the tolerance."""
    return _MIX ** (-2 * steps) * torch.finfo(torch.float32).eps <= _TOLERANCE
