"""Runs on the small model: images, what is told of them, and code that makes the same."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

from PIL import Image

from dense_attn.examples.app import attention, canvas, models, pictures, results, settings
from dense_attn.examples.app.code import code_of
from dense_attn.examples.app.refused import Refused
from dense_attn.examples.app.session import CancelledError, Run, Session
from dense_attn.examples.app.settings import Settings
from dense_attn.integrations.diffusers import Edit, apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
BOXES = canvas.read_boxes("1: 0 0 0.5 0.5\n2: 0.5 0.5 1 1")
PAINTED = BOXES.copy()
PAINTED[40:50, :20], PAINTED[45:, :10] = 3, 3
WORDS = ("a red circle", "a blue square", "a green circle")
TWO = Settings("", BOXES, WORDS[:2], steps=2)
EDITS = (Edit("on white", 12.0, 0.5, warmup=0.0),)


@pytest.fixture(scope="module")
def session() -> Session:
    """A session of the small model."""
    return Session(models.small_model())


@pytest.fixture(scope="module")
def run(session: Session) -> Run:
    """A run of two seeds."""
    return session.run(dataclasses.replace(TWO, samples=2))


KINDS: dict[str, dict[str, Any]] = {
    "boxes": {"seed": 5},
    "painted": {"labels": PAINTED, "words": WORDS, "modulation": "max", "cross_weight": 2.0},
    "without words": {"words": ("a red circle", ""), "prompt": "a red circle on white"},
    "own prompts": {"own_prompts": True, "prompt": "a thing on white", "base_ratio": 0.25},
    "edits, masks": {"edits": EDITS, "modulation": "mask", "active": 1.0},
}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.full if k == "without words" else ()) for k in KINDS],
)
def test_the_code_makes_the_same_image(
    session: Session, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in a namespace of its own, and unlike the plain one."""
    made = settings.check(dataclasses.replace(TWO, **KINDS[kind]))
    run = session.run(made)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(run.code, "code", "exec"), names)
    first = run.samples[0]
    assert names["image"].tobytes() == first.placed.tobytes() != first.plain.tobytes()
    saved = Image.open(tmp_path / f"seed-{made.seed}.png")
    assert saved.tobytes() == first.placed.tobytes()


def test_the_code_has_every_digit(session: Session) -> None:
    fine = Edit("on white", 5.1234567890123, 0.91234567, warmup=1.00000001)
    text = code_of(dataclasses.replace(TWO, edits=(fine,)), session.model, 0)
    edit = 'Edit("on white", scale=5.1234567890123, threshold=0.91234567, warmup=1.00000001,'
    assert edit in text


def test_files_have_the_settings_of_their_image(session: Session, run: Run, tmp_path: Path) -> None:
    assert list(run.files) == ["seed-0.png", "seed-1.png"]
    path = tmp_path / "seed-1.png"
    path.write_bytes(run.files["seed-1.png"])
    found, name = pictures.read_settings(path)
    assert (found.seed, name) == (1, models.SMALL)
    again = session.run(dataclasses.replace(found, samples=1)).samples[0]
    assert again.placed.tobytes() == run.samples[1].placed.tobytes() == Image.open(path).tobytes()


def test_the_page_tells_of_a_run(run: Run) -> None:
    assert [sample.seed for sample in run.samples] == [0, 1]
    assert len({sample.placed.tobytes() for sample in run.samples}) == 2
    table = results.table(run)
    assert table.count("<tr>") == 3
    assert "a red circle" in table
    assert len(run.inside) == 2
    assert all(0 < share <= 1 for pair in run.inside for share in pair)
    assert "s and at most" in results.cost(run)
    assert run.cost.seconds > 0
    assert run.words.size == (256, 256)
    assert run.words.getpixel((8, 8)) == (0xD5, 0x5E, 0x00)
    assert run.words.getpixel((248, 248)) == (0x00, 0x72, 0xB2)
    assert run.words.getpixel((248, 8)) == (255, 255, 255)
    assert pictures.shown(run.samples[0].plain).size == (256, 256)


def test_words_are_escaped(run: Run) -> None:
    odd = dataclasses.replace(run, settings=dataclasses.replace(TWO, words=("<script>", "&")))
    assert "&lt;script&gt;" in results.table(odd)
    assert "&lt;b&gt;" in results.refusal("<b>")


def test_overlap_is_counted_by_colour(session: Session) -> None:
    image = np.full((32, 32, 3), 128, dtype=np.uint8)
    image[:16, :16], image[16:, :16] = (255, 0, 0), (0, 0, 255)
    words = ("a red circle", "a blue square", "a thing")
    labels = BOXES.copy()
    labels[:32, 32:] = 3
    found = session._overlaps(Settings("", labels, words), Image.fromarray(image))
    assert found == [1.0, 0.0, None]


def test_attention_inside_is_what_attention_says() -> None:
    """The shares of one call, against the softmax written out, and out as without counting."""

    class Layer:
        q_words = torch.tensor([[1, 1, 2, 0, 3]], dtype=torch.int32)
        k_words = torch.tensor([[0, 1, 1, 2]], dtype=torch.int32)
        k_order = None

    class Layout:
        kind, depth = "cross", 0
        state = type("State", (), {"layers": {("cross", 0): Layer}})

        def attend(self, q, k, v, scale, mask):  # noqa: ANN001, ANN202
            return (q @ k.mT * scale * 2).softmax(-1) @ v

    torch.manual_seed(1)
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 3, 4, 8, dtype=torch.float64)
    inside, layout = attention.Inside(2), Layout()
    out = attention.Counted(layout, inside).attend(q, k, v, 0.5, None)
    assert torch.equal(out, layout.attend(q, k, v, 0.5, None))
    for factor, found in ((1, 0), (2, 1)):
        weights = (q @ k.mT * 0.5 * factor).softmax(-1).mean((0, 1))
        first, second = weights[:, 1:3].sum(1), weights[:, 3]
        expected = first[[0, 1, 4]].sum() / first.sum(), second[[2, 4]].sum() / second.sum()
        assert [pair[found] for pair in inside.shares] == pytest.approx(
            [float(share) for share in expected], rel=1e-6
        )


def test_counting_changes_no_bit(session: Session) -> None:
    pipe, regions = session.model.pipe, TWO.regions()
    images = []
    for counting in (nullcontext(), attention.counted(pipe, 2)):
        how = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        with apply_layout(pipe, TWO.full_prompt, regions), counting as inside:
            images.append(pipe(TWO.full_prompt, **how).images[0].tobytes())
    assert images[0] == images[1]
    layers = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    assert inside.calls == len(layers) > 1  # once each, in the first of two steps


def test_progress_and_the_time_that_is_left(session: Session) -> None:
    heard: list[tuple[float, str]] = []
    session.run(dataclasses.replace(TWO, samples=2), lambda *told: heard.append(told))
    assert [round(part * 8) for part, _ in heard] == list(range(1, 9))
    assert "seed 0, plain: step 1 of 8" in heard[0][1]
    assert "seed 1, with the layout: step 8 of 8, 0 s left" in heard[-1][1]


def test_a_run_is_cancelled_at_its_next_step(session: Session, run: Run) -> None:
    stop, heard = threading.Event(), []

    def told(part: float, text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            stop.set()

    with pytest.raises(CancelledError, match="cancelled after 4 of 4 steps"):
        session.run(TWO, told, stop)
    assert len(heard) == 3
    with pytest.raises(CancelledError, match="cancelled before it began"):
        session.run(TWO, told, stop)
    plain = session.run(TWO).samples[0].plain
    assert plain.tobytes() == run.samples[0].plain.tobytes()  # nothing is left on


def test_one_run_at_a_time(session: Session) -> None:
    going, most = [], []

    def told(part: float, text: str) -> None:
        going.append(threading.get_ident())
        most.append(going[-1])

    threads = [threading.Thread(target=session.run, args=(TWO, told)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 8
    assert most == [most[0]] * 4 + [most[4]] * 4


def test_what_the_library_refuses_is_told(session: Session) -> None:
    made = dataclasses.replace(TWO, prompt="a red circle on white")
    with pytest.raises(Refused, match="a phrase of the prompt 'a red circle on white'") as error:
        session.run(made)
    assert error.value.field == "run"
    with pytest.raises(Refused, match="words that the model knows"):
        session.run(dataclasses.replace(TWO, prompt="a fox"))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("can't allocate memory\nmore"), "can't allocate memory"),
        (torch.OutOfMemoryError("of a GPU\nmore"), "memory is too small: of a GPU"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_torch_raises_is_told(
    session: Session, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    """A CPU out of memory is a plain RuntimeError."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Session, "_samples", fail)
    with pytest.raises(Refused) as refused:
        session.run(TWO)
    assert (refused.value.field, str(refused.value)) == ("run", sentence)


def test_what_the_library_warns_of_is_told(session: Session, run: Run) -> None:
    late = (Edit("on white", 12.0, 0.5, warmup=9.0),)
    (note,) = session.run(dataclasses.replace(TWO, edits=late)).notes
    assert "edits[0].warmup must be at most 1" in note
    assert run.notes == []
