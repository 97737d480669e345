"""Launch configurations by measurement, on request alone: `DENSE_ATTN_AUTOTUNE=1`.

Another tile sums in another order, so results may differ in their last bits from those of the
tables. What was found is kept in a file by the `store` that the library hands in, and serves later
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from types import ModuleType

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels.configs import Config

Launch = Callable[[Config], Callable[[], object]]
store: ModuleType | None = None  # requested, cache_file, read and keep; without it tables serve
# By file, as it was when it was first asked for, and what came since.
_found: dict[Path | None, dict[str, dict]] = {}


def requested() -> bool:
    """Whether configurations are measured."""
    return store is not None and store.requested()


def best(
    kernel: str, q: Tensor, k: Tensor, options: list[Config], prepare: Callable[[], Launch]
) -> Config:
    """The fastest of some configurations of a kernel for tensors like these: found before, or
    measured now.

    prepare() makes inputs, and returns what makes a call of a configuration. No measurement may
    enter the capture of a CUDA graph: what is not known there is the first option.
    """
    file, key = store.cache_file(), _key(kernel, q, k)
    if file not in _found:
        _found[file] = {}
        _found[file] = store.read(file)
    kept = _found[file].get(key)
    for option in options:
        if asdict(option) == kept:
            return option
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return options[0]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        fastest = _fastest(options, prepare())
    _found[file][key] = asdict(fastest)
    store.keep(file, _found[file])
    return fastest


def neighbours(table: Config, same_keys: bool = False) -> list[Config]:
    """The table's configuration first, then half and double tiles, other warps and stages."""
    if table.specialised:  # other tiles do not part into groups of warps
        return [table, replace(table, num_stages=table.num_stages + 1)]
    m, n = table.BLOCK_M, table.BLOCK_N
    tiles = [(m, n), (2 * m, n), (m // 2, n), *([] if same_keys else [(m, 2 * n), (m, n // 2)])]
    near = [stages for stages in (1, 2, 3) if abs(stages - table.num_stages) <= 1]
    around = (
        replace(table, BLOCK_M=rows, BLOCK_N=keys, num_warps=warps, num_stages=stages)
        for (rows, keys), warps, stages in product(tiles, (4, 8), near)
        if 16 <= rows <= 128 and 16 <= keys <= 128
    )
    return [table, *(config for config in around if config != table)]


def seconds(call: Callable[[], object]) -> float:
    """Time of a call on the GPU, or through the interpreter, which is the host's."""
    if configs.interpreted():
        start = perf_counter()
        call()
        return perf_counter() - start
    return 1e-3 * triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")


def _fastest(options: list[Config], launch: Launch) -> Config:
    """Those that do not fit the device are left out; where none does, a call says so itself."""
    times = {}
    for config in options:
        with suppress(OutOfResources):
            times[config] = seconds(launch(config))
    return min(times, key=times.get, default=options[0])


def _key(kernel: str, q: Tensor, k: Tensor) -> str:
    """The calls that a measurement is good for: sizes up to the next power of two."""
    device = torch.cuda.get_device_name(q.device) if q.is_cuda else "interpreted"
    tokens = (configs.next_power_of_2(x.shape[2]) for x in (q, k))
    sizes = (q.shape[0] * q.shape[1], *tokens, q.shape[3])
    return " ".join(
        map(str, (device, triton.__version__, kernel, q.dtype, configs.precision(q), *sizes))
    )
