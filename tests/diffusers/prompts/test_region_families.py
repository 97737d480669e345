"""Regions with prompts on families of one kind of transformer: dense masks, and plain runs."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from families import FAMILIES, family, run, video
from pipelines import MODELS, close, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout
from dense_attn.integrations.diffusers.prompts.state import RegionState

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("pixart", "qwen", "z_image")  # cross-attention, places made inside, and refiners
WHOLE = (0.0, 0.0, 1.0, 1.0)
ROWS, COLUMNS = np.ogrid[:8, :12]
CAT = (ROWS < 4) & (COLUMNS < 8)
DOG = (ROWS >= 0) & (COLUMNS >= 8)
REGIONS = [Region(CAT, "a cat"), Region(DOG, "dog cat a")]  # a third of the image is in none
PROMPT = "a cat dog"
NEGATIVE = "fog " * 12
# the tokens of the call's prompt and of the two regions', a space one of T5's, in their slots:
# Qwen's and others' have <|im_end|> and a line's end, Lumina's sixteen of the system's
TEXTS = {
    "auraflow": (24, 24, 24),
    "flux2": (24, 24, 24),
    "wan": (24, 24, 24),
    "qwen": (9 + 2, 5 + 2, 9 + 2),
    "z_image": (64, 32, 32),
    "lumina2": (16 + 10 + 1, 16 + 6 + 1, 16 + 10 + 1),
    "pixart": (20, 6 + 1, 10 + 1),
    "chroma": (24, 24, 24),
    "sd3": (16 + 24, 16 + 24, 16 + 24),
    "sana": (20, 6 + 1, 10 + 1),
    "cogview4": (16, 16, 16),
    "kandinsky5": (9 + 2, 5 + 2, 9 + 2),
    "flux2_kv": (24, 24, 24),
    "hunyuan_dit": (333, 333, 333),
    "hunyuan_image": (9 + 2, 5 + 2, 9 + 2),
    "hunyuan_video": (9 + 1, 5 + 1, 9 + 1),
    "hunyuan_video15": (9 + 2, 5 + 2, 9 + 2),
}
GRIDS = dict.fromkeys(("cogview4", "hunyuan_image"), (8, 12))
GRIDS |= dict.fromkeys(("wan", "qwen", "lumina2"), (2, 3))
GRIDS |= dict.fromkeys(("hunyuan_video", "hunyuan_video15"), (2, 4))
FRAMES = {"wan": 2, "hunyuan_video": 3, "hunyuan_video15": 3}
POOLED = "kandinsky5", "hunyuan_dit"
OTHERS = [None]  # a token of no text and no place
LABELS = {"auraflow": "oti", "z_image": "it", "sd3": "it"}  # of others "ti"
LABELS |= dict.fromkeys(("hunyuan_image", "hunyuan_video", "hunyuan_video15"), "it")
KEYS = {"flux2_kv": "tri"}  # of others the queries


def of(*names: str) -> pytest.MarkDecorator:
    full = [pytest.param(name, marks=pytest.mark.full) for name in names if name not in QUICK]
    return pytest.mark.parametrize("name", [*(name for name in names if name in QUICK), *full])


def pipe_of(name: str) -> object:
    return pipeline(name) if name in MODELS else family(name)


def made(name: str, prompt: object, **options: object) -> Tensor:
    """The latents of a short run."""
    if name not in MODELS:
        return run(name, prompt, steps=2, **options)
    given = {"height": 16, "width": 24, "generator": torch.Generator().manual_seed(0)}
    given |= MODELS[name][1] | {"num_inference_steps": 2, "output_type": "latent"} | options
    return pipeline(name)(prompt, **given).images


def ours(
    name: str, prompt: object, regions: list, call: dict | None = None, **options: object
) -> Tensor:
    with apply_layout(pipe_of(name), prompt, regions, **options):
        return made(name, prompt, **(call or {}))


def near(a: Tensor, b: Tensor) -> bool:
    """To 1e-5 of the largest."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@torch.no_grad()
def vectors(name: str, prompt: str) -> dict[str, Tensor]:
    """Pooled vectors of a prompt and the negative one, which HunyuanVideo's calls may be given."""
    if name != "hunyuan_video":
        return {}
    texts = {"pooled_prompt_embeds": prompt, "negative_pooled_prompt_embeds": NEGATIVE}
    return {name: family("hunyuan_video")._get_clip_prompt_embeds(texts[name]) for name in texts}


class Dense:
    """Attention of every layer by scores of all pairs, under masks made of labels by hand.

    A label is None for a token of no text and no place, ("text", block), or ("image", block): the
    one text that the token sees. Padding behind a text that is shorter than its slot is "nothing".
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.frames = [(CAT, DOG)]  # the regions of each, one where all have the same
        self.kinds: set[str] = set()

    def text(self, positive: bool) -> list:
        sizes = TEXTS[self.name]
        found = [("text", block) for block, size in enumerate(sizes) for _ in range(size)]
        if self.name == "z_image" and positive:  # the prompt has half of its negative's tokens
            found[32:64] = ["nothing"] * 32
        return found

    def image(self, positive: bool) -> list:
        rows, columns = GRIDS.get(self.name, (4, 6))  # image tokens
        found = []
        for cat, dog in self.frames * (FRAMES.get(self.name, 1) // len(self.frames)):
            block = np.where(cat, 1, np.where(dog, 2, 0))[:: 8 // rows, :: 12 // columns]
            found += [("image", int(b) if positive else 0) for b in block.flatten()]
        return found + OTHERS * (8 if self.name == "z_image" else 0)  # 24 tokens in 32

    def labels(self, kind: str, positive: bool) -> tuple[list, list]:
        """Labels of queries and keys."""
        text, image = self.text(positive), self.image(positive)
        if kind == "attn2" or kind.endswith("cross_attention"):
            return image, text
        if kind == "text alone":
            return text, text
        sides = {"o": OTHERS * 8, "t": text, "i": image, "r": OTHERS * 16 * 16}
        own = LABELS.get(self.name, "ti")
        both = own, KEYS.get(self.name, own)
        return tuple([label for one in order for label in sides[one]] for order in both)

    def __call__(
        self,
        mark: object,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        mask: object,
    ) -> Tensor:
        self.kinds.add(mark.kind)
        k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], 1) for side in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None and mask.keys.dtype == torch.bool:
            scores = scores.masked_fill(~mask.keys[:, None, None], -torch.inf)
        elif mask is not None:
            here = 1.0 if mask.queries is None else mask.queries[:, None, :, None]
            scores = scores + here * mask.keys[:, None, None]
        for b in range(len(q)):
            half = len(q) // 2
            positive = len(q) == 1 or (b < half) == (self.name == "z_image")
            queries, keys = self.labels(mark.kind, positive)
            seen = {label[1] for label in queries if label is not None and label[0] == "image"}
            met = torch.tensor([[meet(one, other, seen) for other in keys] for one in queries])
            scores[b].masked_fill_(~met, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ v


def meet(a: object, b: object, seen: set[int]) -> bool:
    """Whether two tokens see each other; seen: the texts that any token of the image sees."""
    if "nothing" in (a, b):
        return False
    if a is None or b is None:
        label = a or b
        return label is None or label[0] == "image" or label[1] in seen
    return a[1] == b[1] or a[0] == b[0] == "image"


@of(*TEXTS)
def test_runs_equal_dense_masks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disjoint regions: attention couple's formula, or masks of all pairs of texts and image."""
    plain, out = made(name, PROMPT), ours(name, PROMPT, REGIONS)
    assert not close(out, plain)
    assert close(out, ours(name, PROMPT, REGIONS, backend="reference"))
    assert near(ours(name, PROMPT, REGIONS[::-1]), out)  # their texts' places begin anew
    assert torch.equal(ours(name, PROMPT, REGIONS, base_ratio=1.0), plain)
    dense = Dense(name)
    monkeypatch.setattr(RegionState, "attention", lambda _, *given: dense(*given))
    assert near(out, ours(name, PROMPT, REGIONS))
    refined = {"text alone"} if name in ("z_image", "lumina2", "kandinsky5") else set()
    assert len(dense.kinds - refined) == 1
    assert refined <= dense.kinds
    assert torch.equal(made(name, PROMPT), plain)


def test_regions_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of a video's frames, here of its latents', hard and soft beside one of all frames."""
    frames = np.stack([CAT, DOG])
    regions = [Region(frames, "a cat"), Region(frames[::-1].astype(np.float32), "dog cat a")]
    out = ours("wan", PROMPT, regions)
    assert not close(out, ours("wan", PROMPT, REGIONS))
    pixels = np.concatenate([frames[:1], frames[1:].repeat(4, 0)])
    assert torch.equal(
        ours("wan", PROMPT, [Region(pixels, "a cat"), *regions[1:]][:1]),
        ours("wan", PROMPT, regions[:1]),
    )
    dense = Dense("wan")
    dense.frames = [(CAT, DOG), (DOG, CAT)]
    monkeypatch.setattr(RegionState, "attention", lambda _, *given: dense(*given))
    assert near(out, ours("wan", PROMPT, regions))


@of(*(name for name in {**FAMILIES, **video.FAMILIES}))
def test_one_region_of_the_whole_image_is_its_prompt(name: str) -> None:
    """Its text stands behind another, and means what it means alone; so does a negative one."""
    takes = inspect.signature(type(family(name)).__call__).parameters
    call = {"negative_prompt": NEGATIVE} if "negative_prompt" in takes else {}
    # a vector of the whole text stays the call's, which there has the region's prompt, or vectors
    pooled, beside = name.startswith(POOLED), vectors(name, PROMPT)
    prompt, other = (PROMPT, call) if pooled else ("dog", dict.fromkeys(call, "dog"))
    right = made(name, PROMPT, **call)
    assert near(ours(name, prompt, [Region(WHOLE, PROMPT)], call | beside), right)
    if call:
        region = Region(WHOLE, PROMPT, negative=NEGATIVE)
        assert near(ours(name, prompt, [region], other | beside), right)
    cat = [Region(WHOLE, "a cat")]
    assert not close(ours(name, prompt, cat, call | beside), right)
    if not pooled:  # also behind a longer text, which no token of the image sees
        beside = vectors(name, "a cat")
        assert near(ours(name, NEGATIVE, cat, call | beside), made(name, "a cat", **call))


def test_the_padding_of_lumina2s_own_length() -> None:
    """Padding up to the pipeline's default length is no text, in calls of both prompts."""
    regions = [Region(CAT, "a cat", negative="dim"), Region(DOG, "dog cat a")]
    call = {"negative_prompt": "fog", "max_sequence_length": 64}
    out = ours("lumina2", PROMPT, regions, call)
    assert torch.equal(ours("lumina2", PROMPT, regions, call | {"max_sequence_length": 256}), out)
