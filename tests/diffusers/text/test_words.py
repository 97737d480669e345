"""The tokens that a layout reaches, in every model and size, counted out by hand."""

from __future__ import annotations

import pytest
import torch
from pipelines import MODELS, PROMPT, REGIONS, close, diffusers, latents, pipeline

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")


def refused(pipe: object, sentence: str, prompt: str = PROMPT, phrase: str = "dog") -> None:
    with pytest.raises(ValueError, match=sentence):
        apply_layout(pipe, prompt, [(phrase, (0.0, 0.0, 1.0, 1.0))]).__enter__()


@pytest.mark.parametrize("modulation", ["range", "mask"])
@pytest.mark.parametrize("model", ["sd3", "flux"])
def test_words_and_strengths_of_joint_attention(model: str, modulation: str, calls: list) -> None:
    """4 x 6 image tokens; CLIP reads <start> a c a t d o g, T5 _ a _ c a t _ d o g."""
    pipe, masks = pipeline(model), torch.zeros(2, 8, 12, dtype=torch.bool)
    masks[0, :, :6] = True
    masks[1, 4:, 2:] = True
    with apply_layout(
        pipe, PROMPT, list(zip(("cat", "dog"), masks.numpy())), modulation=modulation, exponent=0.0
    ):
        latents(pipe)
    clip, t5 = {"cat": range(2, 5), "dog": range(5, 8)}, {"cat": range(2, 6), "dog": range(6, 10)}
    text_words, image_words, image_strength = [0] * 24, [], []
    if model == "sd3":
        text_words = [0] * (16 + 24)
    for bit, phrase in ((1, "cat"), (2, "dog")):
        places = [*clip[phrase], *(16 + i for i in t5[phrase])] if model == "sd3" else t5[phrase]
        for place in places:
            text_words[place] = bit
    share = {1: 0.5, 2: 20 / 48, 0: 0.0}
    text_strength = [1 - share[word] if word else 0.0 for word in text_words]
    for row in range(4):
        for column in range(6):
            cat, dog = bool(masks[0, 2 * row, 2 * column]), bool(masks[1, 2 * row, 2 * column])
            image_words.append(cat + 2 * dog)
            area = cat * share[1] + dog * share[2]
            image_strength.append(0.3 * (1 - area))
    if model == "sd3":
        words, strength = (
            torch.tensor(image_words + text_words),
            torch.tensor(image_strength + text_strength),
        )
    else:
        words, strength = (
            torch.tensor(text_words + image_words),
            torch.tensor(text_strength + image_strength),
        )
    everywhere = torch.where(words == 0, -1, words) if modulation == "mask" else words
    joint = [call for call in calls if call[0].shape[2] == len(words)]
    assert joint
    for q, k, _, q_words, k_words, c in joint:
        assert q.shape == k.shape
        assert torch.equal(q_words[0].long(), everywhere)
        assert torch.equal(k_words[0].long(), everywhere)
        inside = words != 0
        torch.testing.assert_close(c[0, 0][inside], strength[inside])


@pytest.mark.parametrize("model", MODELS)
def test_a_strength_of_nothing_is_the_plain_layer(model: str) -> None:
    """Projections, norms and outputs are those of the processor that was there."""
    pipe = tiny_pipeline(MODELS[model][0])
    if model == "sd":
        for layer in pipe.unet.modules():
            if getattr(layer, "is_cross_attention", False):
                layer.norm_cross = torch.nn.LayerNorm(16, elementwise_affine=False)
                layer.norm_encoder_hidden_states = lambda text, norm=layer.norm_cross: (
                    2 * norm(text)
                )
    options = {"cross_weight": 1e-30, "self_weight": 1e-30, "active": 1.0, "encode_phrases": False}
    with apply_layout(pipe, PROMPT, REGIONS, **options):
        ours = latents(pipe)
    assert close(ours, latents(pipe))


def test_sizes_and_batches_change_inside_of_a_block(calls: list) -> None:
    """12 x 20 latents become 3 x 5 and then 2 x 3: each halving rounds up."""
    pipe = pipeline("sd", blocks=4)
    sizes = [
        {},
        {"height": 24, "width": 40},
        {"num_images_per_prompt": 2},
        {"height": 24, "width": 16},
        {},
    ]
    apart = []
    for size in sizes:
        with apply_layout(pipe, PROMPT, REGIONS):
            apart.append(latents(pipe, steps=4, **size))
    assert len(calls) == len(sizes) * 2 * len(pipe.unet.attn_processors)
    with apply_layout(pipe, PROMPT, REGIONS):
        for size, expected in zip(sizes, apart):
            assert torch.equal(latents(pipe, steps=4, **size), expected)


def test_the_tokens_of_an_image_to_edit_are_of_no_region(calls: list) -> None:
    """FLUX Kontext puts them after those of the image."""
    parts = pipeline("flux").components | {"image_encoder": None, "feature_extractor": None}
    pipe = diffusers.FluxKontextPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    with apply_layout(pipe, PROMPT, REGIONS):
        pipe(
            torch.rand(1, 3, 16, 16),
            PROMPT,
            height=16,
            width=24,
            num_inference_steps=2,
            max_sequence_length=24,
            max_area=16 * 24,
            _auto_resize=False,
            output_type="latent",
        )
    assert len(calls) == len(pipe.transformer.attn_processors)
    image = 4 * 6
    for _, _, _, words, _, strength in calls:
        assert words.shape[1] > 24 + image
        assert (words[:, 24 : 24 + image] != 0).any()
        assert (words[:, 24 + image :] == 0).all()
        assert (strength[..., 24 + image :] == 0).all()


def test_a_second_estimate_of_a_step_is_of_the_prompt(calls: list) -> None:
    """Skip-layer guidance of SD3 calls the model again, without the unconditional half."""
    pipe = pipeline("sd3")
    with apply_layout(pipe, PROMPT, REGIONS):
        latents(
            pipe,
            ["a cat dog"] * 2,
            steps=2,
            skip_guidance_layers=[0],
            skip_layer_guidance_start=-1.0,
            skip_layer_guidance_stop=2.0,
        )
    assert {call[0].shape[0] for call in calls} == {2}
    layers = len(pipe.transformer.attn_processors)
    assert layers < len(calls) < 2 * layers


def test_pipelines_without_their_text_parts() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    text, empty = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    pipe.text_encoder = None
    refused(pipe, "encode_phrases must be False for a pipeline without its text_encoder, got True")
    with apply_layout(pipe, PROMPT, REGIONS, encode_phrases=False):
        latents(pipe, None, prompt_embeds=text, negative_prompt_embeds=empty)
    pipe.tokenizer = None
    refused(pipe, "pipe must have the tokenizer of its prompt, got none")
    pipe = tiny_pipeline(diffusers.StableDiffusionXLPipeline)
    pipe.tokenizer = None
    refused(pipe, "encode_phrases must be False for a pipeline without its tokenizer, got True")


def test_phrases_past_what_a_tokenizer_keeps() -> None:
    """T5's tokenizer keeps more of SD3's prompt than CLIP's."""
    prompt = "a big wide green fox dog"
    for model in ("sd", "sdxl"):
        for phrase in ("fox", "dog"):  # of the fox, its first letter is kept
            sentence = f"have a phrase that its tokenizer keeps of the prompt .*, got '{phrase}'"
            refused(pipeline(model), sentence, prompt, phrase)
    pipe = pipeline("sd3")
    with apply_layout(pipe, prompt, [("dog", (0.0, 0.0, 0.5, 1.0))]):
        ours = latents(pipe, prompt, max_sequence_length=32)
    assert not close(ours, latents(pipe, prompt, max_sequence_length=32))
    refused(pipe, "have a phrase of the prompt 'a big wide", prompt, "cat")
