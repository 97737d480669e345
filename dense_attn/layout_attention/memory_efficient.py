"""Layout attention in the layout and under the names of xformers: one line changes in its users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends.contract import MODULATIONS
from dense_attn.layout_attention import inputs
from dense_attn.layout_attention.op import layout_attention, tile_lists

AXES = ("samples", "heads", "queries", "keys")


class LayoutBias:
    """Region words and a strength in the place of an `attn_bias` [B, H, M, N] of xformers.

    `memory_efficient_attention` takes it as it is: no bias is made. Like a tensor it has a `shape`,
    whose samples and heads are 1 where all share them, and is cut by slices, `bias[:, :, 128:256]`
    for some of the queries; axes of 1 that are shared stay. Tile lists, which a GPU takes, are made
    at the first call of each shape and kept: words are not to be changed in place.

    Args:
        q_regions: int32 `[M]` or `[B|1, M]`, bit r set where the query is in region r.
        k_regions: int32 `[N]` or `[B|1, N]`, the same bits for keys.
        strength: a number, or a tensor broadcastable to `[B, H, M]`.
        modulation: as in `layout_attention`.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Source: xformers.ops.fmha.attn_bias.AttentionBias, whose `materialize` this has.

    Example:
        >>> import torch, dense_attn
        >>> words = (torch.arange(256) < 128).int() + 1
        >>> bias = dense_attn.LayoutBias(words, words, 0.5, modulation="bias")
        >>> tuple(bias.shape), tuple(bias[:, :, 128:].shape)
        ((1, 1, 256, 256), (1, 1, 128, 256))
        >>> bias.materialize((1, 1, 256, 256))[0, 0, 0, [0, 255]].tolist()
        [0.5, 0.0]
    """

    def __init__(
        self,
        q_regions: Tensor,
        k_regions: Tensor,
        strength: Tensor | float = 1.0,
        *,
        modulation: str = "range",
    ) -> None:
        self.q_regions = _words("q_regions", q_regions)  # [B|1, M]
        self.k_regions = _words("k_regions", k_regions)  # [B|1, N]
        _checks.same_device("k_regions", k_regions, q_regions, "q_regions")
        self.strength = _strength(strength, self.q_regions)
        self.modulation = _checks.choice("modulation", modulation, MODULATIONS)
        tensors = {"k_regions": self.k_regions, "strength": self.strength}
        self._samples = len(self.q_regions)
        for name, x in tensors.items():
            if isinstance(x, Tensor) and len(x) != 1:
                if self._samples not in (1, len(x)):
                    _checks.refuse(name, f"have 1 or {self._samples} samples", len(x))
                self._samples = len(x)
        self._lists: dict[tuple[Any, ...], Any] = {}

    @property
    def shape(self) -> torch.Size:
        """[B, H, M, N]; samples and heads are 1 where all share them."""
        heads = self.strength.shape[1] if isinstance(self.strength, Tensor) else 1
        tokens = self.q_regions.shape[1], self.k_regions.shape[1]
        return torch.Size((self._samples, heads, *tokens))

    @property
    def device(self) -> torch.device:
        """The device of the words."""
        return self.q_regions.device

    def __repr__(self) -> str:
        return f"LayoutBias({', '.join(map(str, self.shape))}, modulation={self.modulation!r})"

    def to(self, device: torch.device | str) -> LayoutBias:
        """An equal bias on another device."""
        strength = self.strength
        strength = strength.to(device) if isinstance(strength, Tensor) else strength
        words = self.q_regions.to(device), self.k_regions.to(device)
        return LayoutBias(*words, strength, modulation=self.modulation)

    def __getitem__(self, index: object) -> LayoutBias:
        """The bias of some samples, heads, queries and keys, by slices as a tensor's."""
        samples, heads, queries, keys = _slices(index)
        strength = self.strength
        if isinstance(strength, Tensor):
            strength = _cut(_cut(_cut(strength, 0, samples), 1, heads), 2, queries)
        q_regions = _cut(self.q_regions, 0, samples)[:, queries]
        k_regions = _cut(self.k_regions, 0, samples)[:, keys]
        return LayoutBias(q_regions, k_regions, strength, modulation=self.modulation)

    def materialize(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The bias as a tensor [..., M, N], for SDPA and xformers: `strength` times the matched
        pairs, or 0 and -inf under "mask", where a row without a matched key is -inf throughout.

        Under "range" and "max", which depend on the scores, there is none.
        """
        if self.modulation not in ("bias", "mask"):
            rule = 'be "bias" or "mask" to be a tensor that is added, for others need the scores'
            _checks.refuse("modulation", rule, repr(self.modulation))
        matched = (self.q_regions[:, None, :, None] & self.k_regions[:, None, None]) != 0
        if self.modulation == "mask":
            bias = torch.zeros_like(matched, dtype=dtype).masked_fill(~matched, -torch.inf)
        else:
            strength = self.strength
            if isinstance(strength, Tensor):
                bias = (strength[..., None] * matched).to(dtype)
            else:
                bias = matched.to(dtype) * strength
        given, own = tuple(shape), tuple(bias.shape)
        if len(given) < 4 and all(size == 1 for size in own[: 4 - len(given)]):
            bias = bias.reshape(own[4 - len(given) :])
        try:
            return bias.to(device).expand(given)
        except RuntimeError:
            _checks.refuse("shape", f"be one to which {own} broadcasts", given)

    def tile_lists(self, q: Tensor, k: Tensor, backend: str) -> Any:
        """The tile lists of calls of these shapes [B, H, tokens, D], made at the first."""
        key = q.shape, k.shape, q.dtype, backend
        if (lists := self._lists.get(key, key)) is key:
            lists = tile_lists(q, k, self.q_regions, self.k_regions, backend=backend)
            self._lists[key] = lists
        return lists


def memory_efficient_attention(
    query: Tensor,  # [B, M, H, K] or [B, M, K]
    key: Tensor,  # [B, N, H / G, K] or [B, N, K]
    value: Tensor,  # [B, N, H / G, K] or [B, N, K]
    attn_bias: LayoutBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: None = None,
    backend: str = "auto",
) -> Tensor:
    """Layout attention in the shapes of xformers' function of this name, in whose place it stands
    where the bias is a layout.

    `softmax(s') v` of `layout_attention`, whose q, k and v are views of these: nothing is copied.
    xformers computes the same from `attn_bias.materialize(...)`, where there is such a tensor
    ("bias", "mask").

    Args:
        query, key, value: `[B, M, H, K]`, or `[B, M, K]` for one head; as in `layout_attention`.
        attn_bias: the layout, or None for plain attention (by PyTorch's own where the backend is
            "auto").
        p: dropout, 0.
        scale: factor on the scores, `1/sqrt(K)` when None.
        op: xformers' choice of a kernel, None: `backend` is the one here.
        output_dtype: xformers' dtype of the result, None: it is query's.
        backend: as in `layout_attention`.

    Returns:
        `[B, M, H, K]` or `[B, M, K]`, as query is, in its dtype; gradients as `layout_attention`'s.

    Raises:
        ValueError, TypeError, RuntimeError: as `layout_attention`, also without a layout; dropout,
            an op, an output_dtype, and another bias than a LayoutBias, of which xformers' own are
            named.

    Source: xformers.ops.memory_efficient_attention.

    Example:
        >>> import torch, dense_attn
        >>> q, k, v = torch.randn(3, 1, 256, 8, 40).unbind(0)  # [batch, tokens, heads, head dim]
        >>> words = (torch.arange(256) < 128).int() + 1
        >>> bias = dense_attn.LayoutBias(words, words, 0.5)
        >>> dense_attn.memory_efficient_attention(q, k, v, attn_bias=bias).shape
        torch.Size([1, 256, 8, 40])
    """
    if p != 0:
        _checks.refuse("p", "be 0: there is no dropout", p)
    if op is not None:
        _checks.refuse("op", "be None: backend names the kernels", op)
    if output_dtype is not None:
        _checks.refuse("output_dtype", "be None: the result has query's", output_dtype)
    if attn_bias is not None and not isinstance(attn_bias, LayoutBias):
        rule = "be a LayoutBias or None (xformers takes its own, and tensors)"
        _checks.refuse("attn_bias", rule, type(attn_bias).__name__, TypeError)
    if not (_is_whole(query) and _is_whole(key) and _is_whole(value)):
        _check_dimensions(query=query, key=key, value=value)
        heads = (x[:, :, None] for x in (query, key, value))
        return memory_efficient_attention(*heads, attn_bias, p, scale, backend=backend)[:, :, 0]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attn_bias is None and backend == "auto":
        return _plain(q, k, v, scale).transpose(1, 2)
    if attn_bias is None:  # a named backend runs or raises
        words = (torch.zeros(x.shape[2], dtype=torch.int32, device=x.device) for x in (q, k))
        attn_bias = LayoutBias(*words, 0.0, modulation="bias")
    lists = None
    if q.device.type != "cpu" and not torch.compiler.is_compiling():
        lists = attn_bias.tile_lists(q, k, backend)
    how = {"modulation": attn_bias.modulation, "scale": scale}
    words = attn_bias.q_regions, attn_bias.k_regions, attn_bias.strength
    out = layout_attention(q, k, v, *words, **how, tile_lists=lists, backend=backend)
    return out.transpose(1, 2)


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """PyTorch's attention of [B, H, tokens, K], of what `layout_attention` takes."""
    q, k, v = inputs.autocast(q, k, v)
    _checks.attention_inputs(q, k, v)
    if scale is not None:
        scale = _checks.number("scale", scale, rule="be a number or None")
    grouped = q.shape[1] != k.shape[1]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, scale=scale, enable_gqa=grouped)


def _is_whole(x: object) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4


def _check_dimensions(**tensors: object) -> None:
    """Require three tensors without heads."""
    for name, x in tensors.items():
        if _checks.tensor(name, x).dim() not in (3, 4):
            rule = "have the shape [B, tokens, H, K] or [B, tokens, K]"
            _checks.refuse(name, rule, tuple(x.shape))
    if len({x.dim() for x in tensors.values()}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors.values())
        _checks.refuse("query, key and value", "have heads all, or none of them", shapes)


def _words(argument: str, words: Tensor) -> Tensor:
    """Words [N] or [B, N] as [B|1, N]."""
    if _checks.tensor(argument, words).dtype != torch.int32:
        _checks.refuse(argument, "be int32", _checks.name(words.dtype), TypeError)
    if words.dim() not in (1, 2):
        _checks.refuse(argument, "have shape [tokens] or [samples, tokens]", tuple(words.shape))
    return words[None] if words.dim() == 1 else words


def _strength(strength: Tensor | float, words: Tensor) -> Tensor | float:
    """A number, or a tensor [B|1, H|1, M|1] of as many queries as words [B, M] has."""
    if not isinstance(strength, Tensor):
        return _checks.number("strength", strength, rule="be a number or a tensor")
    _checks.same_device("strength", _checks.floats("strength", strength), words, "q_regions")
    if strength.dim() > 3 or (strength.dim() and strength.shape[-1] not in (1, words.shape[1])):
        rule = f"broadcast to [B, H, {words.shape[1]}]"
        _checks.refuse("strength", rule, tuple(strength.shape))
    return strength[(None,) * (3 - strength.dim())]


def _slices(index: object) -> list[slice]:
    """An index of slices and at most one `...` as a slice of each axis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if part is Ellipsis]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(AXES) + 1 - len(parts))
    if len(parts) > len(AXES) or not all(isinstance(part, slice) for part in parts):
        rule = f"be slices of {', '.join(AXES)}"
        _checks.refuse("index", rule, index)
    return parts + [slice(None)] * (len(AXES) - len(parts))


def _cut(x: Tensor, axis: int, part: slice) -> Tensor:
    """A tensor cut along an axis, unless that is of 1, which all share."""
    return x if x.shape[axis] == 1 else x[(slice(None),) * axis + (part,)]
