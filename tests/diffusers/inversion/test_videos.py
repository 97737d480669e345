"""Chains of videos: what is taken as one, and their frames, schedules and losses."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from families import family
from families.chained import bytes_of, call_of, chain_of, image_of, pipe_of, plain_run, size_of
from families.video import cogvideox
from PIL import Image
from pipelines import close, diffusers
from torch import Tensor

from dense_attn import spectral_residual_saliency
from dense_attn.integrations.diffusers import Inversion, invert, optimize, reconstruct

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = {"num_inference_steps": 2}
RUN = STEPS | {"steps": 1, "progress": False, "noise": None}


def inverted(video: Any, name: str = "wan", pipe: Any = None, **options: Any) -> Inversion:
    return invert(pipe or pipe_of(name), video, "a cat", **STEPS | options, call=call_of(name))


def optimized(name: str = "wan", **options: Any) -> Any:
    height, width = (None, None) if "latents" in options else (32, 48)
    given = {"height": height, "width": width, "call": call_of(name)} | RUN | options
    return optimize(pipe_of(name), "a cat", given.pop("loss", torch.mean), **given)


def test_videos_are_taken_in_every_form() -> None:
    """Tensors, arrays of bytes and of floats, pictures, and lists of frames or videos."""
    frames = bytes_of("wan")
    tensor = torch.from_numpy(frames).movedim(-1, 1)
    pictures = [Image.fromarray(frame) for frame in frames]
    floats = tensor.float() / 255
    forms = [frames, tensor, pictures, [pictures], list(floats), [floats], floats[None]]
    forms += [floats.movedim(1, -1).numpy()[None], list(frames)]
    forms += [forms[-2].astype(">f4"), [pictures[0].convert("RGBA"), *pictures[1:]]]
    first, *others = (inverted(form).latents for form in forms)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.full
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_pipelines_own_videos_come_back(output_type: str) -> None:
    """Several at once, in each form that its call returns, in which the way back ends too."""
    pipe, options = pipe_of("wan"), {"height": 32, "width": 48, "num_frames": 5} | STEPS
    options |= call_of("wan") | {"output_type": output_type}
    made = pipe(["a cat", "a dog"], **options).frames
    found = inverted(made)
    again = reconstruct(pipe, found, output_type=output_type)
    assert type(again) is type(made)
    assert np.shape(again[1]) == np.shape(made[1])
    one = inverted(made[1:]).latents[0]
    assert close(found.latents[0][1:], one)


@pytest.mark.parametrize("number", [0, 4, -3, 5.0, True, "5"])
def test_other_numbers_of_frames_are_refused(number: Any) -> None:
    sentence = f"^num_frames must be 1 above a multiple of 4, got {number!r}$"
    with pytest.raises(ValueError, match=sentence):
        optimized(num_frames=number)


def test_images_have_no_frames() -> None:
    options = RUN | {"num_frames": 5, "height": 16, "width": 16, "call": call_of("flux")}
    with pytest.raises(ValueError, match=r"^num_frames must be None where pipe makes images, got"):
        optimize(pipe_of("flux"), "a", torch.mean, **options)


def test_losses_see_videos_and_saliency_their_frames() -> None:
    """A video [B, F, 3, H, W], and its crop, of which each frame has its own."""
    shapes, maps = [], []

    def loss(videos: Tensor) -> Tensor:
        shapes.append(tuple(videos.shape))
        return videos.mean()

    def saliency(frames: Tensor) -> Tensor:
        maps.append(tuple(frames.shape))
        return spectral_residual_saliency(frames)

    optimized(loss=loss, saliency_fn=saliency, num_frames=5)
    assert set(shapes) == {(1, 5, 3, 32, 48)}
    assert len(shapes) == 4  # of both latents of EDICT's pair, whole and cropped
    assert set(maps) == {(5, 3, 32, 48)}


def test_latents_say_how_long_videos_are() -> None:
    """Where they are no tokens."""
    shapes = {"wan": (1, 4, 2, 4, 6), "cogvideox": (1, 3, 4, 4, 8), "ltx": (1, 24, 4)}
    for name, shape in shapes.items():
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if name == "ltx":
            for given in ({}, {"height": 32}, {"height": 32, "width": 64}):
                missing = ("height", "width", "num_frames")[len(given)]
                with pytest.raises(ValueError, match=f"^{missing} must be given with packed"):
                    optimized(name, latents=latents, **given)
        else:
            options = {"latents": latents, "steps": 0, "output_type": "latent"}
            assert optimized(name, **options).images.shape == shape


def test_a_scheduler_of_higher_order_gives_its_schedule() -> None:
    """UniPC's, which Wan's checkpoints come with."""
    pipe = copy.copy(pipe_of("wan"))
    vars(pipe)["scheduler"] = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    video = image_of("wan")
    found = inverted(video, pipe=pipe, num_inference_steps=4)
    back = reconstruct(pipe, found, output_type="latent")
    assert back.isfinite().all()
    assert not close(found.latents[0], inverted(video, num_inference_steps=4).latents[0])


def test_each_denoiser_has_its_own_steps() -> None:
    """Wan 2.2's second has those below the boundary."""
    chain, pipe, seen = chain_of("wan_2_2", 4, method="euler"), pipe_of("wan_2_2"), []
    parts = pipe.transformer, pipe.transformer_2
    handles = [part.register_forward_hook(lambda part, *_: seen.append(part)) for part in parts]
    with torch.no_grad():
        chain.sampler.sample(chain.eps, chain.latents)
    for handle in handles:
        handle.remove()
    assert [parts.index(part) for part in seen] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_each_denoiser_has_its_own_scale() -> None:
    """The pipeline's own bits, also back from the noise; and scales that nothing would take."""
    own = {"guidance_scale_2": 2.0}
    chain = chain_of("wan_2_2", 4, method="euler", call=own)
    with torch.no_grad():
        found = chain.sampler.sample(chain.eps, chain.latents)[0]
    expected, _ = plain_run("wan_2_2", chain, output_type="latent", **own)
    assert torch.equal(found, expected)
    assert not close(found, plain_run("wan_2_2", chain, output_type="latent")[0])
    rules = {"wan": "for a pipe of one denoiser", "wan_2_2": r"where guidance_scale is 1 \(no guid"}
    for name, rule in rules.items():
        with pytest.raises(ValueError, match=rf"^call\['guidance_scale_2'\] must be None {rule}"):
            chain_of(name, 1, guided=name == "wan", call=own)


def with_scheduler(kind: str, **config: Any) -> Any:
    """CogVideoX with another scheduler."""
    pipe = copy.copy(pipe_of("cogvideox"))
    vars(pipe)["scheduler"] = getattr(diffusers, kind)(prediction_type="v_prediction", **config)
    return pipe


@pytest.mark.full
def test_cogvideox_has_its_own_schedule() -> None:
    """Velocities, a shift of the signal, and DPM-Solver's noise schedule without its steps."""
    video, own = image_of("cogvideox"), {"rescale_betas_zero_snr": True, "snr_shift_scale": 1.0}
    found = {}
    for kind in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        for shift in (1.0, 3.0):
            pipe = with_scheduler(kind, **own | {"snr_shift_scale": shift})
            found[kind, shift] = inverted(video, "cogvideox", pipe).latents[0]
            trailing = with_scheduler(kind, **own, timestep_spacing="trailing")
            with pytest.raises(ValueError, match=r"leaves signal at .*, as timestep_spacing='lea"):
                inverted(video, "cogvideox", trailing)
    one, shifted, same, _ = found.values()
    assert torch.equal(one, same)
    assert not close(one, shifted)


@pytest.mark.full
def test_velocities_of_cogvideox_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    monkeypatch.setitem(vars(pipe_of("cogvideox")), "scheduler", scheduler)
    chain = chain_of("cogvideox", 4, method="ddim")
    with torch.no_grad():
        found = chain.sampler.sample(chain.eps, chain.latents)[0]
    expected, _ = plain_run("cogvideox", chain, output_type="latent")
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_two_latent_frames_in_a_token() -> None:
    """CogVideoX 1.5 has the first twice, as its pipelines of images do, and shows it once."""
    pipe, video = copy.copy(pipe_of("cogvideox")), image_of("cogvideox")
    with torch.random.fork_rng():
        vars(pipe)["transformer"] = cogvideox(2).transformer
    found = inverted(video, "cogvideox", pipe)
    again = reconstruct(pipe, found, output_type="latent")
    assert again.shape == (1, 4, 4, 4, 8)
    assert (again[:, 0] - again[:, 1]).abs().max() <= 2.0**-20
    assert reconstruct(pipe, found, output_type="pt").shape == video.shape
    sentence = r"^the number of frames of video must be 1 above a multiple of 8, got 5"
    with pytest.raises(ValueError, match=sentence):
        inverted(video[:, :5], "cogvideox", pipe)


@pytest.mark.full
def test_a_vae_that_is_told_a_time() -> None:
    """LTX's decodes at 0, as the pipeline does."""
    chain, pipe = chain_of("ltx", 1), pipe_of("ltx")
    config = {**pipe.vae.config, "_use_default_values": [], "timestep_conditioning": True}
    vae, own = type(pipe.vae).from_config(config).eval(), pipe.vae
    try:
        vars(pipe)["vae"] = vae
        latents, videos = plain_run("ltx", chain, output_type="pt")
        found = optimize(
            *(pipe, "a cat dog", torch.mean),
            **STEPS | {"steps": 0, "latents": latents, "output_type": "pt", "progress": False},
            **dict(zip(("height", "width"), size_of("ltx"))),
            num_frames=9,
            call=call_of("ltx"),
        )
    finally:
        vars(pipe)["vae"] = own
    assert found.images.shape == videos.shape


@pytest.mark.full
@pytest.mark.parametrize("name", ["hunyuan_image", "hunyuan_video15"])
def test_guiders_give_their_scale(name: str) -> None:
    """None: theirs or 3; one that keeps its estimates is refused, and each stays as it was."""
    pipe = copy.copy(pipe_of(name))
    vars(pipe)["guider"] = guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    before = copy.deepcopy(vars(guider))
    assert inverted(image_of(name), name, pipe).settings.guidance_scale == 2.0
    assert inverted(image_of(name), name, pipe, guidance_scale=5).settings.guidance_scale == 5.0
    assert str(vars(guider)) == str(before)
    vars(pipe)["guider"] = diffusers.AdaptiveProjectedGuidance(guidance_scale=2.0, eta=0.0)
    with pytest.raises(ValueError, match=r"^pipe must combine its estimates in every step as "):
        inverted(image_of(name), name, pipe)


@pytest.mark.full
def test_a_pipeline_without_a_guider_does_not_guide() -> None:
    """HunyuanImage's distilled model."""
    pipe = copy.copy(pipe_of("hunyuan_image"))
    vars(pipe)["guider"] = None
    image, name = image_of("hunyuan_image"), "hunyuan_image"
    assert inverted(image, name, pipe).settings.guidance_scale == 1.0
    with pytest.raises(ValueError, match=r"^guidance_scale must be 1 where pipe has no guider of"):
        inverted(image, name, pipe, guidance_scale=2)


def test_families_that_start_from_an_image_are_refused() -> None:
    pipe = diffusers.WanImageToVideoPipeline(**family("wan").components)
    with pytest.raises(ValueError, match=r"^pipe must make images of a prompt alone, got WanImage"):
        inverted(image_of("wan"), pipe=pipe)
