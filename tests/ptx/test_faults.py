"""Planted faults of accesses and barriers: each is found, and its mended twin runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ptx.planted import Planted, assemble

ACCESSES = {
    "read out of bounds": Planted("""
    - ld.global.b32 %r1, [%from + 4];
    + ld.global.b32 %r1, [%from];
    st.global.b32 [%to], %r1;""", lambda x: x),
    "write out of bounds": Planted("""
    ld.global.b32 %r1, [%from];
    + setp.lt.u32 %p1, %t, 63;
    + @%p1 st.global.b32 [%to + 4], %r1;
    - st.global.b32 [%to + 4], %r1;""", lambda x: torch.cat([x[:1] * 0 - 1, x[:-1]])),
    "read before the beginning": Planted("""
    + setp.gt.u32 %p1, %t, 0;
    mov.b32 %r1, 5;
    + @%p1 ld.global.b32 %r1, [%from + -4];
    - ld.global.b32 %r1, [%from + -4];
    st.global.b32 [%to], %r1;""", lambda x: torch.cat([x[:1] * 0 + 5, x[:-1]])),
    "shared memory out of bounds": Planted("""
    ld.global.b32 %r1, [%from];
    - st.shared.b32 [%own + 4000], %r1;
    + st.shared.b32 [%own + 3000], %r1;
    st.global.b32 [%to], %r1;""", lambda x: x),
    "misaligned": Planted("""
    - ld.global.v2.b32 {%r1, %r2}, [%from];
    + ld.global.v2.b32 {%r1, %r2}, [%x];
    st.global.b32 [%to], %r2;""", lambda x: x[1].expand(64)),
    "misaligned in shared memory": Planted("""
    ld.global.b32 %r1, [%from];
    - st.shared.b32 [%own + 2], %r1;
    + st.shared.b32 [%own + 4], %r1;
    st.global.b32 [%to], %r1;""", lambda x: x),
    "unwritten shared memory": Planted("""
    ld.global.b32 %r1, [%from];
    + st.shared.b32 [%own], %r1;
    ld.shared.b32 %r2, [%own];
    st.global.b32 [%to], %r2;""", lambda x: x, faults=False),
    "unwritten register": Planted("""
    + mov.b32 %r9, 0;
    ld.global.b32 %r1, [%from];
    add.s32 %r1, %r1, %r9;
    st.global.b32 [%to], %r1;""", lambda x: x, faults=False),
}  # fmt: skip
RACES = {
    "read without a barrier": Planted("""
    ld.global.b32 %r1, [%from];
    st.shared.b32 [%own], %r1;
    + bar.sync 0;
    ld.shared.b32 %r2, [%other];
    st.global.b32 [%to], %r2;"""),
    "overwritten while others read": Planted("""
    ld.global.b32 %r1, [%from];
    st.shared.b32 [%own], %r1;
    bar.sync 0;
    ld.shared.b32 %r2, [%other];
    + bar.sync 0;
    st.shared.b32 [%own], %r2;
    st.global.b32 [%to], %r2;"""),
    "a barrier of one warp": Planted("""
    ld.global.b32 %r1, [%from];
    st.shared.b32 [%own], %r1;
    + bar.sync 0;
    - bar.warp.sync -1;
    ld.shared.b32 %r2, [%other];
    st.global.b32 [%to], %r2;"""),
    "lanes without a barrier of their warp": Planted("""
    ld.global.b32 %r1, [%from];
    st.shared.b32 [%own], %r1;
    + bar.warp.sync -1;
    xor.b32 %r2, %t4, 4;
    add.u32 %r2, %r2, %s;
    ld.shared.b32 %r1, [%r2];
    st.global.b32 [%to], %r1;""", lambda x: x.view(-1, 2).flip(1).flatten()),
    "a matrix of several lanes without a barrier of their warp": Planted("""
    mov.b32 %r1, 0x00070007;
    shr.u32 %r2, %t, 5;
    and.b32 %r3, %t, 7;
    mad.lo.u32 %r2, %r2, 8, %r3;
    shl.b32 %r2, %r2, 4;
    add.u32 %r2, %r2, %s;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r1};
    + bar.warp.sync -1;
    ld.shared.u16 %r3, [%r2 + 6];
    st.global.b32 [%to], %r3;""", lambda x: x * 0 + 7, target="sm_90a"),
    "two warps write one place": Planted("""
    ld.global.b32 %r1, [%from];
    and.b32 %r2, %t, 31;
    setp.eq.u32 %p1, %r2, 0;
    + setp.eq.u32 %p1, %t, 0;
    @%p1 st.shared.b32 [%s], %r1;
    bar.sync 0;
    ld.shared.b32 %r1, [%s];
    st.global.b32 [%to], %r1;""", lambda x: x[0].expand(64)),
    "two warps write one place of the output": Planted("""
    ld.global.b32 %r1, [%from];
    and.b32 %r2, %t, 31;
    setp.eq.u32 %p1, %r2, 0;
    + setp.eq.u32 %p1, %t, 32;
    @%p1 st.global.b32 [%out], %r1;""", lambda x: torch.cat([x[32:33], x[1:] * 0 - 1])),
    "two lanes write one place": Planted("""
    ld.global.b32 %r1, [%from];
    setp.lt.u32 %p1, %t, 2;
    + setp.eq.u32 %p1, %t, 1;
    @%p1 st.shared.b32 [%s], %r1;
    bar.sync 0;
    ld.shared.b32 %r1, [%s];
    st.global.b32 [%to], %r1;""", lambda x: x[1].expand(64)),
    "two lanes write one place of the output": Planted("""
    - ld.global.b32 %r1, [%from];
    + ld.global.b32 %r1, [%x];
    setp.lt.u32 %p1, %t, 2;
    @%p1 st.global.b32 [%out], %r1;""", lambda x: torch.cat([x[:1], x[1:] * 0 - 1])),
    "two programs write one place": Planted("""
    setp.eq.u32 %p1, %t, 0;
    mul.wide.u32 %a, %cta, 4;
    + add.s64 %out, %out, %a;
    @%p1 st.global.b32 [%out], %cta;""", lambda x: torch.cat([x[:2] - x[:2] + torch.tensor([0, 1]),
                                                             x[2:] * 0 - 1]).int(), programs=2),
    "a program reads what another writes": Planted("""
    mul.wide.u32 %a, %cta, 128;
    setp.lt.u32 %p1, %t, 32;
    add.s64 %to, %to, %a;
    - ld.global.b32 %r1, [%out + 128];
    + ld.global.b32 %r1, [%x + 128];
    @%p1 st.global.b32 [%to], %r1;""", lambda x: x[32].expand(64), programs=2),
    "a sum that is not atomic": Planted("""
    mov.b32 %r1, 1;
    - ld.global.b32 %r2, [%out];
    - add.s32 %r1, %r1, %r2;
    - st.global.b32 [%out], %r1;
    + red.global.add.s32 [%out], %r1;""", lambda x: torch.cat([x[:1] * 0 + 63, x[1:] * 0 - 1])),
}  # fmt: skip
BARRIERS = {
    "a barrier in divergent code": Planted("""
    ld.global.b32 %r1, [%from];
    setp.lt.u32 %p1, %t, 16;
    st.shared.b32 [%own], %r1;
    - @%p1 bar.sync 0;
    + bar.sync 0;
    ld.shared.b32 %r1, [%other];
    st.global.b32 [%to], %r1;"""),
    "a barrier on one side of a branch": Planted("""
    ld.global.b32 %r1, [%from];
    setp.lt.u32 %p1, %t, 16;
    + setp.lt.u32 %p1, %t, 32;
    st.shared.b32 [%own], %r1;
    @%p1 bra FEW;
    bar.sync 0;
    bra JOIN;
FEW:
    bar.sync 0;
JOIN:
    ld.shared.b32 %r1, [%other];
    st.global.b32 [%to], %r1;"""),
    "warps that wait at two barriers": Planted("""
    ld.global.b32 %r1, [%from];
    setp.lt.u32 %p1, %t, 32;
    @%p1 bra FEW;
    - bar.sync 1;
    + bar.sync 0;
    bra JOIN;
FEW:
    bar.sync 0;
JOIN:
    st.global.b32 [%to], %r1;""", lambda x: x),
}  # fmt: skip
EXCHANGES = {
    "a shuffle that names lanes which skip it": Planted("""
    setp.lt.u32 %p1, %t, 16;
    mov.b32 %r1, 7;
    @!%p1 bra JOIN;
    - shfl.sync.idx.b32 %r1, %t, 3, 31, -1;
    + shfl.sync.idx.b32 %r1, %t, 3, 31, 0xFFFF;
JOIN:
    st.global.b32 [%to], %r1;""", lambda x: torch.where(x < 148, 3, 7).int()),
    "a value of a lane that skips the shuffle": Planted("""
    setp.lt.u32 %p1, %t, 16;
    mov.b32 %r1, 7;
    @!%p1 bra JOIN;
    - shfl.sync.idx.b32 %r1, %t, 20, 31, 0xFFFF;
    + shfl.sync.idx.b32 %r1, %t, 2, 31, 0xFFFF;
JOIN:
    st.global.b32 [%to], %r1;""", lambda x: torch.where(x < 148, 2, 7).int(), faults=False),
    "a vote that names lanes which skip it": Planted("""
    setp.lt.u32 %p1, %t, 16;
    mov.b32 %r1, 7;
    @!%p1 bra JOIN;
    - vote.sync.ballot.b32 %r1, %p1, -1;
    + vote.sync.ballot.b32 %r1, %p1, 0xFFFF;
JOIN:
    st.global.b32 [%to], %r1;""", lambda x: torch.where(x < 148, 0xFFFF, 7).int()),
    "a sum that names lanes which skip it": Planted("""
    setp.lt.u32 %p1, %t, 16;
    mov.b32 %r1, 7;
    @!%p1 bra JOIN;
    - redux.sync.add.s32 %r1, %t, -1;
    + redux.sync.add.s32 %r1, %t, 0xFFFF;
JOIN:
    st.global.b32 [%to], %r1;""", lambda x: torch.where(x < 148, 120, 7).int()),
}  # fmt: skip
PLANTED = ACCESSES | RACES | BARRIERS | EXCHANGES


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
