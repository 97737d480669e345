"""`make compat` fails when anything in it does, and says so in its table."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import compat
import pytest

FAULTS = ("none", "pip", "place", "library", "cuda", "calls", "verify", "tests", "no report")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_run(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "WORK", tmp_path)
    monkeypatch.setattr(compat, "TABLE", tmp_path / "docs" / "table.md")
    monkeypatch.setattr(compat, "build", lambda: tmp_path / "a.whl")
    monkeypatch.setattr(compat, "emulated_library", lambda: tmp_path / "cuda.so")

    def run(program: Path, *arguments: str, check: bool = True) -> CompletedProcess:
        folder = program.parents[1]
        wrong = fault if folder.name == "torch-2.13.0" else "none"
        code, out = 0, ""
        if "pip" in arguments and wrong == "pip":
            raise compat.Failure("no such version")
        if compat.SEEN in arguments:
            place = Path("/elsewhere") if wrong == "place" else folder
            state = "the compiled library does not load" if wrong == "library" else "available"
            torch = folder.name.removeprefix("torch-")
            cuda = "the CUDA library does not load" if wrong == "cuda" else "no GPU"
            out = "\n".join((str(place / "dense_attn"), torch, "3.6", state, "no GPU", cuda))
        elif compat.CALLS in arguments:
            code, out = int(wrong == "calls"), "calls are right\n"
        elif "verify" in arguments:
            code = int(wrong == "verify")
            out = "cpu FAILED\n1 rows FAILED" if code else "every row passed"
        elif program.name == "pytest" and wrong != "no report":
            failures = int(wrong == "tests")
            counts = f'tests="5" failures="{failures}" errors="0" skipped="1"'
            report = Path(arguments[arguments.index("--junitxml") + 1])
            report.write_text(f"<all><testsuite {counts}/></all>")
            code = failures
        return CompletedProcess(arguments, code, out, "")

    monkeypatch.setattr(compat, "run", run)
    assert compat.main() == int(fault != "none")
    lines = compat.TABLE.read_text().splitlines()[-3:]
    cuda = "no GPU; calls are right"
    right = [
        f"| {v} | 3.6 | 8 passed, 2 skipped | every row passed | available | no GPU | {cuda} |"
        for v in compat.VERSIONS
    ]
    assert lines[::2] == right[::2]
    assert (lines[1] == right[1]) == (fault == "none")
    assert lines[1].startswith("| 2.13.0 | ")
    assert ("FAILED" in lines[1]) == (fault not in ("none", "library"))


def test_the_core_tests_are_there() -> None:
    words = [word for selection in compat.CORE for word in selection]
    files = [compat.ROOT / "tests" / word for word in words if word.endswith(".py")]
    assert len(files) == 9
    assert [path for path in files if not path.is_file()] == []
