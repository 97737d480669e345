"""The kinds of denoisers, a file each, and which of them a pipeline has."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch

from dense_attn import _checks

from .._attention_hook import POINTS, kind_of, reaches, stand_in
from ..hooks import unwrapped
from ..modular.pipeline import Modular
from .auraflow import AuraFlow
from .chroma import Chroma
from .cogview4 import CogView4
from .cross.hunyuan_dit import HunyuanDiT
from .cross.kandinsky5 import Kandinsky5
from .cross.pixart import PixArt
from .cross.sana import Sana
from .flux import Flux
from .flux2 import Flux2
from .flux2_kv import Flux2KV
from .hunyuan_image import HunyuanImage
from .lumina2 import Lumina2
from .qwen import QwenImage
from .record import Model
from .sd3 import SD3
from .unet import UNet
from .video.chronoedit import ChronoEdit
from .video.cogvideox import CogVideoX
from .video.hunyuan_video import HunyuanVideo
from .video.hunyuan_video15 import HunyuanVideo15
from .video.ltx import LTX
from .video.skyreels import SkyReels
from .video.wan import Wan
from .z_image import ZImage

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODELS: tuple[type[Model], ...] = (
    UNet,
    SD3,
    Flux,
    Flux2,
    Flux2KV,
    Chroma,
    QwenImage,
    ZImage,
    Lumina2,
    AuraFlow,
    CogView4,
    HunyuanImage,
    PixArt,
    HunyuanDiT,
    Sana,
    Kandinsky5,
    Wan,
    SkyReels,
    ChronoEdit,
    LTX,
    HunyuanVideo,
    HunyuanVideo15,
    CogVideoX,
)


def model_of(pipe: DiffusionPipeline) -> Model:
    """The record of a pipeline's denoiser, whose batches must be of a known kind."""
    unet = getattr(pipe, "unet", None)
    parts = unet, getattr(pipe, "transformer", None), getattr(pipe, "transformer_2", None)
    denoiser = unwrapped(next((part for part in parts if part is not None), None))
    kind = type(denoiser).__name__
    known = [model for model in MODELS if model.denoiser == kind]
    own = [model for model in known if _is_called_as(type(pipe), model)] or known
    if not known:
        *names, last = dict.fromkeys(model.denoiser for model in MODELS)
        got = type(pipe).__name__ + ("" if denoiser is None else f" with {kind}")
        rule = f"have a {', '.join(names)} or {last}, or one with a record (models/record.py)"
        _checks.refuse("pipe", rule, got)
    model = own[0].of(denoiser)
    if not isinstance(pipe, Modular):  # whose calls a guider tells apart
        _check_batches(type(pipe), model)
    for second in map(unwrapped, model.denoisers(pipe).values()):
        if type(second) is not type(denoiser) or model.of(second) != model:
            rule = f"have two denoisers of one kind and patch, {kind}"
            _checks.refuse("pipe", rule, f"{type(pipe).__name__} with a {type(second).__name__}")
    return model


def _check_batches(kind: type, model: Model) -> None:
    """Refuse a pipeline whose batches are neither halves where it guides, nor the prompt alone."""
    if not _is_called_as(kind, model):
        rule = f"call its {model.denoiser} as a {model.pipelines} does"
        _checks.refuse("pipe", rule, kind.__name__)
    encode = getattr(kind, "encode_prompt", None)
    parameters = () if encode is None else inspect.signature(encode).parameters
    if "prompt" not in parameters:
        _checks.refuse("pipe", "have an encode_prompt of a prompt", kind.__name__)
    if "image" in parameters and not model.sees_images:
        _checks.refuse("pipe", "encode its prompt without an image", kind.__name__)
    if "layers" in inspect.signature(kind.__call__).parameters:
        _checks.refuse("pipe", "make images of one layer", kind.__name__)
    told = model.branches == "calls" or model.hears_guidance
    if not told and not hasattr(kind, "do_classifier_free_guidance"):
        rule = "tell whether it guides (do_classifier_free_guidance)"
        _checks.refuse("pipe", rule, kind.__name__)
    for feature in ("do_perturbed_attention_guidance", "image_guidance_scale"):
        if hasattr(kind, feature):
            rule = f"make no estimates beside the prompt's and the negative one's ({feature})"
            _checks.refuse("pipe", rule, kind.__name__)
    if hasattr(kind, "get_views"):
        rule = "denoise the whole image in each call, not views of it (get_views)"
        _checks.refuse("pipe", rule, kind.__name__)


def _is_called_as(kind: type, model: Model | type[Model]) -> bool:
    """Whether a class of pipelines, or what it is derived from, calls its denoiser as recorded."""
    return any(re.fullmatch(model.pipelines, base.__name__) for base in kind.__mro__)


def attention_layers(
    denoiser: torch.nn.Module, model: Model, start: str = ""
) -> dict[str, tuple[Any, str, int]]:
    """A denoiser's attention modules by name, each with its kind and its halvings of the grid.

    Each must have a processor whose softmax is seen; layers without a place are left alone. A
    second denoiser's names have a start of their own.
    """
    layers: dict[str, tuple[Any, str, int]] = {}
    for name, module in denoiser.named_modules():
        if not hasattr(module, "processor"):
            continue
        place = model.place(denoiser, name)
        if place is None:
            continue
        kind = kind_of(module.processor)
        if not reaches(kind) and stand_in(kind) is None:
            rule = f"have attention processors that call {' or '.join(POINTS)}"
            _checks.refuse("pipe", rule, f"{kind.__name__} in {name}")
        layers[start + name] = module, *place
    return layers
