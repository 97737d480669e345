"""A call's own text that no token sees, which is left out: what the image becomes is the same."""

from __future__ import annotations

import functools

import pytest
import torch
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


def parted(left: Tensor, right: Tensor) -> list[Region]:
    return [Region(left, "a cat"), Region(right, "dog and a small cat")]


def drawn() -> dict[str, tuple[list[Region], bool]]:
    """Regions that cover an image of 20 x 30, and whether the grid has a token in none."""
    left = torch.zeros(20, 30)
    left[:, :12] = 1
    dot, hole = left.clone(), 1 - left
    dot[0, 0] = 0.5
    blurred = torch.nn.functional.avg_pool2d(left[None], 5, 1, 2, count_include_pad=False)[0]
    under = hole.clone()
    under[0, 0] = 1
    hole[1, 20] = 0  # which is no token's nearest pixel
    return {
        "soft": (
            parted(
                torch.linspace(1, 0, 30).expand(20, 30),
                torch.linspace(0, 1, 30)[None].expand(20, 30),
            ),
            False,
        ),
        "feathered": (parted(blurred, 1 - blurred), False),
        "feathered over all": (parted(blurred, torch.ones(20, 30)), False),
        "mixed": (parted(dot, under), True),
        "a hole between": (parted(left, hole), False),
    }


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
    compare(name, COVER, False, counts, monkeypatch)


@pytest.mark.parametrize("masks", drawn())
@pytest.mark.parametrize("name", [pytest.param(*NAMES[:1], marks=pytest.mark.full), *NAMES[2:3]])
def test_of_masks_the_grid_decides(
    name: str, masks: str, counts: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hard ones are there by their nearest pixel, soft ones by the mean of a token's cell."""
    compare(name, *drawn()[masks], counts, monkeypatch)


def compare(
    name: str, regions: list, seen: bool, counts: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is the one that all texts give, and none of a text that no token sees is there."""
    pipe, run_of = named(name)

    def made() -> Tensor:
        counts.clear()
        with apply_layout(pipe, PROMPT, regions):
            return run_of()

    less = made()
    assert counts
    assert all((first > 0) == seen and min(others) > 0 for first, *others in counts)
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
