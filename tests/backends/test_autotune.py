"""Configurations by measurement: what is measured and kept, and that calls take it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from pathlib import Path

import forked
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from dense_attn import _tuned
from dense_attn.triton_kernels import autotune, configs

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
    monkeypatch.setattr(autotune, "_failed", set())

    def seconds(call: Callable[[], configs.Config]) -> float:
        timed.append(call())
        return 1.0 if timed[-1] == FAST else 2.0

    monkeypatch.setattr(autotune, "seconds", seconds)
    return timed


def best(kernel: str = "fwd", q: torch.Tensor = Q, ordered: bool = False) -> configs.Config:
    options = autotune.neighbours(TABLE)
    return autotune.best(kernel, q, K, options, lambda: lambda config: lambda: config, ordered)


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
    best(ordered=True)
    assert len(times) == 3 * len(autotune.neighbours(TABLE))
    keys = json.loads(_tuned.cache_file().read_text())
    assert [key.split()[-1] for key in keys] == ["raster", "raster", "raster", "ordered"]


def test_what_another_process_found_stays(times: list, monkeypatch: pytest.MonkeyPatch) -> None:
    best()
    mine = autotune._found
    monkeypatch.setattr(autotune, "_found", {})
    best("bwd_q")
    monkeypatch.setattr(autotune, "_found", mine)
    best("bwd_kv")
    assert len(json.loads(_tuned.cache_file().read_text())) == 3


FAILURES = (
    OutOfResources(300, 200, "shared memory"),
    RuntimeError("`ptxas` failed with error code 255"),
    torch.cuda.OutOfMemoryError("CUDA out of memory."),
    AssertionError("invalid layout"),
)


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.usefixtures("times")
def test_what_fails_is_left_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(call: Callable[[], configs.Config]) -> float:
        if call() == FAST:
            raise error
        return float(call().BLOCK_M)

    monkeypatch.setattr(autotune, "seconds", seconds)
    assert best().BLOCK_M == 32


@pytest.mark.parametrize("where", ["inputs", "calls"])
def test_where_all_fail_the_table_serves_and_nothing_is_kept(where: str, times: list) -> None:
    """Another process may have the memory; in this one no other call tries it again."""
    tried = []

    def prepare() -> autotune.Launch:
        tried.append(where)
        if where == "inputs":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return launch

    def launch(config: configs.Config) -> Callable[[], object]:
        raise RuntimeError("no kernel image")

    for _ in range(2):
        assert autotune.best("fwd", Q, K, autotune.neighbours(TABLE), prepare) == TABLE
    assert len(tried) == 1
    assert not _tuned.cache_file().exists()


def test_whoever_interrupts_is_heard(times: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(call: Callable[[], configs.Config]) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(autotune, "seconds", seconds)
    with pytest.raises(KeyboardInterrupt):
        best()


LONGEST = (  # seconds that inputs, then each configuration takes; how many are measured
    (0.0, [2.3], 4),
    (3.0, [2.3], 3),
    (0.0, [1.0, 2.0, 3.0, 4.0], 4),  # of 6 seconds one more of 3 is begun, and takes 4
    (0.0, [12.0], 1),  # nobody knows of the first
    (11.0, [1.0], 0),
)


@pytest.mark.parametrize(("inputs", "each", "measured"), LONGEST)
def test_none_is_begun_that_the_longest_would_carry_past_the_limit(
    inputs: float, each: list[float], measured: int, times: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def prepare() -> autotune.Launch:
        clock[0] += inputs
        return lambda config: lambda: config

    def seconds(call: Callable[[], configs.Config]) -> float:
        clock[0] += each[min(len(times), len(each) - 1)]
        times.append(call())
        return 1.0 if times[-1].num_stages == 4 else 2.0

    monkeypatch.setattr(autotune, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(autotune, "seconds", seconds)
    options = autotune.neighbours(TABLE)
    found = autotune.best("fwd", Q, K, options, prepare)
    assert times == options[:measured]
    assert found.num_stages == (4 if measured > 2 else TABLE.num_stages)


def test_nothing_is_measured_in_a_capture(times: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what a capture interrupts taken for a measurement."""
    begins = iter([True, False, False, True])
    monkeypatch.setattr(autotune, "is_capturing", lambda: next(begins))
    assert best() == TABLE
    assert times == []
    assert best() == TABLE
    assert times == [TABLE]
    assert not _tuned.cache_file().exists()
    monkeypatch.setattr(autotune, "is_capturing", lambda: False)
    assert best() == FAST


def test_a_bar_shows_what_is_measured(times: list, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("tqdm")
    best()
    count = len(autotune.neighbours(TABLE))
    shown = capsys.readouterr().err
    assert "dense_attn measures interpreted" in shown
    assert f"{count}/{count}" in shown
    best()
    assert capsys.readouterr().err == ""


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
        fixed = {id(configs.FORWARD): (), id(configs.ROW_FORWARD): ("BLOCK_N", "parks")}
        stay = fixed.get(id(table), ("parks",))
        for config in (config for rows in table.values() for config in rows.values()):
            around = autotune.neighbours(config, stay)
            assert around[0] == config
            assert len(around) == len(set(around)) > 3
            assert all(getattr(x, name) == getattr(config, name) for x in around for name in stay)
            apart = [sum(a != b for a, b in zip(astuple(x), astuple(config))) for x in around]
            assert apart == sorted(apart)
            assert apart[-1] == 2
            assert {x.num_stages for x in around} == {1, 2, 3, 4, 5}
            assert "parks" in stay or {x.parks for x in around} == {True, False}


def test_splits_are_tried_where_the_table_has_some() -> None:
    """Files name none where a tile of keys has one program, as before there were any."""
    around = autotune.neighbours(replace(TABLE, splits=4))
    assert {x.splits for x in around} == {2, 4, 8}
    assert {x.splits for x in autotune.neighbours(TABLE)} == {1}
    assert "splits" not in autotune._launched(TABLE)


def test_nothing_is_measured_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "store", _tuned)
    monkeypatch.delenv("DENSE_ATTN_AUTOTUNE", raising=False)
    assert not autotune.requested()
    monkeypatch.setenv("DENSE_ATTN_AUTOTUNE", "1")
    assert autotune.requested()
    monkeypatch.setattr(autotune, "store", None)
    assert not autotune.requested()


WRONG = (("BLOCK_M", 48), ("BLOCK_N", "64"), ("num_warps", 5), ("num_stages", 8), ("more", 1))


@pytest.mark.parametrize("entry", [*WRONG, ("parks", None)], ids=str)
def test_what_cannot_be_is_measured_anew(entry: tuple, times: list) -> None:
    """A file may name what no kernel takes, or what does not fit the device."""
    best()
    (key,) = json.loads(_tuned.cache_file().read_text())
    _tuned.cache_file().write_text(json.dumps({key: asdict(FAST) | dict([entry])}))
    autotune._found.clear()
    times.clear()
    assert best() == FAST
    assert times == autotune.neighbours(TABLE)


def test_a_measurement_leaves_the_random_numbers_alone() -> None:
    q = torch.zeros(1, 1, 4, 16)
    before = torch.get_rng_state()
    first, second = autotune.example(q, q), autotune.example(q, q)
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
autotune.neighbours = lambda table, fixed=(): [table, configs.Config(16, 32, 1, 1)]
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
order = words[1].argsort().to(torch.int32)
layout_attention(*leaves, *words, 0.5, k_order=order, backend="triton")
# Two configurations of each of three passes, forward in an order and without.
assert len(timed) == 8, len(timed)
print("right")
"""


def interpreted(program: str, file: Path) -> None:
    """Run a program in a process of its own; it must say that all is right."""
    asked = {"TRITON_INTERPRET": "1", "DENSE_ATTN_AUTOTUNE": "1"}
    asked["DENSE_ATTN_AUTOTUNE_CACHE"] = str(file)
    result = forked.run(program, **asked)
    assert result.stdout == "right\n", result.stderr


def test_calls_and_lists_take_what_was_found(tmp_path: Path) -> None:
    interpreted(PROGRAM, tmp_path / "f.json")
    assert len(json.loads((tmp_path / "f.json").read_text())) == 4


ON_THE_HOST = """
import torch
from dense_attn import layout_attention
from dense_attn.triton_kernels import autotune, configs

configs.INTERPRETED = configs.Config(32, 16, 1, 1)
autotune.neighbours = lambda table, fixed=(): [table, configs.Config(16, 16, 1, 1)]
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
    interpreted(ON_THE_HOST, tmp_path / "f.json")
