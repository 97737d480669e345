"""The host's way to a launch of Triton's: the time of every raw op, its launches left out.

A launch is `kernel[grid](...)`; a stub stands in for what Triton makes of it. On a machine without
a GPU a process of its own runs the ops on a CPU's tensors, as for Triton's interpreter, which is
not called: through `torch.ops.dense_attn_triton`, with the checks, the choice of a configuration
and the memory of results, but without the switch to the tensors' device. Where a public op runs one
raw op, its whole way is told too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch

from dense_attn import ReversibleSampler, _command
from dense_attn._backends import table, triton

from ..harness import machine
from ..harness.measure import OURS, Latest, Row, spread
from ..reversible.chains import alphas_cumprod
from . import public
from .recorded import Call, in_turn, one_thread, raw_calls

MODULE = "dense_attn.benchmarks.host_cost.stubbed"
OP = "dense_attn-op"
OPS = {  # the raw op of each workload
    "triton-fwd": "layout_attention_fwd",
    "triton-fwd-tiled": "layout_attention_fwd",
    "triton-fwd-specialised": "layout_attention_fwd",
    "triton-bwd": "layout_attention_bwd",
    "triton-tile-lists": "tile_lists",
    "triton-percentile": "percentile_mask",
    "triton-sega-guidance": "sega_guidance",
    "triton-ddim-step": "ddim_step",
    "triton-leapfrog-step": "leapfrog_step",
    "triton-edict-mix": "edict_mix",
    "triton-edict-unmix": "edict_unmix",
    "triton-exact-couple": "exact_couple",
    "triton-exact-leapfrog": "exact_leapfrog",
    "triton-exact-mix": "exact_mix",
    "triton-exact-unmix": "exact_unmix",
}
DTYPES = {"triton-fwd-specialised": "float16"}  # of the others float32


def _specialised() -> Call:
    """Layout attention with lists that are there, by specialised warps, where an architecture has
    them, and interpreted. Few keys are packed too; the plan that is made here serves later calls.
    """
    configs = triton.layout_attention.configs
    interpreted = replace(configs.INTERPRETED, specialised=True)
    with (
        mock.patch.object(configs, "PACKED_KEYS", 0),
        mock.patch.object(configs, "processors", return_value=1),  # none is idle
        mock.patch.object(configs, "INTERPRETED", interpreted),
    ):
        _, call = public.tiled_attention(torch.float16, each=True)
        call()
    return call


PUBLIC: dict[str, Callable[[], Call]] = {  # the public calls that run one raw op
    "triton-fwd": lambda: public.attention()[0](0.5),
    "triton-fwd-tiled": lambda: public.tiled_attention()[1],
    "triton-fwd-specialised": _specialised,
    "triton-tile-lists": lambda: public.tiled_attention()[0],
    "triton-percentile": public.percentile_mask,
    "triton-sega-guidance": public.sega_step,
    "triton-ddim-step": public.ddim_step,
}
Found = dict[str, dict[str, Row]]  # by workload and contender


def public_op(workload: str) -> str:
    """The public op that a workload's raw op is a part of."""
    raw = OPS[workload]
    if raw in table.OPS:
        return raw
    attention = raw == "tile_lists" or raw.startswith("layout_attention")
    return "layout_attention" if attention else "ReversibleSampler"


def contenders(workload: str) -> tuple[str, ...]:
    """The public op where there is one, and the raw op."""
    return (OURS, OP) if workload in PUBLIC else (OP,)


@contextmanager
def launches_left_out() -> Iterator[list[str]]:
    """The names of the kernels that are meanwhile not launched."""
    launched: list[str] = []

    def noted(kernel: Any, *_: object, **__: object) -> None:
        launched.append(kernel.__name__)

    def noticed(*_: object) -> None:
        """Costs less than a mock."""

    kind = type(triton.reversible.ddim_step_kernel)
    # The others look at values where kernels are interpreted, and nowhere else.
    with (
        mock.patch.object(kind, "run", noted),
        mock.patch.object(triton.raw_checks.reversible, "on_the_grid", noticed),
        mock.patch.object(triton.raw_checks, "values", noticed),
        mock.patch.object(triton.raw_checks.layout_attention, "_permutation", noticed),
    ):
        yield launched


def measured() -> Found:
    """The numbers of every row, taken in this process."""
    found: Found = {name: {} for name in OPS}
    with one_thread(), torch.no_grad():
        ours = {name: make() for name, make in PUBLIC.items()}
        raw = _raw(ours)
        with launches_left_out() as launched:
            for name in OPS:
                for contender in contenders(name):
                    call = ours[name] if contender == OURS else raw[name]
                    launched.clear()
                    call()
                    launches, (seconds,) = len(launched), in_turn(call)
                    numbers = {"launches": launches, "rounds": len(seconds)}
                    found[name][contender] = spread("seconds", seconds) | numbers
    return found


def _raw(ours: dict[str, Call]) -> dict[str, Call]:
    """A call of every raw op, as public calls make it."""
    alone = {name: raw_calls(call)[0][-1].call for name, call in ours.items()}
    found: dict[str, Call] = {}
    for others in (_gradient, _there_and_back):
        for raw in raw_calls(others)[0]:
            found.setdefault(raw.name, raw.call)
    return {name: alone[name] if name in alone else found[op] for name, op in OPS.items()}


def _gradient() -> tuple[torch.Tensor, ...]:
    at, _ = public.attention(backward=True)
    with torch.enable_grad():
        return at(0.5)()


def _there_and_back() -> tuple[torch.Tensor, ...]:
    """Three steps of every chain in each direction."""
    x, eps = public.randn(2, *public.LATENT)
    for method in ("edict", "bdia"):
        for exact in (True, False):
            chain = ReversibleSampler(alphas_cumprod(), [900, 600, 300], method=method, exact=exact)
            pair = chain.invert(lambda x, t: eps, *chain.sample(lambda x, t: eps, x))
    return pair


@Latest
def _found(_: None) -> Found | str:
    """The numbers of every row, or the reason why there are none."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if triton.LOAD_ERROR is None and machine.current().device.type == triton.DEVICE:
        return measured()
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", MODULE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{MODULE} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def row(workload: str, contender: str) -> Row:
    """The numbers of a row, or why it has none."""
    found = _found(None)
    if isinstance(found, str):
        return {"reason": found}
    where = "" if machine.on_gpu() and not machine.current().dry_run else ", a CPU's tensors"
    told = {"backend": "triton", "error": 0.0, "allowed": 0.0, "note": f"without launches{where}"}
    return told | found[workload][contender]


def main() -> int:
    """Print the numbers, or the reason why there are none, as JSON."""
    print(json.dumps(triton.LOAD_ERROR or measured()))
    return 0


if __name__ == "__main__":
    sys.exit(_command.run("stubbed", main))
