"""Configurations by measurement: what is measured and kept, and that calls take it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from dense_attn import _tuned
from dense_attn.triton_kernels import autotune, configs, layout_attention

TABLE = configs.Config(64, 32, 4, 2)
FAST = configs.Config(64, 64, 4, 2)
Q, K = torch.zeros(2, 3, 40, 16), torch.zeros(2, 3, 70, 16)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[configs.Config]:
    """A file of its own, a clock that likes one configuration, and what it has timed."""
    timed: list[configs.Config] = []
    monkeypatch.setenv("DENSE_ATTN_AUTOTUNE_CACHE", str(tmp_path / "kept" / "found.json"))
    monkeypatch.setattr(autotune, "store", _tuned)
    monkeypatch.setattr(autotune, "_found", {})

    def seconds(call: Callable[[], configs.Config]) -> float:
        timed.append(call())
        return 1.0 if timed[-1] == FAST else 2.0

    monkeypatch.setattr(autotune, "seconds", seconds)
    return timed


def best(kernel: str = "fwd", q: torch.Tensor = Q) -> configs.Config:
    return autotune.best(
        kernel, q, K, autotune.neighbours(TABLE), lambda: lambda config: lambda: config
    )


def test_the_fastest_is_found_once_and_kept(times: list, monkeypatch: pytest.MonkeyPatch) -> None:
    assert best() == FAST
    assert times == autotune.neighbours(TABLE)
    times.clear()
    assert best() == best(q=Q[:, :, :33]) == FAST  # up to the next power of two
    monkeypatch.setattr(autotune, "_found", {})  # as in another process
    assert best() == FAST
    assert times == []
    (kept,) = json.loads(_tuned.cache_file().read_text()).values()
    assert configs.Config(**kept) == FAST
    best("bwd_q")
    best(q=Q[:1])
    assert len(times) == 2 * len(autotune.neighbours(TABLE))
    assert len(json.loads(_tuned.cache_file().read_text())) == 3


def test_what_another_process_found_stays(times: list, monkeypatch: pytest.MonkeyPatch) -> None:
    best()
    mine = autotune._found
    monkeypatch.setattr(autotune, "_found", {})
    best("bwd_q")
    monkeypatch.setattr(autotune, "_found", mine)
    best("bwd_kv")
    assert len(json.loads(_tuned.cache_file().read_text())) == 3


def test_what_does_not_fit_the_device_is_left_out(
    times: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(call: Callable[[], configs.Config]) -> float:
        if call() == FAST:
            raise OutOfResources(300, 200, "shared memory")
        return float(call().BLOCK_M)

    monkeypatch.setattr(autotune, "seconds", seconds)
    assert best().BLOCK_M == 32


def test_a_damaged_file_is_measured_anew_and_mended(times: list) -> None:
    _tuned.cache_file().parent.mkdir()
    _tuned.cache_file().write_text("{")
    with pytest.warns(UserWarning, match=r"dense_attn measures anew: \S+found.json cannot be read"):
        assert best() == FAST
    assert len(json.loads(_tuned.cache_file().read_text())) == 1


def test_nothing_fails_where_nothing_can_be_kept(
    times: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tuned, "cache_file", lambda: None)
    assert best() == best() == FAST
    assert times == autotune.neighbours(TABLE)


def test_a_folder_that_cannot_be_written_costs_a_warning(times: list) -> None:
    _tuned.cache_file().parent.write_text("a file")
    with pytest.warns(
        UserWarning, match="dense_attn keeps its measurements for this process alone"
    ):
        assert best() == FAST
    assert best() == FAST


def test_neighbours_are_configurations_of_a_kernel() -> None:
    for table in (configs.FORWARD, configs.ROW_FORWARD, configs.BACKWARD_Q, configs.BACKWARD_KV):
        for config in (config for rows in table.values() for config in rows.values()):
            around = autotune.neighbours(config, same_keys=table is configs.ROW_FORWARD)
            assert around[0] == config
            assert len(around) == len(set(around)) > 3
            assert all(x.parks == config.parks for x in around)
            assert table is not configs.ROW_FORWARD or all(
                x.BLOCK_N == config.BLOCK_N for x in around
            )


def test_nothing_is_measured_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "store", _tuned)
    monkeypatch.delenv("DENSE_ATTN_AUTOTUNE", raising=False)
    assert not autotune.requested()
    monkeypatch.setenv("DENSE_ATTN_AUTOTUNE", "1")
    assert autotune.requested()
    monkeypatch.setattr(autotune, "store", None)
    assert not autotune.requested()


@pytest.mark.parametrize(
    "entry",
    [
        {"BLOCK_M": 48},
        {"BLOCK_N": "64"},
        {"num_warps": 5},
        {"num_stages": 8},
        {"parks": None},
        {"more": 1},
    ],
)
def test_what_cannot_be_is_measured_anew(entry: dict, times: list) -> None:
    """A file may name what no kernel takes, or what does not fit the device."""
    best()
    (key,) = json.loads(_tuned.cache_file().read_text())
    _tuned.cache_file().write_text(json.dumps({key: asdict(FAST) | entry}))
    autotune._found.clear()
    times.clear()
    assert best() == FAST
    assert times == autotune.neighbours(TABLE)


def test_a_measurement_leaves_the_random_numbers_alone() -> None:
    q = torch.zeros(1, 1, 4, 16)
    before = torch.get_rng_state()
    first, second = layout_attention._example(q, q), layout_attention._example(q, q)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], second[0])
    assert first[0].abs().max() > 0


PROGRAM = """
import torch
from dense_attn import layout_attention, tile_lists
from dense_attn.triton_kernels import autotune, configs

timed = []
def seconds(call):
    call()
    timed.append(call)
    return -len(timed)  # the last is the fastest

autotune.seconds = seconds
configs.ROW_KEYS = 8
configs.INTERPRETED = configs.Config(32, 16, 1, 1)
autotune.neighbours = lambda table, same_keys=False: [table, configs.Config(16, 32, 1, 1)]
q, k, v = torch.randn(1, 1, 20, 16), *torch.randn(2, 1, 1, 40, 16)
words = [torch.arange(x.shape[2], dtype=torch.int32) % 3 for x in (q, k)]
lists = tile_lists(q, k, *words, backend="triton")
assert lists[0].shape == (1, 2, 2, 2), lists[0].shape  # of 16 rows and 32 keys
leaves = [x.requires_grad_() for x in (q, k, v)]
found = []
for backend in ("triton", "reference"):
    out = layout_attention(*leaves, *words, 0.5, tile_lists=lists, backend=backend)
    found.append([out, *torch.autograd.grad(out.cos().sum(), leaves)])
for got, right in zip(*found):
    torch.testing.assert_close(got, right)
assert len(timed) == 6, len(timed)  # two configurations of each of three passes
print("right")
"""


def test_calls_and_lists_take_what_was_found(tmp_path: Path) -> None:
    """Through the interpreter, in a process of its own."""
    asked = {
        "TRITON_INTERPRET": "1",
        "DENSE_ATTN_AUTOTUNE": "1",
        "DENSE_ATTN_AUTOTUNE_CACHE": str(tmp_path / "f.json"),
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | asked, capture_output=True, text=True
    )
    assert result.stdout == "right\n", result.stderr
    assert len(json.loads((tmp_path / "f.json").read_text())) == 3


ON_THE_HOST = """
import torch
from dense_attn import layout_attention
from dense_attn.triton_kernels import autotune, configs

configs.INTERPRETED = configs.Config(32, 16, 1, 1)
autotune.neighbours = lambda table, same_keys=False: [table, configs.Config(16, 16, 1, 1)]
q, words = torch.randn(1, 1, 20, 16), torch.ones(20, dtype=torch.int32)
times = []
seconds = autotune.seconds
autotune.seconds = lambda call: times.append(seconds(call)) or times[-1]
assert layout_attention(q, q, q, words, words, 0.5, backend="triton").isfinite().all()
assert len(times) == 2 and all(1e-5 < time < 100 for time in times), times
print("right")
"""


def test_the_interpreter_is_timed_by_the_hosts_clock(tmp_path: Path) -> None:
    """There may be no GPU whose clock could be asked."""
    asked = {"TRITON_INTERPRET": "1", "DENSE_ATTN_AUTOTUNE": "1"}
    asked["DENSE_ATTN_AUTOTUNE_CACHE"] = str(tmp_path / "f.json")
    command = [sys.executable, "-c", ON_THE_HOST]
    result = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True)
    assert result.stdout == "right\n", result.stderr
