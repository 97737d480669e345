"""The workflows of a public home, and .ci/run, call make targets alone, so that none drifts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCRIPT = ROOT / ".ci" / "run"
TARGETS = set(re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split())
RULES = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.M))


def fault(command: str) -> str:
    """Why a command is not one make target with ARGS at most; "" if it is."""
    words = shlex.split(command)
    if "\n" in command.strip() or words[:1] != ["make"] or len(words) not in (2, 3):
        return f"{command!r} is not one make target"
    if words[1] not in TARGETS:
        return f"{words[1]!r} is no target of the Makefile"
    return (
        "" if all(word.startswith("ARGS=") for word in words[2:]) else f"{words[2]!r} is not ARGS"
    )


def jobs(path: Path) -> list[dict[str, Any]]:
    """The jobs of a workflow."""
    yaml = pytest.importorskip("yaml", reason="no YAML reader here")
    return list(yaml.safe_load(path.read_text())["jobs"].values())


def commands(path: Path) -> list[str]:
    """The commands of a workflow's steps, or of a script once it is in the project's folder."""
    if path.suffix != ".yml":
        return path.read_text().partition('/.."\n')[2].strip().splitlines()
    return [step["run"] for job in jobs(path) for step in job["steps"] if "run" in step]


def runs(job: dict[str, Any]) -> list[tuple[str, str]]:
    """A job's commands, those of .ci/run for `make ci`, each with a Python that it runs on."""
    steps = job["steps"]
    (named,) = (step["with"]["python-version"] for step in steps if "setup" in step.get("uses", ""))
    pythons = job.get("strategy", {}).get("matrix", {}).get("python", [named])
    found = [step["run"] for step in steps if "run" in step]
    found = [one for text in found for one in (commands(SCRIPT) if text == "make ci" else [text])]
    return [(command, python) for command in found for python in pythons]


@pytest.mark.parametrize("path", [*WORKFLOWS, SCRIPT], ids=lambda path: path.name)
def test_every_command_is_a_make_target(path: Path) -> None:
    found = commands(path)
    assert found
    assert [said for command in found if (said := fault(command))] == []


def test_the_jobs_of_a_public_home_are_there() -> None:
    found = {shlex.split(command)[1] for path in WORKFLOWS for command in commands(path)}
    assert found >= {"ci", "compat", "docs", "test", "wheel"}
    assert {shlex.split(command)[1] for command in commands(SCRIPT)} >= {"lint", "test", "fuzz"}
    assert RULES == TARGETS


def test_no_command_runs_twice_on_one_python() -> None:
    found = [one for job in jobs(ROOT / ".github/workflows/ci.yml") for one in runs(job)]
    assert len(found) == len(set(found))
    pythons = {python for command, python in found if command == "make test"}
    assert pythons == {"3.10", "3.11", "3.13"}


def test_no_home_is_named_until_there_is_one() -> None:
    """Whoever gives the project a home changes the sentence and all of its places."""
    places = "pyproject.toml", "CITATION.cff", "examples/comfyui/pyproject.toml"
    texts = [(ROOT / place).read_text("utf-8") for place in places]
    url = re.compile(r"^(?:repository|repository-code|homepage|url)\b.*http", re.M | re.I)
    named = [text for text in texts if url.search(text)]
    none = "has no public home yet" in (ROOT / "docs" / "contributing.md").read_text("utf-8")
    assert none == (not named)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("pip install .", "is not one make target"),
        ("make lint\nmake test", "is not one make target"),
        ("make nothing", "'nothing' is no target"),
        ("make test --jobs=2", "is not ARGS"),
        ("make test ARGS='-m full'", ""),
    ],
)
def test_another_command_is_seen(command: str, said: str) -> None:
    assert said in fault(command)
    assert bool(said) == bool(fault(command))
