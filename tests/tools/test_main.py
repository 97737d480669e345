"""The command line: its output, its exit codes, and one sentence for what a user gets wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from dense_attn import _kernel_report
from dense_attn._backends import table
from dense_attn._kernel_hashes import kernel_hashes

pytestmark = pytest.mark.usefixtures("one_thread")


def test_python_dash_m() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "dense_attn", "info"], capture_output=True, text=True, check=True
    )
    assert f"torch {torch.__version__}" in process.stdout


def test_info_tells_backends_with_reasons_and_missing_extras(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dense_attn.__main__.EXTRAS", {"bench": ("pytest", "no-such-package")})
    code, out, _ = run("info")
    assert code == 0
    for backend, ops in table.backends().items():
        assert any(
            line.split()[0] == backend and ops["layout_attention"] in line
            for line in out.splitlines()
            if line
        )
    assert "no-such-package   missing: pip install dense_attn[bench]" in out
    assert f"pytest            {pytest.__version__}" in out


def test_info_of_kernels(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("info", "--kernels")
    assert code == 0
    kernels, model, bars, cuda, sources = (part.splitlines() for part in out.split("\n\n"))
    table = _kernel_report.results()["kernels.json"]
    assert len(kernels) == 2 + len(table["rows"])
    assert kernels[1].split() == list(_kernel_report.COLUMNS)
    assert model[0].startswith("a model, not measured: ours / plain")
    assert "faster" not in out
    assert len(model) == 4 + sum("plain" in row for row in table["rows"])
    assert model[3].split() == list(_kernel_report.MODEL_COLUMNS)
    assert bars[1].split() == list(_kernel_report.BAR_COLUMNS)
    assert len(bars) == 2 + len(table["bars"])
    assert "compiled, not run on a GPU" in cuda[0]
    assert len(cuda) == 3 + len(table["cuda_rows"])
    assert [line.split()[0] for line in sources[1:]] == list(kernel_hashes())

    monkeypatch.setattr(_kernel_report, "results", dict)
    code, _, err = run("info", "--kernels")
    assert code == 2
    assert "make kernels writes it" in err


def test_info_of_kernels_knows_other_sources() -> None:
    now = kernel_hashes()
    file = next(iter(now))
    gpu = {"device": "Some GPU", "kernels": now}
    others = {
        "a.json": gpu,
        "b.json": gpu | {"device": "Another", "kernels": now | {file: "0" * 16}},
    }
    first, second = _kernel_report.sources(now | {file: "0" * 16}, others)[1:3]
    assert first.split("  ")[-1] == "Some GPU, Another (other sources)"
    assert "table is of other sources" in first
    assert "of these sources" in second
    assert all(line.endswith("not run on a GPU") for line in _kernel_report.sources(now, {})[1:])


@pytest.mark.parametrize(
    "argv", [(), ("paint",), ("demo", "--grids", "12"), ("demo", "--threads", "0")]
)
def test_wrong_arguments_exit_with_2(run: Callable, argv: tuple[str, ...]) -> None:
    code, _, err = run(*argv)
    assert code == 2
    assert "usage: python -m dense_attn" in err


def test_bench_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch, run: Callable) -> None:
    bench = pytest.importorskip("dense_attn.benchmarks.run")
    seen: list[str] = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.extend(argv) or 1)
    argv = ("--quick", "--workload", "sd15-self-64", "--json", "a.json", "--plot", "a.png")
    more = ("--device", "cuda", "--shape", "1,8,64,77,40", "--modulation", "max", "--dry-run")
    assert run("bench", *argv, *more)[0] == 1
    assert " ".join(sorted(seen)) == (
        "--device=cuda --dry-run --json=a.json --modulation=max --plot=a.png --quick "
        "--shape=1,8,64,77,40 --workload=sd15-self-64"
    )


def test_bench_without_its_extra_says_so(monkeypatch: pytest.MonkeyPatch, run: Callable) -> None:
    monkeypatch.setitem(sys.modules, "dense_attn.benchmarks", None)
    code, _, err = run("bench")
    assert code == 2
    assert err == (
        "dense_attn bench: the benchmarks need dense_attn.benchmarks: pip install "
        "dense_attn[bench]\n"
    )


def test_results_of_other_sources_are_told() -> None:
    """No failure, and shown as the reason of a skip: nobody can run a GPU at will."""
    headers = {name: result["header"] for name, result in _kernel_report.results().items()}
    if stale := _kernel_report.stale(headers):
        pytest.skip("; ".join(stale))


def test_the_stale_are_told_from_the_fresh() -> None:
    fresh = {"device": "Some GPU", "kernels": kernel_hashes()}
    old = fresh | {"kernels": fresh["kernels"] | {"sega/mask.py": "0" * 16}}
    headers = {
        "new.json": fresh,
        "old.json": old,
        "dry.json": old | {"dry_run": True},
        "cpu.json": {"device": "CPU"},
    }
    assert _kernel_report.stale(headers) == ["old.json: Some GPU ran other sources of sega/mask.py"]
