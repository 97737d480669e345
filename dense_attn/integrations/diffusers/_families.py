"""What sets the families of models apart: how their denoisers are called, and which tokens attend to which."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks

from ._hooks import unwrapped
from ._processors import FluxProcessor, JointProcessor, LayoutProcessor, UNetProcessor
from ._state import LayoutState, Side, joined, order_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dense_attn import Layout

Entry = tuple[str, Side, Side, Tensor]  # kind, queries, keys, order


class Call(NamedTuple):
    """The arguments of a denoiser's call that a layout depends on."""

    timestep: Tensor | float
    text: Tensor  # [B, L, C]
    image: Tensor  # latents [B, C, H, W], or the places [N, 3] of packed ones

    @property
    def key(self) -> object:
        """Equal where the grid of latents is."""
        return tuple(self.image.shape) if self.image.dim() == 4 else id(self.image)


@dataclass(frozen=True)
class UNet:
    """Stable Diffusion 1, 2 and XL: self- and cross-attention at several resolutions."""

    component = "unet"
    unit = 1.0
    guidance_apart = False
    processor: type[LayoutProcessor] = UNetProcessor
    replaces = (
        "AttnProcessor2_0", "AttnProcessor", "FusedAttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor",
    )  # fmt: skip

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call."""
        return Call(arguments["timestep"], arguments["encoder_hidden_states"], arguments["sample"])

    def grid(self, call: Call) -> tuple[int, int]:
        """Of the latents."""
        return tuple(call.image.shape[2:])

    def layers(self, state: LayoutState, layouts: list[Layout], text: Side, call: Call) -> Iterator[Entry]:
        """Each halving of the latents has layers of both kinds."""
        options, (height, width) = state.options, self.grid(call)
        while True:
            image = state.image_side(layouts, (height, width), options.self_weight)
            order = order_of(image)
            if options.self_weight:
                yield "self", image, image, order
            if options.cross_weight:
                yield "cross", state.image_side(layouts, (height, width), options.cross_weight), text, order
            if height == width == 1:
                return
            height, width = (height + 1) // 2, (width + 1) // 2


@dataclass(frozen=True)
class Joint:
    """Stable Diffusion 3: joint attention, image tokens first, and self-attention of the image in some blocks."""

    patch: int
    component = "transformer"
    unit = 1.0
    guidance_apart = False
    processor: type[LayoutProcessor] = JointProcessor
    replaces = ("JointAttnProcessor2_0", "XFormersJointAttnProcessor")  # diffusers' fused one leaves out the norms

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call."""
        return Call(arguments["timestep"], arguments["encoder_hidden_states"], arguments["hidden_states"])

    def grid(self, call: Call) -> tuple[int, int]:
        """Of the latents."""
        return tuple(call.image.shape[2:])

    def layers(self, state: LayoutState, layouts: list[Layout], text: Side, call: Call) -> Iterator[Entry]:
        """One of each kind."""
        height, width = self.grid(call)
        image = state.image_side(layouts, (height // self.patch, width // self.patch), state.options.self_weight)
        tokens = joined(image, text)
        yield "joint", tokens, tokens, order_of(tokens)
        if state.options.self_weight:
            yield "self", image, image, order_of(image)


@dataclass(frozen=True)
class Flux:
    """FLUX: joint attention, text tokens first; the estimate for a negative prompt is a call of its own."""

    component = "transformer"
    unit = 1e-3
    guidance_apart = True
    processor: type[LayoutProcessor] = FluxProcessor
    replaces = ("FluxAttnProcessor",)

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call."""
        return Call(arguments["timestep"], arguments["encoder_hidden_states"], arguments["img_ids"])

    def grid(self, call: Call) -> tuple[int, int]:
        """Of the latents, of which a token packs 2 x 2."""
        places = call.image.reshape(-1, 3)
        height, width = (places[places[:, 0] == 0][:, 1:].amax(0) + 1).long().tolist()
        return 2 * height, 2 * width

    def layers(self, state: LayoutState, layouts: list[Layout], text: Side, call: Call) -> Iterator[Entry]:
        """One kind; the tokens of an image to edit come after the others and belong to no region."""
        height, width = (side // 2 for side in self.grid(call))
        others = call.image.shape[-2] - height * width
        image = state.image_side(layouts, (height, width), state.options.self_weight, others)
        tokens = joined(text, image)
        yield "joint", tokens, tokens, order_of(tokens)


Family = UNet | Joint | Flux


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline's denoiser."""
    unet = getattr(pipe, "unet", None)
    denoiser = unwrapped(getattr(pipe, "transformer", None) if unet is None else unet)
    kind = type(denoiser).__name__
    family: Family
    if kind == "UNet2DConditionModel":
        family = UNet()
    elif kind == "SD3Transformer2DModel":
        family = Joint(denoiser.config.patch_size)
    elif kind == "FluxTransformer2DModel":
        family = Flux()
    else:
        rule = "have a UNet2DConditionModel, SD3Transformer2DModel or FluxTransformer2DModel"
        _checks.refuse("pipe", rule, type(pipe).__name__ + ("" if denoiser is None else f" with {kind}"))
    _check_kind(pipe, family)
    return family


def _check_kind(pipe: DiffusionPipeline, family: Family) -> None:
    """Refuse a pipeline whose batches are not known: halves where it guides, or the prompt alone."""
    encode = getattr(type(pipe), "encode_prompt", None)
    if encode is None or "prompt" not in inspect.signature(encode).parameters:
        _checks.refuse("pipe", "have an encode_prompt of a prompt", type(pipe).__name__)
    if not family.guidance_apart and not hasattr(type(pipe), "do_classifier_free_guidance"):
        _checks.refuse("pipe", "tell whether it guides (do_classifier_free_guidance)", type(pipe).__name__)
    for feature in ("do_perturbed_attention_guidance", "image_guidance_scale"):
        if hasattr(type(pipe), feature):
            _checks.refuse("pipe", f"make no estimates beside the prompt's and the negative one's ({feature})",
                           type(pipe).__name__)  # fmt: skip


def attention_layers(denoiser: torch.nn.Module, family: Family) -> dict[str, Any]:
    """The attention modules of a denoiser by name, all of which must have a processor that the family knows."""
    layers = {name: module for name, module in denoiser.named_modules() if hasattr(module, "get_processor")}
    for name, module in layers.items():
        inner = module.processor
        while isinstance(inner, LayoutProcessor):
            inner = inner.original
        kind = type(inner)
        if kind.__name__ not in family.replaces or not kind.__module__.startswith("diffusers."):
            rule = f"have attention processors of {', '.join(family.replaces)}"
            why = ": IP-Adapter's image attention has no layout" if "IPAdapter" in kind.__name__ else ""
            _checks.refuse("pipe", rule, f"{kind.__name__} in {name}{why}")
    return layers
