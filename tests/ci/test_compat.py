"""`make compat` fails when anything in it does, and says so in its table."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess

import compat
import pytest

FAULTS = (
    "none",
    "python",
    "pip",
    "place",
    "library",
    "cuda",
    "calls",
    "verify",
    "tests",
    "no report",
)


class Programs:
    """Stand-ins for the programs that `make compat` runs, of which one on Python 3.11 fails."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __call__(
        self, program: Path, *arguments: str, check: bool = True, cwd: Path | None = None
    ) -> CompletedProcess:
        code, out, folder = 0, "", program.parents[1]
        wrong = self.fault if "3.11" in str(program) else "none"
        if "--version" in arguments:
            code = int(wrong == "python")
        elif "venv" in arguments:
            (Path(arguments[-1]) / "lib/python3/site-packages/dense_attn").mkdir(parents=True)
        elif "pip" in arguments and wrong == "pip":
            raise compat.Failure("no such version")
        elif compat.SEEN in arguments:
            out = self.seen(folder, wrong)
        elif compat.CALLS in arguments:
            code, out = int(wrong == "calls"), "calls are right\n"
        elif "verify" in arguments:
            code = int(wrong == "verify")
            out = "cpu FAILED\n1 rows FAILED" if code else "every row passed"
        elif program.name == "pytest" and wrong != "no report":
            code = int(wrong == "tests")
            counts = f'tests="5" failures="{code}" errors="0" skipped="1"'
            report = Path(arguments[arguments.index("--junitxml") + 1])
            report.write_text(f"<all><testsuite {counts}/></all>")
        return CompletedProcess(arguments, code, out, "")

    @staticmethod
    def seen(folder: Path, wrong: str) -> str:
        """An installation's word of itself."""
        assert list(folder.glob("lib/python3/site-packages/dense_attn/_CUDA.so"))
        place = Path("/elsewhere") if wrong == "place" else folder
        state = "the compiled library does not load" if wrong == "library" else "available"
        cuda = "the CUDA library does not load" if wrong == "cuda" else "no GPU"
        torch = folder.name.split("-torch")[1]
        return "\n".join((str(place / "dense_attn"), torch, "3.6", state, "no GPU", cuda))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the project's, where everything is built already."""
    library = tmp_path / "_CUDA.so"
    library.touch()
    built = compat.Built(tmp_path / "a.whl", tmp_path / "sdist", library, tmp_path / "cuda.so")
    for name, place in (("ROOT", "."), ("WORK", "work"), ("TABLE", "docs/table.md")):
        monkeypatch.setattr(compat, name, tmp_path / place)
    monkeypatch.setattr(compat, "build", lambda: built)
    monkeypatch.setattr(compat.shutil, "which", lambda name: f"/usr/bin/{name}")
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_the_run(fault: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "run", Programs(fault))
    assert compat.main([]) == int(fault != "none")
    lines = compat.TABLE.read_text().splitlines()[-3:]
    state = "3.6 | 8 passed, 2 skipped | every row passed | available | no GPU"
    right = [
        f"| {pair[0]} | {pair[1]} | {state} | no GPU; calls are right |" for pair in compat.PAIRS
    ]
    assert lines[::2] == right[::2]
    assert (lines[1] == right[1]) == (fault == "none")
    assert lines[1].startswith("| 3.11 | 2.13.0 | ")
    assert ("FAILED" in lines[1]) == (fault not in ("none", "library"))


def test_one_row_is_a_page_of_it_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "run", Programs("none"))
    assert compat.main(["--only", "3.13"]) == 0
    rows = [line for line in compat.TABLE.read_text().splitlines() if line.startswith("| 3")]
    assert [row[:15] for row in rows] == ["| 3.13 | newest"]


def test_the_core_tests_are_there() -> None:
    words = [word for selection in compat.CORE for word in selection]
    files = [compat.ROOT / "tests" / word for word in words if word.endswith(".py")]
    assert len(files) == 9
    assert [path for path in files if not path.is_file()] == []
