"""A pipeline's encode_prompt, called for the library's texts, and heard in others' calls."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# of a call that its phrases and concepts share
OPTIONS = ("lora_scale", "clip_skip", "max_sequence_length", "text_encoder_out_layers")

INSTRUCTION = "complex_human_instruction"  # SANA's calls', before each prompt


def takes(pipe: DiffusionPipeline, argument: str) -> bool:
    """Whether a pipeline's encode_prompt has an argument of that name."""
    return argument in inspect.signature(pipe.encode_prompt).parameters


def call_default(pipe: DiffusionPipeline, argument: str) -> Any:
    """The default of an argument of a pipeline's call, None of one that it has not."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(argument)
    return None if parameter is None else parameter.default


def surroundings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The texts that a pipeline puts around a prompt, by encode_prompt's arguments of them."""
    found = {"system_prompt": getattr(pipe, "system_prompt", None)}
    if takes(pipe, "prompt_template"):
        parameters = inspect.signature(pipe.encode_prompt).parameters
        found["prompt_template"] = parameters["prompt_template"].default
    found[INSTRUCTION] = call_default(pipe, INSTRUCTION)
    return {name: value for name, value in found.items() if takes(pipe, name)}


@torch.no_grad()
def encode(
    pipe: DiffusionPipeline, prompt: str | Sequence[str], **options: Any
) -> tuple[Tensor | None, ...]:
    """The output of a pipeline's encode_prompt without guidance; first come the text tokens."""
    given = {
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        INSTRUCTION: call_default(pipe, INSTRUCTION),
    }
    given |= {"prompt_2": None, "prompt_3": None, **options}
    given = {name: value for name, value in given.items() if takes(pipe, name)}
    unheard = getattr(pipe.encode_prompt, "encode_prompt", pipe.encode_prompt)
    if not takes(pipe, "text_encoder_index") or "text_encoder_index" in options:
        return unheard(prompt, **given)
    both = (unheard(prompt, **given, text_encoder_index=i) for i in range(2))
    return tuple(None if first is None else _beside(first, second) for first, second in zip(*both))


def beside(first: Tensor, second: Tensor) -> Tensor:
    """Tokens [B, L, C] of two encoders, one after the other, in the width of the wider."""
    width = max(first.shape[-1], second.shape[-1])
    parts = [functional.pad(part, (0, width - part.shape[-1])) for part in (first, second)]
    return torch.cat(parts, 1)


def _beside(first: Tensor, second: Tensor) -> Tensor:
    """Tokens of two encoders one after the other, or their masks [B, L]."""
    return beside(first, second) if first.dim() == 3 else torch.cat([first, second], 1)


def options_of(pipe: DiffusionPipeline, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a call of encode_prompt that are not its defaults and had an effect."""
    parameters = inspect.signature(pipe.encode_prompt).parameters
    if "text_encoder_index" in parameters:  # HunyuanDiT's encoders have lengths of their own
        return {}
    return {
        name: tuple(given[name]) if isinstance(given[name], list) else given[name]
        for name in (OPTIONS if given.get("prompt_embeds") is None else OPTIONS[:1])
        if given.get(name) is not None and given[name] != parameters[name].default
    }


def manner_of(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of encode_prompt that are no text, and that encoding leaves alone."""
    own = ("device", "do_classifier_free_guidance", "text_encoder_index")
    own += ("prepare_unconditional_embeds", "batch_size")  # modular ones' word; Hunyuan's
    own += ("max_sequence_length",) if "text_encoder_index" in given else ()  # of each its own
    return {
        name: value for name, value in given.items() if "prompt" not in name and name not in own
    }


def same_manner(manner: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two manners are; images and lists are told apart as objects."""
    plain = (str, int, float, bool)
    return manner.keys() == other.keys() and all(
        value is other[name] or (isinstance(value, plain) and value == other[name])
        for name, value in manner.items()
    )


def rows_of(given: dict[str, Any]) -> int:
    """How many texts a call of encode_prompt makes of its prompts."""
    embeddings, prompt = given.get("prompt_embeds"), given.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt or []
    texts = prompts if embeddings is None else embeddings
    return len(texts) * given.get("num_images_per_prompt", given.get("num_videos_per_prompt", 1))


def missing(pipe: DiffusionPipeline) -> str | None:
    """The name of a text encoder or a tokenizer that a pipeline with the other of them lacks."""
    for suffix in ("", "_2", "_3"):
        names = f"tokenizer{suffix}", f"text_encoder{suffix}"
        lacking = [name for name in names if getattr(pipe, name, pipe) is None]
        if len(lacking) == 1:
            return lacking[0]
    return None


@contextmanager
def heard(
    pipe: Any, tell: Callable[[dict[str, Any]], None], name: str = "encode_prompt"
) -> Iterator[None]:
    """`tell` gets the arguments of every call of encode_prompt inside the block, after it."""
    ears = vars(pipe).get(name)
    if not isinstance(ears, _Heard):
        ears = _Heard(pipe, ears, name)
        setattr(pipe, name, ears)
    ears.listeners.append(tell)
    try:
        yield
    finally:
        ears.listeners.remove(tell)
        if not ears.listeners and vars(pipe).get(name) is ears:
            ears.leave(pipe)


class _Heard:
    """An encode_prompt that tells what it was called with."""

    def __init__(self, pipe: Any, own: Callable[..., Any] | None, name: str) -> None:
        functools.update_wrapper(self, getattr(pipe, name))
        self.own, self.encode_prompt, self.name = own, getattr(pipe, name), name
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(self).bind(*args, **kwargs).arguments
        # Z-Image's changes a list of prompts in place
        given = {name: value[:] if type(value) is list else value for name, value in given.items()}
        encoded = self.encode_prompt(*args, **kwargs)
        for tell in self.listeners:
            tell(given)
        return encoded

    def leave(self, pipe: Any) -> None:
        """Put back what was there."""
        if self.own is None:
            delattr(pipe, self.name)
        else:
            setattr(pipe, self.name, self.own)
