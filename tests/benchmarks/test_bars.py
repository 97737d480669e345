"""Bars read the rows and the fields that they name."""

from __future__ import annotations

from dataclasses import replace

import pytest

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


def compiled_row(kernel: str, triton: str, ours: list[int], plain: int) -> dict:
    """A row of the compiled table on sm_90 whose loops' busiest pipe is the ALU's half-rate one."""
    from dense_attn.benchmarks.compiled.kernel_calls import Attention

    which = "bwd" if kernel.startswith("bwd") else kernel
    bodies = [{"cycles": {"issue": cycles, "alu": 2 * cycles}} for cycles in ours]
    beside = {"bodies": [{"cycles": {"issue": plain, "alu": plain // 2}}]}
    name = {"kernel": f"layout_attention_{kernel}_kernel", "triton": triton, "tile": "64x80"}
    return name | Attention("sm_90", which, 40).facts | {"bodies": bodies, "plain": beside}


def test_bars_of_compiled_kernels_by_hand() -> None:
    pytest.importorskip("triton")
    from dense_attn.benchmarks.compiled import bars as compiled_bars

    rows = [
        compiled_row("fwd", "3.10.0", [315, 500, 315, 100], 300),
        compiled_row("fwd", "3.6.0", [300, 600, 300], 300),
        compiled_row("bwd_q", "3.6.0", [6751], 10000),
        compiled_row("bwd_kv", "3.6.0", [6751], 10000),
        compiled_row("bwd_q", "3.10.0", [500], 400),
        compiled_row("bwd_kv", "3.10.0", [310], 200),
        compiled_row("row_fwd", "3.10.0", [1000], 500),
    ]
    other = rows[0] | {"modulation": "max"}
    found = {(x["triton"], x["what"]): x for x in compiled_bars.bars([*rows, other])}
    values = {what: bar["value"] for (triton, what), bar in found.items() if triton == "3.10.0"}
    rows_of_keys = 2 * 8 * 4096, 2 * 8 * 77
    copied = (4 * 40 * sum(rows_of_keys) + 20 * rows_of_keys[0]) / compiled_bars.COPY
    cycles = 2000 * (2 * 8 * 4096 * 128) / 8192 / 132
    assert values == {
        "untested tile": 1.05,  # to issue
        "mixed tile": 4.0,
        "forward in region order": round(0.94 * 2.1 + 0.06 * 4, 3),
        "forward in raster order": round(0.09 * 2.1 + 0.91 * 4, 3),
        "backward": 2.7,
        "sd15-cross-64, of its copy": round(cycles / compiled_bars.CLOCK / copied, 3),
    }
    assert found["3.10.0", "untested tile"]["verdict"] == "holds"
    assert found["3.10.0", "mixed tile"]["verdict"] == "missed"
    oldest = found["3.6.0", "fwd, of Triton 3.10.0's"]
    assert (oldest["value"], oldest["verdict"]) == (pytest.approx(0.976), "holds")
    close = found["3.6.0", "backward"]  # 1.3502
    assert (close["value"], close["bound"], close["verdict"]) == (1.35, 1.35, "missed")
    assert compiled_bars.said([close]) == (
        "0 of 1 bars of the model hold; missed: backward on sm_90 at 40 columns by Triton 3.6.0, "
        "1.35 of 1.35"
    )
    assert compiled_bars.said([oldest]) == "1 of 1 bars of the model hold; missed: none"
