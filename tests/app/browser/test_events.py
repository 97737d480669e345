"""The page's runs by browser, without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="make browser installs gradio")
pytest.importorskip("diffusers")

import gradio

from dense_attn.examples.app import canvas, events, models, page, session

pytestmark = pytest.mark.browser
HERE, ELSEWHERE = (SimpleNamespace(session_hash=name) for name in ("here", "elsewhere"))


@pytest.fixture
def wired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> events.Events:
    """The events of a page on the small model."""
    made: list[events.Events] = []
    monkeypatch.setattr(page, "Events", lambda owner: made.append(events.Events(owner)) or made[0])
    page.Page(session.Session(models.small_model()), tmp_path / "page").blocks()
    return made[0]


def begin(wired: events.Events, request: Any) -> None:
    """Press Run with a painted canvas."""
    values = {field: field.value for field in wired.fields.values()}
    values[wired.fields["canvas"]] = canvas.paint(canvas.read_boxes("1: 0 0 0.5 1"))
    values[wired.fields["words 1"]] = "a red circle"
    values[wired.fields["steps"]] = 2
    values[wired.fields["edits"]] = []
    wired._begin(values | {wired.page.ticket: 0}, request)


@pytest.mark.parametrize("end", ["_stop", "_left"])
def test_all_runs_of_a_browser_end_at_once(wired: events.Events, end: str) -> None:
    """Runs that go on and runs that wait, and nobody else's."""
    heard: list[str] = []

    def told(part: float, text: str) -> None:
        heard.append(text)
        begin(wired, HERE)
        begin(wired, ELSEWHERE)
        getattr(wired, end)(HERE)

    begin(wired, HERE)
    (status,) = wired._run(HERE, told).values()
    assert "cancelled after 2 of 4 steps" in status
    assert len(heard) == 1
    if end == "_stop":
        assert "cancelled before it began" in str(wired._run(HERE, told))
    assert wired._run(HERE, told) == gradio.skip()
    assert len(wired._run(ELSEWHERE, lambda *_: None)) > 1
