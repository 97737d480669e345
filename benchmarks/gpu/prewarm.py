"""All kernels compiled beforehand, side by side: `python -m dense_attn.benchmarks.gpu.prewarm`.

Each task is a call that a later program makes, on tensors of the device and of its sizes, while
launches end when their kernel is compiled: so the keys in Triton's cache are those of the later
calls by construction, and no kernel can crash or hang this program. Processes are apart, so that
the end of one costs its own tasks alone.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from dense_attn._backends import table
from dense_attn.layout_attention.op import MODULATIONS
from dense_attn.verify import calls as verified

from ..harness import machine
from ..host_cost import launches
from ..layout_attention import attention, gpu_baselines, suite
from ..sega import guidance
from . import program, real_sizes, sweep

MODULE = "dense_attn.benchmarks.gpu.prewarm"
MOST_PROCESSES = 14
_MEMORY = 3 << 30  # bytes that a process may need
Task = tuple[str, Callable[[], object]]


def tasks(dry: bool = False) -> list[Task]:
    """The calls of all later programs, those of the first first."""
    every = [task for made in (_real_sizes, _bench, _sweep, _small, _verify) for task in made(dry)]
    return every[:: len(every) // 4] if dry else every


def _real_sizes(dry: bool) -> Iterator[Task]:
    for case in real_sizes.attention_cases(dry):
        yield f"real-sizes-{case}", partial(_attention, case)
    shape = (2, 1, 2, 4, 4) if dry else (3, 1, 4, 64, 64)
    yield "sega", lambda: guidance.ours(guidance.make_step(shape))


def _attention(case: real_sizes.Case) -> None:
    real_sizes.results(case.inputs(), "triton", case.ordered)


def _bench(dry: bool) -> Iterator[Task]:
    """The library's own rows of the short benchmark."""
    if not dry:  # whose workloads are as large as a GPU's
        rows = (_by_triton(entry) for entry in suite.entries(quick=True) if entry.ours)
        for entry in dict.fromkeys(rows):
            yield f"bench-{entry}", partial(_row, entry)


def _by_triton(entry: suite.Entry) -> suite.Entry:
    """A row of CUDA's, which would be launched here, as one of Triton's, which makes its gradient;
    any other as it is.
    """
    by_cuda = suite.backend(entry) == "cuda"
    return replace(entry, contender="dense_attn-triton") if by_cuda else entry


def _row(entry: suite.Entry) -> None:
    inputs = attention._inputs(entry.setting)
    call = gpu_baselines.GPU_CONTENDERS[entry.contender](inputs)
    attention.run(call, inputs, inputs.grad_out, entry.setting.backward)


def _sweep(dry: bool) -> Iterator[Task]:
    for trial in sweep.trials(dry):
        yield f"sweep-{trial}", lambda trial=trial: trial.call()()


def _small(dry: bool) -> Iterator[Task]:
    """The parts of the program for sanitizers that look at no result before the next launch."""
    for part in (*launches.ATTENTION, *launches.GUIDANCE, launches.step):
        yield f"small-{getattr(part, 'args', ('step',))}", part


def _verify(dry: bool) -> Iterator[Task]:
    calls = itertools.chain(verified.calls(), verified.kernel_calls(("triton",)))
    given = list(itertools.islice(calls, 1 if dry else None))
    for dtype in (torch.float16,) if dry else (torch.float32, torch.float16, torch.bfloat16):
        for modulation in MODULATIONS:
            for one in given:
                narrow = one.cast(dtype)
                if narrow.concerns("triton", modulation):
                    name = f"verify-{one.name}-{dtype}-{modulation}"
                    yield name, partial(narrow.run, modulation, "triton")


@contextmanager
def compile_only() -> Iterator[None]:
    """Launches end when their kernel is compiled; results hold what lay in their memory."""
    run = JITFunction.run

    def compiled(self: JITFunction, *args: object, **kwargs: object) -> object:
        kernel = run(self, *args, **kwargs | {"warmup": True})
        if torch.cuda.is_available():
            with suppress(OutOfResources):
                kernel.run  # noqa: B018  what launches it is compiled too, when it is asked for
        return kernel

    with patch.object(JITFunction, "run", compiled), patch.object(launches, "check"):
        yield


def main(run: program.Run) -> int:
    """Run the tasks in processes; 1 if one failed."""
    if run.options.worker is not None:
        return _work(run)
    start, count = time.monotonic(), run.options.processes or processes(run.dry)
    command = [sys.executable, "-m", MODULE, *sys.argv[1:], "--processes", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, "--worker", str(index)], env=environment)
        for index in range(count)
    ]
    codes = [worker.wait() for worker in workers]
    seconds = round(time.monotonic() - start, 1)
    program.say(processes=count, failed=sum(map(bool, codes)), seconds=seconds)
    return 1 if any(codes) else 0


def processes(dry: bool) -> int:
    """The number that cores and memory allow, two cores left to others; half of the cores at least,
    for some machines get their memory as they use it.
    """
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = min(MOST_PROCESSES, cores - 2, max(cores // 2, memory // _MEMORY))
    return 1 if dry else max(1, most)


def _work(run: program.Run) -> int:
    """This process's share of the tasks: a line for each; 1 if one failed."""
    torch.set_num_threads(1)
    failed = late = 0
    if reason := table.unavailable("triton", "layout_attention"):
        raise RuntimeError(reason)
    share = tasks(run.dry)[run.options.worker :: run.options.processes]
    with compile_only(), program.Compilations() as compilations:
        for name, task in share:
            if not run.time_left:
                late += 1
                continue
            fine = _done(name, task, compilations)
            failed += not (fine or name.startswith("sweep"))  # whose tiles need not compile
    if late:
        program.say(worker=run.options.worker, not_reached=late)
    return 1 if failed else 0


def _done(name: str, task: Callable[[], object], compilations: program.Compilations) -> bool:
    """Whether a task ended well; its line."""
    start, before, fault = time.monotonic(), compilations.made, {}
    try:
        task()
    except Exception as error:
        traceback.print_exc()
        fault = {"failed": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
    machine.current().release()
    seconds, kernels = round(time.monotonic() - start, 2), compilations.made - before
    program.say(task=name, kernels=kernels, seconds=seconds, **fault)
    return not fault


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, metavar="N", help="that compile (from the cores)")
    parser.add_argument("--worker", type=int, metavar="I", help="be the I-th of them")


if __name__ == "__main__":
    sys.exit(program.start(MODULE, main, _add))
