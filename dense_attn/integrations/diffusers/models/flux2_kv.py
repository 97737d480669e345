"""FLUX.2 klein whose pipeline keeps the keys of reference images from its first step on."""

from __future__ import annotations

from typing import Any

from .flux2 import Flux2
from .record import IMAGE, REFERENCES, TEXT, Attention, Call


class Flux2KV(Flux2):
    """Flux2Transformer2DModel whose images to edit see each other alone, in the first step.

    The text and the image see them in all steps, between the text and the image.
    """

    pipelines = "Flux2KleinKVPipeline"
    attentions = (Attention("attn", (TEXT, IMAGE), (TEXT, REFERENCES, IMAGE)),)

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, with the number of the others' tokens."""
        call, kept = super().read(arguments), arguments.get("kv_cache")
        count = arguments.get("num_ref_tokens", 0) if kept is None else kept.num_ref_tokens
        return call._replace(places=(call.places, count))

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width."""
        return super().grid(call._replace(places=call.places[0]))

    def references(self, call: Call, image: int) -> int:
        """The tokens of images to edit, which later calls do not bring."""
        return call.places[1]
