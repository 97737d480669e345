"""A concept's call of a transformer: the prompt's rows of a call, with a text of its own."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..text.encoding import encode, takes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Arguments = dict[str, Any]
TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"
T5 = f"{TEXT}_t5", "text_embedding_mask_t5"
GLYPHS = f"{TEXT}_2", f"{MASK}_2"  # of quoted words, by byT5


class Family(NamedTuple):
    """How a kind of transformer is told a prompt, and how its estimates lie."""

    text: tuple[str | None, ...]  # the arguments that encode_prompt's outputs become
    channels: int = 1  # the axis of an estimate's channels


FAMILIES = {
    "SD3Transformer2DModel": Family((TEXT, None, POOLED)),
    "FluxTransformer2DModel": Family((TEXT, POOLED, "txt_ids"), channels=2),
    "Flux2Transformer2DModel": Family((TEXT, "txt_ids"), channels=2),
    "ChromaTransformer2DModel": Family((TEXT, "txt_ids", "attention_mask"), channels=2),
    "QwenImageTransformer2DModel": Family((TEXT, f"{TEXT}_mask"), channels=2),
    "ZImageTransformer2DModel": Family(("cap_feats",)),
    "Lumina2Transformer2DModel": Family((TEXT, MASK)),
    "AuraFlowTransformer2DModel": Family((TEXT,)),
    "CogView4Transformer2DModel": Family((TEXT,)),
    "PixArtTransformer2DModel": Family((TEXT, MASK)),
    "HunyuanDiT2DModel": Family((TEXT, "text_embedding_mask", *T5)),
    "SanaTransformer2DModel": Family((TEXT, MASK)),
    "Kandinsky5Transformer3DModel": Family((TEXT, POOLED), channels=4),
    "WanTransformer3DModel": Family((TEXT,)),
    "SkyReelsV2Transformer3DModel": Family((TEXT,)),
    "ChronoEditTransformer3DModel": Family((TEXT,)),
    "LTXVideoTransformer3DModel": Family((TEXT, MASK), channels=2),
    "HunyuanVideoTransformer3DModel": Family((TEXT, POOLED, MASK)),
    "CogVideoXTransformer3DModel": Family((TEXT,), channels=2),
    "HunyuanImageTransformer2DModel": Family((TEXT, MASK, *GLYPHS)),
    "HunyuanVideo15Transformer3DModel": Family((TEXT, MASK, *GLYPHS)),
}  # fmt: skip
# the other arguments of calls that have an entry for each row of the batch
BY_ROW = {
    *("hidden_states", "x", "timestep", "t", "guidance", "img_ids", "img_shapes"),
    *("original_size", "target_size", "crop_coords", "image_meta_size", "style"),
    *("added_cond_kwargs", "encoder_hidden_states_image", "timestep_r", "image_embeds"),
}

PLACES = "text_rope_pos"
TEXTS = {name for family in FAMILIES.values() for name in family.text if name} | {PLACES}


def encoded(
    pipe: DiffusionPipeline, family: Family, concept: str | list[str], manner: Arguments
) -> Arguments:
    """The text arguments of a concept's call, of one row, or of a row for each of several."""
    if takes(pipe, "text_encoder_index"):  # HunyuanDiT's encoders have lengths of their own
        pairs = [encode(pipe, concept, text_encoder_index=i) for i in range(2)]
        outputs = [part for text, _, mask, _ in pairs for part in (text, mask)]
    else:
        outputs = encode(pipe, concept, **manner)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    return {name: output for name, output in zip(family.text, outputs) if name is not None}


class Calls:
    """The calls of concepts beside a call of the pipeline's.

    Args:
        given: its arguments.
        rows: of its batch.
        start, stop: those that see the prompt.
    """

    def __init__(self, given: Arguments, rows: int, start: int, stop: int) -> None:
        self.given, self.rows, self.start, self.stop = given, rows, start, stop

    def alone(self, text: Arguments) -> Arguments:
        """The arguments of the prompt's rows, with a concept's text in the place of its own."""
        found = {
            name: self._prompts(value) if self._by_row(name, value) else value
            for name, value in self.given.items()
        }
        found |= {name: self._repeated(name, value) for name, value in text.items()}
        if (own := text.get("attention_mask")) is not None:  # Chroma's has the image's tokens too
            image = self._prompts(self.given["attention_mask"])[:, self.given[TEXT].shape[1] :]
            found["attention_mask"] = torch.cat([own.to(image).expand(len(image), -1), image], 1)
        if (places := found.get(PLACES)) is not None:  # Kandinsky's number the tokens of a text
            count = found[TEXT].shape[1]
            found[PLACES] = torch.arange(count, dtype=places.dtype, device=places.device)
        return found

    def together(self, concepts: list[Arguments]) -> Arguments | None:
        """One call of the pipeline's rows and the concepts'; None where their texts do not fit."""
        found = dict(self.given)
        for name, own in self.given.items():
            others = [concept[name] for concept in concepts]
            rowed = self._by_row(name, own)
            if (rowed or name in TEXTS) and not _alike(own, others, int(rowed)):
                return None
            if rowed:
                found[name] = _joined([own, *others])
        return found

    def _by_row(self, name: str, value: Any) -> bool:
        """Whether an argument has an entry for each row of the batch."""
        if name not in BY_ROW | TEXTS or not isinstance(value, (Tensor, list, dict)):
            return False
        if isinstance(value, Tensor) and value.dim() < (3 if name.endswith("_ids") else 1):
            return False
        return isinstance(value, dict) or len(value) == self.rows

    def _prompts(self, value: Any) -> Any:
        """The rows of an argument that see the prompt."""
        if isinstance(value, dict):
            named = value.items()
            return {name: None if x is None else self._prompts(x) for name, x in named}
        return value[self.start : self.stop]

    def _repeated(self, name: str, own: Any) -> Any:
        """A concept's one row for each of the prompt's, as the call has texts."""
        count, like = self.stop - self.start, self.given.get(name)
        if own is None or isinstance(own, list):
            return own and own * count
        own = own.to(like) if isinstance(like, Tensor) else own
        return own if own.dim() < 3 and name.endswith("_ids") else own.expand(count, *own.shape[1:])


def _alike(own: Any, others: list[Any], axis: int) -> bool:
    """Whether arguments have the sizes of a call's own, from an axis on; a list's texts no more."""
    if own is None or isinstance(own, dict):
        return isinstance(own, dict) or not any(other is not None for other in others)
    if isinstance(own, Tensor):
        return all(x is not None and x.shape[axis:] == own.shape[axis:] for x in others)
    longest = max(len(entry) for entry in own)
    return all(len(entry) <= longest for other in others for entry in other)


def _joined(values: list[Any]) -> Any:
    """Rows of arguments, one after the other."""
    first = values[0]
    if isinstance(first, dict):
        return {
            name: x if x is None else _joined([value[name] for value in values])
            for name, x in first.items()
        }
    return torch.cat(values) if isinstance(first, Tensor) else list(chain(*values))
