"""How every command ends: in a sentence where the user can mend it, quietly where nobody reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from dense_attn import _environment
from dense_attn._backends import cpu

REFUSED, INTERRUPTED, UNREAD = 2, 130, 141  # the last two as shells count SIGINT and SIGPIPE


class UserError(Exception):
    """Something that the user gave and that cannot be used, in one sentence for stderr."""


def run(name: str, main: Callable[[], int | None]) -> int:
    """The exit code: main's own, 2 behind a sentence that says why, 130 at Ctrl-C, 141 unread."""
    sentence = ""
    try:
        _take_any_letter()
        _check_environment()
        code = main() or 0
        for stream in _streams():
            stream.flush()
    except KeyboardInterrupt:
        code, sentence = INTERRUPTED, "interrupted"
    except BrokenPipeError:
        code = UNREAD
    except (UserError, _environment.VariableError, torch.OutOfMemoryError, OSError) as error:
        code, sentence = REFUSED, str(error)
    finally:  # argparse leaves by SystemExit
        _let_go()
    if sentence:
        with suppress(OSError):
            print(f"{name}: {sentence}", file=sys.stderr, flush=True)
    return code


def said(text: str) -> str:
    """Words of the command line as they were typed, in UTF-8, where a locale knows ASCII alone."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def _check_environment() -> None:
    """Refuse a variable that a call would refuse, as a DENSE_ATTN_ISA that the processor lacks."""
    _environment.check()
    if cpu.LOAD_ERROR is not None:
        return
    try:
        torch.ops.dense_attn.cpu_isa()
    except RuntimeError as error:
        raise UserError(str(error).splitlines()[0]) from None


def _streams() -> list:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _take_any_letter() -> None:
    """Output whose letters the locale's encoding lacks is printed with escapes."""
    for stream in _streams():
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _let_go() -> None:
    """Flush what can be; what cannot goes nowhere, or Python would complain of it at its end."""
    for stream in _streams():
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
