"""Masks of as many frames as the video of a call, in every family; all others are refused."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from families import classes, family, run, video
from pipelines import PROMPT, diffusers, state_of

from dense_attn.integrations.diffusers import Region, apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
LEFT = torch.zeros(8, 16, dtype=torch.bool)
LEFT[:, :8] = True
TWO_LATENTS = "cogvideox 1.5"  # in a token
FAMILIES = *video.FAMILIES, TWO_LATENTS, "kandinsky5_t2v"


@pytest.fixture(autouse=True)
def _two_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    own = (lambda: video.cogvideox(2), video.FAMILIES["cogvideox"][1])
    monkeypatch.setitem(video.FAMILIES, TWO_LATENTS, own)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list:
    """Prompts that any of these pipelines has encoded."""
    found: list = []
    for name in FAMILIES:
        pipe = family(name)

        def encode(*args: object, own: object = pipe.encode_prompt, **options: object) -> object:
            found.append(args)
            return own(*args, **options)

        monkeypatch.setattr(pipe, "encode_prompt", functools.wraps(pipe.encode_prompt)(encode))
    return found


def regions(count: int, prompts: bool = False) -> list:
    mask = LEFT.expand(count, 8, 16)
    return [Region(mask, "cat")] if prompts else [("cat", mask)]


def refused(name: str, asked: int, count: int, told: str, **options: object) -> None:
    rule = rf"^regions must have masks of the video's {told} of its latents, got {count}$"
    with (
        apply_layout(family(name), PROMPT, regions(count, **options), encode_phrases=False),
        pytest.raises(ValueError, match=rule),
    ):
        run(name, PROMPT, steps=1, num_frames=asked)


def taken(name: str, asked: int, count: int, calls: list) -> list[int]:
    """The words of a step's first layer."""
    calls.clear()
    with apply_layout(family(name), PROMPT, regions(count), encode_phrases=False):
        run(name, PROMPT, steps=1, num_frames=asked)
    return calls[0][3].flatten().tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_frames_of_a_call(name: str, calls: list, encoded: list) -> None:
    """Counts of the video and of its latents pass; one more or one less is refused first."""
    for count in (2, 4, 8, 10, 13):
        refused(name, 9, count, "9 frames or of the 3")
    assert not encoded
    assert taken(name, 9, 9, calls) == taken(name, 9, 3, calls)
    assert encoded


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_past_the_last_whole_latents(name: str, calls: list, encoded: list) -> None:
    """Eleven become nine: masks may be of either."""
    for count in (2, 4, 8, 10, 12):
        refused(name, 11, count, "9 or 11 frames or of the 3")
    assert not encoded
    assert taken(name, 11, 11, calls) == taken(name, 11, 9, calls) == taken(name, 11, 3, calls)


@pytest.mark.parametrize(
    ("name", "counts", "others", "told"),
    [
        ("wan_2_2", (4, 13), (3, 9, 12), "13 frames or of the 4"),  # up to the next whole ones
        ("ltx", (3, 9, 12), (4, 13), "9 or 12 frames or of the 3"),
        (TWO_LATENTS, (3, 9, 12), (4, 13), "9 or 12 frames or of the 3"),
    ],
)
def test_a_number_that_pipelines_round_either_way(
    name: str, counts: tuple, others: tuple, told: str, calls: list
) -> None:
    words = [taken(name, 12, count, calls) for count in counts]
    assert all(each == words[0] for each in words)
    calls.clear()
    for count in others:
        refused(name, 12, count, told)
    assert not calls


def test_two_latents_in_a_token_tell_nine_frames_from_thirteen(calls: list) -> None:
    """A latent is put before the nine frames'; the denoiser's calls of both are the same."""
    moving = torch.stack([LEFT] * 5 + [~LEFT] * 8)
    seen = {}
    for count in (9, 13):
        calls.clear()
        with apply_layout(family(TWO_LATENTS), PROMPT, [("cat", moving[:count])]):
            run(TWO_LATENTS, PROMPT, steps=1, num_frames=count)
            seen[count] = calls[0][3][0, 24:].view(2, 8).tolist()
    left, right = [1, 1, 0, 0] * 2, [0, 0, 1, 1] * 2
    assert seen == {9: [left, right], 13: [left, right]}
    refused(TWO_LATENTS, 9, 13, "9 frames or of the 3")
    refused(TWO_LATENTS, 13, 9, "13 frames or of the 4")
    refused(TWO_LATENTS, None, 13, "9 frames or of the 3")  # the model's own number


def test_prompts_of_regions(encoded: list) -> None:
    for count in (8, 10):
        before = len(encoded)
        rule = r"^regions must have masks of the video's 9 frames or of the 3 of its latents, got "
        with apply_layout(family("wan_2_2"), PROMPT, regions(count, prompts=True)):
            inside = len(encoded)
            with pytest.raises(ValueError, match=rule):
                run("wan_2_2", PROMPT, steps=1)
        assert inside == len(encoded) >= before


def test_latents_of_the_callers_own(calls: list) -> None:
    """A call's latents count where they are given, whatever number it asks for."""
    latents = torch.zeros(1, 4, 3, 4, 8)
    with apply_layout(family("wan_2_2"), PROMPT, regions(9)):
        run("wan_2_2", PROMPT, steps=1, num_frames=17, latents=latents)
        assert calls
        with pytest.raises(ValueError, match=r"the video's 13 frames or of the 4 of its latents"):
            run("wan_2_2", PROMPT, steps=1, latents=torch.zeros(1, 4, 4, 4, 8))


def test_a_video_to_change(calls: list) -> None:
    """A pipeline without a number of frames makes as many as it is given."""
    pipe = classes.made(diffusers.CogVideoXVideoToVideoPipeline)
    with apply_layout(pipe, PROMPT, regions(5), encode_phrases=False):
        classes.call(pipe)
        assert calls
    for count in (1, 3, 4, 9):
        rule = rf"^regions must have masks of the video's 5 frames or of the 2 of .*, got {count}$"
        with (
            apply_layout(pipe, PROMPT, regions(count), encode_phrases=False),
            pytest.raises(ValueError, match=rule),
        ):
            classes.call(pipe)


def test_a_pipeline_is_as_it_was() -> None:
    """Blocks may end in any order; a copy that is made inside is heard by none of them."""
    pipe = family("wan_2_2")
    kind, before = diffusers.WanPipeline, state_of(pipe)
    assert type(pipe) is kind
    one, two = (apply_layout(pipe, PROMPT, regions(9)) for _ in range(2))
    one.__enter__()
    two.__enter__()
    assert isinstance(pipe, kind)
    assert type(pipe).__name__ == kind.__name__
    other = copy.copy(pipe)
    one.__exit__(None, None, None)
    two.__exit__(None, None, None)
    assert type(pipe) is kind
    assert state_of(pipe) == before
    options = video.SHAPES | {"num_inference_steps": 1, "output_type": "latent"}
    assert torch.isfinite(other(PROMPT, **options).frames).all()
