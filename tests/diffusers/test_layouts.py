"""apply_layout on whole runs, against the reference, the official formula, and no layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from case_tensors import REAL_LAYOUTS
from pipelines import MODELS, PROMPT, REGIONS, Official, close, diffusers, latents, pipeline
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
every_model = pytest.mark.parametrize("model", MODELS)


@every_model
@pytest.mark.parametrize("modulation", ["range", "max", "bias", "mask"])
def test_whole_runs_equal_the_reference(model: str, modulation: str) -> None:
    pipe = pipeline(model)
    plain = latents(pipe)
    with apply_layout(pipe, PROMPT, REGIONS, modulation=modulation):
        fused = latents(pipe)
    with apply_layout(pipe, PROMPT, REGIONS, modulation=modulation, backend="reference"):
        exact = latents(pipe)
    assert close(fused, exact)
    assert not close(fused, plain)
    assert torch.equal(latents(pipe), plain)


def real_masks(index: int) -> list[tuple[str, np.ndarray]]:
    """Two regions of a real label map, or two ellipses where the data is not here."""
    if REAL_LAYOUTS.exists():
        labels = np.load(REAL_LAYOUTS)["label_maps"][index]
        return [
            ("cat", labels == 1),
            ("dog", (labels == 2) if (labels == 2).any() else labels == 0),
        ]
    y, x = np.mgrid[:128, :128] / 128
    return [
        ("cat", (x - 0.3) ** 2 + (y - 0.5) ** 2 < 0.04),
        ("dog", (x - 0.7) ** 2 + (y - 0.4) ** 2 < 0.05),
    ]


@torch.no_grad()
def with_phrases(
    pipe: object, prompts: list[str], regions: list[list], spans: list
) -> tuple[Tensor, Tensor]:
    """Embeddings of prompts whose phrases are encoded alone, and of as many empty ones."""
    text, empty = pipe.encode_prompt(prompts, "cpu", 1, True, [""] * len(prompts))
    for embeddings, image, places in zip(text, regions, spans):
        for (phrase, _), (start, stop) in zip(image, places):
            alone = pipe.encode_prompt(phrase, "cpu", 1, False)[0][0]
            embeddings[start:stop] = alone[1 : 1 + stop - start]
    return text, empty


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize(("prompts", "images"), [(1, 1), (2, 2)])
def test_whole_runs_equal_the_official_formula(
    guidance_scale: float, prompts: int, images: int
) -> None:
    pipe = pipeline("sd", blocks=4)
    assert len(pipe.unet.attn_processors) == 32
    texts, spans = ["a cat dog", "dog of cat"][:prompts], [[(2, 5), (5, 8)], [(6, 9), (1, 4)]]
    regions = [real_masks(3), real_masks(7)][:prompts]
    shape = {
        "height": 32,
        "width": 32,
        "num_images_per_prompt": images,
        "guidance_scale": guidance_scale,
        "steps": 12,
    }
    with apply_layout(pipe, texts, regions):
        ours = latents(pipe, texts, **shape)

    masks = [torch.stack([torch.from_numpy(mask) for _, mask in image]) for image in regions]
    masks = [torch.nn.functional.interpolate(mask[None].float(), (16, 16))[0] for mask in masks]
    text, empty = with_phrases(pipe, texts, regions, spans)
    official = Official(pipe, masks, spans, steps=12, guided=guidance_scale > 1)
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(official)
    try:
        theirs = latents(pipe, None, prompt_embeds=text, negative_prompt_embeds=empty, **shape)
    finally:
        pipe.unet.set_attn_processor(before)
        official.handle.remove()
    assert close(ours, theirs)
    assert not close(ours, latents(pipe, texts, **shape))


@every_model
def test_without_weights_it_is_the_plain_pipeline(model: str, calls: list) -> None:
    pipe = pipeline(model)
    with apply_layout(pipe, PROMPT, REGIONS, cross_weight=0, self_weight=0):
        ours = latents(pipe)
    assert torch.equal(ours, latents(pipe))
    assert calls == []


@pytest.mark.parametrize("model", ["sd", "sdxl", "sd3"])
def test_the_unconditional_half_is_the_plain_pipeline(model: str) -> None:
    pipe, halves = pipeline(model), []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    handle = denoiser.register_forward_hook(
        lambda _module, _args, out: halves.append(out[0].chunk(2))
    )
    try:
        latents(pipe, steps=1)
        with apply_layout(pipe, PROMPT, REGIONS):
            latents(pipe, steps=1)
    finally:
        handle.remove()
    (plain, plain_text), (uncond, text) = halves
    torch.testing.assert_close(uncond, plain, rtol=1e-5, atol=1e-6)
    assert not close(text, plain_text)


def test_flux_leaves_the_negative_prompt_alone(calls: list) -> None:
    pipe = pipeline("flux")
    layers = len(pipe.transformer.attn_processors)
    with apply_layout(pipe, PROMPT, REGIONS):
        latents(pipe, negative_prompt="fog", true_cfg_scale=3.0)
        assert len(calls) == 5 * layers  # half of the steps
        calls.clear()
        latents(pipe, negative_prompt="fog", true_cfg_scale=3.0, steps=1)
        assert len(calls) == layers


@pytest.mark.parametrize("image", range(2))
def test_a_batch_of_layouts_is_each_image_by_itself(image: int) -> None:
    """Rows of a batch see their own prompt's layout."""
    pipe, noise = (
        pipeline("sd"),
        torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3)),
    )
    prompts, regions = (
        ["a cat", "dog cat"],
        [[REGIONS[0]], [REGIONS[1], ("cat", (0.0, 0.0, 1.0, 0.3))]],
    )
    with apply_layout(pipe, prompts, regions):
        both = latents(pipe, prompts, latents=noise)
    with apply_layout(pipe, prompts[image], regions[image]):
        alone = latents(pipe, prompts[image], latents=noise[image : image + 1])
    assert close(both[image : image + 1], alone)


SCHEDULERS = (
    "DDIM",
    "PNDM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "KDPM2Discrete",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "UniPCMultistep",
    "DDPM",
    "LCM",
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler(name: str, calls: list) -> None:
    """The layout acts in the first 30 % of the network's calls, twice in a row alike."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    with apply_layout(pipe, PROMPT, REGIONS):
        for _ in range(2):
            calls.clear()
            latents(pipe, steps=10)
            acting = -(-3 * pipe.num_timesteps // 10)  # rounded up: those before 30 %
            assert len(calls) == acting * len(pipe.unet.attn_processors)
            times = pipe.scheduler.timesteps[:acting].double() / 1000
            widest = torch.tensor([one[5].max() for one in calls]).view(acting, -1).amax(1)
            torch.testing.assert_close(
                widest / widest[0], ((times / times[0]) ** 5).float(), rtol=1e-4, atol=0
            )


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_steps_of_a_loop_of_the_users_own(model: str, calls: list) -> None:
    """The number of steps that the pipeline's last call had says nothing of them."""
    pipe = tiny_pipeline(MODELS[model][0])
    latents(pipe, steps=2, guidance_scale=1.0)
    text, _, *pooled = pipe.encode_prompt(
        PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = {"text_embeds": pooled[0], "time_ids": torch.zeros(1, 6)} if pooled else {}
    pipe.scheduler.set_timesteps(10)
    with torch.no_grad(), apply_layout(pipe, PROMPT, REGIONS):
        for t in pipe.scheduler.timesteps:
            pipe.unet(
                torch.zeros(1, 4, 8, 12), t, encoder_hidden_states=text, added_cond_kwargs=added
            )
    assert len(calls) == 3 * len(pipe.unet.attn_processors)


def test_a_run_that_ends_before_its_schedule(calls: list) -> None:
    pipe = pipeline("sdxl")
    with apply_layout(pipe, PROMPT, REGIONS):
        latents(pipe, steps=20, denoising_end=0.5)
    assert len(calls) == 3 * len(pipe.unet.attn_processors)


@pytest.mark.parametrize("name", ["EDMEuler", "IPNDM"])
def test_schedulers_that_count_in_something_else(name: str, calls: list) -> None:
    """Their times are no timesteps: the steps fall evenly from 1."""
    pipe = tiny_pipeline(diffusers.StableDiffusionXLPipeline)
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler")()
    with apply_layout(pipe, PROMPT, REGIONS, self_weight=0, size_weight=0, exponent=1.0):
        latents(pipe)
    acting = torch.tensor([one[5].max() for one in calls]).view(3, -1).amax(1)
    torch.testing.assert_close(acting, torch.tensor([1.0, 0.9, 0.8]))


@pytest.mark.parametrize(
    "kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"]
)
def test_a_start_from_an_image(kind: str, calls: list) -> None:
    """The steps that run count, and time is that of the schedule."""
    pipe = getattr(diffusers, kind)(**pipeline("sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = {"image": torch.rand(1, 3, 16, 16), "strength": 0.5}
    if "Inpaint" in kind:
        image |= {"mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16}
    with apply_layout(pipe, PROMPT, REGIONS, active=0.4, size_weight=0):
        pipe(PROMPT, num_inference_steps=20, output_type="latent", **image)
    assert len(calls) == 4 * len(pipe.unet.attn_processors)
    first = float(pipe.scheduler.timesteps[10]) / 1000
    assert max(one[5].max() for one in calls[: len(pipe.unet.attn_processors)]) == pytest.approx(
        first**5
    )


def test_a_start_at_the_second_of_two_equal_timesteps(calls: list) -> None:
    """Heun's scheduler repeats them: 3 of 13 steps are left, of which the first acts."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **pipeline("sd").components, requires_safety_checker=False
    )
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    with apply_layout(pipe, PROMPT, REGIONS):
        pipe(
            PROMPT,
            torch.rand(1, 3, 16, 16),
            strength=0.3,
            num_inference_steps=7,
            output_type="latent",
        )
    assert pipe.scheduler.timesteps[9] == pipe.scheduler.timesteps[10]
    assert len(calls) == len(pipe.unet.attn_processors)


def test_masks_of_every_kind() -> None:
    from PIL import Image

    pipe, mask = pipeline("sd"), np.zeros((64, 64), bool)
    mask[:, :32] = True
    results = []
    for kind in (
        mask,
        torch.from_numpy(mask),
        Image.fromarray(mask),
        Image.fromarray(mask.astype(np.uint8) * 255),
        (0.0, 0.0, 0.5, 1.0),
        [0, 0, 0.5, 1],
    ):
        with apply_layout(pipe, PROMPT, [("cat", kind)]):
            results.append(latents(pipe))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_region_without_a_phrase_and_phrases_as_they_are() -> None:
    pipe = pipeline("sd")
    results = []
    for regions, options in (
        (REGIONS, {}),
        (REGIONS, {"encode_phrases": False}),
        ([(None, REGIONS[0][1])], {}),
        (REGIONS, {"exponent": 0}),
        (REGIONS, {"size_weight": 0.0}),
        (REGIONS, {"active": 1.0}),
        (REGIONS, {"cross_weight": 0}),
    ):
        with apply_layout(pipe, PROMPT, regions, **options):
            results.append(latents(pipe))
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
