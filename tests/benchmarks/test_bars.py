"""Bars read the rows and the fields that they name."""

from __future__ import annotations

from dataclasses import replace

from dense_attn.benchmarks.families import FAMILIES
from dense_attn.benchmarks.harness.bars import BARS, Bar
from dense_attn.benchmarks.layout_attention import attention, suite

BASE = {"workload": "sd15-self-64", "pass": "fwd", "dtype": "bfloat16"}


def test_bars_of_a_gpu() -> None:
    ratios = {"sdpa": 0.8, "sdpa-flash": 0.7, "dense_attn-sorted": 0.5}
    rows = [BASE | {"contender": name, "ratio": ratio} for name, ratio in ratios.items()]
    rows.append(BASE | {"contender": "sdpa-cudnn", "reason": "no kernel for 40 columns"})
    bar = Bar("sd15-self-64", "fwd", "bfloat16", ("sdpa", "sdpa-flash", "sdpa-cudnn"), 0.67)
    assert (bar.measured(rows), bar.verdict(rows)["verdict"]) == (0.7, "pass")
    by_region = replace(bar, bound=1.5, way="dense_attn-sorted")
    verdict = by_region.verdict(rows)
    assert (verdict["measured"], verdict["verdict"]) == (1.4, "miss")
    assert verdict["what"].endswith("sdpa-cudnn / dense_attn-sorted")
    without = [row for row in rows if row["contender"] != "dense_attn-sorted"]
    assert by_region.verdict(without)["verdict"] == "not measured"
    assert bar.verdict(rows[:1])["verdict"] == "not measured"  # a row is missing, not left out
    wrong = [*rows[:-1], rows[-1] | {"reason": "error 1", "wrong": True}]
    assert bar.verdict(wrong)["verdict"] == "not measured"
    in_graph = Bar("sd15-self-64", "fwd", "bfloat16", (), 15e-6, "graph_seconds")
    row = BASE | {"contender": "dense_attn", "of_large_copy": 0.9}
    row |= {"seconds": 1e-5, "timing": "graph"}
    assert in_graph.verdict([row])["verdict"] == "pass"
    assert in_graph.verdict([row | {"seconds": 2e-5}])["verdict"] == "miss"
    assert in_graph.verdict([row | {"timing": "events"}])["verdict"] == "not measured"
    of_copy = Bar("sd15-self-64", "fwd", "bfloat16", (), 0.8, "of_large_copy")
    assert of_copy.verdict([row])["verdict"] == "pass"


def test_bars_read_their_rows() -> None:
    base = {"workload": "sd15-self-64", "pass": "fwd", "dtype": "float32"}
    rows = [base | {"contender": "flex-smart", "ratio": 5.0}]
    rows.append(base | {"contender": "flex-naive", "ratio": 3.0})
    rows.append(base | {"contender": "dense_attn", "peak_extra_bytes": 10**6})
    bar = Bar("sd15-self-64", "fwd", "float32", ("flex-smart", "flex-naive"), 4)
    assert (bar.verdict(rows)["measured"], bar.verdict(rows)["verdict"]) == (3.0, "miss")
    assert bar.verdict(rows[:1])["verdict"] == "not measured"
    assert Bar("sd15-self-64", "fwd", "float32", (), 16e6).verdict(rows)["verdict"] == "pass"


def test_bars_have_their_rows() -> None:
    promised = {
        (bar.workload, bar.passes, bar.dtype, name)
        for bar in BARS
        for name in bar.contenders or (bar.way,)
    }
    entries = [entry for entry in suite.entries() if suite.why_not(entry) is None]
    rows = {(x.setting.workload.name, x.setting.dtype_name, x) for x in entries}
    for family in FAMILIES.values():
        if family is not attention:
            rows |= {(x.setting.workload, x.setting.dtype, x) for x in family.entries()}
    assert promised <= {(name, x.setting.passes, dtype, x.contender) for name, dtype, x in rows}
    assert len(promised) > 50


def test_bars_read_the_fields_they_name() -> None:
    setting = ("edict-mix-1m", "fwd", "float32")
    base = dict(zip(("workload", "pass", "dtype"), setting)) | {"of_copy": 0.7}
    clone = base | {"contender": "clone"}
    verdict = Bar(*setting, ("clone",), 0.8, "of_copy").verdict([clone])
    assert (verdict["measured"], verdict["verdict"]) == (0.7, "miss")
    assert verdict["what"] == "dense_attn's bytes per second / clone's"
    row = base | {"contender": "dense_attn", "share": 0.03, "differing_bits": 0}

    def verdict_on(bound: float, field: str) -> str:
        return Bar(*setting, (), bound, field).verdict([row])["verdict"]

    assert verdict_on(0.02, "share") == "miss"
    assert verdict_on(0, "differing_bits") == "pass"
    assert verdict_on(0, "share_idle") == "not measured"


def test_bars_of_host_costs() -> None:
    base = {"workload": "triton-fwd", "pass": "fwd", "dtype": "float32"}
    rows = [base | {"contender": "dense_attn", "seconds": 9e-5}]
    rows.append(base | {"contender": "dense_attn-op", "seconds": 3e-5})
    bar = Bar("triton-fwd", "fwd", "float32", (), 40e-6, "host_seconds", "dense_attn-op")
    assert (bar.measured(rows), bar.verdict(rows)["verdict"]) == (3e-5, "pass")
    assert bar.verdict(rows)["what"] == "host seconds before a launch"
    assert bar.verdict(rows[:1])["verdict"] == "not measured"
    row = base | {"contender": "dense_attn", "of_op": 3.5}
    assert Bar("triton-fwd", "fwd", "float32", (), 3, "of_op").verdict([row])["verdict"] == "miss"
