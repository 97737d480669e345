"""Where the phrases of a prompt stand among the text tokens of a pipeline, and their embeddings on their own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LONGEST = 512  # tokens that a T5 encoder of any pipeline is given


class Segment(NamedTuple):
    """A stretch of the denoiser's text tokens; tokenizers that share it number its tokens alike."""

    tokenizers: tuple[Any, ...]
    start: int = 0


def segments(pipe: DiffusionPipeline) -> list[Segment]:
    """The segments of a pipeline's text tokens; FLUX takes those of its second tokenizer alone, SD3 appends T5's."""
    tokenizer, second, third = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
    if _takes(pipe, "prompt_3"):
        return [Segment(_there(tokenizer, second)), Segment(_there(third), pipe.tokenizer_max_length)]
    if getattr(pipe, "unet", None) is None:
        return [Segment(_there(second))]
    return [Segment(_there(tokenizer, second))]


def spans(pipe: DiffusionPipeline, prompt: str, phrase: str, argument: str) -> list[tuple[int, int] | None]:
    """The first place of a phrase in each segment, in the denoiser's text tokens; None where a segment ends before."""
    found: list[tuple[int, int] | None] = []
    for segment in segments(pipe):
        places = {_find(pipe, tokenizer, prompt, phrase, argument) for tokenizer in segment.tokenizers}
        if len(places) > 1:
            _checks.refuse(argument, "have a phrase that both tokenizers find in one place", f"{phrase!r} at {places}")
        found += [place and (segment.start + place[0], segment.start + place[1]) for place in places]
    if not found:
        _checks.refuse("pipe", "have the tokenizer of its prompt", "none")
    if not any(found):
        _checks.refuse(argument, f"have a phrase that its tokenizer keeps of the prompt {prompt!r}", repr(phrase))
    return found


@torch.no_grad()
def alone(pipe: DiffusionPipeline, phrase: str, argument: str) -> list[Tensor | None]:
    """The embeddings of a phrase's tokens when nothing stands around it, [length, channels] for each segment."""
    for suffix in ("", "_2", "_3"):
        if getattr(pipe, f"tokenizer{suffix}", None) is not None and getattr(pipe, f"text_encoder{suffix}") is None:
            _checks.refuse("encode_phrases", f"be False for a pipeline without its text_encoder{suffix}", True)
    embeddings = encode(pipe, phrase)[0][0]
    return [span and embeddings[slice(*span)] for span in spans(pipe, phrase, phrase, argument)]


def encode(pipe: DiffusionPipeline, prompt: str | Sequence[str]) -> tuple[Tensor | None, ...]:
    """What a pipeline's encode_prompt returns for a prompt without guidance; first come the text tokens."""
    options = {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    options |= {"prompt_2": None, "prompt_3": None}
    return pipe.encode_prompt(prompt, **{name: value for name, value in options.items() if _takes(pipe, name)})


def _takes(pipe: DiffusionPipeline, argument: str) -> bool:
    return argument in inspect.signature(pipe.encode_prompt).parameters


def _there(*tokenizers: object) -> tuple[Any, ...]:
    return tuple(tokenizer for tokenizer in tokenizers if tokenizer is not None)


def _find(pipe: DiffusionPipeline, tokenizer: Any, prompt: str, phrase: str, argument: str) -> tuple[int, int] | None:
    """The tokens (start, stop) of a phrase in a prompt at the first exact match, None past what the tokenizer keeps."""
    if hasattr(pipe, "maybe_convert_prompt"):  # a learned word may be several tokens
        prompt, phrase = (pipe.maybe_convert_prompt(text, tokenizer) for text in (prompt, phrase))
    longest = min(tokenizer.model_max_length, LONGEST)
    kept = tokenizer(prompt, truncation=True, max_length=longest).input_ids
    whole = tokenizer(prompt, truncation=True, max_length=2**20).input_ids  # a limit of its own would warn
    wanted = tokenizer(phrase, add_special_tokens=False, truncation=True, max_length=longest).input_ids
    if not wanted:
        _checks.refuse(argument, "have a phrase of at least one token", repr(phrase))
    for start in range(len(whole) - len(wanted) + 1):
        if whole[start : start + len(wanted)] == wanted:
            end = start + len(wanted)
            return (start, end) if kept[:end] == whole[:end] else None
    return _checks.refuse(argument, f"have a phrase of the prompt {prompt!r}", repr(phrase))
