"""A modular pipeline as layouts see it: with the encode_prompt of its text encoder's block."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from dense_attn import _checks

from ..text.encoding import heard
from .guiders import followed

# what encodes prompts, a method of a block or a function of its module
ENCODERS = (
    "encode_prompt",
    "_get_qwen3_prompt_embeds",
    "get_qwen_prompt_embeds",
    "get_qwen_prompt_embeds_edit",
    "get_qwen_prompt_embeds_edit_plus",
)


class Encoder(NamedTuple):
    """The function that encodes the prompts of a modular pipeline, and where it is called."""

    step: Any  # the block that calls it
    holder: Any  # whose attribute it is: the block, or its module
    name: str

    @property
    def call(self) -> Callable[..., Any]:
        """The function itself, also in a block inside of another."""
        own = getattr(self.holder, self.name)
        return getattr(own, "encode_prompt", own)


def viewed(pipe: Any) -> Any:
    """A modular pipeline with an encode_prompt and its helpers as methods; others as they are."""
    kind = type(pipe).__name__
    if all(base.__name__ != "ModularPipeline" for base in type(pipe).__mro__):
        return pipe
    found = list(_encoders(pipe._blocks))
    if len(found) != 1:
        rule = f"have one block that calls one of {', '.join(ENCODERS)}"
        _checks.refuse("pipe", rule, f"{kind} with {len(found)}")
    if getattr(pipe, "guider_2", None) is not None:
        _checks.refuse("pipe", "have one guider", f"{kind} with a guider_2")
    # what phrases ask a class: how prompts are cleaned, and whether they become chats
    module = vars(sys.modules[type(found[0].step).__module__])
    helpers = {f"_{name}": call for name, call in module.items() if inspect.isfunction(call)}
    return type(kind, (Modular,), helpers | {"encode_prompt": found[0].call})(pipe, found[0])


@contextmanager
def listened(pipe: Any, tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """`tell` gets the arguments of every call of encode_prompt inside the block, after it."""
    if not isinstance(pipe, Modular):
        with heard(pipe, tell):
            yield
        return
    with (
        heard(pipe.encoder.holder, functools.partial(pipe.hear, tell), pipe.encoder.name),
        followed(getattr(pipe.pipe, "guider", None)),
    ):
        yield


def _encoders(block: Any) -> Iterator[Encoder]:
    """The encoders of prompts in a block and all blocks in it."""
    module = sys.modules[type(block).__module__]
    code = getattr(inspect.unwrap(type(block).__call__), "__code__", None)
    name = next((name for name in ENCODERS if code and name in code.co_names), None)
    if name is not None:
        yield Encoder(block, block if hasattr(block, name) else module, name)
    for inner in getattr(block, "sub_blocks", {}).values():
        yield from _encoders(inner)


class Modular:
    """A view of a modular pipeline; what it does not have itself is the pipeline's.

    Args:
        pipe: the pipeline.
        encoder: of its prompts.
    """

    denoising_end = None  # steps are counted of the whole schedule

    def __init__(self, pipe: Any, encoder: Encoder) -> None:
        self.pipe, self.encoder = pipe, encoder
        parameters = list(inspect.signature(encoder.call).parameters)
        templates = {
            name: vars(encoder.step)[name] for name in parameters if name in vars(encoder.step)
        }
        vars(self).update(templates)
        first = parameters[: parameters.index("prompt")]
        parts = [pipe if name == "components" else getattr(pipe, name) for name in first]
        call = functools.partial(encoder.call, *parts, **templates)

        def encode_prompt(*args: Any, **options: Any) -> tuple[Any, ...]:
            encoded = call(*args, **options)
            return encoded if isinstance(encoded, tuple) else (encoded,)

        encode_prompt.__signature__ = inspect.signature(call)
        self.encode_prompt, self.parts = encode_prompt, dict(zip(first, parts))
        if "processor" in first:  # which has the tokenizer
            self.tokenizer = pipe.processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def hear(self, tell: Callable[[dict[str, Any]], None], given: dict[str, Any]) -> None:
        """Tell of a call with this pipeline's parts; a module's function has others' calls too."""
        if all(given[name] is part for name, part in self.parts.items()):
            tell(given)
