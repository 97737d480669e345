"""The program that measures what of a flow pipeline's chain passes outside of its network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pipelines import diffusers

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
