"""Prompts beside images, behind instructions and padding; masks that are added by mistake."""

from __future__ import annotations

import pytest
import torch
from families import family, run
from families.images import PICTURE
from pipelines import PROMPT, REGIONS, close

from dense_attn.integrations.diffusers import apply_layout, hooks
from dense_attn.integrations.diffusers.text.encoding import heard

pytestmark = pytest.mark.usefixtures("one_thread")
RANGE = {"modulation": "range", "exponent": 0.0, "active": 1.0}


@pytest.mark.parametrize("name", ["qwen_edit", "qwen_edit_plus", "kandinsky5_i2i"])
def test_phrases_alone_are_read_beside_the_images_of_the_call(name: str) -> None:
    """The embeddings of a phrase are those that encode_prompt makes with the same images.

    Those of an earlier call in the block are forgotten.
    """
    pipe, images, texts = family(name), [], []

    def see(denoiser: torch.nn.Module, args: tuple, given: dict) -> None:
        texts.append(hooks.arguments(denoiser, args, given).arguments["encoder_hidden_states"])

    pictures = (PICTURE.resize((96, 96)), PICTURE)
    if name == "qwen_edit_plus":
        pictures = ([PICTURE, PICTURE], [PICTURE])
    with (
        apply_layout(pipe, PROMPT, REGIONS[:1], **RANGE),
        heard(pipe, lambda given: images.append(given["image"])),
    ):
        handle = pipe.transformer.register_forward_pre_hook(see, with_kwargs=True)
        try:
            for picture in pictures:
                run(name, PROMPT, steps=1, image=picture)
        finally:
            handle.remove()
    with torch.no_grad():
        right, plain = (pipe.encode_prompt(text, images[-1])[0][0] for text in ("cat", PROMPT))
    assert len(texts) == 4  # a prompt and a negative one, twice
    if name == "kandinsky5_i2i":  # a space's token has no other there
        ours, theirs, before = texts[2][0][2:5], right[:3], plain[2:5]
    else:
        ours, theirs, before = texts[2][0][-9:-6], right[-5:-2], plain[-9:-6]
    assert torch.equal(ours, theirs)
    assert not close(ours, before)


def test_images_of_another_size_move_the_prompt(calls: list) -> None:
    """In one block: one image of 24 tokens before the prompt, then two."""
    pipe = family("qwen_edit_plus")
    with apply_layout(pipe, PROMPT, [("cat", REGIONS[0][1])], **RANGE):
        for pictures in ([PICTURE], [PICTURE, PICTURE]):
            run("qwen_edit_plus", PROMPT, steps=1, image=pictures)
    places = [[i for i, word in enumerate(call[4].view(-1).tolist()) if word] for call in calls]
    assert places[0][:4] == [35, 36, 37, 38]
    assert places[-1][:4] == [69, 70, 71, 72]


def test_a_prompt_without_its_images_is_one_prompt() -> None:
    rule = r"^prompt must be one prompt for a pipeline that encodes it with an image, got 2 prompts"
    with (
        pytest.raises(ValueError, match=rule),
        apply_layout(family("qwen_edit"), [PROMPT, PROMPT], REGIONS),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("instruction", [None, ["draw"]])
def test_another_instruction_than_sanas_own_is_refused(instruction: object) -> None:
    rule = r"^complex_human_instruction must be the pipeline's own while a layout is on, got "
    with apply_layout(family("sana"), PROMPT, REGIONS), pytest.raises(ValueError, match=rule):
        run("sana", PROMPT, complex_human_instruction=instruction)


def test_sparse_attention_of_videos_is_refused() -> None:
    pipe = family("kandinsky5")
    own = pipe.transformer.config
    pipe.transformer.register_to_config(attention_type="nabla")
    rule = r'^pipe must have a transformer of attention_type "regular", got \'nabla\'$'
    try:
        with pytest.raises(ValueError, match=rule), apply_layout(pipe, PROMPT, REGIONS):
            pytest.fail("the block must not run")
    finally:
        pipe.transformer.register_to_config(attention_type=own.attention_type)


@pytest.mark.parametrize(
    ("name", "prompt"), [("kandinsky5", "a  cat dog"), ("flux2_dev", "a cat [IMG]dog")]
)
def test_prompts_that_are_cleaned_to_other_tokens_are_refused(name: str, prompt: str) -> None:
    rule = r"^regions\[0\] must have a phrase of a prompt that the pipeline leaves as it is, got "
    with (
        pytest.raises(ValueError, match=rule),
        apply_layout(family(name), prompt, [("cat", REGIONS[0][1])]),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("prompts", [["a cat", "a cat and a dog by the sea"]])
def test_prompts_of_several_lengths_end_together_behind_padding(
    prompts: list[str], calls: list
) -> None:
    """CogView4 pads to 16 tokens on the left; the longest prompt has 22 letters and one more."""
    pipe = family("cogview4")
    with apply_layout(pipe, prompts, [("cat", REGIONS[0][1])], **RANGE):
        pipe(prompts, height=32, width=48, num_inference_steps=1, output_type="latent")
    words = calls[0][4]
    places = [[i for i, word in enumerate(row.tolist()[:32]) if word] for row in words]
    assert places == [[28, 29, 30, 31], [7, 8, 9, 10]]


def test_cogview4s_mask_is_added_as_it_is() -> None:
    """Its ones are added to the scores of all but padding, which removes no token."""
    pipe, here = family("cogview4"), torch.ones(1, 16)
    here[:, :6] = 0
    plain = run("cogview4", PROMPT, steps=2)
    handle = pipe.transformer.register_forward_pre_hook(
        lambda _module, args, given: (args, {**given, "attention_mask": here}), with_kwargs=True
    )
    try:
        masked = run("cogview4", PROMPT, steps=2)
        found = {}
        for backend in ("auto", "reference"):
            with apply_layout(pipe, PROMPT, REGIONS, backend=backend, **RANGE):
                found[backend] = run("cogview4", PROMPT, steps=2)
        least = {"cross_weight": 1e-30, "self_weight": 1e-30, "encode_phrases": False}
        with apply_layout(pipe, PROMPT, REGIONS, **least, **RANGE):
            quiet = run("cogview4", PROMPT, steps=2)
    finally:
        handle.remove()
    assert not close(masked, plain)
    assert close(found["auto"], found["reference"])
    assert not close(found["auto"], masked)
    assert close(quiet, masked)
