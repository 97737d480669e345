"""One call of a model: its rows, its text with that of the regions, and its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention import masks

if TYPE_CHECKING:
    from .parts import Part, Parts

Override = Callable[..., Tensor]  # (func, q, k, v, heads, ...), ComfyUI's
RULE = "attend to the {} tokens of its latents' grid in some layer"


@dataclass(eq=False)
class Heads:
    """The q, k and v of a call in either of ComfyUI's shapes, as views [B, H, tokens, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    split: bool  # whether they came as [B, H, tokens, D], not as [B, tokens, H * D]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, heads: int, split: bool) -> Heads:
        """Views of what came; k and v may have fewer heads."""
        if split:
            return cls(q, k, v, split)
        head_dim = q.shape[-1] // heads
        parts = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
        return cls(*parts, split)

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows of the batch."""
        return self.q[first:last], self.k[first:last], self.v[first:last]


@dataclass(eq=False)
class Call:
    """A call's attention, in the place of `optimized_attention_override`."""

    parts: Parts
    chunks: list[bool]  # of the batch: whether their rows see the prompt
    inner: Override | None  # the override of another, which plain attention goes on to
    factor: float  # of the strengths at this time
    done: bool = False  # whether a layer was modulated
    seen: list[tuple[int, int]] | None = None  # queries and keys of the others

    def __call__(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """Attention as `func` has it, modulated in the rows that see the prompt."""
        options = dict(options, **dict(zip(("attn_precision", "skip_reshape"), args)))
        tokens = 2 if options.get("skip_reshape") else 1
        each, rest = divmod(len(q), len(self.chunks))
        part = None
        if not rest:
            part = self.parts.at(q.shape[tokens], k.shape[tokens], options, each, q.device)
        if part is None:
            self.seen = [*(self.seen or []), (q.shape[tokens], k.shape[tokens])]
            k, v, mask = (self._own(x, at) for x, at in ((k, tokens), (v, tokens), (mask, -1)))
            return self._plain(func, q, k, v, heads, mask, options)
        self.done = True
        given = Heads.of(q, k, v, heads, tokens == 2)
        mask, found = _wide(mask), []
        for first, last, sees in self._spans(each):
            if sees:
                found.append(self._modulated(part, given, first, last, mask, options))
            else:
                rows = slice(first, last)
                theirs = mask if mask is None or len(mask) == 1 else mask[rows]
                own = [self._own(x[rows], tokens) for x in (k, v)]
                own_mask = self._own(theirs, -1)
                found.append(self._plain(func, q[rows], *own, heads, own_mask, options))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _spans(self, each: int) -> Iterator[tuple[int, int, bool]]:
        """The rows of each chunk that sees the prompt, and those of others as long as they go."""
        first = 0
        for sees, group in groupby(self.chunks):
            count = len(list(group))
            for rows in [each] * count if sees else [each * count]:
                yield first, first + rows, sees
                first += rows

    def _modulated(
        self,
        part: Part,
        given: Heads,
        first: int,
        last: int,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """The rows' modulated attention, in the shape that is asked for."""
        q, k, v = given.rows(first, last)
        reduced = masks.of_call({"attn_mask": mask}, first, last, q, k, part.same_tokens)
        out = part.attention(q, k, v, options.get("scale"), reduced, self.factor)
        return out if options.get("skip_output_reshape") else out.transpose(1, 2).flatten(2)

    def _own(self, x: Tensor | None, tokens: int) -> Tensor | None:
        """Keys, values or a mask without the tokens of the regions, where they are among them."""
        cut = self.parts.texts_of(None if x is None else x.shape[tokens])
        if x is None or cut is None:
            return x
        own, texts = cut
        rest = x.narrow(tokens, texts, x.shape[tokens] - texts)
        head = x.narrow(tokens, 0, own)
        return torch.cat((head, rest), tokens) if rest.shape[tokens] else head

    def _plain(
        self,
        func: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention without a layout, be it by another's override."""
        given = options if mask is None else options | {"mask": mask}
        if self.inner is None:
            return func(q, k, v, heads, **given)
        return self.inner(func, q, k, v, heads, **given)

    def check(self) -> None:
        """Refuse a model of which no layer had the tokens of the latents."""
        if not self.done:
            got = "no call of optimized_attention"
            if self.seen:
                queries, keys = self.seen[0]
                got = f"{queries} queries and {keys} keys in the first"
            _checks.refuse("model", RULE.format(self.parts.tokens), got)


def _wide(mask: Tensor | None) -> Tensor | None:
    """A mask as scaled_dot_product_attention has it, by ComfyUI's rule for fewer dimensions."""
    if mask is None or mask.dim() > 3:
        return mask
    return mask[(None,) * 2] if mask.dim() == 2 else mask[:, None]
