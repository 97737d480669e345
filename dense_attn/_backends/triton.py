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
    """The launcher behind the check of its arguments."""

    @wraps(launch)
    def launched(first: Tensor, *arguments: object, **named: object) -> object:
        check(first, *arguments, **named)
        if _is_current(first):
            return launch(first, *arguments, **named)
        with torch.cuda.device(first.device):
            return launch(first, *arguments, **named)

    return launched


def _planned(
    check: Callable, form: Callable, look: Callable | None, plan: Callable, launch: Callable
) -> Callable:
    """The launcher behind the plan of a call's form, which is made once the check has let it
    through; later calls have their values looked at where a CPU has them.
    """
    known: plans.Plans[tuple] = plans.Plans()

    @wraps(launch)
    def launched(*arguments: object, **named: object) -> object:
        first = arguments[0]
        if not _is_current(first):
            with torch.cuda.device(first.device):
                return launched(*arguments, **named)
        key = form(*arguments, **named)
        found = known.get(key)
        if found is None:
            check(*arguments, **named)
            found = known.keep(key, plan(*arguments, **named), *arguments, *named.values())
        elif look is not None and not first.is_cuda:
            look(*arguments, **named)
        return launch(*arguments, **named, plan=found)

    return launched


def _is_current(x: Tensor) -> bool:
    """Whether a tensor is where kernels go: to the current device."""
    return not x.is_cuda or x.device.index == torch.cuda.current_device()


def _check_fwd(q: Tensor, k: Tensor, *others: object) -> None:
    """The check of a forward call, and of its tile lists, which have the shapes of its tiles."""
    raw_checks.layout_attention_fwd(q, k, *others)
    orders, lists = others[6:8], others[8:11]
    if lists[0] is not None:
        ordered = any(order is not None for order in orders)
        blocks = layout_attention.fwd_blocks(q, k, ordered)
        raw_checks.lists(lists, q, k, blocks)


def _fwd_form(*arguments: object) -> plans.Form | None:
    """The form of a forward call, of which float32 products are made in two ways; None where
    configurations are measured, which are asked for in each call.
    """
    if layout_attention.autotune.requested():
        return None
    return raw_checks.fwd_form(*arguments), layout_attention.configs.precision(arguments[0])


def _bwd_form(*arguments: object) -> plans.Form | None:
    """The form of a backward call, as a forward call has one."""
    if layout_attention.autotune.requested():
        return None
    return raw_checks.bwd_form(*arguments), layout_attention.configs.precision(arguments[2])


def _fwd_values(*arguments: object) -> None:
    """Refuse values that a forward call must not have."""
    raw_checks.values(arguments[1], *arguments[8:10], *arguments[16:])


def _bwd_values(*arguments: object) -> None:
    """Refuse those of a backward call."""
    raw_checks.values(arguments[3], *arguments[12:14], *arguments[15:])


def _kernels() -> dict[str, Callable]:
    """The kernel of each op: its launcher behind its check, or behind the plan of a call's form."""
    modules = (layout_attention, sega, reversible)
    launchers = {op: getattr(m, op) for op in ops.OPS for m in modules if hasattr(m, op)}
    backward = raw_checks.layout_attention_bwd, _bwd_form, _bwd_values
    planned = {
        "layout_attention_fwd": (_check_fwd, _fwd_form, _fwd_values, layout_attention.plan_fwd),
        "layout_attention_bwd": (*backward, layout_attention.plan_bwd),
        "sega_guidance": (raw_checks.sega_guidance, raw_checks.sega_form, None, sega.sega_plan),
    }
    found = {op: _planned(*ways, launchers[op]) for op, ways in planned.items()}
    for op in launchers.keys() - planned.keys():
        launch = launchers[op]
        looked = raw_checks.looked_at(launch) if op.startswith("exact_") else launch
        found[op] = _kernel(getattr(raw_checks, op), looked)
    return found


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

EAGER: dict[str, Callable] = {}  # what public ops can call where nothing watches ops of torch's

if LOAD_ERROR is None:
    _ours = _kernels()
    EAGER |= {op: _ours[op] for op in ("layout_attention_fwd", "sega_guidance")}
    _library = ops.define("dense_attn_triton")
    for _name, _launched in _ours.items():
        _library.impl(_name, _launched, DEVICE.upper())
    globals().update(ops.overloads("dense_attn_triton"))
