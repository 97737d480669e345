"""Programs that get Ctrl-C from a test."""

from __future__ import annotations

import signal


def interruptible() -> None:
    """Undo, in a program that begins, what a shell does to commands behind an ampersand."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
