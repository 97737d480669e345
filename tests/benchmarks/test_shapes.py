"""A user's own shapes, `bench --shape`: checked, measured beside everything else, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import why_skip
from stopwatch import Stopwatch

from dense_attn.__main__ import main
from dense_attn.benchmarks import plots
from dense_attn.benchmarks.harness import dry_run, machine, table
from dense_attn.benchmarks.layout_attention import attention, baselines, shapes, suite, workloads
from dense_attn.layout_attention.op import MODULATIONS

SELF, CROSS = "2,2,24,24,16", "2,2,24,9,16"


@pytest.fixture(autouse=True)
def _as_before(one_thread: None) -> Iterator[None]:
    """No shape of a test is left among the workloads."""
    before = dict(workloads.WORKLOADS)
    attention.trial.cache_clear()
    yield
    workloads.WORKLOADS.clear()
    workloads.WORKLOADS.update(before)


def entries_of(
    shape: str, modulation: str | None = None, regions: str | None = None
) -> list[suite.Entry]:
    return list(suite.entries(names=shapes.register([shape], modulation, regions)))


def test_a_shape_is_a_workload() -> None:
    texts = [" 2, 8,4096,77,40,float16", "2,8,4096,77,40,float32", "1,3,77,77,8", "1,1,1,7,9"]
    own = shapes.parse(texts, None, None)
    cross, joined, line = own.values()
    assert list(own) == ["2,8,4096,77,40", "1,3,77,77,8", "1,1,1,7,9"]
    sizes = (cross.batch, cross.num_heads, cross.seqlen_q, cross.seqlen_k, cross.head_dim)
    assert sizes == (2, 8, 4096, 77, 40)
    assert (cross.kind, cross.grid, cross.modulation) == ("cross", (64, 64), "range")
    assert cross.dtypes == ("float16", "float32")
    assert (joined.kind, joined.grid, joined.seqlen_k) == ("self", (7, 11), 77)
    assert joined.dtypes == ("float32", "bfloat16")
    assert (line.grid, line.seqlen_k) == ((1, 1), 7)


def test_regions_are_those_of_the_label_map_or_stripes() -> None:
    own = shapes.parse(["1,1,4096,77,8"], None, None)["1,1,4096,77,8"]
    layout, usual = workloads.own_layout(own), workloads.label_layout()[1]
    assert torch.equal(layout.query_regions(64, 64), usual.query_regions(64, 64))
    assert torch.equal(layout.token_regions(77), usual.token_regions(77))
    inputs = workloads.make_inputs(shapes.parse([CROSS], "bias", "5")[CROSS], torch.float32)
    assert inputs.modulation == "bias"
    assert inputs.q_regions.view(4, 6).tolist() == [[1, 1, 2, 4, 8, 16]] * 4
    assert inputs.k_regions.tolist() == [1, 2, 2, 4, 4, 8, 8, 16, 16]
    assert (inputs.strength[0] == 0).all()
    assert (inputs.strength[1] > 0).all()


@pytest.mark.parametrize("shape", [SELF, CROSS])
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_every_contender_is_right(modulation: str, shape: str) -> None:
    rows = [
        attention.measure(entry, Stopwatch())
        for entry in entries_of(shape, modulation, "4")
        if "flex" not in str(entry)
    ]
    assert {(row["contender"], row["pass"], row["dtype"]) for row in rows} == {
        (contender, passes, dtype)
        for contender in ("dense_attn", "sdpa", "eager", "sdpa-bias")
        for passes in ("fwd", "fwd+bwd")
        for dtype in ("float32", "bfloat16")
    }
    assert all(row["seconds"] == 1.0 and row["modulation"] == modulation for row in rows), rows


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_flex_attention_is_right(modulation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a dry run, which compiles nothing."""
    monkeypatch.setattr(machine, "_current", dry_run.DryGpu())
    rows = [
        attention.measure(entry, None)
        for entry in entries_of(f"{CROSS},float32", modulation, "4")
        if "flex" in str(entry)
    ]
    forward = [row["contender"] for row in rows if row["pass"] == "fwd"]
    assert forward == (["flex-naive", "flex-smart"] if modulation == "range" else ["flex-smart"])
    assert all(row["error"] <= 4 * row["allowed"] for row in rows if row["pass"] == "fwd"), rows


def test_wrong_maths_of_a_shape_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = baselines.eager

    def off(inputs: workloads.Inputs) -> baselines.Call:
        return lambda q, k, v: eager(inputs)(q, k, v) + 1e-2

    monkeypatch.setitem(baselines.CONTENDERS, "eager", off)
    entry = next(entry for entry in entries_of(CROSS, "mask") if entry.contender == "eager")
    row = attention.measure(entry, Stopwatch())
    assert row["wrong"]
    assert "seconds" not in row


@pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
def test_a_head_dim_without_kernels_says_so() -> None:
    row = attention.measure(entries_of("1,1,8,8,300", regions="2")[0], Stopwatch())
    assert (row["backend"], row["note"]) == ("reference", "cpu head_dim is at most 256, got 300")
    assert table.format_row(row).endswith("  (cpu head_dim is at most 256, got 300)")
    assert "note" not in attention.describe(entries_of(SELF)[0])


def test_what_does_not_fit_says_how_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.Cpu, "memory_bytes", lambda self: 10 * 2**30)

    def reasons(shape: str) -> dict[str, str | None]:
        forward = [entry for entry in entries_of(shape) if "fwd-" in str(entry)]
        return {entry.contender: suite.why_not(entry) for entry in forward}

    rows = reasons("1,8,16384,16384,64,float32")
    assert rows["eager"] == "about 32.0 GiB of scores, more than the suite's 6.0 GiB"
    assert rows["dense_attn"] is rows["sdpa"] is None
    huge = set(reasons("2,64,999999,77,64,float16").values())
    assert huge == {"about 122.1 GiB of inputs and results, more than the suite's 6.0 GiB"}


def test_the_quick_rows_of_a_shape_are_forward_and_compile_nothing() -> None:
    names = shapes.register([f"{SELF},float16"], None, None)
    assert [str(entry) for entry in suite.entries(quick=True, names=names)] == [
        f"{SELF}-fwd-float16-{contender}"
        for contender in ("dense_attn", "sdpa", "eager", "sdpa-bias")
    ]


RULE = "--shape must be B,H,M,N,D[,dtype] of whole numbers from 1 to 2147483647, got "
REGIONS = "--regions must be a whole number from 1 to 32, got"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--shape 2,8,64", RULE + "'2,8,64'"),
        ("--shape 2,8,64,64,0", RULE + "'2,8,64,64,0'"),
        ("--shape 2,8,64,64,4.5", RULE + "'2,8,64,64,4.5'"),
        ("--shape=-2,8,64,64,40", RULE + "'-2,8,64,64,40'"),
        ("--shape 2,8,64,64,9999999999", RULE + "'2,8,64,64,9999999999'"),
        ("--shape 2,8,64,64,40,float32,2", RULE + "'2,8,64,64,40,float32,2'"),
        (
            "--shape 2,8,64,64,40,float64",
            "--shape must name a dtype of float32, bfloat16, float16, got '2,8,64,64,40,float64'",
        ),
        (
            f"--shape {SELF} --modulation soft",
            "--modulation must be one of range, max, bias, mask, got 'soft'",
        ),
        (f"--shape {SELF} --regions 33", f"{REGIONS} '33'"),
        (
            f"--shape {SELF} --regions 7",
            f"--regions must be at most 6, the columns of the 4 x 6 grid of --shape {SELF}, got 7",
        ),
        (
            "--shape 1,1,64,2,8 --regions 3",
            "--shape must have a key for each of 3 regions, got '1,1,64,2,8'",
        ),
        (
            f"--shape {SELF} --modulation=",
            "--modulation must be one of range, max, bias, mask, got ''",
        ),
        (f"--shape {SELF} --regions=", f"{REGIONS} ''"),
        (
            f"--shape {SELF} --family sega --family chain",
            "--family must name attention beside --shape, got sega, chain",
        ),
        ("--modulation mask", "--modulation must stand beside --shape, got no --shape"),
        ("--regions 3", "--regions must stand beside --shape, got no --shape"),
    ],
)
def test_refusals(argv: str, sentence: str, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pytest_benchmark")
    with pytest.raises(SystemExit) as refused:
        main(["bench", *argv.split()])
    assert refused.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {sentence}")


@pytest.mark.full
def test_a_dry_run_of_shapes(tmp_path: Path) -> None:
    for package in ("pytest_benchmark", "matplotlib", "tqdm", "triton"):
        pytest.importorskip(package)
    files = ["--json", str(tmp_path / "own.json"), "--plot", str(tmp_path / "own.png")]
    own = ["--shape", "1,2,64,64,8", "--shape", "2,2,64,20,8,float32"]
    own += ["--modulation", "max", "--regions", "3"]
    command = [sys.executable, "-m", "dense_attn", "bench", "--dry-run", "--quick", *own, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "own.json").read_text())
    ours = [row for row in results["rows"] if row["contender"] == "dense_attn"]
    assert [(row["workload"], row["dtype"], row["modulation"]) for row in ours] == [
        ("1,2,64,64,8", "float16", "max"),
        ("2,2,64,20,8", "float32", "max"),
    ]
    assert {row["family"] for row in results["rows"]} == {"attention"}
    assert all(row["seconds"] > 0 for row in ours)
    assert "regions: 3 stripes" in done.stdout
    assert (tmp_path / "own.png").stat().st_size > 10_000


def test_a_figure_shows_every_dtype_and_pass_of_a_shape() -> None:
    pytest.importorskip("matplotlib")
    entries = entries_of(f"{SELF},float16") + entries_of(CROSS)
    entries = [entry for entry in entries if entry.contender == "eager"]
    numbers = {"ratio": 2.0, "seconds": 1.0, "peak_extra_bytes": 1}
    rows = [attention.describe(entry) | numbers for entry in entries]
    axes = plots.attention(rows).figure.axes
    assert [panel.get_title().partition(":")[0] for panel in axes] == [
        "Forward, float16",
        "Forward and backward, float16",
        "Forward, float32",
        "Forward, bfloat16",
        "Forward and backward, float32",
        "Forward and backward, bfloat16",
    ]
    assert plots.attention([attention.describe(entry) for entry in entries]) is None
    assert len(plots.attention([row | {"workload": "long-self-1k"} for row in rows]).axes) == 6 + 2
    for row in rows:
        del row["own"]
    assert len(plots.attention(rows).axes) == 4
