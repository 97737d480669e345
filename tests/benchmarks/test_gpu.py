"""The benchmark of GPUs, without one: a dry run of every row, its contenders, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import forked
import pytest
import torch
from cases import why_skip
from torch import Tensor

from dense_attn.__main__ import main
from dense_attn._kernel_hashes import kernel_hashes
from dense_attn.benchmarks import families
from dense_attn.benchmarks.harness import dry_run, machine
from dense_attn.benchmarks.harness.bars import GPU_BARS
from dense_attn.benchmarks.harness.measure import BY_BACKEND
from dense_attn.benchmarks.host_cost import calls, launch
from dense_attn.benchmarks.layout_attention import attention, baselines, gpu_baselines, suite
from dense_attn.benchmarks.layout_attention.workloads import WORKLOADS, make_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
BASE = {"workload": "sd15-self-64", "pass": "fwd", "dtype": "bfloat16"}
# What the interpreter's machine cannot run: kernels of GPUs alone, packages that are not installed.
ABSENT = {"sdpa-cudnn", "sdpa-efficient", "flash-attn", "efficient-bias", "xformers"}
ABSENT |= {"dense_attn-cuda"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> machine.Gpu:
    """A stand-in for a GPU, whose rows the suite has meanwhile."""
    monkeypatch.setattr(machine, "_current", dry_run.DryGpu())
    return machine.current()


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, subprocess.CompletedProcess, Path]:
    """A dry run's results, its output, and the folder of its figures."""
    for package in ("pytest_benchmark", "matplotlib", "tqdm", "triton"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("dry")
    files = ["--json", str(folder / "gpu.json"), "--plot", str(folder / "gpu.png")]
    command = [sys.executable, "-m", "dense_attn", "bench", "--dry-run", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "gpu.json").read_text()), done, folder


@pytest.mark.full
def test_a_dry_run_goes_through_every_family_and_contender(dry: tuple) -> None:
    results, _, folder = dry
    rows = results["rows"]
    assert {row["family"] for row in rows} == set(families.GPU_FAMILIES)
    mine = [row for row in rows if row["family"] == "attention"]
    assert {row["contender"] for row in mine} == set(gpu_baselines.GPU_CONTENDERS)
    passes = {(row["pass"], row["dtype"]) for row in mine}
    halves = {(which, "float16") for which in ("fwd", "fwd+bwd", "bwd")}
    assert passes == {("fwd", "float32")} | halves
    for name, family in (("launch", launch), ("host_cost", calls)):
        found = {row["workload"] for row in rows if row["family"] == name}
        assert found == set(family.WORKLOADS)
    for row in rows:
        untrained = row["contender"] == "flex-smart" and row["pass"] != "fwd"
        assert ("reason" in row) == (row["contender"] in ABSENT or untrained), row
        if row["contender"].startswith("dense_attn"):
            cuda = row["contender"] == "dense_attn-cuda"
            assert row["backend"] == ("cuda" if cuda else "triton")
    across = [row for row in rows if "across" in row["workload"]]
    assert [row["differing_bits"] for row in across] == [0, 0]
    assert all(row["bits"] > 0 for row in across)
    for part in ("", "-sega", "-reversible"):
        assert (folder / f"gpu{part}.png").stat().st_size > 10_000


@pytest.mark.full
def test_a_dry_run_gives_no_number_of_a_gpu(dry: tuple) -> None:
    results, done, _ = dry
    assert results["header"]["dry_run"]
    assert results["header"]["device"].startswith("none: a dry run")
    assert all(row["dry_run"] for row in results["rows"])
    assert {bar["verdict"] for bar in results["bars"]} == {"not measured"}
    assert "a dry run without a GPU: every time and ratio above means nothing" in done.stdout
    assert results["header"]["kernels"] == kernel_hashes()
    assert {"triton", "xformers", "cuda"} <= results["header"]["versions"].keys()


def test_hashes_are_those_of_the_sources() -> None:
    folder = ROOT / "triton_kernels"
    hashes = {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()[:16]
        for path in folder.rglob("*.py")
    }
    assert kernel_hashes() == hashes
    assert len(hashes) == 30


def test_rows_are_kept_as_they_come(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    from dense_attn.benchmarks.run import Report

    report = Report({"device": "none"}, tmp_path / "rows.json")
    row = {"family": "attention", "contender": "eager", "backend": None, "reason": "no", **BASE}
    for count in (1, 2):
        report._add(dict(row))
        assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == count
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_gpu_has_all_workloads_and_the_bars_have_their_rows(gpu: machine.Gpu) -> None:
    entries = list(suite.entries())
    workloads = [entry.setting.workload for entry in entries]
    assert {workload.name for workload in workloads} == set(WORKLOADS)
    assert {x.num_heads for x in workloads if "long" in x.name} == {8}
    assert suite.why_not(next(entry for entry in entries if "flux" in str(entry))) is None
    rows = {(x.setting.workload.name, x.setting.dtype_name, x) for x in entries}
    for name, family in families.families().items():
        if name != "attention":
            rows |= {(x.setting.workload, x.setting.dtype, x) for x in family.entries()}
        assert set() < set(map(str, family.entries(quick=True))) < set(map(str, family.entries()))
    rows = {(name, x.setting.passes, dtype, x.contender) for name, dtype, x in rows}
    for bar in GPU_BARS:
        setting = (bar.workload, bar.passes, bar.dtype)
        assert {(*setting, who) for who in (*bar.contenders, bar.way)} <= rows
    assert sum(name.endswith("-1g") for name, *_ in rows) == 5 * 6
    large = next(x for x in entries if str(x) == "long-self-64k-fwd-bfloat16-eager")
    assert "GiB of scores" in suite._too_much_memory(large, 80e9)


def attention_row(name: str) -> suite.Entry:
    return next(entry for entry in suite.entries() if str(entry) == name)


def test_a_row_names_the_backend_that_runs_it(
    gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few keys go to CUDA's kernels where they are, and "auto" is measured beside both backends."""
    monkeypatch.setattr(suite.table, "missing", lambda backend, op: None)
    monkeypatch.setattr(suite.table, "why_not", lambda backend, op, x, *_: [])
    cross, own = "sd15-cross-64-fwd-bfloat16-", "sd15-self-64-fwd-bfloat16-"
    rows = ("dense_attn", "dense_attn-triton", "dense_attn-cuda", "sdpa")
    assert [suite.backend(attention_row(cross + x)) for x in rows] == [
        "cuda",
        "triton",
        "cuda",
        None,
    ]
    rows = ("dense_attn", "dense_attn-sorted", "dense_attn-cuda")
    assert [suite.backend(attention_row(own + x)) for x in rows] == ["triton", "triton", "cuda"]
    assert own + "dense_attn-triton" not in set(map(str, suite.entries()))


def test_a_row_of_one_backend_is_run_by_no_other(
    gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, asked = make_inputs(WORKLOADS["sd15-cross-8"], torch.float16), []
    for module, name in (
        (gpu_baselines, "layout_attention"),
        (gpu_baselines.dense_attn, "tile_lists"),
    ):
        monkeypatch.setattr(module, name, lambda *x, backend, **how: asked.append(backend))
    for name, backend in BY_BACKEND.items():
        gpu_baselines.GPU_CONTENDERS[name](inputs)(inputs.q, inputs.k, inputs.v)
        assert asked[-2:] == [backend] * 2
    reasons = ["one", "two"]
    monkeypatch.setattr(
        suite.table, "why_not", lambda backend, op, x, *_: reasons if backend == "cuda" else []
    )
    rows = {x: attention_row(f"sd15-cross-64-fwd-bfloat16-{x}") for x in BY_BACKEND}
    assert suite.why_not(rows["dense_attn-cuda"]) == "one; two"
    assert suite.why_not(rows["dense_attn-triton"]) is None


def test_a_bias_in_memory_is_the_modulation(
    gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that takes the bias is a GPU's: SDPA in its place shows that the bias is right."""
    inputs = make_inputs(replace(WORKLOADS["sd15-cross-8"], num_heads=2), torch.float32)
    biases = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *rest: object) -> tuple[Tensor]:
        biases.append(bias)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (baselines.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2),)

    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", kernel)
    out = gpu_baselines.efficient_bias(inputs)(inputs.q, inputs.k, inputs.v)
    expected = baselines.sdpa_bias(inputs)(inputs.q, inputs.k, inputs.v)
    torch.testing.assert_close(out, expected)
    assert biases[0].shape[-1] == 77
    assert biases[0].stride(-2) % gpu_baselines._ALIGN == 0


def test_a_hard_softmax_finds_the_best_key(gpu: machine.Gpu) -> None:
    """With gradients its place is read from digits, beyond what a narrow dtype counts to."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 700, 16)
    place = baselines._best_place(flex_attention, q, k, 2.0**20)
    assert torch.equal(place[..., 0], (q @ k.mT).argmax(-1))
    torch.testing.assert_close(baselines._row_max(flex_attention, q, k), (q @ k.mT).amax(-1) / 4)


def test_channels_need_regions_that_do_not_overlap() -> None:
    words = torch.tensor([1, 2, 0, -(2**31)], dtype=torch.int32)
    q_hot, k_hot = gpu_baselines._one_hot(words, words, torch.float32)
    assert torch.equal(q_hot @ k_hot.T, ((words[:, None] & words) != 0).float())
    with pytest.raises(NotImplementedError, match="no regions overlap"):
        gpu_baselines._one_hot(words | 1, words, torch.float32)


def test_the_backward_pass_alone_may_be_called_again(gpu: machine.Gpu) -> None:
    inputs = make_inputs(WORKLOADS["sd15-self-8"], torch.float32)
    backward = attention.backward_of(baselines.sdpa(inputs), inputs)
    both = attention.run(baselines.sdpa(inputs), inputs, inputs.grad_out, backward=True)
    for got in (backward(inputs.grad_out), backward(inputs.grad_out)):
        assert all(map(torch.equal, got, both))
    workload = WORKLOADS["sd15-self-8"]
    assert suite.Setting(workload, torch.float32, backward=True, alone=True).passes == "bwd"
    assert workload.gflop(True, alone=True) == workload.gflop(False) * 2.5


def test_what_matters_most_comes_first() -> None:
    """And what compiles for each shape last."""
    places = {name: families.place("attention", name) for name in gpu_baselines.GPU_CONTENDERS}
    first = {name for name, place in places.items() if place == 0}
    assert first == {x for x in places if x.startswith(("dense_attn", "sdpa"))} - {"sdpa-bias"} | {
        "flash-attn"
    }
    assert {x for x, place in places.items() if place == 4} == set(suite.NEED_FLEX)
    assert families.place("sega", "diffusers") == families.place("launch", "dense_attn") == 1
    assert (families.place("chain", "dense_attn"), places["eager"]) == (2, 3)
    assert set(gpu_baselines.GPU_CONTENDERS) < set(families.CONTENDERS)
    assert {"copy", "diffusers", "triton-empty"} < set(families.CONTENDERS)


def chosen(folder: Path, *argv: str) -> dict:
    """The results of a dry run of two workloads and three contenders."""
    for package in ("pytest_benchmark", "tqdm", "triton"):
        pytest.importorskip(package)
    words = [f"--contender={name}" for name in ("eager", "sdpa", "dense_attn")]
    words += ["--workload=sega-1-64", "--workload=sd15-cross-64", "--dry-run", *argv]
    done = forked.run(forked.COMMAND, "bench", *words, "--json", "rows.json", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "rows.json").read_text())


@pytest.mark.full  # interprets what it would time
def test_contenders_are_left_out_and_rows_in_order(tmp_path: Path) -> None:
    rows = chosen(tmp_path)["rows"]
    who = [(row["family"], row["contender"]) for row in rows]
    assert who == sorted(who, key=lambda row: families.place(*row))
    ours = [("attention", x) for x in ("dense_attn", "sdpa", "eager")]
    assert set(who) == {*ours, ("sega", "dense_attn")}


@pytest.mark.full  # a process of its own imports and warms up all
def test_no_row_begins_when_the_time_is_over(tmp_path: Path) -> None:
    results = chosen(tmp_path, "--seconds=0.001")
    assert results["rows"] == []
    assert results["header"]["not_reached"] >= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ("--device", "cuda"),
            "--device must be cpu where torch sees no GPU, got 'cuda' (--dry-run needs none)",
        ),
        (
            ("--family", "launch"),
            "--family must be one of attention, percentile, sega, steps, chain, gradient, round_",
        ),
        (("--dry-run", "--workload", "sega-9"), "--workload must be one of sd15-self-64"),
        (("--contender", "paint"), "--contender must be one of autograd, checkpoint, clone"),
        (("--seconds", "0"), "argument --seconds: must be a positive number, got '0'"),
    ],
)
def test_refusals(argv: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("triton")
    with pytest.raises(SystemExit) as refused:
        main(["bench", *argv])
    assert refused.value.code == 2
    assert sentence in capsys.readouterr().err


def test_the_command_hands_on_what_a_gpu_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = pytest.importorskip("dense_attn.benchmarks.run")
    seen: list[str] = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.extend(argv) or 0)
    argv = ["--quick", "--dry-run", "--device=cuda"]
    argv += ["--family=sega", "--family=steps", "--contender=copy", "--json=a.json", "--seconds=7"]
    assert main(["bench", *argv]) == 0
    assert seen == argv


@pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
def test_a_cpu_has_no_rows_of_a_gpu() -> None:
    assert set(families.families()) == set(families.FAMILIES)
    for entry in suite.entries():
        assert entry.setting.workload.device == "cpu"
        assert not entry.setting.alone
