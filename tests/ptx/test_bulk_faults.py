"""Planted faults of barriers in memory and of bulk copies: found, and mended they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

pytest.importorskip("triton")

from ptx.planted import Planted, assemble, rotated

SETUP = """
    mov.b64 %a, from_param;
    cvta.param.u64 %a, %a;
    mov.b64 %b, to_param;
    cvta.param.u64 %b, %b;
    mov.b32 %r1, 0;
    setp.eq.u32 %p1, %t, 0;
    setp.eq.u32 %p2, %t, 32;
    setp.lt.u32 %p3, %t, 32;
    add.u32 %r8, %s, 2048;
    add.u32 %r9, %s, 2056;
"""  # %r8 and %r9: two barriers; %p1, %p2: the first lanes of both warps
INIT = """
    @%p1 mbarrier.init.shared::cta.b64 [%r8], 1;
    @%p1 mbarrier.init.shared::cta.b64 [%r9], 32;
    bar.sync 0;
"""
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 256;"
COPY = "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes"
LOAD = f"{COPY} [%s], [%a, {{%r1}}], [%r8];"
STORE = "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%b, {%r1}], [%s];"
TRY = "mbarrier.try_wait.parity.shared::cta.b64"
READ = "ld.shared.b32 %r2, [%other];\n st.global.b32 [%to], %r2;"


def wait(barrier: str = "%r8", parity: int = 0, how: str = TRY) -> str:
    """A loop until a phase has ended."""
    again = f"again: {how} done, [{barrier}], {parity}; @!done bra again;"
    return f"{{ .reg .pred done; {again} }}"


def fault(body: str, expected: Callable[[Tensor], Tensor] = rotated) -> Planted:
    return Planted(SETUP + body, expected, target="sm_90a")


LOADS = {
    "a barrier that was not waited for": fault(f"""{INIT}
    @%p1 {EXPECT}
    @%p1 {LOAD}
    + {wait()}
    bar.sync 0;
    {READ}"""),
    "a wait of one warp for both": fault(f"""{INIT}
    @%p1 {EXPECT}
    @%p1 {LOAD}
    - @%p3 bra FIRST; bra BOTH; FIRST:
    {wait()}
    - BOTH:
    {READ}"""),
    "one phase too early": fault(f"""{INIT}
    @%p1 {EXPECT}
    @%p1 {LOAD}
    - {wait(parity=1)}
    + {wait(parity=0)}
    {READ}"""),
    "one phase too late": fault(f"""{INIT}
    @%p1 {EXPECT}
    @%p1 {LOAD}
    {wait()}
    - {wait(parity=1)}
    {READ}"""),
    "a box wider than what is expected": fault(f"""{INIT}
    - @%p1 {EXPECT.replace("256", "128")}
    + @%p1 {EXPECT}
    @%p1 {LOAD}
    {wait()}
    {READ}"""),
    "a box narrower than what is expected": fault(f"""{INIT}
    - @%p1 {EXPECT.replace("256", "512")}
    + @%p1 {EXPECT}
    @%p1 {LOAD}
    {wait()}
    {READ}"""),
    "a box before what is expected": fault(f"""{INIT}
    @%p1 {LOAD}
    - @%p1 mbarrier.arrive.shared::cta.b64 _, [%r8];
    + @%p1 {EXPECT}
    {wait()}
    {READ}"""),
    "a barrier that others do not know": fault(f"""{INIT.replace("bar.sync 0;", "")}
    + bar.sync 0;
    @%p1 {EXPECT}
    @%p1 {LOAD}
    {wait()}
    {READ}"""),
    "a barrier that was never made": fault(f"""{INIT}
    @%p1 {EXPECT}
    @%p1 {LOAD}
    {wait()}
    - {wait("%r9 + 8", 1)}
    + {wait("%r9", 1)}
    {READ}"""),
    "a barrier that ends before its copy": fault(f"""{INIT}
    @%p1 {EXPECT}
    @%p1 {LOAD}
    - @%p1 mbarrier.inval.shared::cta.b64 [%r8];
    {wait()}
    + bar.sync 0;
    + @%p1 mbarrier.inval.shared::cta.b64 [%r8];
    {READ}"""),
    "a barrier that ends while others look": fault(f"""{INIT}
    @%p1 {EXPECT}
    @%p1 {LOAD}
    {wait()}
    + bar.sync 0;
    @%p1 mbarrier.inval.shared::cta.b64 [%r8];
    {READ}"""),
    "a barrier that is overwritten": fault(f"""{INIT}
    @%p1 {EXPECT}
    - @%p1 st.shared.b32 [%r8 + 4], %r1;
    + @%p1 st.shared.b32 [%r9 + 8], %r1;
    @%p1 {LOAD}
    {wait()}
    {READ}"""),
    "a copy over what others have yet to read": fault(f"""{INIT}
    ld.global.b32 %r3, [%from];
    st.shared.b32 [%own], %r3;
    bar.sync 0;
    ld.shared.b32 %r4, [%other];
    + bar.sync 0;
    @%p1 {EXPECT}
    @%p1 {LOAD}
    {wait()}
    st.global.b32 [%to], %r4;"""),
    "a copy over another": fault(f"""{INIT}
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r8], 512;
    @%p1 {LOAD}
    + add.u32 %s, %s, 512;
    @%p1 {LOAD}
    {wait()}
    {READ}"""),
    "a misaligned copy": fault(f"""{INIT}
    @%p1 {EXPECT}
    - add.u32 %s, %s, 64; add.u32 %other, %other, 64;
    + add.u32 %s, %s, 128; add.u32 %other, %other, 128;
    @%p1 {LOAD}
    {wait()}
    {READ}"""),
    "a copy that no one has waited for": fault(f"""{INIT}
    @%p1 {EXPECT}
    @%p1 {LOAD}
    + {wait()}
    ld.global.b32 %r2, [%from];
    st.global.b32 [%to], %r2;""", lambda x: x),
}  # fmt: skip
# The first warp fills a buffer twice; the second one reads it each time, and tells by %r9.
TURNS = f"""{INIT}
    @%p3 bra FIRST;
    {wait("%r8", 0)}
    ld.shared.b32 %r2, [%own];
    ARRIVE
    {wait("%r8", 1)}
    ld.shared.b32 %r3, [%own + -128];
    st.global.b32 [%to + -128], %r2;
    st.global.b32 [%to], %r3;
    bra END;
    FIRST:
    @%p1 {EXPECT}
    @%p1 {LOAD}
    AGAIN
    @%p1 {EXPECT}
    @%p1 {LOAD}
    END:
"""


def turns(arrive: str, again: str = wait("%r9")) -> Planted:
    return fault(TURNS.replace("ARRIVE", arrive).replace("AGAIN", again))


TELL = "mbarrier.arrive.shared::cta.b64 _, [%r9];"
RINGS = {
    "an arrival that is missing": turns(f"+ {TELL}"),
    "a buffer that is not awaited": turns(TELL, f"+ {wait('%r9')}"),
    "a buffer awaited in the wrong phase": turns(
        TELL, f"- {wait('%r9', 1)}\n + {wait('%r9', 0)}"
    ),
    "an arrival before the last read": turns(
        f"- {TELL}\n ld.shared.b32 %r2, [%own];\n + {TELL}"
    ),
    "an arrival of one lane for others": turns(
        f"+ bar.warp.sync -1;\n @%p2 {TELL[:-1]}, 32;"
    ),
    "the arrivals of two phases at once": turns(f"- {TELL}\n {TELL}"),
    "fewer lanes than are expected": turns(f"- @%p2 {TELL}\n + {TELL}"),
    "a look in place of a wait": turns(
        TELL, f"+ {wait('%r9', 0, 'mbarrier.test_wait.parity.shared::cta.b64')}"
    ),
}  # fmt: skip
FILL = "ld.global.b32 %r3, [%from];\n st.shared.b32 [%own], %r3;"
FENCE = "fence.proxy.async.shared::cta;"
COMMIT, READ_BY = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group.read 0;"
SENT = "cp.async.bulk.wait_group 0;"


def same(x: Tensor) -> Tensor:
    return x


STORES = {
    "stored without a fence": fault(f"""{FILL}
    + {FENCE}
    bar.sync 0;
    @%p1 {STORE} {COMMIT} {READ_BY}""", same),
    "a store before others have written": fault(f"""{FILL}
    {FENCE}
    + bar.sync 0;
    @%p1 {STORE} {COMMIT} {READ_BY}""", same),
    "a source overwritten": fault(f"""{FILL}
    {FENCE}
    bar.sync 0;
    @%p1 {STORE} {COMMIT}
    + {READ_BY}
    + bar.sync 0;
    st.shared.b32 [%own], %r1;
    {READ_BY}""", same),
    "a source that only one warp knows to be read": fault(f"""{FILL}
    {FENCE}
    bar.sync 0;
    @%p1 {STORE} {COMMIT} {READ_BY}
    + bar.sync 0;
    st.shared.b32 [%own], %r1;""", same),
    "a store that outlives its warp": fault(f"""{FILL}
    {FENCE}
    bar.sync 0;
    @%p1 {STORE} {COMMIT}
    + {READ_BY}""", same),
    "a store of no group": fault(f"""{FILL}
    {FENCE}
    bar.sync 0;
    @%p1 {STORE}
    + {COMMIT}
    {READ_BY}""", same),
    "a wait for all but the last": fault(f"""{FILL}
    {FENCE}
    bar.sync 0;
    @%p1 {STORE} {COMMIT}
    - {READ_BY.replace("0", "1")}
    + {READ_BY}""", same),
    "a wait of another lane": fault(f"""{FILL}
    {FENCE}
    bar.sync 0;
    @%p1 {STORE} {COMMIT}
    - @%p2 {READ_BY}
    + @%p1 {READ_BY}""", same),
    "what was read, but may not have been written": fault(f"""{FILL}
    {FENCE}
    bar.sync 0;
    @%p1 {STORE} {COMMIT}
    - {READ_BY}
    + {SENT}
    bar.sync 0;
    ld.global.b32 %r4, [%to];
    {READ_BY}
    bar.sync 0;
    st.global.b32 [%to], %r4;""", same),
}  # fmt: skip
PARTS = {
    "a barrier of two numbers": fault("""
    ld.global.b32 %r3, [%from];
    st.shared.b32 [%own], %r3;
    - @%p3 bra FIRST; bar.sync 1, 64; bra BOTH; FIRST: bar.sync 2, 64; BOTH:
    + @%p3 bra FIRST; bar.sync 1, 64; bra BOTH; FIRST: bar.sync 1, 64; BOTH:
    ld.shared.b32 %r2, [%other];
    st.global.b32 [%to], %r2;"""),
    "a barrier for one of two warps": fault("""
    ld.global.b32 %r3, [%from];
    st.shared.b32 [%own], %r3;
    - bar.sync 1, 32;
    + bar.sync 1, 64;
    ld.shared.b32 %r2, [%other];
    st.global.b32 [%to], %r2;"""),
    "warps that disagree": fault("""
    ld.global.b32 %r3, [%from];
    st.shared.b32 [%own], %r3;
    - @%p3 bra FIRST; bar.sync 1, 64; bra BOTH; FIRST: bar.sync 1, 96; BOTH:
    + bar.sync 1, 64;
    ld.shared.b32 %r2, [%other];
    st.global.b32 [%to], %r2;"""),
    "an arrival without a wait": fault("""
    ld.global.b32 %r3, [%from];
    st.shared.b32 [%own], %r3;
    - @%p3 bra FIRST; bar.sync 1, 64; bra BOTH; FIRST: bar.arrive 1, 64; BOTH:
    + bar.sync 1, 64;
    ld.shared.b32 %r2, [%other];
    st.global.b32 [%to], %r2;"""),
    "an arrival before the write": fault("""
    ld.global.b32 %r3, [%from];
    @%p3 bra FIRST;
    bar.sync 1, 64;
    ld.shared.b32 %r2, [%other];
    st.global.b32 [%to], %r2;
    bra END;
    FIRST:
    - bar.arrive 1, 64;
    st.shared.b32 [%own], %r3;
    + bar.arrive 1, 64;
    st.global.b32 [%to], %r3;
    END:""", lambda x: x[:32].repeat(2)),
}  # fmt: skip
PLANTED = LOADS | RINGS | STORES | PARTS


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults(name: str, order: str) -> None:
    PLANTED[name].check(order)


def test_all_twins_are_ptx(tmp_path: Path) -> None:
    twins = [one.text(sign) for one in PLANTED.values() for sign in "+-"]
    assemble(twins, "planted", "sm_90a", tmp_path)
