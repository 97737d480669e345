"""Planted faults of copies and of products that run on their own: found, and mended they run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ptx.planted import Planted, assemble

COPIES = {
    "a copy that was not waited for": Planted("""
    cp.async.ca.shared.global [%own], [%from], 4;
    cp.async.commit_group;
    + cp.async.wait_group 0;
    ld.shared.b32 %r1, [%own];
    st.global.b32 [%to], %r1;""", lambda x: x),
    "a copy that outlives its warp": Planted("""
    ld.global.b32 %r1, [%from];
    cp.async.ca.shared.global [%own], [%from], 4;
    cp.async.commit_group;
    + cp.async.wait_group 0;
    st.global.b32 [%to], %r1;""", lambda x: x),
    "a wait for all but the last": Planted("""
    cp.async.ca.shared.global [%own], [%from], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%own + 1024], [%from], 4;
    cp.async.commit_group;
    - cp.async.wait_group 1;
    + cp.async.wait_group 0;
    ld.shared.b32 %r1, [%own + 1024];
    st.global.b32 [%to], %r1;""", lambda x: x),
    "a copy of no group": Planted("""
    cp.async.ca.shared.global [%own], [%from], 4;
    + cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r1, [%own];
    st.global.b32 [%to], %r1;""", lambda x: x),
    "a copy that only its warp waited for": Planted("""
    cp.async.ca.shared.global [%own], [%from], 4;
    cp.async.commit_group;
    - bar.sync 0;
    cp.async.wait_group 0;
    + bar.sync 0;
    ld.shared.b32 %r1, [%other];
    st.global.b32 [%to], %r1;"""),
    "a copy into what is overwritten": Planted("""
    mov.b32 %r2, 7;
    cp.async.ca.shared.global [%own], [%from], 4;
    cp.async.commit_group;
    + cp.async.wait_group 0;
    st.shared.b32 [%own], %r2;
    cp.async.wait_group 0;
    ld.shared.b32 %r1, [%own];
    st.global.b32 [%to], %r1;""", lambda x: x * 0 + 7),
    "a copy into what others read": Planted("""
    ld.global.b32 %r1, [%from];
    st.shared.b32 [%own], %r1;
    bar.sync 0;
    ld.shared.b32 %r2, [%other];
    + bar.sync 0;
    cp.async.ca.shared.global [%own], [%from], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    st.global.b32 [%to], %r2;"""),
    "a copy on its way into what others read, a barrier before its wait": Planted("""
    ld.global.b32 %r1, [%from];
    st.shared.b32 [%own], %r1;
    bar.sync 0;
    ld.shared.b32 %r2, [%other];
    + bar.sync 0;
    cp.async.ca.shared.global [%own], [%from], 4;
    cp.async.commit_group;
    bar.sync 0;
    cp.async.wait_group 0;
    st.global.b32 [%to], %r2;"""),
    "a copy out of bounds": Planted("""
    mov.b32 %r1, 4;
    + setp.eq.u32 %p1, %t, 63;
    + selp.b32 %r1, 0, 4, %p1;
    cp.async.ca.shared.global [%own], [%from + 4], 4, %r1;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.b32 %r1, [%own];
    st.global.b32 [%to], %r1;""", lambda x: torch.cat([x[1:], x[:1] * 0])),
}  # fmt: skip
ONES = """
    mov.b32 %r1, 0x3C003C00;
    shl.b32 %r2, %t, 4;
    add.u32 %r2, %r2, %s;
    st.shared.v4.b32 [%r2], {%r1, %r1, %r1, %r1};
    setp.lt.u32 %p1, %t, 16;
    @%p1 st.shared.v4.b32 [%r2 + 2048], {%r1, %r1, %r1, %r1};
    shr.u32 %r3, %s, 4;
    cvt.u64.u32 %a, %r3;
    or.b64 %a, %a, 0x0000001000080000;
    add.s64 %b, %a, 128;
    mov.b32 %f1, 0f00000000; mov.b32 %f2, %f1; mov.b32 %f3, %f1; mov.b32 %f4, %f1;
"""  # of float16: 64 by 16 and, after them, 16 by 8, and the descriptors of both
SHAPE = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2, %f3, %f4}"
BY_MEMORY = f"{SHAPE}, %a, %b, 1, 1, 1, 0, 0;"
BY_REGISTERS = f"{SHAPE}, {{%r4, %r5, %r6, %r7}}, %b, 1, 1, 1, 0;"
STORE = "cvt.rzi.s32.f32 %r1, %f4; st.global.b32 [%to], %r1;"


def sixteen(x: Tensor) -> Tensor:
    """Sums of 16 ones."""
    return torch.full_like(x, 16)


def wgmma(body: str, faults: bool = True) -> Planted:
    """A product of ones by all four warps of a group."""
    return Planted(ONES + body, sixteen, threads=128, target="sm_90a", faults=faults)


PRODUCTS = {
    "shared memory that no fence shows": wgmma(f"""
    + fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    {BY_MEMORY}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
    "a product before others have written": wgmma(f"""
    fence.proxy.async.shared::cta;
    + bar.sync 0;
    wgmma.fence.sync.aligned;
    {BY_MEMORY}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
    "a result before its wait": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    {BY_MEMORY}
    wgmma.commit_group.sync.aligned;
    + wgmma.wait_group.sync.aligned 0;
    {STORE}""", faults=False),
    "a wait for all but the last product": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    {BY_MEMORY}
    wgmma.commit_group.sync.aligned;
    - wgmma.wait_group.sync.aligned 1;
    + wgmma.wait_group.sync.aligned 0;
    {STORE}""", faults=False),
    "a product of no group": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    {BY_MEMORY}
    + wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {STORE}""", faults=False),
    "an operand in memory overwritten": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    {BY_MEMORY}
    wgmma.commit_group.sync.aligned;
    + wgmma.wait_group.sync.aligned 0;
    + bar.sync 0;
    st.shared.b32 [%r2], %t;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
    "an operand in registers overwritten": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b32 %r4, %r1; mov.b32 %r5, %r1; mov.b32 %r6, %r1; mov.b32 %r7, %r1;
    wgmma.fence.sync.aligned;
    {BY_REGISTERS}
    wgmma.commit_group.sync.aligned;
    + wgmma.wait_group.sync.aligned 0;
    mov.b32 %r4, 0;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
    "an operand in registers written after the fence": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    - wgmma.fence.sync.aligned;
    mov.b32 %r4, %r1; mov.b32 %r5, %r1; mov.b32 %r6, %r1; mov.b32 %r7, %r1;
    + wgmma.fence.sync.aligned;
    {BY_REGISTERS}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
    "a sum written after the fence": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    - mov.b32 %f4, %f1;
    {BY_MEMORY}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
    "no fence before the first product": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    + wgmma.fence.sync.aligned;
    {BY_MEMORY}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
    "no fence before a product that keeps nothing": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    + wgmma.fence.sync.aligned;
    {BY_MEMORY.replace("%b, 1", "%b, 0")}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
    "a sum overwritten before its wait": wgmma(f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    {BY_MEMORY}
    wgmma.commit_group.sync.aligned;
    + wgmma.wait_group.sync.aligned 0;
    mov.b32 %f1, 0f3F800000;
    wgmma.wait_group.sync.aligned 0;
    {STORE}"""),
}  # fmt: skip
PLANTED = COPIES | PRODUCTS


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults(name: str, order: str) -> None:
    PLANTED[name].check(order)


def test_all_twins_are_ptx(tmp_path: Path) -> None:
    for target in {one.target for one in PLANTED.values()}:
        twins = [
            one.text(sign) for one in PLANTED.values() for sign in "+-" if one.target == target
        ]
        assemble(twins, "planted", target, tmp_path)
