"""The facts of a compiled kernel that its speed depends on, beside those of plain attention.

Not measured: instructions are counted in the machine code, cycles are the model of `counts`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from dense_attn.triton_kernels.parts import head_parts, next_power_of_2

from . import counts, plain_attention, sass
from .ahead_of_time import Launch, compiled, inspect
from .kernel_calls import BATCH, HEADS, PASSES, Attention, Other
from .occupancy import programs_a_processor, waves
from .plain_attention import Tile

Facts = dict[str, Any]
MODELLED = tuple(counts.RATES)  # tcgen05's shapes are not in the code of sm_100
PREFIX = "layout_attention_"
SPECIALISED = "specialised_fwd"
GROUPS, GROUP = 2, 4  # that weigh, and warps of each
empty = partial(torch.empty, device="meta")


def of_launch(call: Attention | Other, launch: Launch) -> Facts:
    """Facts of a row of the table beside the compiler's own numbers."""
    attention = launch.kernel.startswith(PREFIX)
    tile = None
    if attention:
        rows, keys = (launch.constants[side] for side in ("BLOCK_M", "BLOCK_N"))
        # Plain attention has no second part of keys, so that both are counted for its scores.
        tile = rows, next_power_of_2(keys)
    found = _facts(call.target, launch, tile)
    if not attention:
        return found
    kernel = launch.kernel.removeprefix(PREFIX).removesuffix("_kernel")
    default = call == Attention(call.target, call.which, call.head_dim)
    if default and call.which in PASSES and found["programs"]:
        numbers = call.head_dim, tile, found["programs"]
        found["waves"] = waves(call.target, kernel, *numbers)
    if call.target in MODELLED and call.head_dim % plain_attention.GRAIN == 0:
        kind = call.target, kernel, call.head_dim, call.dtype, "tf32" if call.tf32 else "ieee"
        # Plain attention's passes over queries are slower in one part.
        way = "fwd" if kernel in ("fwd", SPECIALISED) else "bwd_kv"
        parts = head_parts(way, call.target, call.precision, call.head_dim)
        yardstick = Tile(*tile, launch.warps, launch.stages, parts)
        if kernel == SPECIALISED:  # the warps that weigh, all of which fetch
            yardstick = Tile(*tile, GROUPS * GROUP, 3, parts)
        found["plain"] = plain(*kind, yardstick)
    return found


@cache
def plain(target: str, kernel: str, head_dim: int, dtype: str, precision: str, tile: Tile) -> Facts:
    """Facts of the plain kernel under the tile of one of ours."""
    rows = empty(BATCH, HEADS, 4096, head_dim, dtype=getattr(torch, dtype))
    numbers = empty(BATCH, HEADS, 4096, dtype=torch.float32)
    with compiled(target) as launches:
        if kernel == "bwd_q":
            tensors = rows, rows, rows, rows, rows, numbers
            plain_attention.attention_bwd_q(*tensors, 1.0, tile, precision)
        elif kernel == "bwd_kv":
            tensors = rows, rows, rows, rows, numbers, numbers
            plain_attention.attention_bwd_kv(*tensors, 1.0, tile, precision)
        else:
            plain_attention.attention_fwd(rows, rows, rows, 1.0, tile, precision)
    (launch,) = launches
    numbers = {name: getattr(launch, name) for name in ("registers", "spills", "shared")}
    # Few keys are one tile, which stands behind the loop.
    return numbers | _facts(target, launch, tile[:2], outside=kernel == "row_fwd")


def _facts(
    target: str, launch: Launch, tile: tuple[int, int] | None, outside: bool = False
) -> Facts:
    """Occupancy, and on devices that are modelled the number of inner loops and what they hold; of
    a kernel without, or `outside` of them, all else that it runs once.
    """
    size = launch.registers, launch.shared, launch.warps
    found: Facts = {"programs": programs_a_processor(target, *size)}
    if target in MODELLED:
        function = function_of(launch)
        loops = [] if outside else function.inner_loops
        scores, warps = tile[0] * tile[1] if tile else counts.SCORES, launch.warps
        if SPECIALISED in launch.kernel:  # each group that weighs has its own: the longer counts
            weighing, warps = [body for body in loops if counts.tensor(body)], GROUPS * GROUP
            first, second = weighing[: len(weighing) // 2], weighing[len(weighing) // 2 :]
            loops = [max(alike, key=len) for alike in zip(first, second, strict=True)]
        bodies = loops or [function.straight]
        found["loops"] = len(loops)
        found["bodies"] = [_body(body, target, warps, scores) for body in bodies]
    return found


def _body(body: list[sass.Instruction], target: str, warps: int, scores: int) -> Facts:
    """The counts of one piece of code, empty ones left out."""
    copies, products = counts.waits(body)
    found = {
        "instructions": len(body),
        "kinds": counts.count(body),
        "tensor": counts.tensor(body),
        "cycles": counts.cycles(body, target, warps, scores),
        "copy_waits": copies,
        "product_waits": products,
    }
    return {name: value for name, value in found.items() if value}


def function_of(launch: Launch) -> sass.Function:
    """The machine code of a kernel."""
    functions = sass.parse(inspect(launch.binary, "--print-code", "nvdisasm"))
    (function,) = (x for x in functions if x.name == launch.kernel)
    return function
