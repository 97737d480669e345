"""Layout-modulated softmax attention: the public op, its checks, its autograd, its dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_attn import _checks, _memory
from dense_attn._backends import dispatch, table
from dense_attn._backends.contract import MODULATIONS  # noqa: F401  for what stands on the op
from dense_attn.layout_attention import inputs, keys, planned


def layout_attention(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H / G, N, D]
    v: Tensor,  # [B, H / G, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    strength: Tensor | float = 1.0,  # broadcastable to [B, H, M]
    *,
    modulation: str = "range",
    scale: float | None = None,
    k_mask: Tensor | None = None,  # bool or floats [N], [B|1, N] or [B|1, 1, 1, N]; int32 [B]
    return_lse: bool = False,
    q_order: Tensor | bool | None = None,  # int32 [M] or [B|1, M]
    k_order: Tensor | bool | None = None,  # int32 [N] or [B|1, N]
    tile_lists: tuple[Tensor | None, ...] | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention whose scores are pulled up inside a query's regions and down outside of
    them.

    With `s = scale * q k^T` and `R[i, j] = (q_regions[i] & k_regions[j]) != 0`, the result is
    `softmax(s') v` where, for `c = strength` and the extremes taken over all keys of a row that
    `k_mask` leaves,

    - `"range"`: `s' = s + c*R*(max(s) - s) - c*(1-R)*(s - min(s))` (DenseDiffusion);
    - `"max"`: `s' = s + c*R*max(s)` (paint-with-words);
    - `"bias"`: `s' = s + c*R`;
    - `"mask"`: `s' = s` where R, `-inf` elsewhere (`strength` unused; a row without a matched key
      gives 0).

    Args:
        q, k, v: `[B, H, M, D]`, `[B, H / G, N, D]`, `[B, H / G, N, D]`; float32, bfloat16, float16
            or float64; any strides with a contiguous last dimension, so a transposed
            `[B, tokens, H, D]` is taken as it is. Head h of q meets head `h // G` of k and v (G is
            1, or more in grouped-query attention).
        q_regions, k_regions: int32 words, bit r set when the token is in region r (32 regions; bit
            31 is the sign).
        strength: a number, or float32 (float64 with float64 inputs) broadcastable to `[B, H, M]`; 0
            is plain attention.
        modulation: the rule above.
        scale: factor on the scores, `1/sqrt(D)` when None.
        k_mask: which keys are there, for all samples or for each, True where one is; int32 `[B]`
            counts them from the first. The others are removed: no score, no extreme, gradients of
            0; a sample without any gives 0. Floats are added to the scores before the rule is
            applied, and remove a key where they are -1e4 (-9984, as bfloat16 has it) or less; they
            cost a copy of q, k and v unless a look (which only the CPU takes) finds nothing added,
            and a head dim of 8 more (of which all but the reference take 256: 254 of q's own, or
            248 where it is a multiple of 8).
        return_lse: also return `logsumexp(s')`, float32 (float64 with float64 inputs), `[B, H, M]`.
        q_order, k_order: permutations of the tokens, the order in which a kernel visits them; None
            for one that suits it (a GPU's: tokens of one region word together), False for raster.
            They change speed, never the result.
        tile_lists: what `tile_lists` has made of these regions, which is in its own orders; without
            it a GPU makes it in every call. It belongs to one `k_mask`.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; a named one runs or
            raises.

    Returns:
        `out [B, H, M, D]` in q's dtype and memory order, or `(out, lse)`. Differentiable once in q,
        k, v, strength and a k_mask of floats.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.
        RuntimeError: the named backend cannot run this call, with every reason; an order is no
            permutation (where the backend looks); a second derivative is asked for.

    Source: Kim et al., Dense Text-to-Image Generation with Attention Modulation, ICCV 2023;
    Balaji et al., eDiff-I, 2022 (paint-with-words).

    Example:
        >>> import torch, dense_attn
        >>> q, k, v = torch.randn(3, 1, 8, 256, 40).unbind(0)
        >>> words = (torch.arange(256) < 128).int() + 1  # left half: region 1, right half: region 0
        >>> dense_attn.layout_attention(q, k, v, words, words, 0.5).shape
        torch.Size([1, 8, 256, 40])
    """
    q, k, v = inputs.autocast(q, k, v)
    tokens = q_regions, k_regions, q_order, k_order
    words = modulation, backend, k_mask is None
    form = planned.form(q, k, v, *tokens, strength, tile_lists, words)
    plan = planned.known.get(form)
    if plan is None:
        plan = planned.planned(form, q, k, v, tokens, strength, tile_lists, *words)
    if scale is None:
        scale = plan.scale
    else:
        scale = _checks.number("scale", scale, rule="be a number or None")
    every, given, added, seqlens_k = 1.0, q, None, None
    if not plan.rows:
        strength, every = inputs.row_strength(strength, q)
    if return_lse is not False:
        return_lse = _checks.flag("return_lse", return_lse)
    name, tiled = plan.backend, plan.tiled
    if k_mask is not None:
        there, added = keys.of_mask(k_mask, q, k)
        if added is not None:
            q, k, v = keys.with_bias(q, k, v, added, scale)
        columns = q.shape[3] - given.shape[3]
        name = table.resolve(backend, "layout_attention", q, k.shape[2], columns)
        if there is not None:
            k, v, k_regions = there.first(k), there.first(v), there.words(k_regions)
            k_order, seqlens_k = there.visits(k_order), there.of_batch(q.shape[0])
        tiled = table.NAMESPACES[name].tiled(q, k)
    recorded, kernels = dispatch.is_recorded(q, k, v, strength), table.NAMESPACES[name]
    try:
        if tiled and tile_lists is None:
            tokens = q_regions, k_regions, q_order, k_order
            tile_lists = kernels.tile_lists_for(q, k, *tokens, kept=False, seqlens_k=seqlens_k)
        visits = inputs.visits(tile_lists, q_order, k_order)
        tokens, rule = (q, k, v, q_regions, k_regions), (strength, modulation, scale)
        last = every, return_lse, recorded, seqlens_k, name
        results = dispatch.run_as(_LayoutAttention, recorded, *tokens, *rule, *visits, *last)
    except RuntimeError as error:
        least = kernels.attention_bytes(q, k)
        _memory.explain(error, "layout_attention", least, q=q, k=k)
        raise
    out = results[0] if added is None else keys.without_columns(results[0], given)
    return (out, results[1]) if return_lse else out


def tile_lists(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H / G, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    *,
    k_mask: Tensor | None = None,  # bool or floats [N], [B|1, N] or [B|1, 1, 1, N]; int32 [B]
    q_order: Tensor | bool | None = None,  # int32 [M] or [B|1, M]
    k_order: Tensor | bool | None = None,  # int32 [N] or [B|1, N]
    backend: str = "auto",
) -> tuple[Tensor | None, ...] | None:
    """Which tiles of keys each tile of queries meets, made once for all layers and steps that share
    a layout.

    For tiles I of queries and J of keys, in the given orders, `(and_I & and_J) != 0` finds those
    whose pairs all match and `(or_I & or_J) == 0` those of which none does, where and_I, or_I
    combine the words of a tile bit by bit. Without an order tokens are sorted by their words, and
    the tiles of queries that take longest come first (outside of `torch.compile`).

    Args:
        q, k: any tensors of the shapes, dtype and device of the calls to come; their values are not
            looked at.
        q_regions, k_regions, k_mask, backend: as in `layout_attention`, to which the result
            belongs.
        q_order, k_order: permutations of the tokens; None to sort them, False for raster.

    Returns:
        int32 tensors for the argument `tile_lists` of `layout_attention`, the last two the orders
        (None for raster); or None where a call needs none: few keys (one tile), or a backend
        without lists.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.
        RuntimeError: the named backend cannot run this call, with every reason.

    Source: Dong et al., FlexAttention, 2024 (block masks).

    Example:
        >>> import torch, dense_attn
        >>> q, k, v = torch.randn(3, 1, 8, 256, 40).unbind(0)
        >>> words = (torch.arange(256) < 128).int() + 1
        >>> lists = dense_attn.tile_lists(q, k, words, words)
        >>> dense_attn.layout_attention(q, k, v, words, words, 0.5, tile_lists=lists).shape
        torch.Size([1, 8, 256, 40])
    """
    q, k, _ = inputs.autocast(q, k, k)
    inputs.check_tensors(q, k, k, q_regions, k_regions, q_order, k_order)
    (there, bias), given = keys.of_mask(k_mask, q, k), q
    if bias is not None:
        q, k, _ = keys.with_bias(q, k, k, bias, 1.0)  # for their head dim
    added, seqlens_k = q.shape[3] - given.shape[3], None
    name = table.resolve(backend, "layout_attention", q, k.shape[2], added)
    if there is not None:
        k_regions, k_order = there.words(k_regions), there.visits(k_order)
        seqlens_k = there.of_batch(q.shape[0])
    kernels = table.NAMESPACES[name]
    if not kernels.tiled(q, k):
        return None
    kept = not torch.compiler.is_compiling()  # a compiled graph makes its lists in every call
    tokens = q_regions, k_regions, q_order, k_order
    return kernels.tile_lists_for(q, k, *tokens, kept=kept, seqlens_k=seqlens_k)


class _LayoutAttention(torch.autograd.Function):
    """Takes the arguments of the raw forward op, and the name of the backend that runs it."""

    num_tensors = 6

    @staticmethod
    def forward(  # torch.compile counts the parameters: no *arguments
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_regions: Tensor,
        k_regions: Tensor,
        strength: Tensor | None,
        modulation: str,
        scale: float,
        q_order: Tensor | None,
        k_order: Tensor | None,
        tiles: Tensor | None,
        counts: Tensor | None,
        k_words: Tensor | None,
        every_strength: float,
        with_lse: bool,
        with_stats: bool,
        seqlens_k: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ints = q_regions, k_regions, q_order, k_order, tiles, counts, k_words, seqlens_k
        run = dispatch.kernel_of(backend, "layout_attention_fwd", (q, k, v, strength), ints)
        tokens, rule = (q, k, v, q_regions, k_regions), (strength, modulation, scale)
        lists = q_order, k_order, tiles, counts, k_words
        return run(*tokens, *rule, *lists, every_strength, with_lse, with_stats, seqlens_k)

    @staticmethod
    def setup_context(ctx, inputs, output) -> int:  # noqa: ANN001
        """How many of the results a recorded call needs."""
        *tensors, ctx.modulation, ctx.scale, q_order, k_order = inputs[:10]
        *_, ctx.every_strength, ctx.with_lse, _, seqlens_k, ctx.backend = inputs
        out, _, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, stats, q_order, k_order, seqlens_k)
        return 2 if ctx.with_lse else 1

    @staticmethod
    def backward(ctx, grad_out, grad_lse=None, *_):  # noqa: ANN001, ANN002, ANN205
        *tensors, out, stats, q_order, k_order, seqlens_k = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if grad_out.stride(-1) != 1:  # the gradient of a sum is one number under stride 0
            grad_out = grad_out.contiguous()
        if not ctx.with_lse:  # torch.compile has zeros for what is not there
            grad_lse = None
        orders = q_order, k_order
        rule = ctx.modulation, ctx.scale, *orders, ctx.every_strength, seqlens_k, ctx.backend
        grads = dispatch.run(_Backward, grad_out, grad_lse, *tensors, out, stats, *rule)
        dq, dk, dv, dstrength = grads
        dstrength = None if tensors[-1] is None else dstrength
        return dq, dk, dv, None, None, dstrength, *[None] * 12

    @staticmethod
    def vmap(info, in_dims, *args):  # noqa: ANN001, ANN002, ANN205
        keys.refuse_vmap()


class _Backward(torch.autograd.Function):
    """The backward pass as a function of q, k and v too: a second derivative is refused, not 0."""

    num_tensors = 10

    @staticmethod
    def forward(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_regions: Tensor,
        k_regions: Tensor,
        strength: Tensor | None,
        out: Tensor,
        stats: Tensor,
        modulation: str,
        scale: float,
        q_order: Tensor | None,
        k_order: Tensor | None,
        every_strength: float,
        seqlens_k: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens, rule = (q, k, v, q_regions, k_regions), (strength, out, stats, modulation, scale)
        last = q_order, k_order, every_strength, seqlens_k
        run = table.NAMESPACES[backend].layout_attention_bwd
        try:
            return run(grad_out, grad_lse, *tokens, *rule, *last)
        except RuntimeError as error:
            least = (q.numel() + 2 * k.numel()) * q.element_size()
            _memory.explain(error, "layout_attention's backward pass", least, q=q, k=k)
            raise

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        pass

    @staticmethod
    def backward(ctx, *grads):  # noqa: ANN001, ANN002, ANN205
        raise RuntimeError("layout_attention must be differentiated once, got a second derivative")
