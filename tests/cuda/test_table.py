"""The CUDA kernels as nvcc compiles them: the committed table, and with `-m full` the library for
sm_80 and sm_90, built, linked, loaded and counted.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from cuda import build

from dense_attn._backends.contract import MODULATIONS
from dense_attn.benchmarks.compiled import cuda_table, kernel_table

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90")
CLASSES = (40, 64, 80, 96, 128, 160, 256)
ROW, FWD = "layout_attention_row_fwd_kernel", "layout_attention_fwd_kernel"
# Instructions of a warp for 16 rows of 77 keys: alone, and with a rare search for the top, lse and
# statistics, which is still less than Triton's kernel takes with the latter.
ROUND = 800, 1110
# Instructions of a warp for 16 x 64 scores of one population and of both, by head dim. Wider heads
# multiply values in a loop of their own.
MOST = {40: (352, 577), 64: (380, 616)}
Row = dict[str, Any]


@pytest.fixture(scope="module")
def committed() -> list[Row]:
    return kernel_table.read(ROOT / "benchmarks" / "results" / "kernels.json")["cuda_rows"]


def rows_of(rows: list[Row], kernel: str, *arguments: str, **facts: object) -> list[Row]:
    """The rows of a kernel with these among its template arguments, and these facts."""
    found = [
        row
        for row in rows
        if row["kernel"] == kernel
        and {*arguments} <= {*row["arguments"]}
        and all(row[name] == value for name, value in facts.items())
    ]
    assert found
    return found


def test_the_table_is_of_these_sources() -> None:
    """`make kernels` writes it anew."""
    table = kernel_table.read(ROOT / "benchmarks" / "results" / "kernels.json")
    assert table["cuda"]["sources"] == cuda_table.hashes()


def test_no_rule_is_broken(committed: list[Row]) -> None:
    assert [cuda_table.name(row) for row in committed if cuda_table.faults(row)] == []


@pytest.mark.parametrize("target", cuda_table.TARGETS)
def test_every_kernel_is_there(committed: list[Row], target: str) -> None:
    """For each class of head dims, each dtype and each modulation."""
    for kernel in (ROW, FWD):
        for dtype in ("float16", "bfloat16"):
            for modulation in MODULATIONS:
                found = rows_of(committed, kernel, dtype, modulation, target=target)
                assert {row["head_dim"] for row in found} == set(CLASSES)


@pytest.mark.parametrize("target", TARGETS)
def test_few_keys(committed: list[Row], target: str) -> None:
    for row in rows_of(committed, ROW, "bfloat16", "80", target=target, head_dim=40):
        ((_, fewest, most),) = row["rounds"]
        assert fewest <= ROUND[0]
        assert most <= ROUND[1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("head_dim", MOST)
def test_many_keys(committed: list[Row], target: str, head_dim: int) -> None:
    """A tile of one population, and of both."""
    for row in rows_of(committed, FWD, "bfloat16", "range", target=target, head_dim=head_dim):
        one, both = [fewest for products, fewest, _ in row["rounds"] if products][:2]
        assert one <= MOST[head_dim][0]
        assert both <= MOST[head_dim][1]
        assert 0 not in row["copy_waits"]


@pytest.mark.full
@pytest.mark.long  # minutes of ptxas; the hash of the sources says when the table is not of them
@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
@pytest.mark.parametrize("head_dims", ["40", pytest.param("", id="all")])
def test_the_library_of_now(head_dims: str, committed: list[Row], tmp_path: Path) -> None:
    """It is compiled without a warning, loads where no GPU is, and is what the table says."""
    library = cuda_table.build(tmp_path, TARGETS, head_dims)
    load = f"import torch; torch.ops.load_library({str(library)!r})"
    load += "; print(torch.ops.dense_attn_cuda.contract())"
    subprocess.run([sys.executable, "-c", load], check=True, capture_output=True)
    compiled = {*map(int, head_dims.split(","))} if head_dims else set(CLASSES)
    known = [
        row
        for row in committed
        if row["target"] in TARGETS and row["head_dim"] in {None, *compiled}
    ]
    assert cuda_table.rows_of(library) == known
