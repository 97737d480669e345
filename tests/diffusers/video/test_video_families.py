"""Models of videos: whole runs, words and strengths by hand, the negative prompt."""

from __future__ import annotations

import re

import pytest
import torch
from families import classes, family, run, video
from pipelines import PROMPT, REGIONS, close, diffusers
from torch import Tensor

from dense_attn.integrations.diffusers import apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("name", video.FAMILIES)
STRONG = {"exponent": 0.0, "active": 1.0}
LEFT_ALONE = "refiner"  # layers of the text alone
# nine frames of a video, 8 x 16 pixels; those of its latents are 1, 4 and 4 of them
CAT = torch.ones(9, 8, 16, dtype=torch.bool)
for frame, left in ((0, 0), (3, 4), (7, 8)):  # in the middle of each; the others are decoys
    CAT[frame] = False
    CAT[frame, :, left : left + 8] = True
DOG = torch.zeros(8, 16, dtype=torch.bool)
DOG[4:, 4:] = True
MASKS = {
    "still": (CAT[0], DOG),
    "moving": (CAT, DOG),
    "frames of latents": (CAT[[0, 3, 7]], DOG),
}
FRAMES = {"still": (0, 0, 0), "moving": (0, 3, 7), "frames of latents": (0, 3, 7)}
# a space's token and a word's: T5 reads _ a _ c a t _ d o g, Llama a _ c a t _ d o g
PLACES = {"t5": ((2, 6), (6, 10)), "chat": ((1, 5), (5, 9))}


@every_family
def test_whole_runs_equal_the_reference(name: str) -> None:
    pipe, plain = family(name), run(name, PROMPT, steps=2)
    regions = [("cat", CAT), ("dog", DOG)]
    with apply_layout(pipe, PROMPT, regions, **STRONG):
        fused = run(name, PROMPT, steps=2)
    with apply_layout(pipe, PROMPT, regions, backend="reference", **STRONG):
        exact = run(name, PROMPT, steps=2)
    assert close(fused, exact)
    assert not close(fused, plain)
    least = {"cross_weight": 1e-30, "self_weight": 1e-30, "encode_phrases": False}
    with apply_layout(pipe, PROMPT, regions, **least, **STRONG):  # masks of keys count as before
        assert close(run(name, PROMPT, steps=2), plain)
    with apply_layout(pipe, PROMPT, regions, cross_weight=0, self_weight=0):
        assert torch.equal(run(name, PROMPT, steps=2), plain)
    assert torch.equal(run(name, PROMPT, steps=2), plain)


@every_family
def test_the_negative_prompt_is_left_alone(name: str) -> None:
    """Estimates of a first step, in the order of branches that the pipeline has."""
    seen: list[Tensor] = []
    handle = family(name).transformer.register_forward_hook(
        lambda _module, _args, out: seen.extend(out[0])
    )
    try:
        run(name, PROMPT, steps=1)
        with apply_layout(family(name), PROMPT, REGIONS, encode_phrases=False, **STRONG):
            run(name, PROMPT, steps=1)
    finally:
        handle.remove()
    plain, ours = seen[:2], seen[2:]
    assert len(plain) == len(ours) == 2
    prompt = 1 if name in ("ltx", "cogvideox") else 0  # halves
    assert not close(ours[prompt], plain[prompt])
    torch.testing.assert_close(ours[1 - prompt], plain[1 - prompt], rtol=1e-5, atol=1e-6)


def image_side(frames: tuple[int, ...], weight: float) -> tuple[list[int], list[float]]:
    """Words and strengths of frames of 2 x 4 tokens, by the masks' pixels at their corners."""
    corners = [torch.stack((CAT[frame], DOG))[:, ::4, ::4].flatten(1) for frame in frames]
    inside = torch.cat(corners, 1)
    share = inside.float().mean(1)
    assert share.tolist() == [0.5, 0.375]
    words, strengths = [], []
    for cat, dog in inside.T.tolist():
        words.append(cat + 2 * dog)
        strengths.append(weight * (1 - cat * 0.5 - dog * 0.375))
    return words, strengths


def text_side(kind: str) -> tuple[list[int], list[float]]:
    """Words and strengths of a prompt's 24 tokens; phrases have the shares of their masks."""
    words, strengths = [0] * 24, [0.0] * 24
    for word, share, (start, stop) in zip((1, 2), (0.5, 0.375), PLACES[kind]):
        words[start:stop] = [word] * (stop - start)
        strengths[start:stop] = [1 - share] * (stop - start)
    return words, strengths


def by_hand(name: str, frames: tuple[int, ...]) -> list[tuple[list[int], list[int], list[float]]]:
    """The words of queries and keys and the strengths of a block's layers, one after the other."""
    words, strengths = image_side(frames, 0.3)
    if name == "cogvideox":
        text = text_side("t5")
        words, strengths = text[0] + words, text[1] + strengths
        return [(words, words, strengths)]
    if name == "hunyuan_video":
        text = text_side("chat")
        words, strengths = words + text[0], strengths + text[1]
        return [(words, words, strengths)]
    if name == "hunyuan_video15":  # <|im_start|> _ c a t _ d o g, and what is not there
        text = text_side("t5")
        words, strengths = words + text[0] + [0] * 22, strengths + text[1] + [0.0] * 22
        return [(words, words, strengths)]
    cross = words, text_side("t5")[0], image_side(frames, 1.0)[1]
    return [(words, words, strengths), cross]


@pytest.mark.parametrize("kind", MASKS)
@every_family
def test_words_and_strengths(name: str, kind: str, calls: list) -> None:
    """Frames, orders of segments and a template's dropped tokens, counted by hand."""
    regions = list(zip(("cat", "dog"), MASKS[kind]))
    with apply_layout(family(name), PROMPT, regions, modulation="range", exponent=0.0):
        run(name, PROMPT, steps=1)
    right = by_hand(name, FRAMES[kind])
    attentions = [
        layer
        for layer, module in family(name).transformer.named_modules()
        if hasattr(module, "processor") and not re.search(LEFT_ALONE, layer)
    ]
    assert len(calls) == len(attentions)
    for i, (_, _, _, q_words, k_words, strength) in enumerate(calls):
        ours, theirs, strengths = right[i % len(right)]
        assert q_words.view(-1).tolist() == ours
        assert k_words.view(-1).tolist() == theirs
        torch.testing.assert_close(strength.view(-1), torch.tensor(strengths))


@pytest.mark.full
@every_family
def test_videos_of_a_batch_are_those_alone(name: str) -> None:
    """Prompts of different lengths, whose padding is masked, and regions of frames in one."""
    prompts = [PROMPT, "dog and a small cat"]
    regions = [[("cat", CAT)], [("cat", CAT[0]), ("dog", DOG)]]
    latents = []
    for i in range(2):
        with apply_layout(family(name), prompts[i], regions[i], **STRONG):
            generator = torch.Generator().manual_seed(i)
            latents.append(run(name, prompts[i], steps=2, generator=generator))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    more = {"negative_prompt": ["fog", "fog"]} if name.startswith("hunyuan_video") else {}
    with apply_layout(family(name), prompts, regions, **STRONG):
        both = run(name, prompts, steps=2, generator=generators, **more)
    assert close(both, torch.cat(latents))


@pytest.mark.full
def test_frames_that_are_left_out_in_the_middle_of_a_run(calls: list) -> None:
    """ChronoEdit's later steps have the first and the last frame alone; all have the regions."""
    pipe = classes.made(diffusers.ChronoEditPipeline)
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe.scheduler = diffusers.UniPCMultistepScheduler(**config)  # as the real one's

    def frames() -> Tensor:
        return pipe(
            classes.PICTURE,
            PROMPT,
            height=32,
            width=64,
            num_frames=9,
            num_inference_steps=3,
            enable_temporal_reasoning=True,
            num_temporal_reasoning_steps=1,
            max_sequence_length=512,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    regions = [("cat", CAT[0]), ("dog", DOG)]
    plain = frames()
    with apply_layout(pipe, PROMPT, regions, **STRONG):
        assert not close(frames(), plain)
    words = image_side((0,), 0.3)[0]
    assert {tuple(call[3].view(-1).tolist()) for call in calls} == {(*words * 3,), (*words * 2,)}
    with (
        pytest.raises(ValueError, match=r"^regions\[0\] must have a mask of 2 dimensions \[height"),
        apply_layout(pipe, PROMPT, [("cat", CAT)]),
    ):
        pytest.fail("the block must not run")
