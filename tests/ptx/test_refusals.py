"""The emulator's edges: what it does not know is refused, and no kernel can harm the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import ptx
from ptx import Fault, Module, Unsupported

KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.global .align 4 .b32 counter;
.visible .entry edge(.param .u64 out_param)
{
    .reg .pred %p<4>;
    .reg .b16 %h<4>;
    .reg .b32 %r<12>;
    .reg .b64 %x<9>;
    .reg .f64 %d<4>;
    .shared .align 16 .b8 buffer[1024];
    ld.param.u64 %x1, [out_param];
    mov.u32 %r9, %tid.x;
    mul.wide.u32 %x2, %r9, 4;
    add.s64 %x3, %x1, %x2;
    BODY
    st.global.b32 [%x3], %r1;
    ret;
}
"""


def run(body: str, lanes: int = 32, **how: object) -> Tensor:
    """Word 0 of what the lanes leave in %r1."""
    out = torch.zeros(lanes, dtype=torch.int32, device="cpu")
    Module(KERNEL.replace("BODY", body)).launch("edge", [out], (1,), (lanes,), **how)
    return out[0].item() & 0xFFFFFFFF


MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
TENSOR = "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes"
GATHER = TENSOR.replace("1d", "2d.tile::gather4")
UNKNOWN = {
    "sat-integer": "add.sat.s32 %r1, %r9, 1;",
    "sat-half": "fma.rn.sat.f16 %h1, %h2, %h2, %h2;",
    "ftz-half": "add.ftz.f16 %h1, %h2, %h2;",
    "div-directed": "div.rz.f32 %r1, %r2, %r3;",
    "f64-directed": "add.rp.f64 %d1, %d2, %d3;",
    "compare-pairs": "setp.eq.f16x2 %p1|%p2, %r1, %r2;",
    "sat-from-integer": "cvt.rn.sat.f32.s32 %r1, %r9;",
    "half-function": "ex2.approx.f16 %h1, %h2;",
    "comparison": "setp.foo.s32 %p1, %r9, 3;",
    "exchange": "shfl.sync.foo.b32 %r1, %r9, 1, 31, -1;",
    "fence": "fence.proxy.alias;",
    "barrier-of-a-cluster": "barrier.cluster.arrive;",
    "copy-without-a-map": "cp.async.bulk.shared::cluster.global [%r1], [%x1], 16, [%r2];",
    "multicast": f"{TENSOR}.multicast::cluster [%r1], [%x1, {{%r2}}], [%r3], %h1;",
    "gathered-rows": f"{GATHER} [%r1], [%x1, {{%r2, %r2}}], [%r3];",
    "map-field": "tensormap.replace.tile.foo.shared::cta.b1024.b32 [%x1], 0x1;",
    "arrival": "mbarrier.arrive.noComplete.shared::cta.b64 %x5, [%r1], 1;",
    "label": "bra nowhere;",
    "labels": "twice: bra twice; twice:",
    "sink": "add.s32 _, %r9, 1;",
    "sink-matrix": "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {_, %r3}, [%r1];",
    "sink-exchange": "shfl.sync.idx.b32 _|%p1, %r9, 0, 31, -1;",
    "long-store": f"st.global.b64 [%x3], {{{', '.join(['%x1'] * 12)}}};",
    "long-load": f"ld.global.v2.b32 {{{', '.join(['%r1'] * 9)}}}, [%x1];",
    "long-copy": "cp.async.cg.shared.global [%r1], [%x1], 32;",
    "product": f"{MMA} {{%r1, %r2, %r3, %r4}}, {{%r5}}, {{%r6}}, {{%r1, %r2, %r3, %r4}};",
    "local": ".local .b8 much[2000000000];",
}


@pytest.mark.parametrize("body", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_forms_are_refused(body: str) -> None:
    with pytest.raises(Unsupported):
        run(body)


FAULTS = {
    "before-null": ("mov.b64 %x5, 0; ld.global.b32 %r1, [%x5+-4];", "outside of every tensor"),
    "before-parameters": ("ld.param.b32 %r1, [out_param+-4];", "parameter out of range"),
    "not-a-member": ("shfl.sync.idx.b32 %r1, %r9, 0, 31, 1;", "does not name its own lane"),
}


@pytest.mark.parametrize(("body", "says"), FAULTS.values(), ids=FAULTS)
def test_no_kernel_reaches_beyond_its_memory(body: str, says: str) -> None:
    with pytest.raises(Fault, match=says):
        run(body)


LAUNCHES = {
    "grid": {"grid": (-1,)},
    "grid-y": {"grid": (1, 70_000)},
    "grid-axes": {"grid": (1, 1, 1, 2)},
    "block": {"block": (2048,)},
    "no-block": {"block": (0,)},
    "shared": {"dynamic_shared": -64},
    "much-shared": {"dynamic_shared": 1 << 20},
}


@pytest.mark.parametrize("wrong", LAUNCHES.values(), ids=LAUNCHES)
def test_launches_that_a_device_refuses(wrong: dict[str, object]) -> None:
    module, out = Module(KERNEL.replace("BODY", "")), torch.zeros(32, device="cpu")
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        module.launch("edge", [out], **{"grid": (1,), "block": (32,)} | wrong)


WIDE = "mov.b64 %x5, 0x4000000000000001; cvt.sat.u64.s64 %x6, %x5; cvt.u32.u64 %r1, %x6;"
SCOPES = """
{ .reg .b64 a; cvt.s64.s32 a, -5; shr.u64 a, a, 32; cvt.u32.u64 %r1, a; }
{ .reg .b32 a; mov.b32 a, 1; }
"""
LABELS = """
mov.b32 %r1, 1;
{ bra over; add.u32 %r1, %r1, 64; over: add.u32 %r1, %r1, 2; }
{ bra over; add.u32 %r1, %r1, 64; over: add.u32 %r1, %r1, 3; }
"""
# halfway between two of bfloat16, and an addend that lies beyond a double's digits
HALFWAY = """
mov.b16 %h1, 0x3F82; mov.b16 %h2, 0x3FA0; mov.b16 %h3, 0x0D80;
fma.rn.bf16 %h1, %h1, %h2, %h3; cvt.u32.u16 %r1, %h1;
"""
EXACT = {  # 1, and what lies 100 powers of two below it
    "sum-toward-zero": ("add.rz.f32 %r1, 0f3F800000, 0f8D800000;", 0x3F7FFFFF),
    "fused-down": ("fma.rm.f32 %r1, 0f3F800000, 0f3F800000, 0f8D800000;", 0x3F7FFFFF),
    "fused-up": ("fma.rp.f32 %r1, 0f3F800000, 0f3F800000, 0f0D800000;", 0x3F800001),
    "most-down": ("mul.rm.f32 %r1, 0f7F000000, 0f7F000000;", 0x7F7FFFFF),
    "least-up": ("mul.rp.f32 %r1, 0f7F000000, 0fFF000000;", 0xFF7FFFFF),
    "wide-clamp": (WIDE, 1),
    "scopes": (SCOPES, 0xFFFFFFFF),
    "labels": (LABELS, 6),
    "narrow-fused": (HALFWAY, 0x3FA3),
}


@pytest.mark.parametrize(("body", "expected"), EXACT.values(), ids=EXACT)
def test_results_to_the_bit(body: str, expected: int) -> None:
    assert run(body) == expected


def test_a_copy_may_end_with_its_tensor() -> None:
    """The bytes that a copy fills with zeros are not read."""
    body = """
    mov.u32 %r2, buffer;
    cp.async.cg.shared.global [%r2], [%x1], 16, 4;
    cp.async.wait_all;
    ld.shared.b32 %r1, [%r2+4];
    """
    assert run(body, lanes=1) == 0


@pytest.mark.parametrize("seed", range(5))
def test_approximations_at_the_ends_stay_numbers(seed: int) -> None:
    most = run("div.full.f32 %r1, 0f7F7FFFFF, 0f3F800000;", harsh=True, seed=seed)
    least = run("ex2.approx.f32 %r1, 0fC3150000;", harsh=True, seed=seed)
    assert most == 0x7F7FFFFF
    assert least == 1


def test_a_module_begins_every_order_alike() -> None:
    """An array of a module has its first values again before the next order."""
    body = "mov.u64 %x5, counter; atom.global.add.u32 %r1, [%x5], 1;"
    module, out = Module(KERNEL.replace("BODY", body)), torch.zeros(1, device="cpu")
    module.launch_in_every_order("edge", [out], (1,), (1,))


def test_verify_says_that_a_compiler_is_missing(tmp_path: Path) -> None:
    folder = shutil.copytree(Path(ptx.__file__).parent, tmp_path / "tests" / "support" / "ptx")
    done = subprocess.run(
        [sys.executable, folder],
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
        check=False,
    )
    says = "dense_attn verify: CXX must be a C++ compiler, got 'no-such-compiler'\n"
    assert (done.returncode, done.stderr) == (2, says)


def test_a_kernel_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptx.module, "MOST", 10_000)
    text = KERNEL.replace("BODY", "AGAIN: bra.uni AGAIN;")
    with pytest.raises(Fault, match="runs on without an end"):
        Module(text).launch("edge", [torch.zeros(32, dtype=torch.int32)], (1,), (32,))
