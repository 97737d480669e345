"""Guiders of concepts on the modular pipelines of transformers, beside semantic_guidance."""

from __future__ import annotations

import types

import pytest
import torch
from families import FAMILIES, family
from pipelines import MODELS, PROMPT, close, diffusers, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import Edit, semantic_guidance, semantic_guider

modular_pipelines = pytest.importorskip("diffusers.modular_pipelines")
pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = [Edit("snow", scale=4, threshold=0.6, warmup=1), Edit("a bank of fog", warmup=0)]
# blocks, what calls are given, and the scale of guidance by the formula of a guider
KINDS = {
    "flux2": ("Flux2KleinBaseAutoBlocks", FAMILIES["flux2"][1], 4.0),
    "sd3": (
        "StableDiffusion3AutoBlocks",
        {"height": 16, "width": 24, **MODELS["sd3"][1], "negative_prompt": "fog"},
        7.0,
    ),
    "z_image": ("ZImageAutoBlocks", FAMILIES["z_image"][1], 6.0),
    "wan": ("WanBlocks", {**FAMILIES["wan"][1], "negative_prompt": "fog"}, 5.0),
}


def modular(name: str) -> object:
    """A modular pipeline of another one's parts."""
    pipe = getattr(modular_pipelines, KINDS[name][0])().init_pipeline()
    parts = dict((pipeline(name) if name in MODELS else family(name)).components)
    if name == "z_image":
        parts["image_processor"] = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    given = {part: parts[part] for part in pipe.components if parts.get(part) is not None}
    pipe.update_components(**given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: object, name: str, **options: object) -> Tensor:
    own = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3}
    return pipe(prompt=PROMPT, **KINDS[name][1] | own | options)


def theirs(name: str) -> Tensor:
    """The latents of the other pipeline, which the first step of a loop takes tokens of."""
    given = dict(KINDS[name][1])
    if name in MODELS:
        return latents(pipeline(name), steps=3, **given)
    found = run(family(name), name, output_type="latent", return_dict=False)[0]
    if name == "flux2":  # after the VAE's normalisation
        norm = family(name).vae.bn
        mean, deviation = norm.running_mean, (norm.running_var + norm.eps).sqrt()
        found = diffusers.Flux2KleinPipeline._patchify_latents(found)
        return (found - mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full) if n != "flux2" else n for n in KINDS]
)
def test_latents_are_those_of_semantic_guidance(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "wan":  # wants a package of its own, which leaves these prompts as they are
        from diffusers.modular_pipelines.wan import encoders

        fixed = types.SimpleNamespace(fix_text=lambda text: text)
        monkeypatch.setattr(encoders, "ftfy", fixed, raising=False)
    pipe, scale = modular(name), KINDS[name][2]
    length = KINDS[name][1]["max_sequence_length"]
    guider = semantic_guider(pipe, EDITS, scale, max_sequence_length=length)
    pipe.update_components(guider=guider)
    guided = run(pipe, name, output="latents")
    assert torch.equal(run(pipe, name, output="latents"), guided)
    with semantic_guidance(pipeline(name) if name in MODELS else family(name), EDITS):
        expected = theirs(name)
    assert close(guided, expected)
    plain = [Edit("snow", scale=0, warmup=0)]
    pipe.update_components(guider=semantic_guider(pipe, plain, scale, max_sequence_length=length))
    assert close(run(pipe, name, output="latents"), theirs(name))
    assert not close(theirs(name), expected)
