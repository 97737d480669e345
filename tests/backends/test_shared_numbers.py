"""Numbers and words that stand in more than one language: one home each, and equal copies."""

from __future__ import annotations

import re

import pytest
import torch
from cases import why_skip
from tree import ROOT

from dense_attn import reference
from dense_attn._backends import contract, cpu, ops

needs_cpu_kernels = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
NO_TOKENS = (None,) * 5


def header(name: str) -> str:
    return (ROOT / "csrc" / name).read_text()


def attention(head_dim: int, modulation: str = "range") -> tuple[torch.Tensor, ...]:
    q, words = torch.randn(1, 1, 2, head_dim), torch.ones(2, dtype=torch.int32)
    strength = torch.ones(1, 1, 2)
    return cpu.layout_attention_fwd(q, q, q, words, words, strength, modulation, 0.1, *NO_TOKENS)


def test_the_grid_in_cpp() -> None:
    (found,) = re.findall(r"kGridLimit = (\S+);", header("reversible.h"))
    assert float.fromhex(found) == reference.GRID_LIMIT == 2.0**50  # which messages say


@needs_cpu_kernels
def test_the_grid_of_the_compiled_library() -> None:
    z = torch.zeros(1, dtype=torch.int64)
    step = torch.tensor([reference.GRID_LIMIT], dtype=torch.float64)
    assert cpu.exact_couple(z, step, 1.0, 1.0, torch.float64)[0].item() == reference.GRID_LIMIT
    with pytest.raises(RuntimeError, match=r"within the grid of 2\^50 steps"):
        cpu.exact_couple(z, step + 1, 1.0, 1.0, torch.float64)


@needs_cpu_kernels
def test_the_head_dim_of_the_compiled_library() -> None:
    assert attention(contract.MAX_HEAD_DIM)[0].shape[3] == contract.MAX_HEAD_DIM
    rule = f"q must have a head dim of 1 to {contract.MAX_HEAD_DIM}, got "
    with pytest.raises(RuntimeError, match=rule):
        attention(contract.MAX_HEAD_DIM + 1)


@needs_cpu_kernels
def test_the_modulations_of_the_compiled_library() -> None:
    for modulation in contract.MODULATIONS:
        assert attention(8, modulation)[0].isfinite().all()
    words = ", ".join(contract.MODULATIONS)
    with pytest.raises(RuntimeError, match=f"modulation must be one of {words}, got other"):
        attention(8, "other")
    enum = re.search(r"enum class Modulation \{(.*?)\}", header("layout_attention.h"))[1]
    names = [name.strip().removeprefix("k").lower() for name in enum.split(",")]
    assert names == re.findall(
        r'"(\w+)"', re.search("kModulations.*", header("layout_attention.h"))[0]
    )


@needs_cpu_kernels
def test_the_numbers_of_a_row_of_the_compiled_library() -> None:
    assert attention(8)[2].shape == (1, 1, 2, contract.STATS)


def test_the_kernels_of_triton() -> None:
    pytest.importorskip("triton")
    from dense_attn.triton_kernels import configs
    from dense_attn.triton_kernels.layout_attention import records
    from dense_attn.triton_kernels.parts import head_parts
    from dense_attn.triton_kernels.reversible import grid

    assert grid.LIMIT.value == reference.GRID_LIMIT
    assert grid.OFF_GRID > reference.GRID_LIMIT
    assert records.STATS == contract.STATS
    columns = [getattr(records, name).value for name in records.STATS_COLUMNS]
    assert columns == list(range(contract.STATS))
    columns = [getattr(records, name).value for name in records.NUMBERS_COLUMNS]
    assert columns == list(range(records.NUMBERS))
    largest = [configs.FORWARD, configs.ROW_FORWARD, configs.BACKWARD_Q, configs.BACKWARD_KV]
    assert {max(rows) for table in largest for rows in table.values()} == {contract.MAX_HEAD_DIM}
    assert sum(head_parts("fwd", "sm_90", "half", contract.MAX_HEAD_DIM)) == contract.MAX_HEAD_DIM


def test_the_modulations_of_triton() -> None:
    sources = [path.read_text() for path in (ROOT / "triton_kernels").rglob("*.py")]
    asked = re.findall(r'(?i:modulation) [!=]= "(\w+)"', "\n".join(sources))
    assert set(asked) == set(contract.MODULATIONS)


def test_the_fake_kernels() -> None:
    q, words = torch.empty(1, 1, 2, 8, device="meta"), torch.empty(2, device="meta")
    fake = ops.OPS["layout_attention_fwd"].fake
    stats = fake(q, q, q, words, words, q[..., 0], "range", 0.1, *NO_TOKENS)[2]
    assert stats.shape[3] == contract.STATS
