"""The results of `make gpu`: one JSON and one archive, written anew whenever a step ends."""

from __future__ import annotations

import io
import json
import runpy
import tarfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_steps import ROOT, Outcome, Runner

LONGEST = 1 << 20  # bytes of a log in the archive, from its ends
BENCHMARKS = ("own", "families", "rest")


class Report:
    """The two files of a run, in one folder."""

    def __init__(self, output: Path, work: Path, header: dict[str, Any]) -> None:
        self.json, self.archive = output / "gpu.json", output / "gpu.tar.gz"
        self._work, self._header = work, header
        # the package imports torch
        self._write = runpy.run_path(str(ROOT / "dense_attn" / "_files.py"))["write"]

    def write(self, runner: Runner) -> None:
        """Both files, of what there is by now."""
        steps = [asdict(outcome) for outcome in runner.outcomes]
        running = [{"step": x.step.name, "rows": x.rows} for x in runner.running]
        found = self._header | {"steps": steps, "running": running}
        found["benchmarks"] = {name: _read(self._work / f"{name}.json") for name in BENCHMARKS}
        self._write(self.json, json.dumps(found, indent=1) + "\n")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as archive:
            for path in sorted(self._work.rglob("*")):
                if path.is_file():
                    with suppress(OSError):  # one that goes meanwhile
                        _add(archive, f"gpu/{path.relative_to(self._work)}", _ends(path))
            _add(archive, "gpu/gpu.json", self.json.read_bytes())
        self._write(self.archive, buffer.getvalue())


def _read(path: Path) -> Any:
    """The results of a benchmark, None without any."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _ends(path: Path) -> bytes:
    """A file, without its middle where it is long."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= LONGEST:
            return file.read()
        first = file.read(LONGEST // 2)
        file.seek(-(LONGEST // 2), io.SEEK_END)
        return first + b"\n... left out ...\n" + file.read()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def print_table(outcomes: list[Outcome]) -> None:
    """Each step's last row, then its time and verdict."""
    for outcome in outcomes:
        if outcome.rows:
            print(f"{outcome.step}: {json.dumps(outcome.rows[-1])[:1500]}")
    print(f"\n{'step':<14} {'seconds':>8}  verdict")
    for outcome in outcomes:
        print(f"{outcome.step:<14} {outcome.seconds:8.1f}  {outcome.verdict}")
