"""The workflows of a public home, and .ci/run, call make targets alone, so that none drifts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
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


def commands(path: Path) -> list[str]:
    """The commands of a workflow's steps, or of a script once it is in the project's folder."""
    if path.suffix != ".yml":
        return path.read_text().partition('/.."\n')[2].strip().splitlines()
    yaml = pytest.importorskip("yaml", reason="no YAML reader here")
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_every_command_is_a_make_target(path: Path) -> None:
    found = commands(path)
    assert found
    assert [said for command in found if (said := fault(command))] == []


def test_the_jobs_of_a_public_home_are_there() -> None:
    found = {shlex.split(command)[1] for path in WORKFLOWS for command in commands(path)}
    assert found >= {"ci", "compat", "docs", "lint", "test", "wheel"}
    assert RULES == TARGETS


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
