"""The page as people use it: painted, typed, run, cancelled, saved and loaded in a real browser."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image

pytestmark = pytest.mark.browser
SHOT = Path(__file__).resolve().parents[3] / "examples/app/page.png"
VISIBLE = 3.0  # mean difference of two screenshots in grey values from which the committed changes
EXAMPLE = "a red circle and a blue square"


def drag(page: Any, x0: float, y0: float, x1: float, y1: float) -> None:
    """A stroke over the canvas, in fractions of it."""
    place = page.locator("#canvas canvas").bounding_box()

    def at(x: float, y: float) -> tuple[float, float]:
        return place["x"] + x * place["width"], place["y"] + y * place["height"]

    page.mouse.move(*at(x0, y0))
    page.mouse.down()
    page.mouse.move(*at(x1, y1), steps=4)
    page.mouse.up()


def paint_two(page: Any) -> None:
    """A stroke, a box and their words."""
    drag(page, 0.2, 0.15, 0.3, 0.35)
    page.get_by_role("button", name="2 blue").click()
    page.get_by_role("button", name="box", exact=True).click()
    drag(page, 0.55, 0.55, 0.9, 0.9)
    words(page, 1).fill("a red circle")
    words(page, 2).fill("a blue square")


def words(page: Any, label: int) -> Any:
    """The field of a colour's words."""
    return page.locator(f"#colour-{label} textarea, #colour-{label} input").first


def steps(page: Any, count: int) -> None:
    """Set the number of steps."""
    field = page.get_by_label("number input for steps")
    field.fill(str(count))
    field.press("Tab")


def run(page: Any) -> None:
    """Press Run and wait for its end."""
    page.locator("#run").click()
    ended(page)
    page.locator("#files a").first.wait_for()


def ended(page: Any) -> None:
    """Wait for the end of a run, or tell what the page says instead."""
    try:
        page.get_by_text("Done: seed").wait_for()
    except Exception as error:
        said = page.locator("[role=status], [role=alert]").all_inner_texts()
        raise AssertionError(f"no run has ended; the page says {said}") from error


def downloaded(page: Any) -> bytes:
    """The image of the last run."""
    link = page.locator("#files a").first.get_attribute("href")
    return page.request.get(link).body()


def code(page: Any) -> str:
    """The program that the page shows."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("#code button").first.click()
    return page.evaluate("navigator.clipboard.readText()")


def refused(page: Any, field: str) -> str:
    """The sentence beside a field."""
    place = page.locator(f"#refused-{field} [role=alert]")
    place.wait_for()
    return place.inner_text()


def test_paint_run_and_leave_with_the_code(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image that is downloaded is the code's, bit for bit; scores change with the numbers."""
    paint_two(page)
    steps(page, 4)
    run(page)
    first, scores = downloaded(page), page.locator("#table").inner_text()
    assert "1 a red circle" in scores
    program = code(page)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(program, "code", "exec"), names)
    assert names["image"].tobytes() == Image.open(io.BytesIO(first)).tobytes()
    assert (tmp_path / "seed-0.png").stat().st_size > 100
    page.get_by_label("number input for cross").fill("0")
    page.get_by_label("number input for cross").press("Tab")
    page.locator("#run").click()
    page.wait_for_function(
        "before => document.querySelector('#table').innerText !== before", arg=scores
    )
    assert Image.open(io.BytesIO(downloaded(page))).tobytes() != names["image"].tobytes()


def test_settings_are_loaded_again(page: Any, address: str, tmp_path: Path) -> None:
    paint_two(page)
    steps(page, 3)
    run(page)
    path = tmp_path / "seed-0.png"
    path.write_bytes(downloaded(page))
    page.goto(address)
    page.locator("#canvas canvas").wait_for()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Load the settings").click()
    chooser.value.set_files(path)
    page.get_by_text("Loaded.").wait_for()
    assert words(page, 2).input_value() == "a blue square"
    assert page.get_by_label("number input for steps").input_value() == "3"
    run(page)
    assert downloaded(page) == path.read_bytes()


def test_what_is_wrong_is_said_beside_its_field(page: Any, tmp_path: Path) -> None:
    """And nothing of what was painted or typed is lost."""
    page.locator("#run").click()
    assert refused(page, "canvas") == "the canvas must have a painted region, got none"
    paint_two(page)
    words(page, 3).fill("a green square")
    page.locator("#run").click()
    assert refused(page, "words").startswith("colour 3 (green) must be painted")
    words(page, 3).fill("")
    words(page, 1).fill("a fox")
    page.locator("#run").click()
    assert refused(page, "prompt").endswith("words that the model knows, got fox")
    assert page.locator("#refused-words [role=alert]").count() == 0
    page.get_by_text("Without painting").click()
    Image.new("L", (10_000, 8), 1).save(tmp_path / "map.png")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload a label map").click()
    chooser.value.set_files(tmp_path / "map.png")
    assert refused(page, "canvas").endswith("at most 4096 pixels a side, got 10000 x 8")
    words(page, 1).fill("a red circle")
    steps(page, 2)
    run(page)
    assert words(page, 2).input_value() == "a blue square"


def test_boxes_examples_and_keys(page: Any) -> None:
    """Three ways to a layout without a mouse on the canvas."""
    page.get_by_role("button", name=EXAMPLE).first.click()
    page.wait_for_function("document.querySelector('#colour-1 textarea, #colour-1 input').value")
    assert words(page, 1).input_value() == "a red circle"
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
    steps(page, 2)
    run(page)
    assert "3 a green triangle" in page.locator("#table").inner_text()


def test_cancel(page: Any) -> None:
    page.get_by_role("button", name=EXAMPLE).first.click()
    page.wait_for_function("document.querySelector('#colour-1 textarea, #colour-1 input').value")
    steps(page, 100)
    page.locator("#run").click()
    page.get_by_text("s left").wait_for()
    page.locator("#cancel").click()
    page.get_by_text("cancelled after").wait_for()
    steps(page, 2)
    run(page)


def test_cancel_ends_every_run_of_its_page(page: Any) -> None:
    """Also the one that goes on while Run is pressed again."""
    page.get_by_role("button", name=EXAMPLE).first.click()
    page.wait_for_function("document.querySelector('#colour-1 textarea, #colour-1 input').value")
    steps(page, 100)
    page.locator("#run").click()
    page.get_by_text("s left").wait_for()
    page.locator("#run").click()
    page.wait_for_timeout(200)
    page.locator("#cancel").click()
    page.get_by_text("cancelled before it began").wait_for()
    steps(page, 2)
    run(page)


@pytest.mark.parametrize(
    ("theme", "colour"), [("light", "rgb(180, 35, 24)"), ("dark", "rgb(255, 155, 143)")]
)
def test_refusals_are_read_in_both_themes(page: Any, address: str, theme: str, colour: str) -> None:
    """Dark red on white, pale red on black."""
    page.goto(f"{address}?__theme={theme}")
    page.locator("#canvas canvas").wait_for()
    page.locator("#run").click()
    said = page.locator("#refused-canvas [role=alert]")
    said.wait_for()
    assert said.evaluate("element => getComputedStyle(element).color") == colour


def test_two_tabs(page: Any, address: str) -> None:
    """The second waits for the first, and each gets its own."""
    other = page.context.new_page()
    other.goto(address)
    for tab, example in ((page, EXAMPLE), (other, "a magenta circle and a cyan triangle")):
        tab.get_by_role("button", name=example).first.click()
        tab.wait_for_function("document.querySelector('#colour-1 textarea, #colour-1 input').value")
    steps(page, 30)
    steps(other, 2)
    page.locator("#run").click()
    page.get_by_text("s left").wait_for()
    other.locator("#run").click()
    other.get_by_text("Waiting for its turn.").wait_for()
    assert page.get_by_text("Done: seed").count() == 0
    ended(other)
    assert page.get_by_text("Done: seed").count() == 1
    assert "a magenta circle" in other.locator("#table").inner_text()
    assert "a red circle" in page.locator("#table").inner_text()


def test_nothing_outside_is_served(page: Any, address: str) -> None:
    answer = page.request.get(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    for path in ("/etc/passwd", Path(__file__), "README.md", "../README.md"):
        assert page.request.get(f"{address}gradio_api/file={path}").status in (403, 404)


def test_the_screenshot_shows_the_page(page: Any) -> None:
    """The committed one is written anew where it differs visibly."""
    page.get_by_role("button", name=EXAMPLE).first.click()
    page.wait_for_function("document.querySelector('#colour-1 textarea, #colour-1 input').value")
    page.get_by_text("Numbers", exact=True).click()
    run(page)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)
    shot = page.screenshot(full_page=True)
    assert np.asarray(Image.open(io.BytesIO(shot))).std() > 10
    if not SHOT.exists() or difference(shot, SHOT.read_bytes()) > VISIBLE:
        SHOT.write_bytes(shot)
    for width in (390, 768):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def difference(first: bytes, second: bytes) -> float:
    """The mean difference of two pictures in grey values of 64 x 64 places."""
    small = [
        np.asarray(Image.open(io.BytesIO(data)).convert("L").resize((64, 64))).astype(float)
        for data in (first, second)
    ]
    return float(abs(small[0] - small[1]).mean())
