"""Tiny pipelines of every class of diffusers' that a layout works with, and their calls."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import types
import warnings
from functools import cache
from typing import Any

import torch
from PIL import Image
from pipelines import PROMPT, diffusers, pipeline

from dense_attn.integrations.diffusers import models
from families import FAMILIES, family, video

DENOISERS = re.compile(rf"\b({'|'.join(model.denoiser for model in models.MODELS)})\b")
PICTURE = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
MASK = torch.zeros(1, 1, 16, 16)
MASK[..., :8] = 1.0
OWN = {  # arguments of calls by class, in the place of those below
    "StableDiffusionLDM3DPipeline": {"output_type": "np"},
    "Lumina2Pipeline": {"max_sequence_length": 32},
    "FluxKontextPipeline": {"max_area": 256, "_auto_resize": False},
    "FluxKontextInpaintPipeline": {"max_area": 256, "_auto_resize": False},
    "WanVideoToVideoPipeline": {"video": [PICTURE[0]] * 5},
    "Flux2KleinPipeline": {"image": Image.new("RGB", (64, 64))},
    "LucyEditPipeline": {"video": [PICTURE[0]] * 5},
    "StableDiffusionXLControlNetUnionPipeline": {"control_image": [PICTURE], "control_mode": [0]},
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": {
        "control_image": [PICTURE],
        "control_mode": [0],
    },
    "StableDiffusionXLControlNetUnionInpaintPipeline": {
        "control_image": [PICTURE],
        "control_mode": [0],
    },
}
ARGUMENTS = {
    "prompt": PROMPT,
    "height": 16,
    "width": 16,
    "num_inference_steps": 4,
    "output_type": "latent",
    "image": PICTURE,
    "control_image": PICTURE,
    "mask_image": MASK,
    "control_mask": MASK,
    "depth_map": torch.rand(1, 16, 16),
    "max_sequence_length": 24,
    "strength": 0.75,
    "true_cfg_scale": 2.0,
}


@cache
def kinds() -> dict[str, type]:
    """All classes of pipelines that take a denoiser of an accepted kind, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
            try:
                importlib.import_module(module.name)
            except (ImportError, RuntimeError):  # utilities of packages that are not there
                continue
    found, waiting = {}, [diffusers.DiffusionPipeline]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("diffusers.") and denoisers(kind):
            found[kind.__name__] = kind
    return dict(sorted(found.items()))


def denoisers(kind: type) -> dict[str, str]:
    """The components of an accepted kind that a class is made of."""
    parameters = inspect.signature(kind.__init__).parameters.items()
    found = {name: DENOISERS.search(str(parameter.annotation)) for name, parameter in parameters}
    return {name: match[1] for name, match in found.items() if match}


def model_name(kind: type) -> str:
    parts = inspect.signature(kind.__init__).parameters
    if kind.__name__.startswith(video.NAMES):
        return video.model_name(kind.__name__)
    for name, start in (
        ("qwen", "QwenImage"),
        ("wan", "Wan"),
        ("wan", "Lucy"),
        ("auraflow", "Aura"),
        ("flux2", "Flux2"),
        ("z_image", "ZImage"),
        ("chroma", "Chroma"),
        ("lumina2", "Lumina2"),
        ("pixart", "PixArt"),
    ):
        if kind.__name__.startswith(start):
            return name
    if "transformer" in parts:
        return "sd3" if "tokenizer_3" in parts else "flux"
    if kind.__name__.startswith("Kolors"):
        return "kolors"
    return "sdxl" if "text_encoder_2" in parts else "sd"


def made(kind: type) -> Any:
    """A pipeline of a class, of the parts of a tiny one of its model and others beside them."""
    parts = inspect.signature(kind.__init__).parameters
    text = sys.modules[kind.__module__]
    if hasattr(text, "basic_clean") and not hasattr(text, "ftfy"):  # Wan's wants it
        text.ftfy = types.SimpleNamespace(fix_text=str)
    given = parts_of(model_name(kind)) | {
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "image_processor": None,
    }
    given |= {"requires_safety_checker": False, "add_watermarker": False, "depth_estimator": None}
    given |= extras(kind.__name__, model_name(kind), given)
    pipe = kind(**{name: part for name, part in given.items() if name in parts})
    if hasattr(pipe, "prompt_template_encode"):
        pipe.prompt_template_encode = family("qwen").prompt_template_encode
        pipe.prompt_template_encode_start_idx = family("qwen").prompt_template_encode_start_idx
    if hasattr(pipe, "system_prompt"):
        pipe.system_prompt = family("lumina2").system_prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any) -> None:
    """A run with what the class takes."""
    takes = inspect.signature(type(pipe).__call__).parameters
    given = {name: value for name, value in ARGUMENTS.items() if name in takes} | OWN.get(
        type(pipe).__name__, {}
    )
    if model_name(type(pipe)) in ("qwen", "wan", "flux2"):  # more pixels a latent
        given |= {"height": 32, "width": 32} if "height" in takes else {}
    if "use_resolution_binning" in takes:
        given |= {"use_resolution_binning": False, "clean_caption": False}
    if "num_frames" in takes:
        given["num_frames"] = 5
    if type(pipe).__name__.startswith(video.NAMES):
        more = video.arguments(type(pipe).__name__, PICTURE[0])
        given |= {name: value for name, value in more.items() if name in takes}
    if "true_cfg_scale" in given:
        given["negative_prompt"] = "fog"
    pipe(**given, generator=torch.Generator().manual_seed(0))


def parts_of(model: str) -> dict[str, Any]:
    if model in FAMILIES | video.FAMILIES:
        return dict(family(model).components)
    if model == "kolors":
        return pipeline("sd").components | kolors()
    return dict(pipeline(model).components)


def extras(name: str, model: str, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts that a class has in the place of others, or beside them."""
    if name.startswith(video.NAMES):
        return video.extras(name, parts)
    from diffusers import ControlNetXSAdapter, LCMScheduler, MotionAdapter, T2IAdapter

    if name.startswith(("AnimateDiff", "PIA")):
        net = controlnet(name, parts)
        sizes = {
            "motion_layers_per_block": 1,
            "motion_num_attention_heads": 2,
            "motion_norm_num_groups": 4,
        }
        return {"motion_adapter": MotionAdapter((8, 16), **sizes), "controlnet": net}
    if "ControlNetXS" in name:
        unet = pipeline(model, blocks=4).unet
        net = ControlNetXSAdapter.from_unet(unet, 1.0, conditioning_embedding_out_channels=(8, 8))
        return {"unet": unet, "controlnet": net}
    if "ControlNet" in name:
        return {"controlnet": controlnet(name, parts).eval()}
    if "Adapter" in name:
        return {"adapter": T2IAdapter(3, [8, 16, 16, 16], 1, 4, "full_adapter_xl").eval()}
    if name.startswith("LatentConsistency"):
        scheduler = LCMScheduler.from_config(parts["scheduler"].config)
        return {"unet": changed(parts["unet"], time_cond_proj_dim=8), "scheduler": scheduler}
    if "LDM3D" in name:
        return {"vae": changed(parts["vae"], out_channels=6)}
    if "Depth2Img" in name:
        return {"unet": changed(parts["unet"], in_channels=5)}
    if name == "ChromaInpaintPipeline":  # asks for a setting that its model has no more
        transformer = changed(parts["transformer"])
        transformer.register_to_config(guidance_embeds=False)
        return {"transformer": transformer}
    if name.startswith("FluxControl"):
        return {"transformer": changed(parts["transformer"], in_channels=32, out_channels=16)}
    if name in ("WanImageToVideoPipeline", "LucyEditPipeline"):  # an image's latents, and a mask's
        channels = 4 + 4 + (4 if name.startswith("Wan") else 0)
        return {"transformer": changed(parts["transformer"], in_channels=channels, out_channels=4)}
    if name == "FluxFillPipeline":
        return {
            "transformer": changed(parts["transformer"], in_channels=16 + 16 + 16, out_channels=16)
        }
    return {}


def controlnet(name: str, parts: dict[str, Any]) -> torch.nn.Module:
    """The second network of a class, of the first one's sizes."""
    from diffusers import (
        ControlNetModel,
        ControlNetUnionModel,
        FluxControlNetModel,
        QwenImageControlNetModel,
        SD3ControlNetModel,
        ZImageControlNetModel,
    )

    if "Union" in name:
        net = ControlNetUnionModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(8, 8)
        )
        return changed(
            net, num_trans_channel=8, num_proj_channel=8, num_trans_head=2, num_trans_layer=1
        )
    if name.startswith("QwenImage"):
        sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
        sizes["extra_condition_channels"] = 4 if "Inpaint" in name else 0
        return QwenImageControlNetModel.from_transformer(parts["transformer"], **sizes)
    if name.startswith("ZImage"):
        sizes = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
        sizes |= {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        sizes["control_in_dim"] = 9 if "Inpaint" in name else 4
        net = ZImageControlNetModel(**sizes)
        return ZImageControlNetModel.from_transformer(net, parts["transformer"])
    if name.startswith("StableDiffusion3"):
        extra = 1 if "Inpaint" in name else 0
        return SD3ControlNetModel.from_transformer(
            parts["transformer"], 1, num_extra_conditioning_channels=extra
        )
    if name.startswith("Flux"):
        return FluxControlNetModel.from_transformer(
            parts["transformer"], 1, 1, attention_head_dim=16, num_attention_heads=2
        )
    return ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8))


def changed(model: torch.nn.Module, **config: object) -> torch.nn.Module:
    """A model like another, but for some of its sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(model).from_config(model.config, **config).eval()


@cache
def kolors() -> dict[str, Any]:
    """A ChatGLM and a U-Net of its width; CLIP's tokenizer numbers tokens as ChatGLM's does."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    own = pipeline("sd").tokenizer

    class Tokenizer(type(own)):
        def __call__(self, *args: object, **kwargs: object) -> Any:
            found = super().__call__(*args, **kwargs)
            if isinstance(found.input_ids, torch.Tensor):
                found["position_ids"] = torch.arange(found.input_ids.shape[1]).expand_as(
                    found.input_ids
                )
            return found

    tokenizer = Tokenizer(own.get_vocab(), [], model_max_length=own.model_max_length)
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(own),
        hidden_size=16,
        ffn_hidden_size=16,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=512,
        original_rope=True,
        rmsnorm=True,
        add_qkv_bias=True,
        multi_query_attention=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ChatGLMModel(config).eval()
        for parameter in encoder.parameters():  # its constructor leaves them as memory was
            torch.nn.init.normal_(parameter, std=0.5)
    unet = changed(
        pipeline("sd").unet,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=16,
    )
    return {"tokenizer": tokenizer, "text_encoder": encoder, "unet": unet}
