"""Masks with frames: which of them stand for a video's latents, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import family, run, video
from pipelines import PROMPT, REGIONS, latents, pipeline

from dense_attn.integrations.diffusers import Region, apply_layout
from dense_attn.integrations.diffusers.regions.frames import Video

pytestmark = pytest.mark.usefixtures("one_thread")
LEFT = torch.zeros(8, 16, dtype=torch.bool)
LEFT[:, :8] = True


def words(name: str, regions: list, calls: list, **options: object) -> list[list[int]]:
    """The words of the image's tokens, frame by frame, in a step's first layer."""
    calls.clear()
    with apply_layout(family(name), PROMPT, regions):
        run(name, PROMPT, steps=1, **options)
    return calls[0][3].view(-1, 8).tolist()


@pytest.mark.parametrize(
    ("video", "count", "owners"),
    [
        (Video(3, 1, 4), 9, [0, 1, 1, 1, 1, 2, 2, 2, 2]),
        (Video(3, 1, 4), 3, [0, 1, 2]),
        # frames past the last whole four, which pipelines leave out
        (Video(3, 1, 4), 11, [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]),
        (Video(2, 1, 8), 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]),
        (Video(1, 1, 4), 1, [0]),
        # two latents a token: of four, and of three with one that is put before them
        (Video(4, 2, 4), 13, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]),
        (Video(4, 2, 4, 9), 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]),
        (Video(4, 2, 4, 9), 3, [0, 1, 1]),
        (Video(4, 2, 4, 12), 12, [0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]),
        (Video(2, 2, 4), 2, [0, 0]),
        (Video(2, 2, 4, 5), 5, [0, 0, 0, 0, 0]),
        (Video(2, 2, 4, 1), 1, [0]),
    ],
)
def test_the_frames_of_tokens(video: Video, count: int, owners: list[int]) -> None:
    assert video.owners(count) == owners


@pytest.mark.parametrize(
    ("video", "wrong", "told"),
    [
        (Video(4, 2, 4, 9), (2, 4, 8, 10, 13), "9 frames or of the 3"),
        (Video(4, 2, 4, 11), (2, 4, 8, 10, 12, 13), "9 or 11 frames or of the 3"),
        (Video(4, 2, 4, 13), (3, 9, 12, 14), "13 frames or of the 4"),
        (Video(4, 1, 4, 12), (3, 9, 12), "13 frames or of the 4"),  # some pipelines round up
        (Video(3, 1, 4, 49), (2, 8, 10, 49), "9 frames or of the 3"),  # latents of the caller's
        (Video(3, 1, 4), (2, 4, 8, 13), "9 frames or of the 3"),
    ],
)
def test_other_numbers_of_frames(video: Video, wrong: tuple[int, ...], told: str) -> None:
    for count in wrong:
        with pytest.raises(ValueError, match=rf"the video's {told} of its latents, got {count}$"):
            video.owners(count)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 13])
def test_frames_that_do_not_fit_are_refused(count: int, calls: list) -> None:
    """The call says it before its first step, and a call that fits runs in the same block."""
    regions = [("cat", LEFT.expand(count, 8, 16))]
    rule = rf"^regions must have masks of the video's 9 frames or of the 3 of .*, got {count}$"
    with apply_layout(family("wan_2_2"), PROMPT, regions):
        with pytest.raises(ValueError, match=rule):
            run("wan_2_2", PROMPT, steps=1)
        assert not calls
        if count == 13:
            run("wan_2_2", PROMPT, steps=1, num_frames=13)
            assert calls


def test_a_region_of_other_frames_than_those_in_the_middle(calls: list) -> None:
    """It has all that it takes in the frames of each token; one that comes and goes is gone."""
    moment = torch.zeros(9, 8, 16, dtype=torch.bool)
    moment[1, :, 12:] = moment[2, 4:, :4] = moment[5, :4, :4] = True
    seen = words("wan_2_2", [("cat", moment)], calls)
    assert seen == [[0] * 8, [0, 0, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]]
    moment[3] = LEFT
    seen = words("wan_2_2", [("cat", moment)], calls)
    assert seen == [[0] * 8, [1, 1, 0, 0] * 2, [0] * 8]


def test_small_places_are_kept_in_each_frame(calls: list) -> None:
    """A pixel between those that the tokens' corners take counts in its frame alone."""
    small = LEFT.repeat(9, 1, 1)
    small[3] = False
    small[3, 2, 9] = True
    seen = words("wan_2_2", [("cat", small)], calls)
    assert seen == [[1, 1, 0, 0] * 2, [0, 0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0] * 2]


def test_frames_that_pipelines_leave_out(calls: list) -> None:
    """Eleven frames become nine; the last two have no place, and the others theirs."""
    moving = torch.stack([LEFT] * 8 + [~LEFT] * 3)
    seen = words("wan_2_2", [("cat", moving)], calls, num_frames=11)
    assert seen == [[1, 1, 0, 0] * 2] * 3


def test_kinds_of_masks_stand_beside_each_other(calls: list) -> None:
    """A box and a mask of all frames beside arrays with frames."""
    moving = np.stack([LEFT.numpy()] * 4 + [~LEFT.numpy()] * 5)
    seen = words("wan_2_2", [("cat", moving), ("dog", (0.0, 0.5, 1.0, 1.0))], calls)
    assert seen == [[1, 1, 0, 0, 3, 3, 2, 2]] * 2 + [[0, 0, 1, 1, 2, 2, 3, 3]]


def test_videos_of_a_batch(calls: list) -> None:
    """Each prompt has its own masks, with frames or without."""
    prompts = [PROMPT, PROMPT]
    regions = [[("cat", LEFT)], [("cat", torch.stack([LEFT, ~LEFT, LEFT]))]]
    with apply_layout(family("wan_2_2"), prompts, regions):
        run("wan_2_2", prompts, steps=1)
    still, moving = [1, 1, 0, 0] * 2, [0, 0, 1, 1] * 2
    assert calls[0][3].tolist() == [3 * still, still + moving + still]


@pytest.mark.full
def test_two_latents_in_a_token(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    """CogVideoX 1.5 puts a latent before those of nine frames, for tokens of two."""
    monkeypatch.setitem(video.FAMILIES, "cogvideox 1.5", (lambda: video.cogvideox(2), video.SHAPES))
    moving = torch.stack([LEFT] + [~LEFT] * 8)
    with apply_layout(family("cogvideox 1.5"), PROMPT, [("cat", moving)], modulation="range"):
        run("cogvideox 1.5", PROMPT, steps=1)
    assert calls[0][3][0, 24:].view(2, 8).tolist() == [[1, 1, 0, 0] * 2, [0, 0, 1, 1] * 2]


def test_what_is_refused() -> None:
    pipe, image = family("wan_2_2"), pipeline("sd")
    nine, frames = LEFT.expand(9, 8, 16), "or of 3 \\[frames, height, width\\]"
    flat = r"^regions\[0\] must have a mask of 2 dimensions \[height, width\]"
    box = (0.0, 0.0, 0.5, 1.0)
    for of, regions, rule in (
        (image, [("cat", nine)], rf"{flat}, got \(9, 8, 16\)$"),
        (pipe, [("cat", nine[None])], rf"{flat}, {frames}, got \(1, 9, 8, 16\)$"),
        (
            pipe,
            [("cat", nine), ("dog", nine[:3])],
            r"^regions\[1\] must have a mask of as many frames as the others, 9, got 3$",
        ),
        (
            pipe,
            [("cat", nine), ("dog", LEFT[:, :8])],
            r"^regions\[1\] must have a mask of the size \(8, 16\) of the others, got \(8, 8\)$",
        ),
        (
            pipe,
            [("cat", ~nine & nine)],
            r"^regions\[0\] must have a mask of at least one pixel, got none$",
        ),
        (image, [Region(nine, "cat"), Region(box, "dog")], rf"{flat}, got \(9, 8, 16\)$"),
    ):
        with pytest.raises(ValueError, match=rule), apply_layout(of, PROMPT, regions):
            pytest.fail("the block must not run")
    assert torch.isfinite(latents(image, steps=2)).all()


def test_a_template_of_the_calls_own_is_refused() -> None:
    """Phrases have their places in the pipeline's template alone."""
    with (
        apply_layout(family("hunyuan_video"), PROMPT, REGIONS),
        pytest.raises(ValueError, match=r"^prompt_template must be the pipeline's own while a l"),
    ):
        run("hunyuan_video", PROMPT, prompt_template={"template": "{}", "crop_start": 0})
