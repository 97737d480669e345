"""Models whose record is a table: whole runs, words and strengths by hand, the negative prompt."""

from __future__ import annotations

import re

import pytest
import torch
from families import FAMILIES, family, run
from pipelines import PROMPT, REGIONS, close, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import apply_layout
from dense_attn.layout_attention import masks

pytestmark = pytest.mark.usefixtures("one_thread")
# others of a kind, as kandinsky5_i2i beside kandinsky5
VARIANTS = {"kandinsky5_i2i", "kandinsky5_t2v", "qwen_edit_plus"}


def each(*left_out: str) -> pytest.MarkDecorator:
    """A test of every family, but for some."""
    names = [
        pytest.param(name, marks=pytest.mark.full) if name in VARIANTS else name
        for name in FAMILIES
        if name not in left_out
    ]
    return pytest.mark.parametrize("name", names)


STRONG = {"exponent": 0.0, "active": 1.0}
MASKS = torch.zeros(2, 8, 12, dtype=torch.bool)
MASKS[0, :, :6] = True
MASKS[1, 4:, 2:] = True
BOTH = [("cat", MASKS[0]), ("dog", MASKS[1])]
# the tokens of a space and a word: T5 reads _ a _ c a t _ d o g, Qwen a _ c a t _ d o g;
# sixteen stand before the prompt in _ s _ <P r o m p t _ S t a r t > _ a _ c a t _ d o g </s>
PLACES = {"t5": ((2, 6), (6, 10)), "qwen": ((1, 5), (5, 9)), "chat": ((2, 6), (6, 10))}
PLACES["system"] = (18, 22), (22, 26)
PLACES |= {"clip": ((2, 5), (5, 8)), "gemma": ((3, 7), (7, 11)), "padded": ((8, 12), (12, 16))}
# <|begin|> <|im_start|> s e e <|im_end|> <|im_start|> before it
PLACES["begun"] = (8, 12), (12, 16)
# <|vision_start|> <|image_pad|>... <|vision_end|>, of 24 patches, and twice with _ i c t u r e _
PLACES |= {"pictured": ((27, 31), (31, 35)), "pictures": ((69, 73), (73, 77))}
# layers of the image or the text alone, and linear ones
LEFT_ALONE = dict.fromkeys(FAMILIES, "refiner|text_transformer_blocks") | {"sana": "attn1"}
HALVES = ("auraflow", "pixart", "hunyuan_dit", "sana")  # with the negative prompt's first
# joint attention's segments: a text and its tokens, an image and its rows, columns, tokens behind
# it, others
JOINT: dict[str, tuple[tuple, ...]] = {
    "auraflow": (("registers", 8), ("t5", 24), ("image", 4, 6, 0)),
    "chroma": (("t5", 24), ("image", 4, 6, 0)),
    "cogview4": (("padded", 16), ("image", 8, 12, 0)),
    "flux2": (("chat", 24), ("image", 4, 6, 0)),
    "hunyuan_image": (("image", 8, 12, 0), ("qwen", 24 + 16)),  # and those of quoted words
    "flux2_kv": (("chat", 24), ("image", 4, 6, 0)),
    "flux2_dev": (("begun", 24), ("image", 4, 6, 16 * 16)),
    "lumina2": (("system", 27), ("image", 2, 3, 0)),
    "qwen": (("qwen", 9 + 2), ("image", 2, 3, 0)),  # <|im_end|> and a line's end
    "qwen_edit": (("pictured", 26 + 9 + 2), ("image", 2, 3, 6)),
    "qwen_edit_plus": (("pictures", 2 * 34 + 9 + 2), ("image", 2, 3, 2 * 6)),
    "z_image": (("image", 4, 6, 8), ("chat", 64)),
}
# of keys that are others than the queries
KEYS = {"flux2_kv": (("chat", 24), ("registers", 16 * 16), ("image", 4, 6, 0))}
# cross-attention's text, and the image's frames, rows and columns
CROSS: dict[str, tuple[tuple, int, int, int]] = {
    "hunyuan_dit": ((("clip", 77), ("t5", 256)), 1, 4, 6),
    "kandinsky5": ((("qwen", 9 + 2),), 1, 4, 6),
    "kandinsky5_i2i": ((("qwen", 9 + 18 + 1),), 1, 4, 6),  # 16 patches behind the prompt
    "kandinsky5_t2v": ((("qwen", 9 + 2),), 2, 4, 6),
    "pixart": ((("t5", 20),), 1, 4, 6),
    "sana": ((("gemma", 20),), 1, 4, 6),
    "wan": ((("t5", 24),), 2, 2, 3),
}


@each()
def test_whole_runs_equal_the_reference(name: str) -> None:
    pipe, plain = family(name), run(name, PROMPT, steps=2)
    with apply_layout(pipe, PROMPT, REGIONS, **STRONG):
        fused = run(name, PROMPT, steps=2)
    with apply_layout(pipe, PROMPT, REGIONS, backend="reference", **STRONG):
        exact = run(name, PROMPT, steps=2)
    assert close(fused, exact)
    assert not close(fused, plain)
    least = {"cross_weight": 1e-30, "self_weight": 1e-30, "encode_phrases": False}
    with apply_layout(pipe, PROMPT, REGIONS, **least, **STRONG):
        assert close(run(name, PROMPT, steps=2), plain)
    with apply_layout(pipe, PROMPT, REGIONS, cross_weight=0, self_weight=0):
        assert torch.equal(run(name, PROMPT, steps=2), plain)
    assert torch.equal(run(name, PROMPT, steps=2), plain)


@each("flux2_dev", "flux2_kv")  # have none
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
    prompt = 1 if name in HALVES else 0
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
        rest = 0
        if kind == "image":
            *sizes, rest = sizes
            own = image_side(*sizes, weight)
        elif kind == "registers":
            own, (rest,) = ([], []), sizes
        else:
            own = text_side(kind, *sizes)
        words += own[0] + [0] * rest
        strengths += own[1] + [0.0] * rest
    return words, strengths


def by_hand(name: str) -> dict[tuple[int, int], tuple[list[int], list[int], list[float]]]:
    """The words of queries and keys and the strengths of each kind of layers, by their lengths."""
    if name in JOINT:
        words, strengths = sequence(JOINT[name], 0.3)
        keys, _ = sequence(KEYS.get(name, JOINT[name]), 0.3)
        return {(len(words), len(keys)): (words, keys, strengths)}
    text, frames, *grid = CROSS[name]
    keys, _ = sequence(text, 0.3)
    words, own = (frames * side for side in image_side(*grid, 0.3))
    cross = frames * image_side(*grid, 1.0)[1]
    layers = {(len(words), len(words)): (words, words, own)} if name != "sana" else {}
    return layers | {(len(words), len(keys)): (words, keys, cross)}


@each()
def test_words_and_strengths(name: str, calls: list) -> None:
    """Registers, a template's dropped tokens, frames and orders of segments, counted by hand."""
    with apply_layout(family(name), PROMPT, BOTH, modulation="range", exponent=0.0):
        run(name, PROMPT, steps=1)
    layers = by_hand(name)
    assert {(call[0].shape[2], call[1].shape[2]) for call in calls} == set(layers)
    attentions = [
        layer
        for layer, module in family(name).transformer.named_modules()
        if hasattr(module, "processor") and not re.search(LEFT_ALONE[name], layer)
    ]
    assert len(calls) == len(attentions)
    for q, k, _, q_words, k_words, strength in calls:
        ours, theirs, right = layers[q.shape[2], k.shape[2]]
        assert q_words.view(-1).tolist() == ours
        assert k_words.view(-1).tolist() == theirs
        torch.testing.assert_close(strength.view(-1), torch.tensor(right))


def test_keys_that_are_kept_have_their_words_in_all_steps(calls: list) -> None:
    """FLUX.2 klein's images to edit, which the first step's call alone brings."""
    with apply_layout(family("flux2_kv"), PROMPT, BOTH, modulation="range", **STRONG):
        run("flux2_kv", PROMPT, steps=3)
    assert len(calls) == 3 * 2
    words, keys, _ = by_hand("flux2_kv")[48, 48 + 16 * 16]
    assert {tuple(call[3].view(-1).tolist()) for call in calls} == {(*words,)}
    assert {tuple(call[4].view(-1).tolist()) for call in calls} == {(*keys,)}
    calls.clear()
    with apply_layout(family("flux2_kv"), PROMPT, BOTH):
        run("flux2_kv", PROMPT, steps=1, image=None)
    assert {call[1].shape[2] for call in calls} == {48}


@pytest.mark.parametrize(
    ("name", "runs"), [("chroma", 1), ("hunyuan_image", 1), ("qwen", 1), ("z_image", 2)]
)
def test_masks_are_looked_at_once(name: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that make masks of their own share one, of a run or, made anew, of a call."""
    own, looks = masks.reduced, []
    monkeypatch.setattr(masks, "reduced", lambda *x: (looks.append(x[0].shape), own(*x))[1])
    prompts = [PROMPT, "dog and a small cat"]
    more = {"negative_prompt": ["fog" if name != "z_image" else 12 * "fog "] * 2}
    with apply_layout(family(name), prompts, [[("cat", MASKS[0])]] * 2, **STRONG):
        run(name, prompts, steps=2, **more)
    assert len(looks) == runs


def test_words_of_stable_diffusion_3_5(calls: list) -> None:
    """Its first block attends to the image once more, in a layer without text."""
    with apply_layout(pipeline("sd3"), PROMPT, BOTH, modulation="range", exponent=0.0):
        latents(pipeline("sd3"), PROMPT, steps=1)
    image, text = image_side(4, 6, 0.3), sequence((("clip", 16), ("t5", 24)), 0.3)
    joint = [a + b for a, b in zip(image, text)]
    alone = [call for call in calls if call[1].shape[2] == len(image[0])]
    assert len(alone) == 1
    assert len(calls) == 3 + len(alone)
    for call in calls:
        words, strengths = image if any(call is one for one in alone) else joint
        assert call[3].view(-1).tolist() == call[4].view(-1).tolist() == words
        torch.testing.assert_close(call[5].view(-1), torch.tensor(strengths))


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


def test_lumina_may_have_negative_prompts_of_other_lengths(calls: list) -> None:
    """Their call is left alone."""
    prompts = ["a cat dog", "a dog cat"]
    with apply_layout(family("lumina2"), prompts, REGIONS, encode_phrases=False):
        run("lumina2", prompts, steps=1, negative_prompt=["fog", "a dog cat"])
    assert len(calls) == 2  # a layer each


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


def test_z_image_ends_its_guidance_for_all_images_of_a_prompt(calls: list) -> None:
    """Two images of other noise: the last steps' rows are both theirs."""
    noises = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = {"num_images_per_prompt": 2, "generator": noises, "cfg_truncation": 0.5}
    with apply_layout(family("z_image"), PROMPT, REGIONS, **STRONG):
        run("z_image", PROMPT, **options)
    assert {len(call[0]) for call in calls} == {2}
