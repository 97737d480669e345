"""Models whose record is a table: whole runs, words and strengths by hand, the negative prompt."""

from __future__ import annotations

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
# the tokens of a space and a word: T5 reads _ a _ c a t _ d o g, Qwen a _ c a t _ d o g
PLACES = {"t5": ((2, 6), (6, 10)), "qwen": ((1, 5), (5, 9)), "chat": ((2, 6), (6, 10))}


@every_family
def test_whole_runs_equal_the_reference(name: str) -> None:
    pipe, plain = family(name), run(name, PROMPT)
    with apply_layout(pipe, PROMPT, REGIONS, **STRONG):
        fused = run(name, PROMPT)
    with apply_layout(pipe, PROMPT, REGIONS, backend="reference", **STRONG):
        exact = run(name, PROMPT)
    assert close(fused, exact)
    assert not close(fused, plain)
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
    prompt = 1 if name == "auraflow" else 0  # halves, of which Z-Image has the prompt's first
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


def by_hand(name: str) -> dict[tuple[int, int], tuple[list[int], list[int], list[float]]]:
    """The words of queries and keys and the strengths of each kind of layers, by their lengths."""
    if name == "wan":
        text, _ = text_side("t5", 24)
        words, own = (2 * side for side in image_side(2, 3, 0.3))  # two frames
        cross = 2 * image_side(2, 3, 1.0)[1]
        return {(12, 12): (words, words, own), (12, 24): (words, text, cross)}
    if name == "qwen":
        text, image = text_side("qwen", 9 + 2), image_side(2, 3, 0.3)  # <|im_end|> and a line's end
        words, strengths = (a + b for a, b in zip(text, image))
    elif name == "z_image":  # 24 tokens and 8 of padding, 11 and 21
        text, image = text_side("chat", 1 + 9 + 1), image_side(4, 6, 0.3)
        words, strengths = (a + [0] * 8 + b + [0] * (32 - len(b)) for a, b in zip(image, text))
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
    with apply_layout(family(name), PROMPT, BOTH, exponent=0.0):
        run(name, PROMPT, steps=1)
    layers = by_hand(name)
    assert {(call[0].shape[2], call[1].shape[2]) for call in calls} == set(layers)
    attentions = [m for m in family(name).transformer.modules() if hasattr(m, "processor")]
    refiners = 2 if name == "z_image" else 0  # of the image or the text alone
    assert len(calls) == len(attentions) - refiners
    for q, k, _, q_words, k_words, strength in calls:
        ours, theirs, right = layers[q.shape[2], k.shape[2]]
        assert q_words.view(-1).tolist() == ours
        assert k_words.view(-1).tolist() == theirs
        inside = torch.tensor(ours) != 0
        torch.testing.assert_close(strength.view(-1)[inside], torch.tensor(right)[inside])


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
