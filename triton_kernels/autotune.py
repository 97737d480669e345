"""Launch configurations by measurement, on request alone: `DENSE_ATTN_AUTOTUNE=1`.

Another tile sums in another order, so results may differ in their last bits from those of the tables. What was found is
kept in `DENSE_ATTN_AUTOTUNE_CACHE`, or in dense_attn/autotune.json of the user's cache folder, and serves later runs.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels.configs import Config

Launch = Callable[[Config], Callable[[], object]]
_found: dict[Path, dict[str, Config]] = {}  # by file, as it was when it was first asked for, and what came since


def requested() -> bool:
    """Whether configurations are measured."""
    return os.environ.get("DENSE_ATTN_AUTOTUNE") == "1"


def cache_file() -> Path:
    """Where what was found is kept."""
    named = os.environ.get("DENSE_ATTN_AUTOTUNE_CACHE")
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(folder) / "dense_attn" / "autotune.json"


def best(kernel: str, q: Tensor, k: Tensor, options: list[Config], prepare: Callable[[], Launch]) -> Config:
    """The fastest of some configurations of a kernel for tensors like these: found before, or measured now.

    prepare() makes inputs, and returns what makes a call of a configuration. No measurement may enter the capture of
    a CUDA graph: what is not known there is the first option.
    """
    file, key = cache_file(), _key(kernel, q, k)
    if file not in _found:
        _found[file] = _read(file)
    if key not in _found[file]:
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return options[0]
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            _found[file][key] = _fastest(options, prepare())
        _write(file)
    return _found[file][key]


def neighbours(table: Config, same_keys: bool = False) -> list[Config]:
    """The table's configuration first, then half and double tiles, other warps and stages."""
    m, n = table.BLOCK_M, table.BLOCK_N
    tiles = [(m, n), (2 * m, n), (m // 2, n), *([] if same_keys else [(m, 2 * n), (m, n // 2)])]
    around = (
        replace(table, BLOCK_M=rows, BLOCK_N=keys, num_warps=warps, num_stages=stages)
        for rows, keys in tiles for warps in (4, 8) for stages in (1, 2, 3)
        if 16 <= rows <= 128 and 16 <= keys <= 128 and abs(stages - table.num_stages) <= 1
    )  # fmt: skip
    return [table, *(config for config in around if config != table)]


def seconds(call: Callable[[], object]) -> float:
    """Time of a call on the GPU."""
    return 1e-3 * triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")


def _fastest(options: list[Config], launch: Launch) -> Config:
    """Those that do not fit the device are left out."""
    times = {}
    for config in options:
        with suppress(OutOfResources):
            times[config] = seconds(launch(config))
    return min(times, key=times.get)


def _key(kernel: str, q: Tensor, k: Tensor) -> str:
    """What a measurement is good for: sizes up to the next power of two."""
    device = torch.cuda.get_device_name(q.device) if q.is_cuda else "interpreted"
    tokens = (triton.next_power_of_2(max(x.shape[2], 1)) for x in (q, k))
    sizes = (q.shape[0] * q.shape[1], *tokens, q.shape[3])
    return " ".join(map(str, (device, triton.__version__, kernel, q.dtype, configs.precision(q), *sizes)))


def _read(file: Path) -> dict[str, Config]:
    try:
        found = {key: Config(**values) for key, values in json.loads(file.read_text()).items()}
        return {key: config for key, config in found.items() if _can_be(config)}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"dense_attn measures anew: {file} cannot be read: {error}", stacklevel=2)
        return {}


def _can_be(config: Config) -> bool:
    """Whether a tile could have been measured; a file may hold anything."""
    numbers = (config.BLOCK_M, config.BLOCK_N, config.num_warps, config.num_stages)
    whole = all(type(number) is int for number in numbers) and type(config.parks) is bool
    return whole and {config.BLOCK_M, config.BLOCK_N} <= {16, 32, 64, 128} and {*numbers[2:]} <= {1, 2, 3, 4, 8}


def _write(file: Path) -> None:
    """Whole or not at all; what another process has found since stays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _read(file) | _found[file]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({key: asdict(config) for key, config in found.items()}, indent=1) + "\n")
        new.replace(file)
    except OSError as error:
        with suppress(OSError):
            file.with_suffix(f".{os.getpid()}").unlink()
        warnings.warn(f"dense_attn keeps its measurements for this process alone: {error}", stacklevel=2)
