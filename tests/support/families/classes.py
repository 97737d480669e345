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
from families import FAMILIES, family, images, video
from families.controlnets import changed, controlnet

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
    "Flux2KleinKVPipeline": {"image": Image.new("RGB", (64, 64))},
    "HunyuanDiTControlNetPipeline": {"control_image": images.PICTURE},
    "SanaControlNetPipeline": {"control_image": images.PICTURE},
    "SanaSprintPipeline": {"intermediate_timesteps": None},
    "SanaSprintImg2ImgPipeline": {"intermediate_timesteps": None},
    "Kandinsky5I2IPipeline": {"max_sequence_length": 64},
    "HunyuanVideo15ImageToVideoPipeline": {"image": Image.new("RGB", (32, 32), "red")},
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

# of the input of a class, in which there is more than latents
CHANNELS = {
    "StableDiffusionDepth2ImgPipeline": ("unet", 5),
    "CogView4ControlPipeline": ("transformer", 8),
}
# attributes of pipelines that are shorter or smaller in tiny ones
SHORT = {
    "prompt_template",
    "prompt_template_encode",
    "prompt_template_encode_start_idx",
    "resolutions",
    "system_message",
    "system_prompt",
    "tokenizer_2_max_length",
    "tokenizer_max_length",
    "vision_num_semantic_tokens",
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
        ("qwen_edit_plus", "QwenImageEditPlus"),
        ("qwen_edit", "QwenImageEdit"),
        ("qwen", "QwenImage"),
        ("wan", "Wan"),
        ("wan", "Lucy"),
        ("auraflow", "Aura"),
        ("flux2", "Flux2Klein"),
        ("flux2_dev", "Flux2"),
        ("hunyuan_dit", "HunyuanDiT"),
        ("hunyuan_image", "HunyuanImage"),
        ("cogview4", "CogView4"),
        ("sana", "Sana"),
        ("kandinsky5_i2i", "Kandinsky5I2I"),
        ("kandinsky5_t2v", "Kandinsky5I2V"),
        ("kandinsky5_t2v", "Kandinsky5T2V"),
        ("kandinsky5", "Kandinsky5"),
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
    if hasattr(text, "calculate_dimensions"):
        images.shrink(text)
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
    if model_name(kind) in FAMILIES | video.FAMILIES:
        like = family(model_name(kind))
        for name in SHORT & vars(pipe).keys() & vars(like).keys():
            setattr(pipe, name, getattr(like, name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, **more: Any) -> Any:
    """The output of a run with what the class takes, and with more."""
    takes = inspect.signature(type(pipe).__call__).parameters
    given = {name: value for name, value in ARGUMENTS.items() if name in takes} | OWN.get(
        type(pipe).__name__, {}
    )
    if model_name(type(pipe)) in ("qwen", "wan", "flux2"):  # more pixels a latent
        given |= {"height": 32, "width": 32} if "height" in takes else {}
    if model_name(type(pipe)) in images.FAMILIES:
        own = images.FAMILIES[model_name(type(pipe))][1]
        given |= {name: value for name, value in own.items() if name in takes}
    if "use_resolution_binning" in takes:
        given["use_resolution_binning"] = False
    if "clean_caption" in takes:
        given["clean_caption"] = False
    if "num_frames" in takes:
        given["num_frames"] = 5
    if type(pipe).__name__.startswith(video.NAMES):
        own = video.arguments(type(pipe).__name__, PICTURE[0])
        given |= {name: value for name, value in own.items() if name in takes}
    if "true_cfg_scale" in given:
        given["negative_prompt"] = "fog"
    torch.manual_seed(0)  # some encode images without a generator
    return pipe(**given | more, generator=torch.Generator().manual_seed(0))


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
        return {"controlnet": controlnet(name, parts).eval(), **images.extras(name, parts)}
    if "Adapter" in name:
        return {"adapter": T2IAdapter(3, [8, 16, 16, 16], 1, 4, "full_adapter_xl").eval()}
    if name.startswith("LatentConsistency"):
        scheduler = LCMScheduler.from_config(parts["scheduler"].config)
        return {"unet": changed(parts["unet"], time_cond_proj_dim=8), "scheduler": scheduler}
    if "LDM3D" in name:
        return {"vae": changed(parts["vae"], out_channels=6)}
    if name in CHANNELS:
        part, count = CHANNELS[name]
        return {part: changed(parts[part], in_channels=count)}
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
    return images.extras(name, parts)


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
