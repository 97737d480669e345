"""Launch configurations by measurement, on request alone: `DENSE_ATTN_AUTOTUNE=1`.

Another tile sums in another order, so results may differ in their last bits from those of the
tables. What was found is kept in a file by the `store` that the library hands in, and serves later
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields, replace
from itertools import combinations, product
from pathlib import Path
from time import perf_counter
from types import ModuleType

import torch
import triton
from torch import Tensor

from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels.configs import Config
from dense_attn.triton_kernels.parts import next_power_of_2

Launch = Callable[[Config], Callable[[], object]]
# Seconds for each kernel of a shape: no configuration is begun that the longest so far would carry
# past them, and the best is kept.
LIMIT = 10.0
_VALUES = {"num_stages": [5, 4, 3, 2, 1], "num_warps": [4, 8]}
# requested, cache_file, read, keep and bar; without it tables serve
store: ModuleType | None = None
# By file, as it was when it was first asked for, and what came since.
_found: dict[Path | None, dict[str, dict]] = {}
_failed: set[str] = set()  # calls of which no configuration could be measured


def requested() -> bool:
    """Whether configurations are measured."""
    return store is not None and store.requested()


def best(
    kernel: str,
    q: Tensor,
    k: Tensor,
    options: list[Config],
    prepare: Callable[[], Launch],
    ordered: bool = False,
) -> Config:
    """The fastest of some configurations of a kernel for tensors like these, visited in an order or
    not: found before, or measured now.

    prepare() makes inputs, and returns what makes a call of a configuration. No measurement may
    enter the capture of a CUDA graph: what is not known there is the first option.
    """
    file, key = store.cache_file(), _key(kernel, q, k, ordered, options[0])
    if file not in _found:
        _found[file] = {}
        _found[file] = store.read(file)
    kept = _found[file].get(key)
    for option in options:
        if _launched(option) == kept:
            return option
    if key in _failed or is_capturing():
        return options[0]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        fastest = _fastest(options, prepare, key)
    if fastest is None:
        return options[0]
    _found[file][key] = _launched(fastest)
    store.keep(file, _found[file])
    return fastest


def neighbours(table: Config, fixed: tuple[str, ...] = ()) -> list[Config]:
    """The table's configuration, then those that differ in one field, then in two: half and double
    tiles, other warps, up to 5 stages, and what is done or not. Fixed fields stay.
    """
    if table.specialised:  # other rows do not part into groups of warps
        keys = 64 if table.BLOCK_N == 128 else 128
        other = replace(table, BLOCK_N=keys, num_stages=256 // keys)  # 256 keys on chip
        fewer = range(table.num_stages - 1, 1, -1)
        return [table, other, *(replace(table, num_stages=stages) for stages in fewer)]
    other: dict[str, list[int | bool]] = {}
    for field in fields(table):
        now = getattr(table, field.name)
        if field.name in ("BLOCK_M", "BLOCK_N"):
            values = [side for side in (2 * now, now // 2) if 16 <= side <= 128]
        elif field.name == "splits":
            values = [now // 2, 2 * now] if now > 1 else []
        elif isinstance(now, bool):
            values = [not now]
        else:
            values = _VALUES.get(field.name, [])
        if field.name not in (*fixed, "specialised"):
            other[field.name] = [value for value in values if value != now]
    names = sorted(other, key=lambda name: name != "num_stages")  # they matter most
    changes = [(name,) for name in names] + list(combinations(names, 2))
    found = [table]
    for changed in changes:
        for values in product(*(other[name] for name in changed)):
            found.append(replace(table, **dict(zip(changed, values))))
    return found


def example(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Random q, k, v like these, four regions in the quarters of a picture, and strengths, to
    measure a call by.
    """
    words = []
    for tokens in (q.shape[2], k.shape[2]):
        side = max(round(tokens**0.5), 1)
        places = torch.arange(tokens, device=q.device, dtype=torch.int32)
        lower, right = 2 * places >= tokens, 2 * (places % side) >= side
        words.append(1 << (2 * lower.to(torch.int32) + right))
    # Of its own: the caller's random numbers stay what they are.
    generator = torch.Generator(q.device).manual_seed(0)
    rows = (torch.empty_like(x).normal_(generator=generator) for x in (q, k, k))
    return *rows, *words, torch.full(q.shape[:3], 0.3, dtype=torch.float32, device=q.device)


def seconds(call: Callable[[], object]) -> float:
    """Time of a call on the GPU, or through the interpreter, which is the host's."""
    if configs.interpreted():
        start = perf_counter()
        call()
        return perf_counter() - start
    return 1e-3 * triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")


def is_capturing() -> bool:
    """Whether this thread's stream is being captured, or in any thread the one that
    `torch.cuda.graph` takes of its own; of other streams torch does not tell.

    A measurement waits for the device, which ends a capture, another thread's too.
    """
    if not torch.cuda.is_initialized():
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    stream = torch.cuda.graph.default_capture_stream
    if stream is None:
        return False
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def _fastest(options: list[Config], prepare: Callable[[], Launch], key: str) -> Config | None:
    """The fastest of those that the limit leaves time for, None where none was measured.

    A configuration that fails is left out, whatever it raises: it may not fit the device, nor the
    compiler, nor the memory that is left. Where all of them do, a call says so itself.
    """
    times: dict[Config, float] = {}
    start, longest = perf_counter(), 0.0
    with store.bar(len(options), key) as advance:
        try:
            launch = prepare()
        except Exception:
            _failed.add(key)
            return None
        for config in options:
            began = perf_counter()
            if began - start + longest > LIMIT:
                break
            if is_capturing():
                return None
            with suppress(Exception):
                times[config] = seconds(launch(config))
            longest = max(longest, perf_counter() - began)
            advance()
    if not times:
        _failed.add(key)
    return min(times, key=times.get, default=None)


def _launched(config: Config) -> dict[str, int | bool]:
    """A configuration but for what it may spill, which no launch depends on, and for one split, so
    that what was measured before there were several is found.
    """
    fields_of = asdict(config).items()
    return {x: y for x, y in fields_of if "spills" not in x and (x, y) != ("splits", 1)}


def _key(kernel: str, q: Tensor, k: Tensor, ordered: bool, table: Config) -> str:
    """The calls that a measurement is good for: sizes up to the next power of two, and the table's
    row for them.
    """
    device = torch.cuda.get_device_name(q.device) if q.is_cuda else "interpreted"
    tokens = (next_power_of_2(x.shape[2]) for x in (q, k))
    sizes = (q.shape[0] * q.shape[1], *tokens, q.shape[3])
    order = "ordered" if ordered else "raster"
    numbers = (q.dtype, configs.precision(q), *sizes, *_launched(table).values(), order)
    return " ".join(map(str, (device, triton.__version__, kernel, *numbers)))
