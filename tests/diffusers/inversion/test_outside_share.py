"""The program that measures what of a flow pipeline's chain passes outside of its network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pipelines import diffusers
from tree import ROOT

from dense_attn.benchmarks.reversible import flow_pipelines

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.full
def test_a_dry_run_has_a_row_of_each_pipeline(tmp_path: Path) -> None:
    assert diffusers is not None
    path = tmp_path / "found.json"
    given = ["--dry-run", "--steps", "1", "--rounds", "1", "--json", str(path)]
    assert flow_pipelines.main(given) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["pipeline"] for row in rows] == ["sd3", "flux"]
    assert all(row["finite"] and 0 < row["share"] < 1 for row in rows)


def test_the_page_has_what_was_measured() -> None:
    """Shares outside of the network, and guidance's steps on latents of flows."""
    page, results = (ROOT / "docs/measured.md").read_text("utf-8"), ROOT / "benchmarks/results"
    rows = json.loads((results / "flow-pipelines.json").read_text())["rows"]
    sd3, flux = (f"{row['share']:.2%}" for row in rows)
    assert f"{sd3} (SD3's) and\n{flux} (FLUX's, packed)" in page
    found = json.loads((results / "sega-flow.json").read_text())["rows"]
    for workload in ("sega-3-128-16ch", "sega-3-packed", "sega-3-packed-tokens"):
        ours, theirs = (row for row in found if row["workload"] == workload)
        assert f"{ours['seconds'] * 1e3:.3g} ms and {theirs['ratio']:.1f}x" in page
