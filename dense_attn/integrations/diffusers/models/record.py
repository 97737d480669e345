"""A model's record: what the library must know of a denoiser to put phrases where they belong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..hooks import unwrapped
from ..layers import Side, joined
from ..options.numbers import JOINT, RANGE, Defaults
from ..rows import version

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dense_attn import Layout

    from ..prompts.texts import Slots, Texts
    from ..state import LayoutState


class Call(NamedTuple):
    """The arguments of a denoiser's call that a layout depends on."""

    timestep: Tensor | float
    text: Tensor  # [B, L, C]
    latents: Tensor  # [B, C, H, W], of videos [B, C, F, H, W], or packed [B, N, C]
    # of packed ones, [N, 3] or [B, N, 3]: image, row, column; or a record's own, one or a tuple
    places: Any = None

    @property
    def key(self) -> object:
        """Equal where the grid of latents is, and where its tokens stand."""
        places = self.places if isinstance(self.places, tuple) else (self.places,)
        return tuple(self.latents.shape), *map(_identity, places)


def _identity(x: Any) -> object:
    """A tensor's, until it is changed in place; numbers and texts are known by their value."""
    if isinstance(x, Tensor):
        return id(x), version(x)
    return x if isinstance(x, (int, float, str, type(None))) else id(x)


class Entry(NamedTuple):
    """The layers of one kind and size."""

    kind: str
    depth: int  # halvings of the grid of latents
    q: Side
    k: Side  # the same object where queries and keys are the same tokens


class Segment(NamedTuple):
    """A stretch of a layer's tokens."""

    kind: str  # "text", "image", or "other" for tokens of no region
    count: int | None = 0  # of "other": how many; None: those of the latents behind the image's
    multiple: int = 1  # padding at its end makes the number of its tokens a multiple of this


TEXT = Segment("text")
IMAGE = Segment("image")
REFERENCES = Segment("other", None)  # images to edit, which come as latents behind the image's


def registers(count: int) -> Segment:
    """Tokens that a model has of its own."""
    return Segment("other", count)


class Attention(NamedTuple):
    """The tokens that layers of a name attend from and to, in their order."""

    layers: str  # the end of their modules' names, a regular expression
    queries: tuple[Segment, ...]
    keys: tuple[Segment, ...] | None = None  # None: the queries' own tokens


@dataclass(frozen=True)
class Model:
    """A kind of denoiser; a subclass in the list `MODELS` is all that the library knows of it.

    Most records are a table. Layers are told apart by the ends of their modules' names; layers that
    no name fits are left alone. Where a table does not do, a record has methods of its own.

    Example:
        A transformer whose blocks have an `attn1` of the image alone and an `attn2` from the image
        to the text, and which is called once for the prompt and then for the negative prompt:

        >>> from dense_attn.integrations.diffusers.models import record
        >>> class Other(record.Model):
        ...     denoiser = "OtherTransformer2DModel"
        ...     branches = "calls"
        ...     attentions = (
        ...         record.Attention("attn1", (record.IMAGE,)),
        ...         record.Attention("attn2", (record.IMAGE,), (record.TEXT,)),
        ...     )

        Joint attention of four registers, the text and the image has the queries
        `(registers(4), TEXT, IMAGE)`, and `IMAGE._replace(multiple=32)` is an image with padding.
        Where the patch, the grid of packed latents or a call's arguments are not as usual, `of`,
        `grid`, `read` and `write` say so.
    """

    patch: int = 1  # latents on a side of an image token
    frames: int = 1  # of a video's latents in a token

    denoiser: ClassVar[str]  # the name of its class
    video: ClassVar[bool] = False  # whether it makes one, so that masks may have frames
    pipelines: ClassVar[str] = ".*"  # of the classes, a regular expression, that call it as here
    component: ClassVar[str] = "transformer"  # the pipeline's name for it
    latents: ClassVar[str] = "hidden_states"  # the argument that brings them
    unit: ClassVar[float] = 1.0  # of its timesteps, in the scheduler's
    packs: ClassVar[int | None] = None  # latents on a side of a token that its pipelines pack
    # where the negative prompt is: "halves" of a batch, before the prompt's, "prompt first" for
    # halves behind it, or "calls" of their own after the prompt's
    branches: ClassVar[str] = "halves"
    sign: ClassVar[int] = 1  # of its estimates, in the scheduler's
    # the axis on which text-to-video calls have room for an image behind the latents: zeros, as
    # many channels and a mask's
    room: ClassVar[int | None] = None
    lengths: ClassVar[int] = 1  # of its videos, in frames of latents: 1 above a multiple of it
    unguided: ClassVar[float] = 1.0  # the guidance scale without a negative branch
    shifts: ClassVar[bool] = False  # whether its pipelines read the VAE's shift_factor
    upcasts: ClassVar[bool] = False  # whether they heed the VAE's force_upcast
    hears_guidance: ClassVar[bool] = False  # encode_prompt is told whether it guides, no one else
    sees_images: ClassVar[bool] = False  # whose tokens encode_prompt may put beside the prompt's
    attentions: ClassVar[tuple[Attention, ...]] = ()
    # prompts of regions: whether a call takes more text behind its own, as `lengthen` and
    # `numbered` place it, None where cross-attention does; layers in which text sees text, a
    # regular expression; the argument that tells text from padding, and whether layers see padding
    # all the same, or words alone leave out what it would; the module and the function that number
    # the tokens
    masks: ClassVar[tuple[str, ...]] = ()  # all arguments of which layers make masks of their own
    longer_text: ClassVar[bool | None] = None
    text_layers: ClassVar[str | None] = None
    text_mask: ClassVar[str] = "encoder_attention_mask"
    keeps_padding: ClassVar[bool] = False
    words_alone: ClassVar[bool] = False
    numbering: ClassVar[tuple[str, str] | None] = None
    # the layers, a name in `attentions`, that take texts of regions as rows behind a call's own
    beside: ClassVar[str | None] = None

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> Model:
        """The record of one denoiser."""
        patch = cls.packs or getattr(denoiser.config, "patch_size", 1)
        frames = getattr(denoiser.config, "patch_size_t", None) or 1
        if not isinstance(patch, int):  # (frames, rows, columns), or without frames
            frames, patch = patch[0] if len(patch) == 3 else 1, patch[-1]
        return cls(patch=patch, frames=frames)

    @property
    def joint(self) -> bool:
        """Whether text tokens attend too, in the layers of the image."""
        rows = (segment.kind for attention in self.attentions for segment in attention.queries)
        return "text" in rows

    @property
    def layer_kinds(self) -> list[tuple[set[str], set[str]]]:
        """Each kind of layers: the tokens, "text" and "image", that it attends from and to."""
        sides = [(queries, keys or queries) for _, queries, keys in self.attentions]
        return [tuple({part.kind for part in side} - {"other"} for side in pair) for pair in sides]

    @property
    def defaults(self) -> Defaults:
        """The numbers of a layout whose caller does not say; a record may name its own."""
        return JOINT if self.joint else RANGE

    def denoisers(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """A pipeline's denoisers by the beginning of their layers' names: one, or two in turns."""
        first, second = (
            getattr(pipe, name, None) for name in (self.component, f"{self.component}_2")
        )
        found = {"": first, f"{self.component}_2.": None if second is first else second}
        return {start: denoiser for start, denoiser in found.items() if denoiser is not None}

    def root(self, pipe: DiffusionPipeline, name: str) -> tuple[torch.nn.Module, str]:
        """The denoiser of a layer, and the layer's name in it."""
        denoisers = self.denoisers(pipe)
        start = max((start for start in denoisers if name.startswith(start)), key=len)
        return unwrapped(denoisers[start]), name.removeprefix(start)

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call."""
        latents, text = arguments[self.latents], arguments["encoder_hidden_states"]
        timestep = arguments["timestep"]
        if isinstance(timestep, Tensor) and timestep.dim() == 2:  # [B, N], 0 in a given frame
            timestep = timestep[:, -1]
        return Call(timestep, text, latents, arguments.get("img_ids"))

    def check(self, arguments: dict[str, Any]) -> None:
        """Refuse a call of the prompt's that no layout can be for."""

    def write(self, arguments: dict[str, Any], text: Tensor) -> None:
        """Put text tokens [B, L, C] into a call."""
        arguments["encoder_hidden_states"] = text

    def mask_sources(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of which each layer makes its mask; none where they share one."""
        given = tuple(arguments.get(name) for name in self.masks)
        return given if all(isinstance(mask, Tensor) for mask in given) else ()

    def own_text(self, arguments: dict[str, Any], text: Tensor) -> tuple[Tensor, list[int]]:
        """A call's text [B, L, C], and the tokens at the begin of each row that are there."""
        return text, [text.shape[1]] * len(text)

    def second_text(self, arguments: dict[str, Any]) -> tuple[Tensor, list[int]] | None:
        """The text of a call as another encoder reads it, [B, L, C], and its tokens in each row."""
        return None

    def without_text(self, arguments: dict[str, Any]) -> bool:
        """Take a call's own text out where none of it is seen; no where a model needs one."""
        return False

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's, with what it is told of each token."""
        self.write(arguments, texts.tokens)
        mask = arguments.get(self.text_mask)
        if mask is not None:
            own = mask[:, : texts.slots.own]
            arguments[self.text_mask] = torch.cat([own, texts.mask.to(own)], 1)

    def numbered(self, own: Any, slots: Slots, *args: Any, **kwargs: Any) -> Any:
        """The result of the function that numbers tokens, `own`, for texts in their slots."""
        raise NotImplementedError

    def guided(self, negative: Tensor, prompt: Tensor, scale: float) -> Tensor:
        """The estimate that its pipelines make of two, before the sign."""
        return negative + scale * (prompt - negative)

    def given(self, latents: Tensor) -> Any:
        """Latents of the pipeline's loop as the denoiser's argument."""
        return latents

    def taken(self, made: Any) -> Tensor:
        """The denoiser's latents or estimates as the pipeline's loop has them."""
        return made

    def arranged(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W], of videos [B, C, F, H, W], as the pipeline's loop has them."""
        return latents

    def pictured(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents of the pipeline's loop, of this height and width, as the VAE has them."""
        return latents

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width."""
        return tuple(call.latents.shape[-2:])

    def length(self, call: Call) -> int:
        """The latents' frames; an image has one."""
        return call.latents.shape[2] if call.latents.dim() == 5 else 1

    def references(self, call: Call, image: int) -> int:
        """The tokens of images to edit, beside so many of the image's own."""
        return call.latents.shape[1] - image

    def place(self, denoiser: torch.nn.Module, name: str) -> tuple[str, int] | None:
        """A layer's kind and its halvings of the grid; None for one that is left alone."""
        ends = (attention.layers for attention in self.attentions)
        return next(((end, 0) for end in ends if re.search(rf"(^|\.)({end})$", name)), None)

    def attentions_of(self, call: Call) -> tuple[Attention, ...]:
        """The kinds of a call's layers while regions have prompts."""
        return self.attentions

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """Every kind and size of attention layers."""
        for kind, queries, keys in self.attentions:
            columns = tuple({segment.kind for segment in keys or queries})
            weights = {row.kind: state.options.weight(row.kind, columns) for row in queries}
            if not any(weights.values()):
                continue
            q = self._side(state, layouts, text, call, queries, weights.get("image", 0.0))
            k = q if keys is None else self._side(state, layouts, text, call, keys, 0.0)
            yield Entry(kind, 0, q, k)

    def _side(
        self,
        state: LayoutState,
        layouts: list[Layout],
        text: Side,
        call: Call,
        segments: tuple[Segment, ...],
        weight: float,
    ) -> Side:
        """The tokens of segments, one after the other."""
        height, width = (side // self.patch for side in self.grid(call))
        height *= self.length(call) // self.frames  # frames stand one below the other
        sides = []
        for segment in segments:
            if segment.kind == "text":
                side = text
            elif segment.kind == "image":
                side = state.image_side(layouts, (height, width), weight)
            else:
                packed = segment.count is None
                count = self.references(call, height * width) if packed else segment.count
                side = state.other_side(layouts, count)
            missing = -side.words.shape[1] % segment.multiple
            sides.append(joined(side, state.other_side(layouts, missing)) if missing else side)
        return joined(*sides)


def packed(latents: Tensor) -> Tensor:
    """Latents [B, C, H, W] as tokens [B, H/2 * W/2, 4C] of 2 x 2, each channel's together."""
    tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, H/2, 2, W/2, 2]
    return tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Latents [B, C, H, W] of a height and width, out of the tokens of `packed`."""
    height, width = grid
    cells = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def like_norm(estimate: Tensor, prompt: Tensor) -> Tensor:
    """A guided estimate whose vectors along the last axis are as long as those of the prompt's."""
    return estimate * (prompt.norm(dim=-1, keepdim=True) / estimate.norm(dim=-1, keepdim=True))
