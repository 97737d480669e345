"""A program for a GPU: its options, its lines of JSON as they come, a dry run without one."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from dense_attn import _command, _environment

from ..harness import machine

SKIPPED = 77  # the exit code of a program whose tool is not to be had here


@dataclass(frozen=True)
class Run:
    """How a program runs: small and interpreted or not, and until when it begins something."""

    dry: bool = False
    end: float = math.inf  # of time.monotonic()
    first: int = 0  # the place of the item to begin with
    options: argparse.Namespace = field(default_factory=argparse.Namespace)  # the program's own

    @property
    def time_left(self) -> bool:
        """Whether something new may begin."""
        return time.monotonic() < self.end


def say(**row: object) -> None:
    """Print a row as a line of JSON, now, in one piece where other processes print too."""
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def start(
    module: str,
    main: Callable[[Run], int],
    add: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> int:
    """The exit code of a program, started by its options, of which `add` adds its own; a dry run
    interprets the kernels.
    """
    parser = argparse.ArgumentParser(f"python -m {module}")
    add(parser)
    return _command.run(module.rpartition(".")[2], lambda: _started(module, main, parser))


def _started(module: str, main: Callable[[Run], int], parser: argparse.ArgumentParser) -> int:
    parser.add_argument("--dry-run", action="store_true", help="small, without a GPU")
    parser.add_argument("--seconds", type=float, metavar="N", help="begin nothing after this time")
    parser.add_argument(
        "--first", type=int, default=0, metavar="I", help="begin with the I-th item"
    )
    arguments = parser.parse_args()
    if arguments.dry_run and not _environment.flag("TRITON_INTERPRET"):
        if find_spec("triton") is None:
            raise _command.UserError("--dry-run needs Triton, whose interpreter runs the kernels")
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is loaded
        return subprocess.run(command, env=environment, check=False).returncode
    if not arguments.dry_run and not torch.cuda.is_available():
        raise _command.UserError("a GPU must be there, torch sees none (--dry-run needs none)")
    machine.use("cuda", arguments.dry_run)
    if arguments.dry_run:
        torch.set_num_threads(1)
    seconds = math.inf if arguments.seconds is None else arguments.seconds
    end = time.monotonic() + seconds
    return main(Run(arguments.dry_run, end, arguments.first, arguments))


def is_usable() -> bool:
    """Whether the device still takes calls, as it does not after an illegal access."""
    try:
        machine.current().release()
        machine.current().synchronize()
    except RuntimeError:
        return False
    return True


def continued(module: str, run: Run, first: int) -> int:
    """The exit code of a process of its own that goes on with an item, this one's device being
    lost.
    """
    say(continued_at=first)
    rest = ["--first", str(first)]
    if run.end < math.inf:
        rest += ["--seconds", f"{max(0.0, run.end - time.monotonic()):.0f}"]
    command = [sys.executable, "-m", module, *sys.argv[1:], *rest]
    return subprocess.run(command, check=False).returncode


class Compilations:
    """How many kernels were compiled since, and how many were found in the cache."""

    def __init__(self) -> None:
        self.found = self.made = 0

    def __enter__(self) -> Compilations:
        from triton import knobs

        self._before, knobs.compilation.listener = knobs.compilation.listener, self._listen
        return self

    def __exit__(self, *_: object) -> None:
        from triton import knobs

        knobs.compilation.listener = self._before

    def _listen(self, *, cache_hit: bool, **_: object) -> None:
        self.found += cache_hit
        self.made += not cache_hit
