"""Models whose record is a table: whole runs, words and strengths by hand, the negative prompt."""

from __future__ import annotations

import re

import pytest
import torch
from families import FAMILIES, family, run
from pipelines import PROMPT, REGIONS, close
from torch import Tensor

from dense_attn.integrations.diffusers import apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
every_family = pytest.mark.parametrize("name", FAMILIES)
STRONG = {"exponent": 0.0, "active": 1.0}
MASKS = torch.zeros(2, 8, 12, dtype=torch.bool)
MASKS[0, :, :6] = True
MASKS[1, 4:, 2:] = True
BOTH = [("cat", MASKS[0]), ("dog", MASKS[1])]
# the tokens of a space and a word: T5 reads _ a _ c a t _ d o g, Qwen a _ c a t _ d o g;
# sixteen stand before the prompt in _ s _ <P r o m p t _ S t a r t > _ a _ c a t _ d o g </s>
PLACES = {"t5": ((2, 6), (6, 10)), "qwen": ((1, 5), (5, 9)), "chat": ((2, 6), (6, 10))}
PLACES["system"] = (18, 22), (22, 26)
LEFT_ALONE = "refiner"  # layers of the image or the text alone
# joint attention's segments: a text and its tokens, an image and its rows, columns, padding
JOINT = {
    "lumina2": (("system", 27), ("image", 2, 3, 0)),
    "z_image": (("image", 4, 6, 8), ("chat", 64)),
    "chroma": (("t5", 24), ("image", 4, 6, 0)),
}


@every_family
def test_whole_runs_equal_the_reference(name: str) -> None:
    pipe, plain = family(name), run(name, PROMPT)
    with apply_layout(pipe, PROMPT, REGIONS, **STRONG):
        fused = run(name, PROMPT)
    with apply_layout(pipe, PROMPT, REGIONS, backend="reference", **STRONG):
        exact = run(name, PROMPT)
    assert close(fused, exact)
    assert not close(fused, plain)
    least = {"cross_weight": 1e-30, "self_weight": 1e-30, "encode_phrases": False}
    with apply_layout(pipe, PROMPT, REGIONS, **least, **STRONG):
        assert close(run(name, PROMPT), plain)
    with apply_layout(pipe, PROMPT, REGIONS, cross_weight=0, self_weight=0):
        assert torch.equal(run(name, PROMPT), plain)
    assert torch.equal(run(name, PROMPT), plain)


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
    # halves, of which Z-Image has the prompt's first
    prompt = 1 if name in ("auraflow", "pixart") else 0
    assert not close(ours[prompt], plain[prompt])
    torch.testing.assert_close(ours[1 - prompt], plain[1 - prompt], rtol=1e-5, atol=1e-6)


def image_side(rows: int, columns: int, weight: float) -> tuple[list[int], list[float]]:
    """Words and strengths of an image's tokens, by the masks' pixels at their corners."""
    step = 8 // rows
    inside = MASKS[:, ::step, ::step][:, :rows, :columns].flatten(1)
    share = inside.float().mean(1)
    words, strengths = [], []
    for cat, dog in inside.T.tolist():
        words.append(cat + 2 * dog)
        strengths.append(weight * (1 - cat * float(share[0]) - dog * float(share[1])))
    return words, strengths


def text_side(kind: str, tokens: int) -> tuple[list[int], list[float]]:
    """Words and strengths of a prompt's tokens; phrases have the shares of their masks."""
    words, strengths = [0] * tokens, [0.0] * tokens
    for word, share, (start, stop) in zip((1, 2), (0.5, 40 / 96), PLACES[kind]):
        words[start:stop] = [word] * (stop - start)
        strengths[start:stop] = [1 - share] * (stop - start)
    return words, strengths


def sequence(segments: tuple[tuple, ...], weight: float) -> tuple[list[int], list[float]]:
    """Words and strengths of segments, one after the other."""
    words, strengths = [], []
    for kind, *sizes in segments:
        rest = sizes.pop() if kind == "image" else 0
        own = image_side(*sizes, weight) if kind == "image" else text_side(kind, *sizes)
        words += own[0] + [0] * rest
        strengths += own[1] + [0.0] * rest
    return words, strengths


def by_hand(name: str) -> dict[tuple[int, int], tuple[list[int], list[int], list[float]]]:
    """The words of queries and keys and the strengths of each kind of layers, by their lengths."""
    if name == "wan":
        text, _ = text_side("t5", 24)
        words, own = (2 * side for side in image_side(2, 3, 0.3))  # two frames
        cross = 2 * image_side(2, 3, 1.0)[1]
        return {(12, 12): (words, words, own), (12, 24): (words, text, cross)}
    if name == "pixart":
        text, _ = text_side("t5", 20)
        words, own = image_side(4, 6, 0.3)
        return {(24, 24): (words, words, own), (24, 20): (words, text, image_side(4, 6, 1.0)[1])}
    if name in JOINT:
        words, strengths = sequence(JOINT[name], 0.3)
    elif name == "qwen":
        text, image = text_side("qwen", 9 + 2), image_side(2, 3, 0.3)  # <|im_end|> and a line's end
        words, strengths = (a + b for a, b in zip(text, image))
    elif name == "flux2":
        text, image = text_side("chat", 24), image_side(4, 6, 0.3)
        words, strengths = (a + b for a, b in zip(text, image))
    else:
        text, image = text_side("t5", 24), image_side(4, 6, 0.3)
        words, strengths = ([0] * 8 + a + b for a, b in zip(text, image))
    return {(len(words), len(words)): (words, words, strengths)}


@every_family
def test_words_and_strengths(name: str, calls: list) -> None:
    """Registers, a template's dropped tokens, frames and orders of segments, counted by hand."""
    with apply_layout(family(name), PROMPT, BOTH, modulation="range", exponent=0.0):
        run(name, PROMPT, steps=1)
    layers = by_hand(name)
    assert {(call[0].shape[2], call[1].shape[2]) for call in calls} == set(layers)
    attentions = [
        layer
        for layer, module in family(name).transformer.named_modules()
        if hasattr(module, "processor") and not re.search(LEFT_ALONE, layer)
    ]
    assert len(calls) == len(attentions)
    for q, k, _, q_words, k_words, strength in calls:
        ours, theirs, right = layers[q.shape[2], k.shape[2]]
        assert q_words.view(-1).tolist() == ours
        assert k_words.view(-1).tolist() == theirs
        torch.testing.assert_close(strength.view(-1), torch.tensor(right))


def test_a_prompt_that_is_read_in_small_letters(
    calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phrases are found where the small prompt has them; one that is cleaned is refused."""
    pipe, prompt = family("pixart"), "  A Cat DOG "
    regions = [("Cat", MASKS[0]), ("DOG", MASKS[1])]
    with apply_layout(pipe, prompt, regions, exponent=0.0):
        run("pixart", prompt, steps=1)
    text = next(call[4] for call in calls if call[1].shape[2] == 20)
    assert text.view(-1).tolist() == text_side("t5", 20)[0]
    monkeypatch.setattr("diffusers.utils.is_bs4_available", lambda: True)
    monkeypatch.setattr("diffusers.utils.is_ftfy_available", lambda: True)
    monkeypatch.setattr(pipe, "_clean_caption", lambda text: text.lower().replace("dog", "elk"))
    rule = r"^regions\[0\] must have a phrase of a prompt that clean_caption leaves as it is"
    with pytest.raises(ValueError, match=rule), apply_layout(pipe, prompt, regions):
        pytest.fail("the block must not run")


def test_prompts_that_lumina_2_places_otherwise_are_refused() -> None:
    pipe, prompts = family("lumina2"), [PROMPT, "a cat a dog"]
    with (
        apply_layout(pipe, PROMPT, REGIONS),
        pytest.raises(ValueError, match=r"^system_prompt must be the pipeline's own while a"),
    ):
        run("lumina2", PROMPT, system_prompt="t")
    with (
        apply_layout(pipe, prompts, REGIONS, encode_phrases=False),
        pytest.raises(ValueError, match=r"^prompt must have prompts of as many tokens as each"),
    ):
        pipe(prompts, height=32, width=32, max_sequence_length=32, num_inference_steps=1)


def test_a_pipeline_of_two_denoisers_is_refused() -> None:
    pipe = family("wan")
    pipe.register_modules(transformer_2=pipe.transformer)
    try:
        with (
            pytest.raises(
                ValueError, match=r"^pipe must have one denoiser, got WanPipeline with a"
            ),
            apply_layout(pipe, PROMPT, REGIONS),
        ):
            pytest.fail("the block must not run")
    finally:
        pipe.register_modules(transformer_2=None)


def test_z_image_ends_its_guidance_before_the_run(calls: list) -> None:
    """The last steps have the prompt's rows alone, which are modulated as before."""
    pipe, batches = family("z_image"), []
    handle = pipe.transformer.register_forward_hook(
        lambda _module, _args, out: batches.append(len(out[0]))
    )
    try:
        with apply_layout(pipe, PROMPT, REGIONS, **STRONG):
            run("z_image", PROMPT, cfg_truncation=0.5)
    finally:
        handle.remove()
    assert batches[0] == 2
    assert batches[-1] == 1
    assert len(calls) % len(batches) == 0
    assert {len(call[0]) for call in calls} == {1}
    last = calls[-len(calls) // len(batches) :]
    assert all(bool((call[5] > 0).any()) for call in last)
