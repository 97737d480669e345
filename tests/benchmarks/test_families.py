"""Rows of semantic guidance and reversible DDIM are honest: nothing wrong is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stopwatch import Stopwatch
from torch import Tensor

import dense_attn
from dense_attn.benchmarks import families, plots
from dense_attn.benchmarks.families import FAMILIES
from dense_attn.benchmarks.harness import dry_run, machine
from dense_attn.benchmarks.harness.measure import BY_BACKEND, Entry, Latest, Row, Setting
from dense_attn.benchmarks.reversible import chain, chains, gradient, round_trip, steps, unet
from dense_attn.benchmarks.sega import guidance, percentile


@pytest.fixture(autouse=True)
def _fresh_trials(one_thread: None) -> None:
    Latest.forget_all()


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of a few steps on small latents, and few values for the step kernels."""
    monkeypatch.setitem(chain.WORKLOADS, "edict-50", (1, 4, 8, 8))
    monkeypatch.setattr(chain, "_STEPS", 4)
    monkeypatch.setitem(gradient.WORKLOADS, "gradient-10", 3)
    monkeypatch.setattr(gradient, "_SHAPE", (1, 4, 8, 8))
    monkeypatch.setitem(steps.SIZES, "1m", 4096)


TINY_FAMILIES = {  # one workload of each family that is timed
    "percentile": ("percentile-4x4096", "fwd", "bfloat16", percentile.CONTENDERS),
    "sega": ("sega-1-64", "fwd", "float32", guidance.CONTENDERS),
    "steps": ("edict-mix-1m", "fwd", "float32", steps.CONTENDERS),
    "steps on the grid": ("exact-mix-1m", "fwd", "int64", steps.CONTENDERS),
    "chain": ("edict-50", "fwd", "float32", chain.CONTENDERS),
    "gradient": ("gradient-10", "fwd+bwd", "float32", gradient.CONTENDERS),
}


def measured(family: str, contender: str) -> Row:
    """The row of a family's tiny workload."""
    *setting, _ = TINY_FAMILIES[family]
    entry = Entry(Setting(*setting), contender)
    return FAMILIES[family.partition(" ")[0]].measure(entry, Stopwatch())


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("family", "contender"),
    [(family, who) for family, (*_, contenders) in TINY_FAMILIES.items() for who in contenders],
)
def test_the_right_contenders_of_every_family_are_timed(family: str, contender: str) -> None:
    row = measured(family, contender)
    assert row["seconds"] == 1.0
    assert ("ratio" in row) == (contender != "dense_attn")
    assert (row["backend"] is None) == (not contender.startswith("dense_attn"))
    assert row["peak_extra_bytes"] is None or row["peak_extra_bytes"] >= 0


def spoil(family: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make one contender of a family wrong by little, and name it."""
    if family == "percentile":

        def nearest(x: Tensor) -> tuple[Tensor, Tensor]:
            return percentile.kthvalue(torch.nextafter(x, x + 1))

        monkeypatch.setitem(percentile.GPU_CONTENDERS, "torch.kthvalue", nearest)
        return "torch.kthvalue"
    if family == "sega":

        def dropped(step: guidance.Step) -> list[Tensor]:
            return [x.masked_fill(x == x.max(), x.mean()) for x in guidance.public_pipeline(step)]

        monkeypatch.setitem(guidance.GPU_CONTENDERS, "diffusers", dropped)
        return "diffusers"
    if family == "chain":
        monkeypatch.setitem(chain.CONTENDERS, "edict-float64", chain.CONTENDERS["ddim-float32"])
        return "edict-float64"
    if family == "gradient":

        def mixed(
            eps_fn: chains.EpsFn, x: Tensor, steps: int, mix: float, recompute: bool
        ) -> tuple[Tensor, Tensor]:
            return chains.edict(eps_fn, x, steps, mix if recompute else mix + 1e-3)

        monkeypatch.setattr(gradient, "edict", mixed)
        return "autograd"
    calls = steps.calls

    def off_by_little(entry: Entry, inputs: steps.Inputs) -> Callable[[], list[Tensor]]:
        little = 1 if entry.setting.dtype == "int64" else 1e-5
        return lambda: [x + little for x in calls(entry, inputs)()]

    monkeypatch.setattr(steps, "calls", off_by_little)
    return "dense_attn"


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_wrong_maths_of_every_family_is_not_timed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = measured(family, spoil(family, monkeypatch))
    assert row["wrong"]
    assert "seconds" not in row


@pytest.mark.usefixtures("_small")
def test_the_share_of_the_network_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured("chain", "dense_attn")
    assert 0 < row["share"] < 1
    assert 0 < row["share_idle"] < 1
    clock = chain.Clock(lambda x, t: x)
    clock.walk(lambda eps_fn, x: (eps_fn(x, 0), time.sleep(0.02))[:1], torch.zeros(1))
    assert clock.shares[0] > 0.9


def test_a_copy_is_compared_by_the_bytes_it_moves() -> None:
    row = measured("steps", "clone")
    assert row["of_copy"] == row["ratio"]
    moved = 5 * 4 * steps.SIZES["1m"]  # three read and two written, of four bytes each
    assert row["gb_per_s"] == pytest.approx(1e-9 * moved)
    assert 2 * steps._prepared(steps._setting("edict-mix-1m")).source.nbytes == moved


@pytest.mark.parametrize("name", round_trip._SAMPLERS)
def test_round_trips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(precision: str) -> Row:
        setting = Setting(f"round-trip-{name}-10", "loop", precision)
        return round_trip.measure(Entry(setting, "dense_attn"))

    if name == "ddim":  # its error is not one of rounding
        assert row("float64")["error"] > 1e-2
        return
    assert row("float16")["error"] > 1e3 * row("float64")["error"] > 0
    if name not in round_trip._EXACT:
        return
    assert (row("exact")["error"], row("exact")["differing_bits"]) == (0, 0)
    round_trip_of = round_trip.there_and_back

    def off_by_one_step(*arguments: object) -> round_trip.Pair:
        x, y = round_trip_of(*arguments)
        return x + 2.0**-26, y

    monkeypatch.setattr(round_trip, "there_and_back", off_by_one_step)
    assert row("exact")["wrong"]
    assert row("exact")["differing_bits"] > 0


def test_bits_are_counted() -> None:
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert round_trip.differing_bits(x, -x) == 2
    assert round_trip.differing_bits(x, x.clone()) == 0


def test_the_networks_are_those_of_the_design() -> None:
    network = unet.SmallUNet()
    assert 0.9e6 < sum(weight.numel() for weight in network.parameters()) < 1.1e6
    x = torch.randn(1, 4, 32, 32)
    early, late = (network(x, t) / network.noise_level[t] for t in (900, 100))
    assert not torch.equal(early, late)
    assert gradient.activations(network, x) > 20 * x.nbytes


@pytest.mark.usefixtures("_small")
def test_what_memory_does_not_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_SHARE_OF_MEMORY", 1e-12)
    assert "GiB" in measured("steps", "eager")["reason"]
    assert "reason" not in measured("gradient", "autograd")
    monkeypatch.setattr(gradient, "_MAX_BYTES", 1e5)
    assert "GB of activations" in measured("gradient", "autograd")["reason"]
    assert "reason" not in measured("gradient", "checkpoint")


def test_the_workloads_of_the_families_are_those_of_the_design() -> None:
    assert set(percentile.WORKLOADS.values()) == {(4, 4096), (64, 4096), (1, 2**20), (1, 2**24)}
    assert {shape[0] for shape in guidance.WORKLOADS.values()} == {1, 3, 8}
    assert {(3, 1, 16, 21, 60, 104), (3, 2, 4, 64, 64)} <= set(guidance.WORKLOADS.values())
    assert len(steps.WORKLOADS) == 15
    assert set(gradient.WORKLOADS.values()) == {10, 50, 200}
    assert len(round_trip.WORKLOADS) == 16
    names = {name for family in FAMILIES.values() for name in family.WORKLOADS}
    assert len(names) == len(families.WORKLOADS)


def test_the_quick_suite_is_a_part_of_every_family() -> None:
    for family in FAMILIES.values():
        everything, quick = (
            set(map(str, family.entries())),
            set(map(str, family.entries(quick=True))),
        )
        assert set() < quick < everything


def test_a_figure_shows_the_gradients_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"contender": who, "steps": count, "seconds": 0.1 * count, "peak_extra_bytes": 10**6}
        for who in gradient.CONTENDERS
        for count in gradient.WORKLOADS.values()
    ]
    rows[-1] = {"contender": "checkpoint", "steps": 200, "reason": "too large"}
    rows = [row | {"family": "gradient"} for row in rows]
    header = dict.fromkeys(("device", "threads", "isa", "torch_isa", "date"), "")
    header["versions"] = {"torch": "1", "dense_attn": "2"}
    (file,) = plots.draw({"rows": rows, "header": header}, tmp_path / "a.svg")
    assert file == tmp_path / "a-reversible.svg"
    assert "a checkpoint each step" in file.read_text()


@pytest.mark.parametrize("family", ["percentile", "sega", "steps"])
def test_on_a_gpu_rows_of_one_backend_are_run_by_no_other(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks its backend, names it, and says why it is not there."""
    monkeypatch.setattr(machine, "_current", dry_run.DryGpu())
    module, asked = FAMILIES[family], []
    rows = {x.contender: x for x in module.entries(quick=True)}
    assert BY_BACKEND.keys() < rows.keys()
    monkeypatch.setattr(
        dense_attn, "sega_guidance", lambda *x, backend, **how: asked.append(backend) or []
    )
    monkeypatch.setattr(
        dense_attn, "percentile_mask", lambda *x, backend, **how: asked.append(backend)
    )
    monkeypatch.setattr(
        steps.table, "resolve", lambda backend, op, x: asked.append(backend) or "cpu"
    )
    for name, backend in BY_BACKEND.items():
        if family == "steps":
            steps.calls(rows[name], steps.Inputs([torch.ones(8, device="cpu")], None, {}))
        else:
            given = guidance.make_step((1, 1, 1, 4)) if family == "sega" else None
            module.GPU_CONTENDERS[name](given)
        assert asked[-1] == backend
    monkeypatch.setattr(steps.table, "why_not", lambda backend, op, x, *_: [f"no {backend}"])
    found = {name: module.measure(rows[name], None) for name in BY_BACKEND}
    assert {name: (row["backend"], row["reason"]) for name, row in found.items()} == {
        name: (backend, f"no {backend}") for name, backend in BY_BACKEND.items()
    }
