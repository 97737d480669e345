"""Boxes of tensors in shared memory: how they are swizzled, and what lies outside of a tensor."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ptx import Fault, Module, TensorMap

COPY = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes"
KERNEL = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry box(.param .u64 out_param, .param .align 64 .b8 map_param[128])
.maxnreg 64
{
    .shared .align 1024 .b8 memory[4096];
    .shared .align 8 .b8 barrier[8];
    .reg .pred %p<3>;
    .reg .b32 %r<8>;
    .reg .b64 %x<5>;
    ld.param.u64 %x1, [out_param];
    mov.b64 %x2, map_param;
    cvta.param.u64 %x2, %x2;
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, 0;
    mov.u32 %r2, barrier;
    mov.u32 %r3, memory;
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], BYTES;
    @%p1 COPY [%r3], [%x2, {AT}], [%r2];
    again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
    @!%p2 bra again;
    shl.b32 %r4, %r1, 2;
    add.u32 %r3, %r3, %r4;
    cvt.u64.u32 %x3, %r4;
    add.s64 %x1, %x1, %x3;
    setp.lt.u32 %p2, %r4, BYTES;
    ld.shared.b32 %r5, [%r3];
    @%p2 st.global.b32 [%x1], %r5;
    ret;
}
"""
TYPES = {torch.float16: 6, torch.bfloat16: 10, torch.int32: 3, torch.float32: 7}


def load(x: Tensor, box: tuple[int, ...], at: tuple[int, ...], **how: int) -> Tensor:
    """The bytes of a box as they lie in shared memory."""
    elements = torch.Size(box).numel()
    out = torch.zeros(elements, dtype=x.dtype, device="cpu")
    size = x.element_size()
    strides = [size * stride for stride in x.stride()]
    text = KERNEL.replace("BYTES", str(elements * size)).replace("COPY", COPY.format(len(box)))
    text = text.replace("AT", ", ".join(map(str, reversed(at))))
    box_map = TensorMap(x, TYPES[x.dtype], x.shape, strides, box, **how)
    lanes = min(-(-elements * size // 128) * 32 or 32, 1024)
    Module(text).launch("box", [out, box_map], (1,), (lanes,))
    return out


@pytest.mark.parametrize("swizzle", range(4))
def test_swizzles(swizzle: int) -> None:
    """The 16 bytes numbered j of row i lie where j and some bits of i, by the mode, differ."""
    pieces = 2 << max(swizzle - 1, 0)  # of a row
    x = torch.arange(16 * pieces * 8, dtype=torch.int32).to(torch.float16).view(16, pieces * 8)
    found = load(x, (16, pieces * 8), (0, 0), swizzle=swizzle).view(16, pieces, 8)
    for i, j in itertools.product(range(16), range(pieces)):
        turned = j ^ {0: 0, 1: i // 4 % 2, 2: i // 2 % 4, 3: i % 8}[swizzle]
        assert torch.equal(found[i, turned], x.view(16, pieces, 8)[i, j]), (i, j)


@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize("first", [-3, 0, 2])
def test_boxes_that_reach_outside(rank: int, first: int) -> None:
    x = torch.arange(1, 1 + 6**rank, dtype=torch.int32).view([6] * rank)
    x = torch.nn.functional.pad(x, (0, 2))[..., :6]  # rows of 32 bytes
    box = (*[3] * (rank - 1), 4)
    at = tuple(first + i for i in range(rank))
    around = torch.nn.functional.pad(x, [8] * 2 * rank)
    inside = tuple(slice(8 + a, 8 + a + n) for a, n in zip(at, box))
    assert torch.equal(load(x, box, at).view(box), around[inside])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_not_a_number_outside(dtype: torch.dtype) -> None:
    x = torch.ones(8, dtype=dtype)
    found = load(x, (16,), (4,), fill=1)
    assert torch.equal(found[:4], x[:4])
    assert found[4:].isnan().all()


WRONG = {
    "no box": {"box": (0, 16)},
    "too wide a box": {"box": (257, 16)},
    "a row of odd bytes": {"box": (4, 12)},
    "a row longer than its swizzle": {"box": (4, 32), "swizzle": 1},
}


@pytest.mark.parametrize("name", WRONG)
def test_maps_that_a_device_refuses(name: str) -> None:
    how = {"at": (0, 0)} | WRONG[name]
    with pytest.raises(Fault, match="tensor map"):
        load(torch.zeros(8, 32, dtype=torch.float16), **how)


def test_strides_must_be_whole_pieces() -> None:
    with pytest.raises(Fault, match="a stride must be a multiple of 16 bytes"):
        load(torch.zeros(8, 12, dtype=torch.float16), (4, 8), (0, 0))


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_registers_that_no_one_gives_back(order: str) -> None:
    """One warp gets more when the other has fewer, and waits for ever where it does not."""
    parts = """
    setp.lt.u32 %p1, %r1, 32;
    @%p1 bra more;
    setmaxnreg.dec.sync.aligned.u32 FEWER;
    bra.uni both;
    more: setmaxnreg.inc.sync.aligned.u32 104;
    both: mov.u32 %r2, barrier;"""
    text = KERNEL.replace("mov.u32 %r2, barrier;", parts).replace("COPY", COPY.format(1))
    text = text.replace("BYTES", "64").replace("{AT}", "{0}")
    x, out = (torch.ones(16, dtype=torch.int32) for _ in range(2))
    given = ("box", [out, TensorMap(x, 3, (16,), (4,), (16,))], (1,), (64,))
    text = text.replace("@%p1 mb", "setp.eq.u32 %p1, %r1, 0; @%p1 mb")
    Module(text.replace("FEWER", "24")).launch(*given, order=order)
    with pytest.raises(Fault, match="deadlock"):
        Module(text.replace("FEWER", "32")).launch(*given, order=order)
