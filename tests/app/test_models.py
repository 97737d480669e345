"""The page's command, and pipelines other than the small model behind it."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import diffusers

from dense_attn import __main__
from dense_attn._command import UserError
from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.examples.app import canvas, models, serve
from dense_attn.examples.app.session import Session
from dense_attn.examples.app.settings import Settings
from dense_attn.integrations.diffusers import Edit

pytestmark = pytest.mark.usefixtures("one_thread")
BOXES = canvas.read_boxes("1: 0 0 0.5 0.5\n2: 0.5 0.5 1 1")


def test_without_gradio_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(__main__, "find_spec", lambda name: None if name == "gradio" else name)
    assert __main__.main(["app"]) == 2
    said = "dense_attn app: the page needs gradio: pip install dense_attn[app]\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("port", ["0", "65536", "-1", "any"])
def test_a_port_is_a_number_of_two_bytes(port: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["app", f"--port={port}"])
    assert f"--port: must be in 1..65535, got '{port}'\n" in capsys.readouterr().err


def test_what_cannot_be_listened_on_is_refused() -> None:
    """Before a model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^--port must be free, got {port}$"):
            serve.main("no model", "127.0.0.1", port, show=False)
    with pytest.raises(UserError, match=r"^--host must be an address of this machine, got '192\."):
        serve.main("no model", "192.0.2.1", None, show=False)


def test_what_is_no_pipeline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--model must be a diffusers pipeline .*, got '.*': "):
        models.load_model(str(tmp_path))


def test_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="it makes videos"):
        models.of_pipeline(tiny_pipeline(diffusers.WanPipeline), "a model")


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "FluxPipeline"])
def test_other_pipelines_run(kind: str) -> None:
    """Pipelines of random weights; what cannot be counted is not told."""
    model = models.of_pipeline(tiny_pipeline(getattr(diffusers, kind)), "a/model")
    own = {"modulation": "bias", "cross_weight": 3.0, "self_weight": 0.0, "active": 1.0}
    made = Settings("", BOXES, ("a cat", "a dog"), steps=1, **(own if model.joint else {}))
    session = Session(model)
    run = session.run(made)
    edits = (Edit("snow", 12.0, 0.5, warmup=0.0),)
    edited = session.run(dataclasses.replace(made, edits=edits)).samples[0]
    assert edited.placed.tobytes() != run.samples[0].placed.tobytes()
    sample = run.samples[0]
    assert model.joint == (kind == "FluxPipeline")
    assert sample.placed.tobytes() != sample.plain.tobytes()
    assert sample.overlaps == sample.plain_overlaps == [None, None]
    assert (run.inside is None) == model.joint
    assert 'DiffusionPipeline.from_pretrained("a/model", torch_dtype=torch.float32)' in run.code
