"""A call's own text that no token sees, which is left out: what the image becomes is the same."""

from __future__ import annotations

import functools

import pytest
from families import family, run
from pipelines import MODELS, PROMPT, close, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout
from dense_attn.integrations.diffusers.models.record import Model
from dense_attn.integrations.diffusers.prompts.state import RegionState

pytestmark = pytest.mark.usefixtures("one_thread")
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
COVER = [Region(LEFT, "a cat"), Region(RIGHT, "dog and a small cat")]
NAMES = "flux", "flux2", "chroma", "qwen"


def named(name: str) -> tuple[object, object]:
    """A pipeline, and its run of a prompt."""
    if name in MODELS:
        pipe = pipeline(name)
        return pipe, functools.partial(latents, pipe, steps=2)
    return family(name), functools.partial(run, name, PROMPT, steps=2)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The tokens of each text in calls with texts of regions."""
    seen, own = [], RegionState._make

    def watched(state: RegionState, call: object, slots: object, spans: object) -> None:
        seen.append(slots.sizes)
        own(state, call, slots, spans)

    monkeypatch.setattr(RegionState, "_make", watched)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_the_image_is_the_same(name: str, counts: list, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, run_of = named(name)

    def made() -> Tensor:
        counts.clear()
        with apply_layout(pipe, PROMPT, COVER):
            return run_of()

    less = made()
    assert counts
    assert all(first == 0 and min(others) > 0 for first, *others in counts)
    kind = next(each for each in type(pipe_model(pipe)).__mro__ if "without_text" in vars(each))
    monkeypatch.setattr(kind, "without_text", Model.without_text)
    whole = made()
    assert all(min(sizes) > 0 for sizes in counts)
    assert close(less, whole)
    assert not close(less, run_of())


def pipe_model(pipe: object) -> Model:
    from dense_attn.integrations.diffusers.models import model_of

    return model_of(pipe)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("regions", "options"),
    [(COVER[:1], {}), (COVER, {"base_ratio": 0.2}), (COVER, {"every": 2})],
)
def test_a_text_that_is_seen_stays(name: str, regions: list, options: dict, counts: list) -> None:
    """Where no region is, beneath regions, and in layers that are left out."""
    pipe, run_of = named(name)
    with apply_layout(pipe, PROMPT, regions, **options):
        run_of()
    assert all(sizes[0] > 0 for sizes in counts)
