"""The Triton backend: launchers as opaque ops under the names of the contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec

import torch
from torch import Tensor

from dense_attn import _environment, _tuned
from dense_attn._backends import ops, plans, raw_checks

AUTOGRAD = False  # torch does not see into its kernels
NO_KERNELS: set[str] = set()
_OLDEST = (3, 6)
_OLDEST_OF_AMD = (3, 9)  # 3.6 cannot compile the forward kernel for AMD's GPUs
_MIXED = 3  # what a tile of matched and unmatched pairs costs, in tiles of one kind
_NO_GPU = "this build of torch knows no GPU, and TRITON_INTERPRET=1 is not set"
_ADVICE = "pip install dense_attn[triton]"


def _load() -> str | None:
    """Load Triton and the launchers; the reason why not, or None."""
    global layout_attention, reversible, sega
    if find_spec("triton") is None:
        return f"Triton is not installed: {_ADVICE}"
    knows_gpu = torch.version.cuda is not None or torch.version.hip is not None
    try:
        if not knows_gpu and not _environment.flag("TRITON_INTERPRET"):
            return _NO_GPU
        import triton

        needed = _OLDEST_OF_AMD if torch.version.hip else _OLDEST
        if tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) < needed:
            oldest = ".".join(map(str, needed))
            return f"needs Triton {oldest} or newer, got {triton.__version__}: {_ADVICE}"
        from dense_attn.triton_kernels import autotune, layout_attention, reversible, sega
    except _environment.VariableError as error:
        return str(error)
    except Exception as error:  # another package's, of any kind, and not to take this one along
        return f"Triton does not load: {(str(error).splitlines() or [type(error).__name__])[0]}"
    autotune.store = _tuned
    return None


def _kernel(check: Callable, launch: Callable) -> Callable:
    """The launcher behind the check of its arguments, on the device of its first tensor: kernels
    go to the current one.
    """

    @wraps(launch)
    def launched(first: Tensor, *arguments: object, **named: object) -> object:
        check(first, *arguments, **named)
        if _is_current(first):
            return launch(first, *arguments, **named)
        with torch.cuda.device(first.device):
            return launch(first, *arguments, **named)

    return launched


def _planned(check: Callable, form: Callable, plan: Callable, launch: Callable) -> Callable:
    """The launcher with the plan of its call, made where the check lets a new form through."""
    known: plans.Plans = plans.Plans()

    @wraps(launch)
    def planned(*arguments: object, **named: object) -> object:
        key = form(*arguments, **named)
        found = known.get(key)
        if found is None:
            check(*arguments, **named)
            found = plan(*arguments, **named)
            known.keep(key, found, *arguments, *named.values())
        if _is_current(arguments[0]):
            return launch(*arguments, **named, plan=found)
        with torch.cuda.device(arguments[0].device):
            return launch(*arguments, **named, plan=found)

    return planned


def _is_current(x: Tensor) -> bool:
    """Whether a tensor is where kernels go: to the current device."""
    return not x.is_cuda or x.device.index == torch.cuda.current_device()


def _check_orders(q: Tensor, *arguments: object) -> None:
    """The check that public calls leave: of values, at which no one looks on a GPU."""
    q_order, k_order = arguments[7:9]
    if not (q_order is k_order is None or q.is_cuda):
        raw_checks.orders(q_order, k_order)


def _layout_attention_fwd(
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
    *last: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher with tile lists as one argument, of the shapes that its tiles have."""
    lists = config = None
    if tiles is not None:
        lists = layout_attention.TileLists(tiles, counts, k_words)
        config = layout_attention.fwd_tiles(q, k, q_order is not None or k_order is not None)
        blocks = None if config is None else (config.BLOCK_M, config.BLOCK_N)
        raw_checks.lists(lists, q, k, blocks)
    tokens, rule = (q_regions, k_regions, strength), (modulation, scale)
    run = layout_attention.layout_attention_fwd
    return run(q, k, v, *tokens, *rule, q_order, k_order, lists, *last, config=config)


def _launchers() -> dict[str, Callable]:
    """The launcher of each op, for arguments that are checked."""
    modules = (layout_attention, sega, reversible)
    found = {op: getattr(m, op) for op in ops.OPS for m in modules if hasattr(m, op)}
    on_grid = {
        op: raw_checks.looked_at(run) for op, run in found.items() if op.startswith("exact_")
    }
    return found | on_grid | {"layout_attention_fwd": _layout_attention_fwd}


def attention_bytes(q: Tensor, k: Tensor) -> int:
    """The bytes that a call of layout attention takes at least: its result."""
    return q.numel() * q.element_size()


def tiled(q: Tensor, k: Tensor) -> bool:
    """Whether calls like this one visit tiles."""
    configs, seqlen_k = layout_attention.configs, k.shape[2]
    kind = configs.architecture(q.device), configs.precision(q)
    return seqlen_k > 0 and q.numel() > 0 and not configs.row_at_once(*kind, seqlen_k)


def tile_lists_for(
    q: Tensor,
    k: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    q_order: Tensor | bool | None,
    k_order: Tensor | bool | None,
    kept: bool,
    seqlens_k: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The tile lists of calls like this one, which visits tiles, and the orders that they are of.
    Lists that are kept for many calls are worth more launches.
    """
    blocks = layout_attention.fwd_blocks(q, k, q_order is not False or k_order is not False)
    ours = q_order is None
    if ours:
        q_order = _by_region(q_regions)
    if k_order is None:
        same = ours and k_regions is q_regions and seqlens_k is None
        k_order = q_order if same else _by_region(k_regions, seqlens_k)
    q_order, k_order = (None if order is False else order for order in (q_order, k_order))
    made = torch.ops.dense_attn_triton.tile_lists.default
    lists = made(q_regions, k_regions, q_order, k_order, *blocks, seqlens_k)
    if ours and kept:
        q_order, *lists = _longest_first(q_order, *lists, blocks[0])
    return *lists, q_order, k_order


def _by_region(words: Tensor, counts: Tensor | None = None) -> Tensor:
    """The order in which tokens of one region word stand together, int32 [tokens] or [B|1,
    tokens]; in front those that are there, of which a sample has so many.
    """
    if counts is not None:
        place = torch.arange(words.shape[-1], dtype=torch.int32, device=words.device)
        words = words.long().masked_fill(place >= counts[:, None], 1 << 32)
    return words.argsort(dim=-1, stable=True).to(torch.int32)


def _longest_first(
    q_order: Tensor, tiles: Tensor, counts: Tensor, k_words: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An order of the queries and its lists with the tiles that take longest in front, so that none
    of them is waited for at the end. The tile that the queries end in stays there.
    """
    samples, query_tiles = counts.shape[:2]
    num_tokens = q_order.shape[-1]
    work = counts[:, :, 0] + _MIXED * counts[:, :, 1]  # unmatched tiles are the rest, or left out
    tile = torch.arange(query_tiles, dtype=torch.int32, device=work.device)
    work = work.masked_fill(tile == num_tokens // block, -1)
    turns = work.argsort(dim=1, descending=True, stable=True)
    padded = (0, query_tiles * block - num_tokens)
    places = torch.nn.functional.pad(q_order.expand(samples, num_tokens), padded)
    places = places.view(samples, query_tiles, block).take_along_dim(turns[:, :, None], 1)
    order = places.flatten(1)[:, :num_tokens]
    tiles = tiles.take_along_dim(turns[:, :, None, None], 1)
    counts = counts.take_along_dim(turns[:, :, None], 1)
    return order if samples > 1 else order[0], tiles, counts, k_words


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of the CPU."""
    return LOAD_ERROR is None and layout_attention.configs.interpreted()


LOAD_ERROR = _load()
DEVICE = "cpu" if interpreted() else "cuda"  # the kind of tensors that the ops take

EAGER: dict[str, Callable] = {}  # what public ops, which have checked their arguments, can call

if LOAD_ERROR is None:
    EAGER["layout_attention_fwd"] = _kernel(_check_orders, _layout_attention_fwd)
    _kernels = {name: _kernel(getattr(raw_checks, name), run) for name, run in _launchers().items()}
    _kernels["sega_guidance"] = EAGER["sega_guidance"] = _planned(
        raw_checks.sega_guidance, raw_checks.sega_form, sega.sega_plan, sega.sega_guidance
    )
    _library = ops.define("dense_attn_triton")
    for _name, _launched in _kernels.items():
        _library.impl(_name, _launched, DEVICE.upper())
    globals().update(ops.overloads("dense_attn_triton"))
