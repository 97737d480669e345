"""diffusers' modular pipelines of tiny parts, and the latents of the pipelines beside them."""

from __future__ import annotations

from functools import cache

import torch
from pipelines import MODELS, PROMPT, diffusers, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers.modular.pipeline import viewed
from families import FAMILIES, family, run, video

SIZES = {"height": 16, "width": 24}
# blocks, and what calls are given
KINDS = {
    "sdxl": ("StableDiffusionXLAutoBlocks", SIZES),
    "flux": ("FluxAutoBlocks", {**SIZES, **MODELS["flux"][1]}),
    "z_image": ("ZImageAutoBlocks", FAMILIES["z_image"][1]),
    "wan": ("WanBlocks", {**FAMILIES["wan"][1], "negative_prompt": "fog"}),
    "sd3": ("StableDiffusion3AutoBlocks", {**SIZES, **MODELS["sd3"][1], "negative_prompt": "fog"}),
    "qwen": ("QwenImageAutoBlocks", {"height": 32, "width": 48, "negative_prompt": "fog"}),
    "flux2": ("Flux2KleinBaseAutoBlocks", FAMILIES["flux2"][1]),
    "ltx": ("LTXAutoBlocks", {**video.FAMILIES["ltx"][1], "negative_prompt": "fog"}),
    "hunyuan_video15": ("HunyuanVideo15AutoBlocks", video.FAMILIES["hunyuan_video15"][1]),
    "qwen_edit": ("QwenImageEditAutoBlocks", FAMILIES["qwen_edit"][1]),
    "qwen_edit_plus": ("QwenImageEditPlusAutoBlocks", FAMILIES["qwen_edit_plus"][1]),
}
# what a class says where an instance of the other pipeline does
OF_CLASS = (
    "prompt_template_encode_start_idx",
    "system_message",
    "tokenizer_2_max_length",
    "tokenizer_max_length",
    "vision_num_semantic_tokens",
)


def classic(name: str) -> object:
    return pipeline(name) if name in MODELS else family(name)


@cache
def modular(name: str) -> object:
    pipe = getattr(diffusers.modular_pipelines, KINDS[name][0])().init_pipeline()
    parts = {part: value for part, value in classic(name).components.items() if value is not None}
    if name == "z_image":  # whose other pipeline guides by another formula
        parts["image_processor"] = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
        parts["guider"] = diffusers.ClassifierFreeGuidance(5.0, use_original_formulation=True)
    pipe.update_components(**{part: parts[part] for part in pipe.components if part in parts})
    if name == "hunyuan_video15":  # whose texts' lengths and message are its class's
        own = {attribute: getattr(classic(name), attribute) for attribute in OF_CLASS}
        pipe.__class__ = type(type(pipe).__name__, (type(pipe),), own)
    if name.startswith("qwen"):
        step = viewed(pipe).encoder.step
        for template in ("prompt_template_encode", "prompt_template_encode_start_idx"):
            setattr(step, template, getattr(classic(name), template))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(name: str, prompt: object = PROMPT, steps: int = 4, **options: object) -> Tensor:
    given = {**KINDS[name][1], "generator": torch.Generator().manual_seed(0), **options}
    return modular(name)(prompt=prompt, num_inference_steps=steps, output="latents", **given)


def theirs(name: str) -> Tensor:
    """The latents of the other pipeline's run, which some pack into tokens."""
    negative = {key: value for key, value in KINDS[name][1].items() if key == "negative_prompt"}
    if name in MODELS:
        scale = {"sdxl": {"guidance_scale": 7.5}, "sd3": {"guidance_scale": 7.0}}.get(name, {})
        result = latents(pipeline(name), steps=4, **scale, **negative)
    else:
        result = run(name, PROMPT, steps=4, **negative)
    if name == "flux":
        return diffusers.FluxPipeline._unpack_latents(result, 16, 24, 2)
    if name.startswith("qwen"):
        return diffusers.QwenImagePipeline._unpack_latents(result, 32, 48, 8)
    if name == "ltx":
        return diffusers.LTXPipeline._unpack_latents(result, 3, 2, 4)
    if name == "flux2":  # after the VAE's normalisation
        norm = classic(name).vae.bn
        result = diffusers.Flux2KleinPipeline._patchify_latents(result)
        scale = (norm.running_var + norm.eps).sqrt().view(1, -1, 1, 1)
        return (result - norm.running_mean.view(1, -1, 1, 1)) / scale
    return result
