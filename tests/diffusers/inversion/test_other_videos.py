"""Refusals of other videos, in the words of who gave them."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
from families.chained import bytes_of, call_of, image_of, pipe_of
from PIL import Image

from dense_attn.integrations.diffusers import Inversion, invert

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURE = Image.new("RGB", (48, 32))
RGBA = [(0, 0)] * 3 + [(0, 1)]
TENSOR = "video must have shape (F, 3, H, W) or (B, F, 3, H, W) as a tensor"
ARRAY = "video must have shape (F, H, W, 3) or (B, F, H, W, 3) as an array"
FRAMES = "video must have shape (H, W, 3) or (F, H, W, 3) as an array of a list"
FORMS = "video must be a list of PIL images, a tensor [F, 3, H, W], an array [F, H, W, 3], or a lis"
FORMS += "t of these"
VALUES = "video must hold floats in 0..1 or bytes, got"
SAME = "video must hold frames of one shape and dtype, got"


def inverted(video: Any, prompt: Any = "a cat", pipe: Any = None) -> Inversion:
    pipe = pipe or pipe_of("wan")
    return invert(pipe, video, prompt, num_inference_steps=2, call=call_of("wan"))


def test_several_videos_have_a_prompt_each() -> None:
    with pytest.raises(
        ValueError, match=r"^prompt must hold one entry for each of the 2 videos, got 1"
    ):
        inverted(image_of("wan", 2), ["a cat"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x[:, :4], "the number of frames of video must be 1 above a multiple of 4, got"),
        (lambda x: x[..., :40], "video must have sides of multiples of 16, got 40 x 32"),
        (lambda x: x[:, :, :2], f"{TENSOR}, got (1, 5, 2, 32, 48)"),
        (lambda x: x[0, 0], f"{TENSOR}, got (3, 32, 48)"),
        (lambda x: x[:, :0], f"{TENSOR}, got (1, 0, 3, 32, 48)"),
        (lambda x: x[0].numpy(), f"{ARRAY}, got (5, 3, 32, 48)"),
        (lambda _: np.pad(bytes_of("wan"), RGBA), f"{ARRAY}, got (5, 32, 48, 4)"),
        (lambda _: list(np.pad(bytes_of("wan"), RGBA)), f"{FRAMES}, got (32, 48, 4)"),
        (
            lambda x: [[*x]],
            "video must have shape (3, H, W) as a tensor of a list, got (5, 3, 32, ",
        ),
        (lambda x: 2 * x, "video must hold floats in 0..1 or bytes, got values from 0"),
        (lambda x: 2 * x.numpy()[0].transpose(0, 2, 3, 1), f"{VALUES} values from 0"),
        (lambda x: x * math.nan, f"{VALUES} nan"),
        (lambda x: 255 * x.int(), f"{VALUES} int32"),
        (lambda x: x.numpy() > 0.5, f"{VALUES} bool"),
        (lambda x: x.to("meta"), "video must hold values, got a meta tensor"),
        (lambda x: x.byte().to("meta"), "video must hold values, got a meta tensor"),
        (
            lambda _: [PICTURE.crop((0, 0, 0, 0))] * 5,
            "video must have sides of multiples of 16, got ",
        ),
        (lambda _: PICTURE, f"{FORMS}, got Image 48 x 32"),
        (lambda _: "video.mp4", f"{FORMS}, got str"),
        (lambda _: [], f"{FORMS}, got a list of 0"),
        (
            lambda x: [*x[0], PICTURE],
            f"{FORMS}, got a list of 6: float32 (3, 32, 48), Image 48 x 32",
        ),
        (lambda x: [PICTURE, x[0, 0]], f"{FORMS}, got a list of 2: Image 48 x 32, float32 (3, "),
        (lambda x: [[[*x[0]]]], f"{FORMS}, got a list of 5: float32 (3, 32, 48)"),
        (lambda x: [x[0], x[0, :1]], f"{SAME} float32 (5, 3, 32, 48) and float32 (1, 3, 32, 48)"),
        (
            lambda x: [*x[0, :4], x[0, 4].byte()],
            f"{SAME} float32 (3, 32, 48) and uint8 (3, 32, 48)",
        ),
        (
            lambda _: [bytes_of("wan"), bytes_of("wan")[:, :16]],
            f"{SAME} uint8 (5, 32, 48, 3) and uint8 (5, 1",
        ),
        (lambda _: [[PICTURE] * 5, [PICTURE]], f"{SAME} a list of 5: Image 48 x 32 and a list of "),
    ],
)
def test_other_videos_are_refused(change: Any, sentence: str) -> None:
    """Before anything is encoded."""
    pipe, seen = copy.copy(pipe_of("wan")), []
    vars(pipe)["encode_prompt"] = seen.append
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(sentence)}"):
        inverted(change(image_of("wan")), pipe=pipe)
    assert seen == []


def test_pictures_of_two_sizes_are_refused() -> None:
    pictures = [Image.new("RGB", size) for size in ((48, 32), (32, 48))]
    with pytest.raises(ValueError, match=r"^video must hold pictures of one size, got 48 x 32 and"):
        inverted(pictures)


def test_a_transparent_video_is_warned_of_in_its_name() -> None:
    clear = [Image.new("RGBA", (48, 32))] * 5
    for video in (clear, [clear]):
        with pytest.warns(UserWarning, match=r"^video must be opaque to be taken as") as told:
            invert(pipe_of("wan"), video, "a cat", num_inference_steps=2, call=call_of("wan"))
        assert told[0].filename == __file__
