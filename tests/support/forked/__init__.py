"""Programs in processes of their own, forked from one that has imported torch and nothing else: to
import it takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

PYTEST = "import sys, pytest; sys.exit(pytest.main())"
COMMAND = "import runpy; runpy.run_module('dense_attn', run_name='__main__', alter_sys=True)"
SERVER = Path(__file__).with_name("server.py")


def run(
    program: str, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A program run as `python -c` does, in this environment and these variables. Too late for
    those that torch reads as it is imported, as OMP_NUM_THREADS.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "program": program,
            "arguments": arguments,
            "cwd": str(cwd or Path.cwd()),
            "environment": os.environ | environment,
            "streams": [str(Path(folder, name)) for name in ("stdout", "stderr")],
        }
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        out, err = (Path(path).read_text("utf-8") for path in request["streams"])
    return subprocess.CompletedProcess([program, *arguments], code, out, err)


@cache
def _server() -> subprocess.Popen[str]:
    """It ends when its stdin does."""
    command = [sys.executable, str(SERVER)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
