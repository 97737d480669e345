"""The benchmark of GPUs, without one: a dry run of every row, the clock of events beside a
stand-in, bars, refusals.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from cases import why_skip
from torch import Tensor

from dense_attn.__main__ import main
from dense_attn._kernel_hashes import kernel_hashes
from dense_attn.benchmarks import families
from dense_attn.benchmarks.harness import dry_run, machine
from dense_attn.benchmarks.harness.bars import GPU_BARS, Bar
from dense_attn.benchmarks.harness.clocks import EventClock, Trial
from dense_attn.benchmarks.harness.measure import measure
from dense_attn.benchmarks.host_cost import launch
from dense_attn.benchmarks.layout_attention import attention, baselines, gpu_baselines, suite
from dense_attn.benchmarks.layout_attention.workloads import WORKLOADS, make_inputs

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
BASE = {"workload": "sd15-self-64", "pass": "fwd", "dtype": "bfloat16"}
# What the interpreter's machine cannot run: kernels of GPUs alone, packages that are not installed.
ABSENT = {"sdpa-cudnn", "sdpa-efficient", "flash-attn", "efficient-bias", "xformers"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> machine.Gpu:
    """A stand-in for a GPU, whose rows the suite has meanwhile."""
    monkeypatch.setattr(machine, "_current", dry_run.DryGpu())
    return machine.current()


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, subprocess.CompletedProcess, Path]:
    """What a dry run writes and prints, and where its figures are."""
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
    assert {row["contender"] for row in rows if row["family"] == "attention"} == set(
        gpu_baselines.GPU_CONTENDERS
    )
    passes = {(row["pass"], row["dtype"]) for row in rows if row["family"] == "attention"}
    assert passes == {
        ("fwd", "float16"),
        ("fwd", "float32"),
        ("fwd+bwd", "float16"),
        ("bwd", "float16"),
    }
    assert {row["workload"] for row in rows if row["family"] == "launch"} == set(launch.WORKLOADS)
    for row in rows:
        left_out = row["contender"] in ABSENT or (
            row["contender"] == "flex-smart" and row["pass"] != "fwd"
        )
        assert ("reason" in row) == left_out, row
        if row["contender"].startswith("dense_attn"):
            assert row["backend"] == "triton"
    across = [row for row in rows if "across" in row["workload"]]
    assert [row["differing_bits"] for row in across] == [0, 0]
    assert all(row["bits"] > 0 for row in across)
    assert all(
        (folder / f"gpu{part}.png").stat().st_size > 10_000 for part in ("", "-sega", "-reversible")
    )


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
    sources = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")
    }
    assert kernel_hashes() == {
        name: sha256(text).hexdigest()[:16] for name, text in sources.items()
    }
    assert len(sources) == 11


class ScriptedGpu(dry_run.DryGpu):
    """Time passes when a call says so, and everything that the clock does is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.log = 0.0, []

    def call(self, name: str, seconds: float) -> Callable[[], list[Tensor]]:
        """A call that takes so long."""

        def run() -> list[Tensor]:
            self.log.append(name)
            self.now += seconds
            return [torch.ones(1)]

        return run

    def mark(self) -> float:
        return self.now

    def flush(self) -> None:
        self.log.append("flush")
        self.now += 100.0

    def synchronize(self) -> None:
        self.log.append("wait")


def trial(run: Callable[[], object], seconds: float, in_graph: bool = True) -> Trial:
    return Trial(run, seconds, None, 0.0, 1.0, in_graph)


def test_events_stand_around_the_call_alone() -> None:
    gpu = ScriptedGpu()
    slow, fast = trial(gpu.call("slow", 3.0), 3.0), trial(gpu.call("fast", 2.0), 2.0)
    rounds = EventClock(gpu, seconds=15.0, least=1).compare(slow, fast)
    assert (rounds.times, rounds.beside, rounds.ratios) == ([3.0] * 3, [2.0] * 3, [1.5] * 3)
    assert gpu.log == ["flush", "fast", "flush", "slow"] * 3 + ["wait"]
    assert rounds.notes == {"timing": "events", "partner_timing": "events"}
    gpu.log.clear()
    assert EventClock(gpu, seconds=0.0, least=5).compare(slow, None).beside == []
    assert gpu.log.count("slow") == 5
    assert EventClock(gpu).median(slow.run, rounds=3) == 3.0


def test_a_short_call_is_replayed_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = ScriptedGpu()

    def capture(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        return gpu.call("replay", 1e-6), run()

    monkeypatch.setattr(gpu, "capture", capture)
    clock, short = EventClock(gpu, seconds=0.0, least=3), gpu.call("short", 1e-4)
    assert clock.compare(trial(short, 1e-4), None).times == pytest.approx([1e-6] * 3, abs=1e-9)
    assert clock.compare(trial(short, 1e-4), None).notes == {"timing": "graph"}
    assert clock.compare(trial(short, 1e-4, in_graph=False), None).notes == {"timing": "events"}
    assert clock.compare(trial(gpu.call("long", 1e-3), 1e-3), None).notes == {"timing": "events"}
    monkeypatch.setattr(gpu, "capture", lambda run: (gpu.call("replay", 1e-6), [torch.zeros(1)]))
    assert (
        "its replay gives other results" in clock.compare(trial(short, 1e-4), None).notes["timing"]
    )

    def refused(run: Callable[[], object]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "capture", refused)
    rounds = clock.compare(trial(short, 1e-4), None)
    assert rounds.notes == {
        "timing": "events; not in a graph: operation not permitted when stream is capturing"
    }
    assert rounds.times == pytest.approx([1e-4] * 3, abs=1e-9)


def test_who_fails_costs_its_own_row(gpu: machine.Gpu) -> None:
    def failing() -> Trial:
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more")

    right = trial(lambda: [torch.ones(1)], 1e-2)
    row = measure({"contender": "eager"}, failing, lambda: right, None)
    assert row == {"contender": "eager", "reason": "OutOfMemoryError: CUDA out of memory."}
    row = measure({"contender": "dense_attn"}, failing, lambda: right, None)
    assert row["wrong"]
    assert "in failing" in row["traceback"]
    row = measure({"contender": "eager"}, lambda: right, failing, None)
    assert row["seconds"] > 0
    assert "ratio" not in row
    row = measure({"contender": "eager"}, lambda: replace(right, error=5.0), lambda: right, None)
    assert row["wrong"]
    assert "seconds" not in row


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
    cases = list(suite.cases())
    assert {case.setting.workload.name for case in cases} == set(WORKLOADS)
    assert {
        case.setting.workload.num_heads for case in cases if "long" in case.setting.workload.name
    } == {8}
    assert suite.why_not(next(case for case in cases if "flux" in str(case))) is None
    rows = {
        (c.setting.workload.name, c.setting.passes, c.setting.dtype_name, c.contender)
        for c in cases
    }
    for name, family in families.families().items():
        if name != "attention":
            rows |= {
                (c.setting.workload, c.setting.passes, c.setting.dtype, c.contender)
                for c in family.cases()
            }
    for bar in GPU_BARS:
        assert {
            (bar.workload, bar.passes, bar.dtype, who) for who in (*bar.contenders, bar.way)
        } <= rows
    for family in families.families().values():
        assert set() < set(map(str, family.cases(quick=True))) < set(map(str, family.cases()))
    assert {name for *_, name in rows if name.endswith("-1g")} == set()
    assert sum(case[0].endswith("-1g") for case in rows) == 5 * 4
    reason = suite._too_much_memory(
        next(c for c in cases if str(c) == "long-self-64k-fwd-bfloat16-eager"), 80e9
    )
    assert "GiB of scores" in reason


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
    wrong = [
        row | {"reason": "error 1", "wrong": True} if row["contender"] == "sdpa-cudnn" else row
        for row in rows
    ]
    assert bar.verdict(wrong)["verdict"] == "not measured"
    in_graph = Bar("sd15-self-64", "fwd", "bfloat16", (), 15e-6, "graph_seconds")
    row = BASE | {
        "contender": "dense_attn",
        "seconds": 1e-5,
        "timing": "graph",
        "of_large_copy": 0.9,
    }
    assert in_graph.verdict([row])["verdict"] == "pass"
    assert in_graph.verdict([row | {"seconds": 2e-5}])["verdict"] == "miss"
    assert in_graph.verdict([row | {"timing": "events"}])["verdict"] == "not measured"
    of_copy = Bar("sd15-self-64", "fwd", "bfloat16", (), 0.8, "of_large_copy")
    assert of_copy.verdict([row])["verdict"] == "pass"


def test_a_bias_in_memory_is_the_modulation(
    gpu: machine.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that takes the bias exists on GPUs alone: SDPA in its place shows that bias and
    layout are right.
    """
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
    setting = suite.Setting(WORKLOADS["sd15-self-8"], torch.float32, backward=True, alone=True)
    assert setting.passes == "bwd"
    assert (
        WORKLOADS["sd15-self-8"].gflop(True, alone=True)
        == WORKLOADS["sd15-self-8"].gflop(False) * 2.5
    )


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
    argv = [
        "--quick",
        "--dry-run",
        "--family",
        "sega",
        "--family",
        "steps",
        "--device",
        "cuda",
        "--json",
        "a.json",
    ]
    assert main(["bench", *argv]) == 0
    assert seen == argv


@pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
def test_a_cpu_has_no_rows_of_a_gpu() -> None:
    assert set(families.families()) == set(families.FAMILIES)
    assert all(
        case.setting.workload.device == "cpu" and not case.setting.alone for case in suite.cases()
    )
