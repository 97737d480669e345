"""The benchmark of whole blocks: its ways are what they say, and what is wrong is told."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
from dense_attn.benchmarks.blocks import page, run, ways
from dense_attn.benchmarks.blocks.networks import NETWORKS

pytestmark = pytest.mark.usefixtures("one_thread")


def dry(path: Path, *options: str) -> int:
    small = ["--dry-run", "--rounds", "1", "--side", "8", "--dtype", "float32"]
    return run.main([*small, "--json", str(path), *options])


def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every way of a family of each kind has a row, and the bars their verdicts."""
    path = tmp_path / "blocks.json"
    assert dry(path, "--network", "sdxl", "--network", "flux") == 0
    found = json.loads(path.read_text())
    assert found["header"]["dry_run"] is True
    names = [(row["workload"], row["contender"]) for row in found["rows"]]
    assert names == [(name, way) for name in ("sdxl", "flux") for way in run.ways_of(name)]
    for row in found["rows"]:
        assert row["seconds"] > 0
        assert (row["of_plain"] == 1) == (row["contender"] == "plain")
    assert found["rows"][2]["error"] <= found["rows"][2]["allowed"] == 1e-4
    assert len(found["bars"]) == 2 * 2 * 2
    assert {bar["verdict"] for bar in found["bars"]} <= {"pass", "miss", "not measured"}
    lines = page.table(found["rows"]).splitlines()
    assert len(lines) == 2 + len(names)
    assert lines[2] in capsys.readouterr().out


def test_prompts_of_regions_that_are_wrong_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention couple with regions elsewhere is another result."""
    own = ways.Ways._masks
    monkeypatch.setattr(ways.Ways, "_masks", lambda self: own(self).flip(0))
    path = tmp_path / "blocks.json"
    assert dry(path, "--network", "sd15") == 1
    assert [row["contender"] for row in json.loads(path.read_text())["rows"] if "wrong" in row] == [
        "regions"
    ]
    monkeypatch.undo()
    assert dry(path, "--network", "sd15") == 0


def test_rows_of_a_real_images_tokens(tmp_path: Path) -> None:
    """One dtype, and no way by hand."""
    path = tmp_path / "blocks.json"
    names = [name for name, network in NETWORKS.items() if network.real]
    asked = [part for name in names for part in ("--network", name)]
    small = ["--dry-run", "--rounds", "1", "--side", "8", "--json", str(path), *asked]
    assert run.main(small) == 0
    rows = json.loads(path.read_text())["rows"]
    found = [(row["workload"], row["dtype"], row["contender"]) for row in rows]
    ways_of = ("plain", "layout", "regions")
    assert found == [(name, "float32", way) for name in names for way in ways_of]
    assert all(row["seconds"] > 0 for row in rows)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "plain", "regions"),
    [
        ("flux-1024px-128", 128, 3 * 128),
        # a prompt's letters, and <|im_end|> \n <|im_start|> assistant \n
        ("qwen", len(ways.PROMPT) + 13, sum(len(text) + 13 for text in ways.PHRASES)),
    ],
)
def test_tokens_of_texts(name: str, plain: int, regions: int) -> None:
    """Real calls' numbers; regions that cover the image go without the call's own text."""
    pipe = NETWORKS[name].make(True)
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        made = ways.Ways(NETWORKS[name], pipe, 8, stack)
        counts = [
            made.call(way).keywords["encoder_hidden_states"].shape[1]
            for way in ("plain", "layout", "regions")
        ]
    assert counts == [plain, plain, regions]


@torch.no_grad()
def test_a_layout_changes_a_block_and_nothing_else() -> None:
    torch.manual_seed(0)
    network = NETWORKS["flux"]
    pipe = network.make(True)
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        made = ways.Ways(network, pipe, 8, stack)
        plain, layout = made.call("plain"), made.call("layout")
        before = plain()
        changed = layout()
        assert not torch.equal(before[1], changed[1])
        assert torch.equal(plain()[1], before[1])
    assert torch.equal(layout()[1], before[1])


def test_a_reason_stands_where_there_are_no_numbers() -> None:
    row = {"workload": "x", "dtype": "float32", "contender": "layout", "reason": "no record"}
    assert "not measured: no record" in page.table([row])
    assert [bar["verdict"] for bar in run.bars([row])] == ["not measured"] * 2
