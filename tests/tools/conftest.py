"""The command line as tests of the tools run it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dense_attn.__main__ import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of a command."""

    def command(*argv: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in argv])
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return command
