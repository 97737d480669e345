"""`verify` on a GPU reaches every kernel that "auto" may choose: a row that passed says so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dense_attn import reference
from dense_attn._backends import cuda, table
from dense_attn._backends.contract import MODULATIONS
from dense_attn.verify import accuracy, calls, sega
from dense_attn.verify import layout_attention as attention

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
# Tiles of a whole row of keys: csrc/cuda/layout_attention_row.cu, triton_kernels/configs.py.
ROW_TILES = {"cuda": (80, 128), "triton": (16, 32, 64, 80, 96, 128)}
Seen = set[tuple[str, int, int, str, torch.dtype, bool]]


def numbers(file: str, pattern: str) -> list[int]:
    """The numbers that a source names."""
    found = re.findall(pattern, (ROOT / file).read_text())
    assert found
    return [int(x) for x in found]


def test_the_classes_are_those_of_the_sources() -> None:
    assert tuple(numbers("csrc/cuda/head_dims.h", r"f\((\d+)\)")) == cuda.HEAD_DIMS
    assert numbers("csrc/cuda/kernels.h", r"kMaxRowKeys = (\d+)") == [cuda.ROW_KEYS]
    assert numbers("csrc/cuda/kernels.h", r"kMaxBwdHeadDim = (\d+)") == [cuda.GRADIENT_HEAD_DIM]
    row = "csrc/cuda/layout_attention_row.cu"
    assert ROW_TILES["cuda"] == tuple(numbers(row, r"launch_row<T, kModulation, (\d+)>"))
    assert ROW_TILES["triton"] == tuple(
        map(int, re.search(r"ROW_TILES = \((.*)\)", configs_text())[1].split(","))
    )


def configs_text() -> str:
    return (ROOT / "triton_kernels" / "configs.py").read_text()


def tile(backend: str, keys: int) -> int:
    """The tile of a row of so many keys, 0 for a loop over tiles."""
    return next((tile for tile in ROW_TILES[backend] if keys <= tile), 0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Backend, head dim, tile, modulation, dtype of every call on the backends of a GPU, and
    whether gradients came of it; results are made up, so that all are right.
    """
    found: Seen = set()

    def made_up(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_regions: Tensor,
        k_regions: Tensor,
        strength: Tensor | float,
        *,
        modulation: str,
        k_mask: Tensor | None,
        backend: str,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if backend != "reference":
            call = backend, q.shape[3], tile(backend, k.shape[2]), modulation, q.dtype
            found.add((*call, False))
            q.register_hook(lambda grad: found.add((*call, True)))
        lse = (q.sum(3) + strength) * (q_regions.view(-1, q.shape[2])[0, 0] & 1)
        out = q * lse[..., None].to(q.dtype)
        return (out, lse) if return_lse else out

    monkeypatch.setattr(calls, "_runs_on_a_gpu", lambda backend: True)
    monkeypatch.setattr(calls, "HEADS", 3)
    monkeypatch.setattr(calls, "layout_attention", made_up)
    monkeypatch.setattr(attention, "usable", lambda op, dtype, among: list(among))
    monkeypatch.setattr(attention, "refused", lambda *_: "")
    monkeypatch.setattr(table, "device_of", lambda backend: "cpu")
    return found


def verify(backends: Sequence[str]) -> None:
    given = [*calls.kernel_calls(backends)]
    verdicts = [*attention.verify(backends, given)]
    shown = {(verdict.backend, verdict.what): verdict.error for verdict in verdicts}
    assert set(shown.values()) == {""}


@pytest.mark.parametrize("triton_makes_gradients", [False, True])
def test_every_kernel_of_cuda_runs(
    triton_makes_gradients: bool, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Triton's kernels make the gradients, each class has some."""
    maker = "triton" if triton_makes_gradients else "cuda"
    monkeypatch.setattr(cuda, "gradient_of_attention", lambda q: maker)
    monkeypatch.setattr(attention, "DTYPES", calls.HALF)
    verify(["cuda"])
    forward = product(["cuda"], cuda.HEAD_DIMS, (80, 128, 0), MODULATIONS, calls.HALF, [False])
    assert seen >= {*forward}
    backward = {call[1:] for call in seen if call[-1]}
    if triton_makes_gradients:
        assert {(head_dim, dtype) for head_dim, _, _, dtype, _ in backward} == {
            *product(cuda.HEAD_DIMS, calls.HALF)
        }
        assert len(backward) == len(cuda.HEAD_DIMS) * len(calls.KEYS) * len(calls.HALF)
    else:
        assert {(head_dim, *rest) for head_dim, _, *rest in backward} == {
            *product(cuda.HEAD_DIMS, MODULATIONS, calls.HALF, [True])
        }


def test_every_tile_of_triton_runs(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "DTYPES", calls.HALF)
    verify(["triton"])
    run = {call[1:-1] for call in seen}
    assert run == {call[1:-1] for call in seen if call[-1]}  # forward and backward
    assert {(head_dim, keys, dtype) for head_dim, keys, _, dtype in run} >= {
        *product(cuda.HEAD_DIMS, (80, 128, 0), calls.HALF)
    }
    assert {keys for _, keys, *_ in run} == {0, *ROW_TILES["triton"]}
    assert {modulation for _, _, modulation, _ in run} == {*MODULATIONS}


def test_inference_masks_and_groups_run(seen: Seen) -> None:
    given = [one for one in calls.kernel_calls(["cuda"]) if one.k_mask is not None]
    assert {(one.k.shape[2], one.every) for one in given} == {*product((77, 300), (None, 1.0))}
    for one in given:
        assert one.k_mask.sum(1).tolist() == [one.k.shape[2], 0, one.k.shape[2] // 2]
        assert one.q.shape[1] == 2 * one.k.shape[1]
        assert one.concerns("triton", "range") == (one.q.dtype in calls.HALF)
        half = one.cast(torch.float16)
        assert [*half.run("range", "reference")] == ["out"] if one.every else [*calls.RESULTS]


def test_calls_of_kernels_are_of_half_floats_on_gpus(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "DTYPES", (torch.float32,))
    given = [*calls.kernel_calls(["cuda"])]
    assert given
    assert not any(one.cast(torch.float32).concerns("cuda", "range") for one in given)
    assert not any(one.cast(torch.float16).concerns("cpu", "range") for one in given)
    monkeypatch.undo()
    assert [*calls.kernel_calls(["cpu", "reference"])] == []


def test_whole_tiles_of_triton_run() -> None:
    """Halves are taken where whole ones leave processors without any."""
    configs = pytest.importorskip("dense_attn.triton_kernels.configs")
    config = configs.FORWARD["sm_90"][64]
    assert configs.filling(config, 33, 2, 132) != config
    assert configs.filling(config, 33, calls.HEADS, 192) == config


def test_whole_and_half_tiles_of_each_row_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that sm_90 has for a class of head dims, with specialised warps and gradients."""
    configs = pytest.importorskip("dense_attn.triton_kernels.configs")
    made, shapes = calls._Maker.__call__, []

    def noted(maker: object, name: str, shape: tuple, *rest: object) -> calls.AttentionCall:
        shapes.append(shape)
        return made(maker, name, (3, 4, 1, 1, 8), *rest)

    monkeypatch.setattr(calls, "_runs_on_a_gpu", lambda backend: True)
    monkeypatch.setattr(calls._Maker, "__call__", noted)
    assert [*calls.kernel_calls(["triton"])]
    for processors, idle in ((192, False), (108, True)):  # the most, whose tiles are whole
        taken, possible = set(), set()
        for batch, heads, rows, keys, d in shapes:
            row = configs.row_at_once("sm_90", "half", keys)
            forward = configs.layout_attention_fwd("sm_90", "half", d, keys)
            pair = configs.layout_attention_bwd("sm_90", "half", d)
            sides = ((rows, "BLOCK_M"), (rows, "BLOCK_M"), (keys, "BLOCK_N"))
            for config, (tokens, side) in zip((forward, *pair)[row:], sides[row:]):
                taken.add(configs.filling(config, tokens, batch * heads, processors, side))
                possible.add(configs.filling(config, 1, 1, 2, side) if idle else config)
        assert taken >= possible
        assert idle or taken >= {*configs.SPECIALISED["sm_90"].values()}


def test_channels_of_every_length_run_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[bool, set[int]] = {True: set(), False: set()}

    def call(backend: str, op: str, *tensors: Tensor, **options: object) -> tuple[Tensor, ...]:
        rows[options["sum_channels"]].add(tensors[0][0, 0].numel())
        return reference.sega_guidance(*tensors, **options)

    monkeypatch.setattr(sega, "call", call)
    monkeypatch.setattr(table, "device_of", lambda backend: "cuda")
    for options in (sega.PLAIN, sega.MIXED):
        assert sega._guidance("cuda", torch.float32, "", options).passed
    several = 1024 * numbers("csrc/cuda/sega.cu", r"kLongestRow = (\d+) << 10")[0] // 4
    (held,) = numbers("triton_kernels/sega/__init__.py", r"UNSTAGED = (\d+)")
    (longest,) = numbers("triton_kernels/sega/selection.py", r"LONGEST = (\d+)")
    for counts in rows.values():
        assert min(counts) <= min(several, held)
        assert any(held < count <= longest for count in counts)
        assert max(counts) > max(several, longest)


def test_a_call_that_needs_no_gpu_is_of_any_dtype() -> None:
    given = [*calls.calls()]
    assert len(given) == 5
    for one, dtype in product(given, accuracy.DTYPES):
        assert one.cast(dtype).concerns("cpu", "mask")
