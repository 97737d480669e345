"""The state of a layout that is on: rows, region words and strengths of this step."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dense_attn import Layout, _checks
from dense_attn.layout_attention.layout import _BITS, nearest
from dense_attn.layout_attention.masks import Mask

from ._attention_hook import Expected, is_marked
from .hooks import arguments, foreign, unwrapped
from .layers import Layer, Side, order_of
from .modular.guiders import GuidedRows
from .modular.pipeline import Modular
from .options import blocks
from .regions.frames import asked_of, check_call, masks_of_call
from .rows import Rows
from .steps import Steps, check_sigmas

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .models.record import Call, Model
    from .options.numbers import Options
    from .text.reading import Reading


class Image(NamedTuple):
    """The regions of one prompt: masks, each phrase's tokens, and their embeddings alone."""

    masks: Tensor  # bool [R, H, W], of each frame [R, F, H, W]
    spans: list[list[tuple[int, int]]]  # of each region, none without a phrase
    alone: list[tuple[tuple[int, int], Tensor]]  # in the order in which they are put in


class NearestLayout(Layout):
    """A layout by nearest pixels alone, as in DenseDiffusion's code; a region may lose a grid."""

    def _resized(self, height: int, width: int) -> Tensor:
        return nearest(self.masks, (height, width)).flatten(1)


class LayerMark:
    """A block's knowledge of one attention module, which its calls ask for."""

    def __init__(self, state: LayoutState, name: str, kind: str, depth: int) -> None:
        self.state, self.name = state, name
        self.kind, self.depth = kind, depth  # as those of an Entry

    def expected(self) -> Expected | None:
        """The softmax to modulate in this call; None in steps and layers that are left alone."""
        return self.state.expected(self.kind, self.depth)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Mask | None
    ) -> Tensor:
        """Modulated attention of the rows q, k, v [B, H, N, D] that see the prompt."""
        return self.state.attend(self.state.layers[self.kind, self.depth], q, k, v, scale, mask)

    def missed(self, seen: list[tuple[int, int]]) -> None:
        """Say that the layer attends to other tokens than those of its place."""
        self.state.missed(self, seen)


class LayoutState:
    """One `apply_layout` block."""

    def __init__(
        self, pipe: DiffusionPipeline, model: Model, reading: Reading, options: Options
    ) -> None:
        self.pipe, self.model, self.options = pipe, model, options
        self.reading, self.images = reading, reading.images()
        self.steps = Steps(pipe, options.active_sigma)
        self.longest = reading.needed
        self.paused = 0  # blocks inside of this one
        self.attentions: dict[str, Any] = {}  # the modules that have marks, by name
        self.layers: dict[tuple[str, int], Layer] = {}  # by kind and halvings of the grid
        self.first, self.last = 0, 0  # the rows of the batch that this call modulates
        self.sources: tuple[Tensor, ...] = ()  # what its layers make their masks of
        self.asked: int | None = None  # frames of the video that the pipeline's call asks for
        rows = GuidedRows if isinstance(pipe, Modular) else Rows
        self._rows = rows(pipe, len(self.images), model.branches)
        self._told = self._cached = False  # of layers left alone, of a cache of steps
        self._made_for: object = None
        self._call: Call | None = None  # kept so that its key stays its own

    def __reduce__(self) -> tuple[Any, ...]:
        """That of a copied or pickled denoiser, which is in no block: its calls go on."""
        return object.__new__, (type(self),), {"paused": 1, "first": 0, "last": 0}

    @property
    def masks(self) -> list[Tensor]:
        """The masks of each image's regions, [R, H, W] or [R, F, H, W]."""
        return [image.masks for image in self.images]

    def hear_call(self, given: dict[str, Any]) -> None:
        """Take a pipeline's call's arguments; refuse masks of other frames, and rising sigmas."""
        if not self.paused:
            check_call(self.pipe, self.model, given, self.masks)
            if self.options.active_sigma is not None:
                check_sigmas(given)
        self.asked = asked_of(self.pipe, given)

    def marks(self, layers: dict[str, tuple[Any, str, int]]) -> list[tuple[Any, LayerMark]]:
        """The marks of attention modules, given by name with their kind and depth."""
        self.attentions = {name: layer for name, (layer, *_) in layers.items()}
        return [(layer, LayerMark(self, name, *at)) for name, (layer, *at) in layers.items()]

    def expected(self, kind: str, depth: int) -> Expected | None:
        """The softmax of a kind of layers, None where nothing is to be modulated."""
        layer = self.layers.get((kind, depth))
        if self.first == self.last or layer is None:
            return None
        sizes = layer.q_words.shape[1], layer.k_words.shape[1]
        return Expected(self.first, self.last, *sizes, layer.k_order is not None, self.sources)

    def attend(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        mask: Mask | None = None,
    ) -> Tensor:
        """Modulated attention of q, k, v [B, H, N, D] as [B, H, M, D]."""
        if mask is None:
            return layer.attention(q, k, v, scale=scale, options=self.options)
        return mask.attention(q, k, v, scale, partial(layer.attention, options=self.options))

    def missed(self, mark: LayerMark, seen: list[tuple[int, int]]) -> None:
        """Refuse a layer's own number of tokens; once a block, warn of an extension's."""
        expected = self.layers[mark.kind, mark.depth].q_words.shape[1]
        got = seen[0][0] if seen else "none"
        other = foreign(*self.model.root(self.pipe, mark.name))
        if other is None:
            rule = f"give {mark.name} the {expected} tokens of its latents' grid"
            _checks.refuse("pipe", rule, got)
        if not self._told:
            self._told = True
            text = f"{other} gives it {got} where {expected} tokens have a place"
            warnings.warn(
                f"a layout leaves {mark.name}, and layers like it, alone: {text}", stacklevel=2
            )

    def _tell_of_cache(self, denoiser: Any) -> None:
        """Warn once of a cache of steps, which may keep what a layout made past its last step."""
        if (
            (self.options.active == 1 and not self.options.active_sigma)
            or self._cached
            or not getattr(denoiser, "is_cache_enabled", False)
        ):
            return
        self._cached = True
        kind = type(denoiser._cache_config).__name__
        warnings.warn(f"{kind} may repeat a layout's steps after the last of them", stacklevel=2)

    def before_call(
        self, denoiser: torch.nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """A hook before each call of the denoiser: its step in the run, its phrases' embeddings."""
        self.first = self.last = 0
        if self.paused or not self.options.acts:
            return None
        for name, layer in self.attentions.items():
            if not is_marked(layer.processor):
                rule = "keep the layout's attention processors inside of the block"
                _checks.refuse("pipe", rule, f"{type(layer.processor).__name__} in {name}")
        bound = arguments(denoiser, args, kwargs)
        call = self.model.read(bound.arguments)
        self.reading.check()
        self.steps.follow(call.timestep, self.model.unit)
        said = self.reading.rows, self.reading.guides
        rows = self._rows.of(call.latents, call.text, self.steps.repeated, *said)
        if rows is None:
            return None
        self.model.check(bound.arguments)
        if self.longest > call.text.shape[1]:
            rule = f"have its phrases in the {call.text.shape[1]} tokens of the call"
            _checks.refuse("prompt", rule, self.longest)
        self._read(call.text.shape[1])
        self.model.write(bound.arguments, self._with_phrases(call.text, *rows))
        self.sources = self.model.mask_sources(bound.arguments)
        if self.steps.within(0.0, self.options.active):
            self._make_layers(call, rows[1] - rows[0])
            factor = self.steps.time**self.options.exponent
            for layer in self.layers.values():
                layer.now = layer.strength * factor
            self.first, self.last = rows
            self._tell_of_cache(unwrapped(denoiser))
        return bound.args[1:], bound.kwargs

    def _read(self, num_tokens: int) -> None:
        """Take the phrases as they are in this call."""
        images = self.reading.images(num_tokens)
        if images is not self.images:
            self.images, self._made_for = images, None

    def _with_phrases(self, text: Tensor, first: int, last: int) -> Tensor:
        """The text tokens, with phrases' embeddings alone in the rows that see the prompt."""
        if not any(image.alone for image in self.images):
            return text
        replaced = text.expand(
            max(last, len(text)), -1, -1
        ).clone()  # anew: callbacks change text in place
        each = (last - first) // len(self.images)
        for i, image in enumerate(self.images):
            for (start, stop), alone in image.alone:
                replaced[first + i * each : first + (i + 1) * each, start:stop] = alone.to(text)
        return replaced

    def _make_layers(self, call: Call, rows: int) -> None:
        """The layers of a latent grid and a number of text tokens, once a run."""
        made_for = call.key, call.text.shape[1], call.text.device, rows, self.asked
        made_for += (torch.is_inference_mode_enabled(),)  # whose tensors no gradient may keep
        if made_for == self._made_for:
            return
        masks = masks_of_call(self.pipe, self.model, call, self.images, self.asked)
        layouts = [Layout(x) for x in masks]
        text = self._text_side(layouts, call.text)
        each, self.layers = rows // len(self.images), {}

        def spread(side: Tensor) -> Tensor:
            return side if len(self.images) == 1 else side.repeat_interleave(each, 0)

        masked = self.options.modulation == "mask"  # where no row may see nothing
        for entry in self.model.layers(self, layouts, text, call):
            q_words, k_words = blocks.words(entry.q, entry.k, self.options.blocks, masked)
            self.layers[entry.kind, entry.depth] = Layer(
                q_words=spread(q_words),
                k_words=spread(k_words),
                strength=spread(entry.q.strength)[:, None],
                q_order=spread(order_of(entry.q._replace(words=q_words))),
                k_order=spread(order_of(entry.k._replace(words=k_words)))
                if entry.k is entry.q
                else None,
            )
        self._made_for, self._call = made_for, call

    def image_side(self, layouts: list[Layout], grid: tuple[int, int], weight: float) -> Side:
        """The tokens of an image."""
        options = {"weight": weight, "time": 1.0, "size_weight": self.options.size_weight}
        words = torch.stack([layout.query_regions(*grid) for layout in layouts])
        strength = torch.stack([layout.strength(*grid, **options) for layout in layouts])
        return Side(words, strength, torch.zeros_like(words, dtype=torch.bool))

    def other_side(self, layouts: list[Layout], count: int) -> Side:
        """Tokens that belong to no region."""
        shape, device = (len(layouts), count), layouts[0].masks.device
        kinds = torch.int32, torch.float32, torch.bool
        return Side(*(torch.zeros(shape, dtype=kind, device=device) for kind in kinds))

    def _text_side(self, layouts: list[Layout], text: Tensor) -> Side:
        """The tokens of a prompt; as queries, in joint attention, a phrase's are modulated."""
        weight, size_weight = self.options.weight("text"), self.options.size_weight
        words = torch.zeros(len(layouts), text.shape[1], dtype=torch.int32, device="cpu")
        strength = torch.zeros(len(layouts), text.shape[1], dtype=torch.float32, device="cpu")
        for i, (image, layout) in enumerate(zip(self.images, layouts)):
            for r, places in enumerate(image.spans):
                share = layout.masks[r].float().mean().item()
                for start, stop in places:
                    words[i, start:stop] = _BITS[r]
                    strength[i, start:stop] = weight * (1 - size_weight * share)
        sides = words, strength, torch.ones_like(words, dtype=torch.bool)
        return Side(*(side.to(text.device) for side in sides))
