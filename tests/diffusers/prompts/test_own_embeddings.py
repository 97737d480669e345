"""Prompts of regions beside a caller's own embeddings: their lengths, and masks with holes."""

from __future__ import annotations

import pytest
import torch
from families import family, run
from pipelines import close
from torch import Tensor
from torch.nn.functional import pad

from dense_attn.integrations.diffusers import Region, apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
WHOLE, LEFT = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)
SHORT, MIDDLE, LONG = "a cat", "dog cat a cat", "dog cat a cat cat dog dog cat"


def near(a: Tensor, b: Tensor) -> bool:
    """To 1e-5 of the largest: sums in another order, far below the effect of a token."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def short_of(name: str) -> dict[str, Tensor]:
    """A short prompt's embeddings without the padding that a mask leaves out."""
    text, mask, *_ = family(name).encode_prompt(SHORT, do_classifier_free_guidance=False)
    if name == "cogview4":
        return {"prompt_embeds": text}
    count = int(mask.sum())
    return {"prompt_embeds": text[:, :count], "prompt_attention_mask": mask[:, :count]}


# CogView4 pads to 16 tokens; the calls of others have 20
LONGER = ("cogview4", LONG), ("pixart", MIDDLE), ("lumina2", MIDDLE)


@pytest.mark.parametrize(("name", "text"), LONGER)
def test_a_regions_text_is_no_shorter_for_the_calls(name: str, text: str) -> None:
    """Where no padding makes texts as long as each other, the embeddings' length cuts nothing."""
    pipe, own = family(name), short_of(name)
    plain = {"guidance_scale": 1.0, "negative_prompt": None}
    right = run(name, text, steps=1, **plain)
    with apply_layout(pipe, SHORT, [Region(WHOLE, text)]):
        assert near(run(name, None, steps=1, **plain | own), right)


def encoded(text: str, start: str) -> dict[str, Tensor]:
    """A text of HunyuanDiT's two encoders."""
    found = {}
    for i, end in enumerate(("", "_2")):
        given = {"text_encoder_index": i, "do_classifier_free_guidance": False}
        tokens, _, mask, _ = family("hunyuan_dit").encode_prompt(text, **given)
        found |= {f"{start}prompt_embeds{end}": tokens, f"{start}prompt_attention_mask{end}": mask}
    return found


def test_embeddings_of_two_encoders() -> None:
    """HunyuanDiT's 77 and 256 tokens do as their prompt does; other lengths are refused."""
    name, pipe, regions = "hunyuan_dit", family("hunyuan_dit"), [Region(LEFT, "a cat")]
    own = encoded("dog", "") | encoded("fog", "negative_")
    with apply_layout(pipe, "dog", regions):
        right = run(name, "dog", steps=1, negative_prompt="fog")
        assert near(run(name, None, steps=1, **own), right)
    assert not close(run(name, None, steps=1, **own), right)
    cut = {key: value[:, :128] if key.endswith("_2") else value for key, value in own.items()}
    rule = "^prompt_embeds must have 77 tokens, and prompt_embeds_2 256, got 77 and 128$"
    with apply_layout(pipe, "dog", regions), pytest.raises(ValueError, match=rule):
        run(name, None, steps=1, **cut)


@pytest.mark.parametrize("name", ["hunyuan_video15", "hunyuan_image"])
def test_a_mask_that_begins_with_padding(name: str) -> None:
    """Tokens that are there are a call's text wherever they stand, of both encoders."""
    pipe, prompt = family(name), 'dog "cat" a cat'
    names = [f"prompt_embeds{end}" for end in ("", "_mask", "_2", "_mask_2")]
    texts = pipe.encode_prompt(prompt, device="cpu")
    padded = []
    for tokens, mask in (texts[:2], texts[2:]):
        count = int(mask.sum())
        assert count > 1
        # a hole behind the first token, and padding before it
        tokens, mask = tokens[:, :count], mask[:, :count]
        tokens = torch.cat([tokens[:, :1], torch.ones_like(tokens[:, :2]), tokens[:, 1:]], 1)
        mask = torch.cat([mask[:, :1], torch.zeros_like(mask[:, :1]).expand(-1, 2), mask[:, 1:]], 1)
        padded += [pad(tokens, (0, 0, 6, 0)), pad(mask, (6, 0))]
    with apply_layout(pipe, prompt, [Region(LEFT, "a cat")]):
        right = run(name, None, steps=1, **dict(zip(names, texts)))
        out = run(name, None, steps=1, **dict(zip(names, padded)))
    assert near(out, right)
