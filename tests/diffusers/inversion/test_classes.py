"""Every class of pipelines around a known denoiser has chains, or is refused in one sentence."""

from __future__ import annotations

import inspect
from contextlib import suppress

import pytest
import torch
from families.classes import kinds, made, model_name, parts_of
from families.images import PICTURE

from dense_attn.integrations.diffusers import invert
from dense_attn.integrations.diffusers.inversion.shared import check_pipe
from dense_attn.integrations.diffusers.models import model_of

pytestmark = pytest.mark.usefixtures("one_thread")
CHAINED = set(
    """AuraFlow Chroma CogView4 Flux Flux2 Flux2Klein HunyuanDiT Kandinsky5T2I Kolors Lumina2
    PixArtAlpha PixArtSigma QwenImage Sana StableDiffusion3 StableDiffusionXL ZImage HunyuanImage
    Wan SkyReelsV2 LTX HunyuanVideo HunyuanVideo15 Kandinsky5T2V CogVideoX""".split()  # noqa: SIM905
)


def skeleton(kind: type) -> object:
    """A pipeline of a class with a denoiser and what belongs to images, and no other part."""
    pipe, parts = kind.__new__(kind), parts_of(model_name(kind))
    for name in ("unet", "transformer"):
        pipe.__dict__[name] = parts.get(name)
    pipe.__dict__ |= {"vae": object(), "image_processor": object(), "vae_scale_factor": 8}
    pipe.__dict__["video_processor"] = object()
    pipe.__dict__ |= {"guider": None} if "guider" in parts else {}
    return pipe


@pytest.mark.full
def test_classes_that_have_chains_are_known() -> None:
    """Chains of Stable Diffusion 1 and 2 are in test_chains.py; Sprint's scheduler is refused."""
    found = set()
    for name, kind in kinds().items():
        if model_name(kind) != "sd":
            with suppress(ValueError):
                check_pipe(skeleton(kind))
                found.add(name.removesuffix("Pipeline"))
    assert found == CHAINED | {"SanaSprint"}


@pytest.mark.full
def test_vaes_are_upcast_where_their_pipelines_do() -> None:
    told = {name for name in CHAINED if "force_upcast" in source(name)}
    assert told == {"AuraFlow", "Kolors", "StableDiffusionXL"}
    assert told == {
        name for name in CHAINED if model_of(skeleton(kinds()[f"{name}Pipeline"])).upcasts
    }


def source(name: str) -> str:
    return inspect.getsource(kinds()[f"{name}Pipeline"].__call__)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Flux2", "Kolors", "PixArtAlpha"])
def test_classes_beside_their_family(name: str) -> None:
    """An image to its noise, for an image of 64 x 64 pixels."""
    pipe = made(kinds()[f"{name}Pipeline"])
    call = {"Kolors": {}, "PixArtAlpha": {"clean_caption": False}}
    call = call.get(name, {"max_sequence_length": 24})
    found = invert(pipe, PICTURE, "a cat", num_inference_steps=2, call=call)
    assert all(bool(latents.isfinite().all()) for latents in found.latents)
    assert found.latents[0].dtype == torch.float64
