"""Forks for every request in a line of stdin, and answers with the exit code of the child."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping

import torch  # noqa: F401  (what every program would import first)


def folders(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Where Python looks for modules before its own."""
    return [x for x in environment.get("PYTHONPATH", "").split(os.pathsep) if x]


def next_program() -> str | None:
    """In each child the program that it is to run; here None, at the end of stdin."""
    gc.freeze()  # of what is shared with every child nothing is garbage
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(**request)
            return request["program"]
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(
    program: str,
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    streams: list[str],
) -> None:
    """Make this process what `python -c` would have made of it."""
    for fd, path in enumerate((os.devnull, *streams)):
        opened = os.open(path, os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, fd)
        os.close(opened)
    os.chdir(cwd)
    sys.path[: 1 + len(folders())] = ["", *folders(environment)]
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]


if (_program := next_program()) is not None:
    exec(compile(_program, "<string>", "exec"), {"__name__": "__main__"})
