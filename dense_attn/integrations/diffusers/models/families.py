"""What sets the families of models apart: how their denoisers are called, and which tokens attend
to which.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks

from .._hooks import unwrapped
from .._state import LayoutState, NearestLayout, Side, joined, order_of
from .processors import FluxProcessor, JointProcessor, LayoutProcessor, UNetProcessor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dense_attn import Layout

Entry = tuple[
    tuple[str, int], Side, Side, Tensor
]  # kind and halvings of the grid, queries, keys, order


class Call(NamedTuple):
    """The arguments of a denoiser's call that a layout depends on."""

    timestep: Tensor | float
    text: Tensor  # [B, L, C]
    latents: Tensor  # [B, C, H, W], or packed [B, N, C]
    places: Tensor | None = None  # of packed ones, [N, 3] or [B, N, 3]: image, row, column

    @property
    def key(self) -> object:
        """Equal where the grid of latents is."""
        return tuple(self.latents.shape), id(self.places)


@dataclass(frozen=True)
class UNet:
    """Stable Diffusion 1, 2 and XL: self- and cross-attention at several resolutions."""

    deepest: int = 0  # halvings of the grid in the middle
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
        """The latents' height and width."""
        return tuple(call.latents.shape[2:])

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """Each halving of the latents has layers of both kinds; the finest with attention has
        tokens of all regions.
        """
        options, (height, width) = state.options, self.grid(call)
        for depth in range(self.deepest + 1):
            if depth == _first_attention(state.pipe.unet) + 1:
                layouts = [NearestLayout(layout.masks) for layout in layouts]
            image = state.image_side(layouts, (height, width), options.self_weight)
            order = order_of(image)
            if options.self_weight:
                yield ("self", depth), image, image, order
            if options.cross_weight:
                cross = state.image_side(layouts, (height, width), options.cross_weight)
                yield ("cross", depth), cross, text, order
            height, width = (height + 1) // 2, (width + 1) // 2

    def depth(self, unet: torch.nn.Module, name: str) -> int:
        """How often the grid is halved where a layer is; -1 for layers of no grid, as GLIGEN's
        are.
        """
        part, *rest = name.split(".")
        if "fuser" in rest or part not in ("down_blocks", "mid_block", "up_blocks"):
            return -1
        if part == "down_blocks":
            return _resized(unet.down_blocks[: int(rest[0])], "downsamplers")
        if part == "up_blocks":
            return self.deepest - _resized(unet.up_blocks[: int(rest[0])], "upsamplers")
        return self.deepest


def _first_attention(unet: torch.nn.Module) -> int:
    """How often a U-Net halves its latents before its first attention layers."""
    kinds = unwrapped(unet).config.down_block_types
    return next((level for level, kind in enumerate(kinds) if "Attn" in kind), len(kinds) - 1)


@dataclass(frozen=True)
class Joint:
    """Stable Diffusion 3: joint attention, image tokens first, and self-attention of the image in
    some blocks.
    """

    patch: int
    component = "transformer"
    unit = 1.0
    guidance_apart = False
    processor: type[LayoutProcessor] = JointProcessor
    replaces = (
        "JointAttnProcessor2_0",
        "XFormersJointAttnProcessor",
    )  # diffusers' fused one leaves out the norms

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call."""
        return Call(
            arguments["timestep"], arguments["encoder_hidden_states"], arguments["hidden_states"]
        )

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width."""
        return tuple(call.latents.shape[2:])

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """One of each kind."""
        height, width = self.grid(call)
        image = state.image_side(
            layouts, (height // self.patch, width // self.patch), state.options.self_weight
        )
        tokens = joined(image, text)
        yield ("joint", 0), tokens, tokens, order_of(tokens)
        if state.options.self_weight:
            yield ("self", 0), image, image, order_of(image)

    def depth(self, transformer: torch.nn.Module, name: str) -> int:
        """All layers have one grid."""
        return 0


@dataclass(frozen=True)
class Flux:
    """FLUX: joint attention, text tokens first; the estimate for a negative prompt is a call of its
    own.
    """

    component = "transformer"
    unit = 1e-3
    guidance_apart = True
    processor: type[LayoutProcessor] = FluxProcessor
    replaces = ("FluxAttnProcessor",)

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call."""
        latents, places = arguments["hidden_states"], arguments["img_ids"]
        return Call(arguments["timestep"], arguments["encoder_hidden_states"], latents, places)

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width, of which a token packs 2 x 2: counted, for bfloat16 rounds
        places past 256.
        """
        places = (
            call.places[0] if call.places.dim() == 3 else call.places
        )  # as the transformer reads them
        own = places[places[:, 0] == 0]
        width = int((own[:, 1] == 0).sum())
        height = len(own) // max(width, 1)
        expected = (
            torch.arange(height, dtype=torch.int64, device=own.device)
            .repeat_interleave(width)
            .to(own.dtype)
        )
        if len(own) != height * width or not torch.equal(own[:, 1], expected):
            _checks.refuse(
                "pipe",
                "number its image tokens row by row (img_ids)",
                f"{len(own)} in rows of {width}",
            )
        return 2 * height, 2 * width

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """One kind; the tokens of an image to edit come after the others and belong to no
        region.
        """
        height, width = (side // 2 for side in self.grid(call))
        others = call.latents.shape[1] - height * width
        image = state.image_side(layouts, (height, width), state.options.self_weight, others)
        tokens = joined(text, image)
        yield ("joint", 0), tokens, tokens, order_of(tokens)

    def depth(self, transformer: torch.nn.Module, name: str) -> int:
        """All layers have one grid."""
        return 0


Family = UNet | Joint | Flux


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline's denoiser."""
    unet = getattr(pipe, "unet", None)
    denoiser = unwrapped(getattr(pipe, "transformer", None) if unet is None else unet)
    kind = type(denoiser).__name__
    family: Family
    if kind == "UNet2DConditionModel":
        family = UNet(_resized(denoiser.down_blocks, "downsamplers"))
    elif kind == "SD3Transformer2DModel":
        family = Joint(denoiser.config.patch_size)
    elif kind == "FluxTransformer2DModel":
        family = Flux()
    else:
        rule = "have a UNet2DConditionModel, SD3Transformer2DModel or FluxTransformer2DModel"
        _checks.refuse(
            "pipe", rule, type(pipe).__name__ + ("" if denoiser is None else f" with {kind}")
        )
    _check_kind(pipe, family)
    return family


def _check_kind(pipe: DiffusionPipeline, family: Family) -> None:
    """Refuse a pipeline whose batches are not known: halves where it guides, or the prompt
    alone.
    """
    encode = getattr(type(pipe), "encode_prompt", None)
    if encode is None or "prompt" not in inspect.signature(encode).parameters:
        _checks.refuse("pipe", "have an encode_prompt of a prompt", type(pipe).__name__)
    if not family.guidance_apart and not hasattr(type(pipe), "do_classifier_free_guidance"):
        _checks.refuse(
            "pipe", "tell whether it guides (do_classifier_free_guidance)", type(pipe).__name__
        )
    for feature in ("do_perturbed_attention_guidance", "image_guidance_scale"):
        if hasattr(type(pipe), feature):
            _checks.refuse("pipe", f"make no estimates beside the prompt's and the negative one's ({feature})",
                           type(pipe).__name__)  # fmt: skip
    if hasattr(type(pipe), "get_views"):
        _checks.refuse(
            "pipe",
            "denoise the whole image in each call, not views of it (get_views)",
            type(pipe).__name__,
        )


def _resized(blocks: Any, samplers: str) -> int:
    """How many blocks halve the grid, or double it."""
    return sum(bool(getattr(block, samplers, None)) for block in blocks)


def attention_layers(denoiser: torch.nn.Module, family: Family) -> dict[str, Any]:
    """The attention modules of a denoiser by name, all of which must have a processor that the
    family knows.
    """
    layers = {
        name: module
        for name, module in denoiser.named_modules()
        if hasattr(module, "get_processor")
    }
    for name, module in layers.items():
        inner = module.processor
        while isinstance(inner, LayoutProcessor):
            inner = inner.original
        kind = type(inner)
        if kind.__name__ not in family.replaces or not kind.__module__.startswith("diffusers."):
            rule = f"have attention processors of {', '.join(family.replaces)}"
            why = (
                ": IP-Adapter's image attention has no layout"
                if "IPAdapter" in kind.__name__
                else ""
            )
            _checks.refuse("pipe", rule, f"{kind.__name__} in {name}{why}")
    return layers
