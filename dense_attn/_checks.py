"""One voice of refusal: `<argument> must <rule>, got <value>`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INT32, _STRIDED = torch.int32, torch.strided  # torch looks its names up each time
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}


def refuse(
    argument: str,
    rule: str,
    got: object,
    kind: type[Exception] = ValueError,
    cause: Exception | None = None,
) -> NoReturn:
    """Raise the library's one kind of error message, from the error that is its reason if any."""
    error = kind(f"{argument} must {rule}, got {got}")
    if not torch.compiler.is_compiling():  # which knows no attributes of errors
        error._refused = argument, f"must {rule}, got {got}"  # for `renamed`
    if cause is not None:
        raise error from cause
    raise error


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals raised inside name the arguments that the caller of an outer function gave."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        argument, rest = getattr(error, "_refused", ("", ""))
        if argument in names:
            error.args = (f"{names[argument]} {rest}",)
        raise


@contextmanager
def not_renamed() -> Iterator[None]:
    """Refusals raised inside, in a user's function, keep their words: they name its arguments."""
    try:
        yield
    except Exception as error:
        with suppress(AttributeError):
            del error._refused
        raise


def name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


DTYPE_RULE = f"be one of {', '.join(map(name, DTYPES))}"


class Placed(Protocol):
    """A tensor, or what is known of one."""

    shape: torch.Size
    device: torch.device


def tensor(argument: str, value: object) -> Tensor:
    """Require a strided tensor."""
    if not isinstance(value, Tensor):
        refuse(argument, "be a tensor", type(value).__name__, TypeError)
    if value.layout != torch.strided:
        refuse(argument, "be a strided tensor", value.layout, TypeError)
    return value


def number(
    argument: str,
    value: object,
    dtype: torch.dtype = torch.float64,
    rule: str = "be a number",
    where: str = "",
) -> float:
    """Require a number that is finite in a dtype."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            refuse(argument, rule, f"{type(value).__name__}{where}", TypeError)
        if isinstance(value, (np.integer, np.floating)):
            value = float(value)  # numpy would bring the bound to its own dtype
    if not abs(value) <= LARGEST[dtype]:  # math.isfinite would break the graph of torch.compile
        finite = "be finite" if dtype == torch.float64 else f"be finite in {name(dtype)}"
        refuse(argument, finite, f"{value}{where}")
    return float(value)


def flag(argument: str, value: object) -> bool:
    """Require a bool."""
    if not isinstance(value, (bool, np.bool_)):
        refuse(argument, "be a bool", type(value).__name__, TypeError)
    return bool(value)


def function(argument: str, value: object) -> None:
    """Require what can be called."""
    if not callable(value):
        refuse(argument, "be callable", type(value).__name__, TypeError)


def choice(argument: str, value: object, choices: tuple[str, ...]) -> str:
    """Require one of a few words."""
    if not isinstance(value, str) or value not in choices:  # arrays compare to many truths
        refuse(argument, f"be one of {', '.join(choices)}", repr(value))
    return value


def fraction(argument: str, value: object) -> float:
    """Require a number from 0 to 1."""
    checked = number(argument, value)
    if not 0 <= checked <= 1:
        refuse(argument, "be from 0 to 1", value)
    return checked


def readable(argument: str, value: object, what: str = "values") -> Tensor:
    """Require a strided tensor whose numbers can be looked at."""
    if tensor(argument, value).is_meta:
        refuse(argument, f"hold {what}", "a meta tensor")
    return value


def same_dtype(argument: str, value: Tensor, other: Tensor, name_of_other: str = "q") -> None:
    """Require a tensor of another's dtype."""
    if value.dtype != other.dtype:
        rule = f"have {name_of_other}'s dtype {name(other.dtype)}"
        refuse(argument, rule, name(value.dtype), TypeError)


def same_device(argument: str, value: Tensor, other: Placed, name_of_other: str = "q") -> None:
    """Require a tensor to live where another lives."""
    if value.device != other.device:
        refuse(argument, f"be on {name_of_other}'s device {other.device}", value.device)


def shaped_like(argument: str, value: Tensor, other: Placed, name_of_other: str) -> None:
    """Require a tensor of another's shape and device."""
    if value.shape != other.shape:
        refuse(argument, f"have {name_of_other}'s shape {tuple(other.shape)}", tuple(value.shape))
    same_device(argument, value, other, name_of_other)


def floats(argument: str, value: object) -> Tensor:
    """Require a tensor of a dtype that kernels compute with."""
    if tensor(argument, value).dtype not in DTYPES:
        refuse(argument, DTYPE_RULE, name(value.dtype), TypeError)
    return value


def like(argument: str, value: object, other: Tensor, name_of_other: str) -> Tensor:
    """Require a tensor of another's shape, dtype and device."""
    same_dtype(argument, tensor(argument, value), other, name_of_other)
    shaped_like(argument, value, other, name_of_other)
    return value


def attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Require q [B, H, M, D] and k, v [B, H / G, N, D] of one dtype and device."""
    if _rows_fit(q, k, v):
        return
    for argument, value in (("q", q), ("k", k), ("v", v)):
        floats(argument, value)
        if value.dim() != 4:
            rule = "have 4 dimensions [batch, heads, tokens, head_dim]"
            refuse(argument, rule, tuple(value.shape))
        same_dtype(argument, value, q)
        if value.shape[3] > 1 and value.stride(3) != 1:
            refuse(argument, "have a contiguous last dimension", f"strides {value.stride()}")
        same_device(argument, value, q)
    batch, num_heads, _, head_dim = q.shape
    if head_dim == 0:
        refuse("q", "have a head dim of at least 1", tuple(q.shape))
    key_heads, seqlen_k = k.shape[1], k.shape[2]
    if key_heads != num_heads and (key_heads == 0 or num_heads % key_heads):
        rule = f"have {num_heads} heads as q has, or a number that divides them"
        refuse("k", rule, tuple(k.shape))
    expected = (batch, key_heads, seqlen_k, head_dim)
    for argument, value in (("k", k), ("v", v)):
        if value.shape != expected:
            rule = f"have shape [{', '.join(map(str, expected))}] to go with q and k"
            refuse(argument, rule, tuple(value.shape))


def token_words(argument: str, value: Tensor, batch: int, num_tokens: int, q: Tensor) -> None:
    """Require int32 [tokens] or [1 or batch, tokens]."""
    if _words_fit(value, num_tokens, q):
        return
    tensor(argument, value)
    if value.dtype != torch.int32:
        refuse(argument, "be int32", name(value.dtype), TypeError)
    allowed = ((num_tokens,), (1, num_tokens), (batch, num_tokens))
    if tuple(value.shape) not in allowed:
        rule = f"have shape [{num_tokens}], [1, {num_tokens}] or [{batch}, {num_tokens}]"
        refuse(argument, rule, tuple(value.shape))
    same_device(argument, value, q)


def _rows_fit(q: object, k: object, v: object) -> bool:
    """Whether one look finds nothing to refuse in q, k and v; no about what is rare."""
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        return False
    shape, keys, dtype, device = q.shape, k.shape, q.dtype, q.device
    return (
        len(shape) == len(keys) == 4
        and v.shape == keys
        and keys[0] == shape[0]
        and keys[1] == shape[1]
        and keys[3] == shape[3] > 1
        and dtype in DTYPES
        and k.dtype is dtype is v.dtype
        and q.layout is k.layout is v.layout is _STRIDED
        and q.stride()[3] == k.stride()[3] == v.stride()[3] == 1
        and k.device == device == v.device
    )


def _words_fit(words: object, num_tokens: int, q: Tensor) -> bool:
    """Whether one look finds nothing to refuse in words that all samples share."""
    return (
        isinstance(words, Tensor)
        and words.dtype is _INT32
        and (words.shape == (num_tokens,) or words.shape == (1, num_tokens))
        and words.layout is _STRIDED
        and words.device == q.device
    )
