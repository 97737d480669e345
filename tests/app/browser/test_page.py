"""The page as people use it: painted, typed, run, cancelled, saved and loaded in a real browser.

Every wait is for what the page shows, none for time.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("playwright", reason="make browser installs playwright")
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
SHOT = Path(__file__).resolve().parents[3] / "examples/app/page.png"
VISIBLE = 3.0  # mean difference of two screenshots in grey values from which the committed changes
EXAMPLE = "a red circle and a blue square"
REDS = {"dark": "rgb(255, 155, 143)", "light": "rgb(180, 35, 24)"}  # on black, on white
STARTS = "20"  # the steps of examples


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A stroke over the canvas, in fractions of it."""
    canvas = page.locator("#canvas canvas")
    box = canvas.bounding_box()

    def at(x: float, y: float) -> dict[str, float]:
        return {"x": x * box["width"], "y": y * box["height"]}

    canvas.hover(position=at(*start))  # once it stands still
    page.mouse.down()
    canvas.hover(position=at(*end))
    page.mouse.up()


def paint_two(page: Any) -> None:
    """A stroke, a box and their words."""
    drag(page, (0.2, 0.15), (0.3, 0.35))
    page.get_by_role("button", name="2 blue").click()
    page.get_by_role("button", name="box", exact=True).click()
    drag(page, (0.55, 0.55), (0.9, 0.9))
    words(page, 1).fill("a red circle")
    words(page, 2).fill("a blue square")


def words(page: Any, label: int) -> Any:
    """The field of a colour's words."""
    return page.locator(f"#colour-{label} textarea, #colour-{label} input").first


def number(page: Any, name: str) -> Any:
    """The field of a number beside its slider."""
    return page.get_by_label(f"number input for {name}")


def set_number(page: Any, name: str, value: int) -> None:
    """Type a number."""
    field = number(page, name)
    field.fill(str(value))
    field.press("Tab")
    expect(field).to_have_value(str(value))


def example(page: Any, prompt: str = EXAMPLE) -> None:
    """Choose an example, and wait until it has filled the last of its fields too."""
    set_number(page, "samples", 2)
    page.get_by_role("button", name=prompt).first.click()
    expect(number(page, "samples")).to_have_value("1")
    expect(number(page, "steps")).to_have_value(STARTS)
    expect(words(page, 1)).not_to_have_value("")


def said(page: Any, text: str) -> None:
    """Wait for a sentence on the run."""
    page.locator("#status").filter(has_text=text).wait_for()


def press_run(page: Any, times: int = 1) -> None:
    """Press Run for the first, second, ... time on a page, and wait until it was heard."""
    page.locator("#run").click()
    ticket = "times => document.querySelector('#ticket input').value === `${times}`"
    page.wait_for_function(ticket, arg=times)


def run(page: Any, times: int = 1) -> None:
    """Press Run and wait for its end; no run has ended on the page before."""
    expect(page.get_by_text("Done: seed")).to_have_count(0)
    press_run(page, times)
    said(page, "Done: seed")


def begin_long(page: Any) -> None:
    """Begin a run of an example that takes far longer than a press of a button."""
    example(page)
    set_number(page, "samples", 4)
    set_number(page, "steps", 100)
    press_run(page)
    said(page, "s left")


def shorten(page: Any) -> None:
    """Make the next run a short one."""
    set_number(page, "samples", 1)
    set_number(page, "steps", 2)


def downloaded(page: Any) -> bytes:
    """The image of the last run."""
    return page.request.get(image_link(page).get_attribute("href")).body()


def image_link(page: Any) -> Any:
    """The link to the first image of the last run."""
    return page.locator("#files a").first


def code(page: Any) -> str:
    """The program that the page shows, by its button for copies."""
    page.evaluate("navigator.clipboard.writeText('')")
    page.locator("#code button").first.click()
    page.wait_for_function("async () => await navigator.clipboard.readText() !== ''")
    return page.evaluate("navigator.clipboard.readText()")


def refused(page: Any, field: str, sentence: str) -> None:
    """Wait for a sentence, or its end, beside a field."""
    page.locator(f"#refused-{field} [role=alert]").filter(has_text=sentence).wait_for()


def choose_file(page: Any, button: str, path: Path) -> None:
    """Give a file to a button."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=button).click()
    chooser.value.set_files(path)


def test_paint_run_and_leave_with_the_code(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image that is downloaded is the code's, bit for bit; scores change with the numbers."""
    paint_two(page)
    set_number(page, "steps", 4)
    run(page)
    first, link = downloaded(page), image_link(page).get_attribute("href")
    scores = page.locator("#table").inner_text()
    assert "1 a red circle" in scores
    program = code(page)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(program, "code", "exec"), names)
    assert names["image"].tobytes() == Image.open(io.BytesIO(first)).tobytes()
    assert (tmp_path / "seed-0.png").stat().st_size > 100
    set_number(page, "cross", 0)
    press_run(page, 2)
    expect(image_link(page)).not_to_have_attribute("href", link)
    expect(page.locator("#table")).not_to_have_text(scores, use_inner_text=True)
    assert Image.open(io.BytesIO(downloaded(page))).tobytes() != names["image"].tobytes()


def test_settings_are_loaded_again(page: Any, tab: Callable[..., Any], tmp_path: Path) -> None:
    paint_two(page)
    set_number(page, "steps", 3)
    run(page)
    path = tmp_path / "seed-0.png"
    path.write_bytes(downloaded(page))
    other = tab()
    choose_file(other, "Load the settings", path)
    said(other, "Loaded.")
    expect(words(other, 2)).to_have_value("a blue square")
    expect(number(other, "steps")).to_have_value("3")
    run(other)
    assert downloaded(other) == path.read_bytes()


def test_what_is_wrong_is_said_beside_its_field(page: Any, tmp_path: Path) -> None:
    """In a red for each theme, and nothing of what was painted or typed is lost."""
    page.locator("#run").click()
    refused(page, "canvas", "the canvas must have a painted region, got none")
    for theme, colour in REDS.items():
        page.evaluate(f"document.body.classList.toggle('dark', '{theme}' === 'dark')")
        expect(page.locator("#refused-canvas [role=alert]")).to_have_css("color", colour)
    paint_two(page)
    expect(words(page, 3)).to_be_hidden()  # until its colour is chosen
    page.get_by_role("button", name="3 green").click()
    words(page, 3).fill("a green square")
    page.locator("#run").click()
    refused(page, "words", "colour 3 (green) must be painted")
    words(page, 3).fill("")
    words(page, 1).fill("a fox")
    page.locator("#run").click()
    refused(page, "prompt", "words that the model knows, got fox")
    expect(page.locator("#refused-words [role=alert]")).to_have_count(0)
    page.get_by_text("Without painting").click()
    Image.new("L", (10_000, 8), 1).save(tmp_path / "map.png")
    choose_file(page, "Upload a label map", tmp_path / "map.png")
    refused(page, "canvas", "at most 4096 pixels a side, got 10000 x 8")
    words(page, 1).fill("a red circle")
    set_number(page, "steps", 2)
    run(page)
    expect(words(page, 2)).to_have_value("a blue square")


def test_boxes_examples_and_keys(page: Any) -> None:
    """Three ways to a layout without a mouse on the canvas."""
    example(page)
    expect(words(page, 1)).to_have_value("a red circle")
    page.get_by_text("Without painting").click()
    page.get_by_label("Boxes").fill("1: 0 0 0.5 0.5\n2: 0.5 0.5 1 1")
    page.get_by_role("button", name="Draw the boxes").click()
    context = "document.querySelector('#canvas canvas').getContext('2d')"
    page.wait_for_function(f"{context}.getImageData(0, 0, 1, 1).data[2] === 0")  # vermilion
    canvas = page.locator("#canvas canvas")
    canvas.focus()
    for key in ("3", "ArrowRight", " "):
        canvas.press(key)
    words(page, 3).fill("a green triangle")
    page.locator("#prompt textarea").fill("")
    set_number(page, "steps", 2)
    run(page)
    assert "3 a green triangle" in page.locator("#table").inner_text()


def test_cancel_ends_every_run_of_its_page(page: Any) -> None:
    """The one that goes on, and the one that waits since Run was pressed again."""
    begin_long(page)
    page.locator("#cancel").click()
    said(page, "cancelled after")
    press_run(page, 2)
    said(page, "s left")
    press_run(page, 3)
    page.locator("#cancel").click()
    said(page, "cancelled before it began")
    shorten(page)
    run(page, 4)
    page.locator("#cancel").click()
    said(page, "There is no run to cancel.")


def test_two_tabs(page: Any, tab: Callable[..., Any]) -> None:
    """The second waits for the first, and each gets its own."""
    other = tab()
    example(other, "a magenta circle and a cyan triangle")
    set_number(other, "steps", 2)
    page.bring_to_front()
    begin_long(page)
    other.bring_to_front()
    press_run(other)
    said(other, "queue: 1/1")
    page.bring_to_front()
    page.locator("#cancel").click()
    said(page, "cancelled after")
    said(other, "Done: seed")
    shorten(page)
    run(page, 2)
    assert "a magenta circle" in other.locator("#table").inner_text()
    assert "a red circle" in page.locator("#table").inner_text()


def test_nothing_outside_is_served(context: Any, address: str) -> None:
    answer = context.request.get(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for path in ("/etc/passwd", Path(__file__), "README.md", "../README.md"):
        assert context.request.get(f"{address}gradio_api/file={path}").status in (403, 404)


def test_the_screenshot_shows_the_page(page: Any) -> None:
    """The committed one is written anew where it differs visibly."""
    example(page, "a orange square and a green triangle")
    page.get_by_text("Numbers", exact=True).click()
    run(page)
    page.mouse.move(0, 0)
    page.evaluate("window.scrollTo(0, 0)")  # Run stays in sight
    expect(page.locator("#code")).to_contain_text("import")
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    shot = page.screenshot(full_page=True, animations="disabled")
    assert np.asarray(Image.open(io.BytesIO(shot))).std() > 10
    if not SHOT.exists() or difference(shot, SHOT.read_bytes()) > VISIBLE:
        SHOT.write_bytes(shot)
    for width in (390, 768):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function(f"document.documentElement.scrollWidth <= {width}")


def difference(first: bytes, second: bytes) -> float:
    """The mean difference of two pictures in grey values of 64 x 64 places."""
    small = [
        np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((64, 64))).astype(float)
        for data in (first, second)
    ]
    return float(abs(small[0] - small[1]).mean())
