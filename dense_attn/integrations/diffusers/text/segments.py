"""The stretches of a pipeline's text tokens: who reads each, and what stands around the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..hooks import unwrapped
from .encoding import INSTRUCTION, surroundings, takes
from .tokens import tokens_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

UNPADDED = "QwenImageTransformer2DModel", "ZImageTransformer2DModel"  # whose texts have none
LONGEST = 512  # tokens that a T5 encoder of any pipeline is given
HUNYUAN_DIT = 77, 256  # tokens of its encoders


class Segment(NamedTuple):
    """A stretch of the denoiser's text tokens; tokenizers that share it number its tokens alike.

    It starts before the first of them, below 0, where the first tokens of a template are dropped.
    """

    tokenizers: tuple[Any, ...]
    prompts: tuple[str, ...]  # the arguments of encode_prompt that they read
    start: int = 0
    longest: int | None = None  # tokens of every call; None: a call says it
    template: str = "{}"  # around a prompt
    # where a call's other tokens stand, such as an image's: "before" or "behind" the longest text;
    # None: a tokenizer pads
    others: str | None = None
    padded: bool = True  # whether padding, which may stand before a text, is there

    def tokens(self, num_tokens: int | None) -> int:
        """The segment's tokens among num_tokens, or the most that it can have."""
        if self.longest is not None:
            return self.longest
        if num_tokens is not None:
            return num_tokens - self.start
        limits = [tokenizer.model_max_length for tokenizer in self.tokenizers]
        return min(*limits, LONGEST - min(self.start, 0))

    def room(self, tokenizer: Any, batch: Sequence[str], num_tokens: int | None) -> tuple[int, int]:
        """The tokens of a batch's texts among num_tokens, and the place of the first of them."""
        if self.others is None:
            return self.tokens(num_tokens), self.start
        longest = max(len(tokens_of(tokenizer, self.around(text)).ids) for text in batch)
        if num_tokens is None:
            return longest, self.start
        length = min(longest, num_tokens - self.start)
        return length, num_tokens - length if self.others == "before" else self.start

    def around(self, text: str) -> str:
        """A prompt inside of the template, whose last braces it takes."""
        before, _, behind = self.template.rpartition("{}")
        return before + text + behind


def segments(pipe: DiffusionPipeline) -> list[Segment]:
    """The segments of a pipeline's text tokens: of FLUX T5's alone, of SD3 T5's after CLIP's.

    A pipeline's template is around the prompt, whose first tokens it may drop.
    """
    names = "tokenizer", "tokenizer_2", "tokenizer_3"
    readers = [getattr(pipe, name, None) for name in names]
    first, second, third = map(_tokenizer, readers)
    if takes(pipe, "prompt_3"):
        size = pipe.tokenizer_max_length
        found = [_segment((first, second), 0, size), _segment((None, None, third), size, None)]
    elif takes(pipe, "text_encoder_index"):
        short, long = HUNYUAN_DIT
        found = [_segment((first,), 0, short), _segment((None, second), short, long)]
    elif own := surroundings(pipe).get("prompt_template"):  # HunyuanVideo's, without CLIP's text
        found = [_segment((first,), -own["crop_start"], None)._replace(template=own["template"])]
    elif takes(pipe, INSTRUCTION):
        found = [_instructed(pipe, first)]
    elif getattr(pipe, "unet", None) is None:
        found = [_templated(pipe, readers[0], first, second)]
    else:
        length = getattr(second if first is None else first, "model_max_length", LONGEST)
        told = takes(pipe, "max_sequence_length")  # by Kolors' calls
        found = [_segment((first, second), 0, None if told or length > LONGEST else length)]
    return [segment for segment in found if segment.tokenizers]


def _templated(pipe: DiffusionPipeline, reader: Any, first: Any, second: Any) -> Segment:
    """The tokens of a transformer's one encoder, of which a chat's come first."""
    dropped = getattr(pipe, "prompt_template_encode_start_idx", 0)
    own = getattr(pipe, "prompt_template_encode", None) or getattr(pipe, "prompt_template", None)
    chats = first is not None and (own is not None or second is None or _has_system(pipe))
    segment = _segment((first,) if chats else (None, second), -dropped, None)
    template = own or _chat(pipe, reader, first)
    if takes(pipe, "system_prompt"):
        template = f"{pipe.system_prompt} <Prompt Start> {{}}"
    others = None
    if takes(pipe, "image"):
        others = "behind" if "<|image_pad|>" in template.partition("{}")[2] else "before"
    elif hasattr(pipe, "_get_glm_embeds"):
        others = "before"  # CogView4's own padding
    denoiser = unwrapped(getattr(pipe, "transformer", None))
    padded = type(denoiser).__name__ not in UNPADDED
    return segment._replace(template=template, others=others, padded=padded)


def _instructed(pipe: DiffusionPipeline, tokenizer: Any) -> Segment:
    """The tokens of a prompt behind SANA's instruction, of which the first and the last are kept.

    The instruction's own last token is kept too, and takes the place behind the first.
    """
    text = "\n".join(surroundings(pipe)[INSTRUCTION] or ())
    dropped = len(tokens_of(tokenizer, text).ids) - 2 if text and tokenizer is not None else 0
    segment = _segment((tokenizer,), -dropped, None)
    return segment._replace(template=text + "{}")


def _chat(pipe: DiffusionPipeline, reader: Any, tokenizer: Any) -> str:
    """The template of a pipeline's chats around a message; an answer's begin comes behind it."""
    methods = [
        inspect.unwrap(call) for _, call in inspect.getmembers(type(pipe), inspect.isroutine)
    ]
    codes = (getattr(method, "__code__", None) for method in methods)
    named = {name for code in codes if code is not None for name in code.co_names}
    if tokenizer is None or "apply_chat_template" not in named:
        return "{}"
    if _has_system(pipe):  # FLUX.2 dev's, with a processor, or HunyuanVideo 1.5's
        around = inspect.unwrap(type(pipe).encode_prompt).__globals__
        form = around.get("format_input") or around["format_text_input"]
        chat = form(["{}"], pipe.system_message)[0]
        text = reader.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        return _begun_once(tokenizer, text)
    message = [{"role": "user", "content": "{}"}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)


def _has_system(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline's chats begin with a system's message."""
    return hasattr(pipe, "system_message")


def _begun_once(tokenizer: Any, text: str) -> str:
    """A template without its first token where the tokenizer has it of its own."""
    begin = tokenizer.bos_token
    if not begin or not text.startswith(begin):
        return text
    plain = tokenizer(text, add_special_tokens=False).input_ids
    return text if tokenizer(text).input_ids == plain else text.removeprefix(begin)


def _tokenizer(reader: Any) -> Any:
    """The tokenizer of a processor of texts and images, or what is one."""
    kinds = (base.__name__ for base in type(reader).__mro__)
    return reader.tokenizer if "ProcessorMixin" in kinds else reader


def _segment(tokenizers: tuple[Any, ...], start: int, longest: int | None) -> Segment:
    names = ("prompt", "prompt_2", "prompt_3")
    there = [
        (tokenizer, name) for tokenizer, name in zip(tokenizers, names) if tokenizer is not None
    ]
    return Segment(
        tuple(tokenizer for tokenizer, _ in there), tuple(name for _, name in there), start, longest
    )
