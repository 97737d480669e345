"""Models that put tokens which are there before those which are not: where phrases stand then."""

from __future__ import annotations

import pytest
import torch
from families import family, run

from dense_attn.integrations.diffusers import apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
LEFT = [("cat", (0.0, 0.0, 0.5, 1.0))]
QUOTED = 'a cat "dog"'
BYTES = len('Text "dog". ') + 1  # with an end


@pytest.mark.parametrize(("name", "first"), [("hunyuan_image", 1), ("hunyuan_video15", 2)])
def test_quoted_words_stand_before_the_prompt(name: str, first: int, calls: list) -> None:
    """Each sample's own: the second prompt has no quotes, and other tokens that are not there."""
    prompts, regions = [QUOTED, "a cat dog"], [LEFT, LEFT]
    with apply_layout(family(name), prompts, regions, encode_phrases=False):
        run(name, prompts, steps=1, negative_prompt=["fog", "fog"])
    assert calls
    for call in calls:
        words = call[4][:, -(24 + 16 + (6 if name == "hunyuan_video15" else 0)) :]
        for row, before in zip(words.tolist(), (BYTES, 0)):
            place = before + first
            assert [i for i, word in enumerate(row) if word] == list(range(place, place + 4))


@pytest.mark.full
def test_an_image_stands_before_all_texts(calls: list) -> None:
    """HunyuanVideo 1.5's calls tell by values other than 0 that there is one."""
    name = "hunyuan_video15"
    transformer = family(name).transformer

    def seen(_module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"image_embeds": torch.ones_like(kwargs["image_embeds"])}

    with apply_layout(family(name), QUOTED, LEFT):
        handle = transformer.register_forward_pre_hook(seen, with_kwargs=True, prepend=True)
        try:
            run(name, QUOTED, steps=1)
        finally:
            handle.remove()
    for call in calls:
        row = call[4][0, -46:].tolist()
        place = 6 + BYTES + 2
        assert [i for i, word in enumerate(row) if word] == list(range(place, place + 4))
