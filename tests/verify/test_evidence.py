"""The evidence of the table of dispatch is in the table of compiled kernels, number by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dense_attn._backends import choice, cuda

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90")


def kernels_json() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())


def test_the_evidence_of_few_keys_is_that_of_the_table_of_kernels() -> None:
    """And it speaks for CUDA's kernel: its usual way is shorter."""
    table_of_kernels, least, found = kernels_json(), 0, {}
    for head_dim in cuda.HEAD_DIMS:
        own = [
            row["rounds"][0]
            for row in table_of_kernels["cuda_rows"]
            if row["kernel"] == "layout_attention_row_fwd_kernel"
            and row["arguments"] == ["bfloat16", "range", "80"]
            and row["head_dim"] == head_dim
            and row["target"] in TARGETS
        ]
        others = [
            instructions(row)
            for row in table_of_kernels["rows"]
            if row["kernel"] == "layout_attention_row_fwd_kernel"
            and row["target"] in TARGETS
            and (row["dtype"], row["modulation"]) == ("bfloat16", "range")
            and least < row["head_dim"] <= head_dim
            and row["tile"].endswith("x80")
        ]
        assert len(own) == len(TARGETS)
        _, fewest, most = zip(*own)
        found[head_dim] = min(fewest), max(most), min(others)
        least = head_dim
    assert found == choice.ROWS_COUNTED
    assert all(ours < others for ours, _, others in found.values())


def instructions(row: dict[str, Any]) -> int:
    """Instructions of warps for 16 rows, from a Triton kernel's row of the table."""
    block_m = int(row["tile"].split("x")[0])
    return sum(body["instructions"] for body in row["bodies"]) * row["warps"] * 16 // block_m


def test_the_evidence_of_many_keys_is_that_of_the_table_of_kernels() -> None:
    """Cycles to issue 128 x 64 scores of one population: of eight warps on four schedulers."""
    table_of_kernels = kernels_json()
    wanted = {"head_dim": 64, "dtype": "bfloat16", "modulation": "range", "triton": "3.9.0"}

    def triton(kernel: str, target: str) -> int:
        return min(
            body["cycles"]["issue"]
            for row in table_of_kernels["rows"]
            if row["kernel"] == kernel
            and row["target"] == target
            and row.items() >= wanted.items()
            and row["tile"].startswith("128x")
            for body in row["bodies"][:1]
        )

    def of_cuda(target: str) -> int:
        (row,) = (
            row
            for row in table_of_kernels["cuda_rows"]
            if row["kernel"] == "layout_attention_fwd_kernel"
            and row["arguments"] == ["bfloat16", "range"]
            and (row["head_dim"], row["target"]) == (64, target)
        )
        return 2 * next(fewest for products, fewest, _ in row["rounds"] if products)

    (rule,) = (rule for rule in choice.RULES if rule.keys and rule.keys[0] == 129)
    specialised = triton("layout_attention_specialised_fwd_kernel", "sm_90")
    ampere = triton("layout_attention_fwd_kernel", "sm_80")
    assert f" {specialised} cycles" in rule.evidence
    assert f"CUDA's {of_cuda('sm_90')};" in rule.evidence
    assert rule.evidence.endswith(f" {ampere} and {of_cuda('sm_80')}")
