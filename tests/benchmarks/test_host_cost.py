"""The benchmark of host costs is honest: the raw ops are those of the call, nothing wrong is timed,
launches are left out and counted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import forked
import pytest
import torch
from cases import why_skip

from dense_attn.benchmarks.harness.bars import HOST_BARS
from dense_attn.benchmarks.harness.measure import Entry, Latest, Row, Setting
from dense_attn.benchmarks.harness.table import format_row, heading
from dense_attn.benchmarks.host_cost import calls, page, public, recorded, stubbed

compiled = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "host-cost.json"
AROUND = [name for name, work in calls.WORKLOADS.items() if work.ways is not None]
# Of the others, 1.
LAUNCHES = {"triton-bwd": 2, "triton-tile-lists": 3, "triton-fwd-specialised": 2}


@pytest.fixture(autouse=True)
def _few_rounds(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_ROUNDS", 3)
    monkeypatch.setattr(recorded, "_ROUND_SECONDS", 1e-6)
    Latest.forget_all()


def measured(workload: str, contender: str) -> Row:
    work = calls.WORKLOADS[workload]
    setting = Setting(workload, work.passes, work.dtype)
    return calls.measure(Entry(setting, contender))


@compiled
@pytest.mark.parametrize("workload", AROUND)
def test_every_call_is_timed_beside_its_yardsticks(workload: str) -> None:
    if workload.startswith("host-layer"):
        pytest.importorskip("diffusers")
        pytest.importorskip("transformers")
    contenders = calls.WORKLOADS[workload].contenders
    for contender in contenders:
        row = measured(workload, contender)
        assert row["seconds"] > 0
        assert row["error"] <= row["allowed"]
        beside = {
            calls._RATIOS[name] for name in contenders if name not in ("dense_attn", contender)
        }
        assert {name for name in ("of_op", "of_sdpa") if name in row} == beside
        assert all(row[name] > 0 for name in beside)
        assert (row["backend"] is None) == (contender in ("sdpa", "diffusers"))
        cells = format_row(row)[66:].split("  (")[0].split()
        assert len(cells) == 1 + len(beside)


@compiled
@pytest.mark.parametrize(
    ("make", "ops"),
    [
        (lambda: public.attention()[0](0.5), ["layout_attention_fwd"]),
        (lambda: public.attention(requires_grad=True)[0](0.5), ["layout_attention_fwd"]),
        (
            lambda: public.attention(backward=True)[0](0.5),
            ["layout_attention_fwd", "layout_attention_bwd"],
        ),
        (public.percentile_mask, ["percentile_mask"]),
        (public.ddim_step, ["ddim_step"]),
        (public.sega_step, ["sega_guidance"]),
        (public.exact_chain, ["exact_couple", "exact_mix"] * public.STEPS),
    ],
    ids=["attention", "recorded", "gradient", "percentile", "ddim-step", "sega-step", "chain"],
)
def test_the_raw_ops_are_those_of_the_call(
    make: Callable[[], recorded.Call], ops: list[str]
) -> None:
    found, results = recorded.raw_calls(make())
    assert [raw.name for raw in found] == ops
    last = recorded.listed(found[-1].call())
    assert calls._apart(last, results) <= 1e-12
    assert calls._apart([x.flip(0) + 1e-9 for x in results], results) > 1e-12


@compiled
@pytest.mark.parametrize("contender", ["dense_attn-op", "sdpa"])
def test_what_computes_something_else_is_not_timed(
    contender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another op than the call's, and attention of another scale."""
    if contender == "sdpa":
        plain = public.scaled_dot_product_attention
        monkeypatch.setattr(
            public, "scaled_dot_product_attention", lambda *qkv: plain(*qkv, scale=0.3)
        )
    else:
        record = calls.raw_calls
        monkeypatch.setattr(
            calls, "raw_calls", lambda call: (record(call)[0], [torch.rand(1, 1, 16, 16)])
        )
    row = measured("host-attention", contender)
    assert row["wrong"]
    assert "seconds" not in row


def test_another_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strength 1e-30 leaves attention as it is; a strength that does not is none to check by."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.setattr(calls, "_TINY", 0.5)
    assert measured("host-layer", "diffusers")["wrong"]


def test_calls_take_turns_and_a_thread_counts_its_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (waited,) = recorded.in_turn(lambda: time.sleep(0.02))
    assert max(waited) < 0.01
    now, log = [0.0], []

    def call(name: str, seconds: float) -> recorded.Call:
        return lambda: (log.append(name), now.__setitem__(0, now[0] + seconds))

    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    slow, fast = recorded.in_turn(call("slow", 3.0), call("fast", 2.0))
    assert (slow, fast) == ([3.0] * 3, [2.0] * 3)
    assert log[-6:] == ["slow", "fast"] * 3


@pytest.fixture(scope="module")
def before_launches() -> dict[str, dict[str, Row]]:
    """Triton's rows as a process of their own measures them, and the raw ops that there are."""
    pytest.importorskip("triton")
    program = """
import json, torch
torch.set_num_threads(1)
from dense_attn.benchmarks.host_cost import recorded, stubbed
from triton.runtime.interpreter import GridExecutor
recorded._ROUNDS, recorded._ROUND_SECONDS = 3, 1e-6
registered = torch._C._dispatch_get_all_op_names()
ops = [name for name in registered if name.startswith("dense_attn_triton")]
raw = stubbed._raw
def recorded_first(ours):
    found = raw(ours)
    GridExecutor.__call__ = None  # from here on a launch fails
    return found
stubbed._raw = recorded_first
rows = stubbed.measured()
with torch.no_grad(), stubbed.launches_left_out() as launched:
    call = stubbed.PUBLIC["triton-fwd-specialised"]()
    launched.clear()
    call()
print(json.dumps({"rows": rows, "ops": ops, "specialised": launched}))
"""
    done = forked.run(program, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_raw_op_of_tritons_has_a_row(before_launches: dict) -> None:
    ops = {name.split("::")[1].split(".")[0] for name in before_launches["ops"]}
    assert set(stubbed.OPS.values()) == ops
    assert {bar.workload for bar in HOST_BARS if bar.way == stubbed.OP} == set(stubbed.OPS)


def test_launches_are_left_out_and_counted(before_launches: dict) -> None:
    rows = before_launches["rows"]
    assert {name: set(found) for name, found in rows.items()} == {
        name: set(stubbed.contenders(name)) for name in stubbed.OPS
    }
    for name, found in rows.items():
        for row in found.values():
            assert row["launches"] == LAUNCHES.get(name, 1), name
            assert 0 < row["seconds"] < 0.1


def test_specialised_warps_are_launched_behind_what_packs_their_keys(before_launches: dict) -> None:
    kernels = ["packed_rows_kernel", "layout_attention_specialised_fwd_kernel"]
    assert before_launches["specialised"] == kernels


def test_rows_of_another_process_are_those_of_the_suite(
    before_launches: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = before_launches["rows"]
    monkeypatch.setattr(stubbed, "_found", lambda _: rows)
    row = measured("triton-bwd", "dense_attn-op")
    assert row["seconds"] == rows["triton-bwd"]["dense_attn-op"]["seconds"]
    assert row["backend"] == "triton"
    assert format_row(row).endswith("2  (without launches, a CPU's tensors)")
    assert heading(row).split()[-7:] == ["call", "x", "raw", "op", "x", "SDPA", "launches"]


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (calls, stubbed):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    row = measured("triton-fwd", "dense_attn-op")
    assert row["reason"] == "Triton is not installed"
    assert "wrong" not in row
    assert (
        measured("host-layer", "diffusers")["reason"] == "diffusers and transformers not installed"
    )


def test_a_process_that_fails_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(stubbed, "MODULE", "no_such_module")
    monkeypatch.setattr(stubbed.triton, "LOAD_ERROR", "no GPU")
    row = measured("triton-fwd", "dense_attn-op")
    assert row["wrong"]
    assert "no_such_module failed" in row["reason"]


def test_the_tables_of_a_page() -> None:
    assert list(page.CALLS) == AROUND
    call = {"workload": "host-attention", "contender": "dense_attn", "seconds": 3.16e-5}
    op = {"workload": "triton-bwd", "contender": "dense_attn-op", "seconds": 3e-5, "launches": 2}
    rows = [call | {"of_op": 2.96, "of_sdpa": 5.0}, op]
    rows += [{"workload": "host-layer", "contender": "dense_attn", "reason": "not installed"}]
    assert page.tables(rows).splitlines()[2:] == [
        "| `layout_attention` | 32 | 3.0x | 5.0x |",
        "",
        "| Triton op | launches | us before them | us with the public op |",
        "|---|---|---|---|",
        "| bwd | 2 | 30 | - |",
    ]


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    """Not a number of them is typed by hand."""
    text = (ROOT / "docs" / "measured.md").read_text("utf-8")
    for table in page.tables(json.loads(RESULTS.read_text("utf-8"))["rows"]).split("\n\n"):
        assert table in text
    cuda = json.loads(RESULTS.with_name("host-cost-cuda.json").read_text("utf-8"))
    assert page.cuda_table(cuda) in text
    date = datetime.fromisoformat(cuda["header"]["date"])
    where = f"{cuda['header']['cores']} cores of an {cuda['header']['device']}"
    assert f"{where}, {date:%-d %B %Y}; `benchmarks/results/host-cost-cuda.json`" in text
