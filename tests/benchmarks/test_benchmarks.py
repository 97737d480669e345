"""The benchmark is honest: nothing wrong is timed, each contender runs beside its partner."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stopwatch import Stopwatch

from dense_attn.__main__ import main as command_line
from dense_attn._files import FileError
from dense_attn.benchmarks import plots
from dense_attn.benchmarks.layout_attention import attention, baselines, suite
from dense_attn.benchmarks.layout_attention.workloads import WORKLOADS, Inputs, make_inputs

TINY = suite.Setting(WORKLOADS["sd15-self-8"], torch.float32, backward=False)
TINY_TRAINED = suite.Setting(WORKLOADS["sd15-self-8"], torch.float32, backward=True)


@pytest.fixture(autouse=True)
def _fresh_trials(one_thread: None) -> None:
    attention.trial.cache_clear()


@pytest.mark.parametrize("setting", [TINY, TINY_TRAINED], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("contender", ["dense_attn", "sdpa", "eager", "sdpa-bias"])
def test_a_right_contender_is_timed(contender: str, setting: suite.Setting) -> None:
    row = attention.measure(suite.Entry(setting, contender), Stopwatch())
    assert row["seconds"] == 1.0
    assert row["rounds"] >= 3
    assert ("ratio" in row) == (contender != "dense_attn")


def test_wrong_maths_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.CONTENDERS, "eager", baselines.sdpa)
    row = attention.measure(suite.Entry(TINY, "eager"), Stopwatch())
    assert row["wrong"]
    assert "seconds" not in row


@pytest.mark.parametrize("index", range(4), ids=["out", "dq", "dk", "dv"])
def test_every_result_is_checked(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = attention.run

    def spoiled(
        call: baselines.Call, inputs: Inputs, grad_out: torch.Tensor, backward: bool
    ) -> list[torch.Tensor]:
        results = run(call, inputs, grad_out, backward)
        if inputs.q.shape[1] == 8:  # the contender's own call, not the reference's
            results[index][-1, -1, -1] += 1e-2
        return results

    monkeypatch.setattr(attention, "run", spoiled)
    assert attention.measure(suite.Entry(TINY_TRAINED, "dense_attn"), Stopwatch())["wrong"]


def test_partner_and_contender_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def logged(name: str) -> Callable[[Inputs], baselines.Call]:
        prepare = baselines.CONTENDERS[name]

        def prepared(inputs: Inputs) -> baselines.Call:
            call = prepare(inputs)
            return lambda q, k, v: (calls.append(name), call(q, k, v))[1]

        return prepared

    for name in ("dense_attn", "eager"):
        monkeypatch.setitem(baselines.CONTENDERS, name, logged(name))
    rounds = attention.measure(suite.Entry(TINY, "eager"), Stopwatch())["rounds"]
    assert calls[-2 * rounds :] == ["dense_attn", "eager"] * rounds


def test_a_large_row_is_checked_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_CHECKED_PAIRS", 0)
    monkeypatch.setattr(attention, "_CHECKED_ROWS", 5)
    row = attention.measure(suite.Entry(TINY_TRAINED, "dense_attn"), Stopwatch())
    assert row["checked"] == "5 rows of 2 heads"
    assert 0 < row["error"] <= row["allowed"]


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has a high-water mark that can be reset"
)
def test_what_is_left_out_has_a_reason() -> None:
    def reason(name: str, contender: str, backward: bool) -> str | None:
        setting = suite.Setting(WORKLOADS[name], torch.float32, backward)
        return suite.why_not(suite.Entry(setting, contender))

    assert reason("sd15-self-64", "eager", False) is None
    assert "GiB" in reason("long-self-64k", "eager", False)
    assert "GFLOP" in reason("long-self-64k", "dense_attn", True)
    assert "no backward" in reason("sd15-self-64", "flex-smart", True)
    assert "needs a GPU" in reason("flux-joint-1024", "dense_attn", False)


def test_grouped_heads_are_checked_on_every_way() -> None:
    """k and v have fewer heads, which plain attention takes and others get repeated."""
    few = replace(WORKLOADS["lumina2-joint-512"], num_heads=6, grid=(4, 8), text_tokens=16)
    setting = suite.Setting(few, torch.float32, backward=False)
    inputs = make_inputs(few, torch.float32)
    assert (inputs.q.shape[1], inputs.k.shape[1], inputs.v.shape[1]) == (6, 2, 2)
    for contender in ("dense_attn", "sdpa", "eager", "sdpa-bias"):
        entry = suite.Entry(setting, contender)
        trial = attention.trial(entry)
        assert trial.error <= trial.allowed, contender
        assert attention.describe(entry)["key_heads"] == 2
        backward = suite.Entry(replace(setting, backward=True), contender)
        assert "sums over heads" in suite.why_not(backward)


def test_workloads_are_those_of_the_design() -> None:
    shapes = {
        name: (w.num_heads, w.seqlen_q, w.seqlen_k, w.head_dim) for name, w in WORKLOADS.items()
    }
    assert shapes["sd15-self-64"] == (8, 4096, 4096, 40)
    assert shapes["sdxl-cross-32"] == (20, 1024, 77, 64)
    assert shapes["flux-joint-2048"] == (24, 16384 + 512, 16384 + 512, 128)
    assert shapes["long-self-64k"][1:] == (65536, 65536, 64)
    assert shapes["qwen-joint-1328"] == (24, 83 * 83 + 128, 83 * 83 + 128, 128)
    assert shapes["zimage-joint-1024"] == (30, 4096 + 128, 4096 + 128, 128)
    assert shapes["krea2-gqa-1024"] == (48, 4096 + 512, 4096 + 512, 128)
    assert shapes["wan-cross-480p"] == (12, 32760, 512, 128)
    assert WORKLOADS["krea2-gqa-1024"].groups == 48 // 12
    dims = {shape[3] for shape in shapes.values()}
    assert dims == {40, 64, 72, 80, 88, 96, 112, 128, 160, 256}
    for workload in WORKLOADS.values():
        if workload.device == "cpu" and workload.pairs < 2**25:
            inputs = make_inputs(workload, torch.bfloat16)
            assert len(inputs.q_regions) == workload.seqlen_q
            assert len(inputs.k_regions) == workload.seqlen_k
            assert len(inputs.k_regions.unique()) > 1


@pytest.mark.full
def test_the_command_writes_results_and_a_figure(tmp_path: Path) -> None:
    for package in ("pytest_benchmark", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    files = {"--json": tmp_path / "results.json", "--plot": tmp_path / "figure.png"}
    figures = [tmp_path / f"figure{suffix}.png" for suffix in ("", "-sega", "-reversible")]
    names = ("sd15-cross-8", "percentile-4x4096", "sega-1-64", "ddim-step-1m", "round-trip-bdia-10")
    arguments = [str(text) for pair in files.items() for text in pair]
    arguments += [f"--workload={name}" for name in names]
    command = [sys.executable, "-m", "dense_attn.benchmarks.run", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert set(tmp_path.iterdir()) == {files["--json"], *figures}
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sd15-cross-8          fwd+bwd  bfloat16  sdpa-bias" in done.stdout
    assert "differing bits" in done.stdout
    results = json.loads(files["--json"].read_text())
    assert [row["workload"] for row in results["rows"]] == sorted(
        (row["workload"] for row in results["rows"]), key=names.index
    )
    assert {row["workload"] for row in results["rows"]} == set(names)
    loops = [row for row in results["rows"] if row["family"] == "round_trip"]
    assert [row["differing_bits"] == 0 for row in loops] == [False, False, False, True]
    timed = [row for row in results["rows"] if row["family"] != "round_trip"]
    assert all(row["error"] <= 4 * row["allowed"] and row["seconds"] > 0 for row in timed)
    assert results["limits"]["copy_gb_per_s"] > 0
    assert all(path.stat().st_size > 10_000 for path in figures)
    plots.draw(results, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workload", "sd15-self-65"], "--workload must be one of sd15-self-64"),
        (
            ["--json", "no/such/folder/file.json"],
            "--json must be in a folder that exists, got no/such",
        ),
        (["--plot", "figure.gif"], "--plot must end in .png or .svg, got figure.gif"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytest_benchmark")
    from dense_attn.benchmarks.run import main

    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name"), [("--json", "."), ("--plot", "a.svg"), ("--plot", "b.svg")]
)
def test_a_file_that_cannot_be_written_is_refused_before_the_first_row(
    option: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A figure's three files too; nothing is left."""
    run = pytest.importorskip("dense_attn.benchmarks.run")
    for folder in ("a-sega.svg", "b-reversible.svg"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(pytest, "main", lambda *_, **__: pytest.fail("a row is measured"))
    assert command_line(["bench", option, str(tmp_path / name)]) == 2
    assert re.fullmatch(
        r"dense_attn bench: \S+ cannot be written: it is a folder\n", capsys.readouterr().err
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-sega.svg", "b-reversible.svg"]
    with pytest.raises(FileError):
        run.main([option, str(tmp_path / name)])


def test_results_go_where_a_link_points(tmp_path: Path) -> None:
    run = pytest.importorskip("dense_attn.benchmarks.run")
    (tmp_path / "link").symlink_to("results.json")
    run.Report({"name": "a run"}, tmp_path / "link").save()
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "results.json").read_text())["header"]["name"] == "a run"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_disk_that_fills_up_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are measured and printed; the end says that they could not be written."""
    run = pytest.importorskip("dense_attn.benchmarks.run")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    report = run.Report({}, tmp_path / "rows.json")
    row = {"family": "sega", "workload": "x", "pass": "fwd", "dtype": "float32"}
    report._add(row | {"contender": "dense_attn", "backend": "", "reason": "-"})
    assert len(report.rows) == 1
    with pytest.raises(FileError, match=r"rows.json cannot be written: No space left on device"):
        report.save()
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_what_a_layout_costs_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("diffusers")
    from dense_attn.benchmarks.layout_attention import pipeline

    assert pipeline.main(["--dry-run", "--rounds", "1", "--json", str(tmp_path / "cost.json")]) == 0
    results = json.loads((tmp_path / "cost.json").read_text())
    assert results["header"]["dry_run"] is True
    assert list(results["rows"]) == ["plain", "dense_attn", "reference", "official"]
    assert all(row["seconds"] > row["attention_seconds"] > 0 for row in results["rows"].values())
    assert len(capsys.readouterr().out.splitlines()) == 5
