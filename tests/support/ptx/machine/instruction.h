// An instruction as the parser encodes it. Names are listed once, here; the parser reads these lists.
#pragma once

#include <cstdint>

namespace ptx {

// clang-format off
#define PTX_OPS(X) \
  X(add) X(sub) X(mul) X(mul_hi) X(mul_wide) X(mad) X(mad_hi) X(mad_wide) X(fma) X(div) X(rem) \
  X(min) X(max) X(abs) X(neg) X(not) X(cnot) X(and) X(or) X(xor) X(shl) X(shr) X(setp) X(selp) \
  X(mov) X(cvt) X(cvt_pack) X(pack) X(unpack) X(ex2) X(lg2) X(rcp) X(sqrt) X(rsqrt) X(sin) X(cos) \
  X(tanh) X(popc) X(clz) X(brev) X(bfind) X(bfe) X(bfi) X(prmt) X(lop3) X(shf) X(copysign) X(ld) \
  X(st) X(atom) X(cp_async) X(cp_async_commit_group) X(cp_async_wait_group) X(ldmatrix) \
  X(stmatrix) X(shfl) X(vote) X(redux) X(activemask) X(bar) X(bar_warp) X(fence) X(fence_proxy) \
  X(bra) X(exit) X(trap) X(mma) X(wgmma) X(wgmma_fence) X(wgmma_commit_group) X(wgmma_wait_group) \
  X(cvta) X(nop) \
  X(bar_arrive) X(elect) X(setmaxnreg) X(pause) X(mbarrier_init) X(mbarrier_inval) X(mbarrier_arrive) \
  X(mbarrier_expect) X(mbarrier_try) X(mbarrier_test) X(bulk_load) X(bulk_store) X(bulk_commit) \
  X(bulk_wait) X(map_replace) X(map_copy) X(map_fence)

#define PTX_TYPES(X) \
  X(none) X(pred) X(b8) X(u8) X(s8) X(b16) X(u16) X(s16) X(b32) X(u32) X(s32) X(b64) X(u64) X(s64) \
  X(f16) X(bf16) X(tf32) X(f16x2) X(bf16x2) X(f32) X(f64)

// How an instruction rounds, compares, combines or what it asks of its lanes.
#define PTX_MODES(X) \
  X(plain) X(rn) X(rz) X(rm) X(rp) X(rni) X(rzi) X(rmi) X(rpi) X(rna) X(eq) X(ne) X(lt) X(le) \
  X(gt) X(ge) X(equ) X(neu) X(ltu) X(leu) X(gtu) X(geu) X(num) X(nan) X(up) X(down) X(bfly) X(idx) \
  X(all) X(any) X(uni) X(ballot) X(m_add) X(m_min) X(m_max) X(m_and) X(m_or) X(m_xor) X(exch) \
  X(cas) X(inc) X(dec) X(left) X(right) X(parity) X(reads)

#define PTX_FLAGS(X) \
  X(ftz) X(sat) X(propagate) X(approx) X(full) X(negated_guard) X(wrap) X(trans) X(relu)

#define PTX_SPACES(X) \
  X(generic) X(global) X(shared) X(local) X(param)
// clang-format on

#define PTX_ENUM(name) name##_,
enum Op { PTX_OPS(PTX_ENUM) };
enum Type { PTX_TYPES(PTX_ENUM) };
enum Mode { PTX_MODES(PTX_ENUM) };
enum Space { PTX_SPACES(PTX_ENUM) };
#undef PTX_ENUM
enum FlagBit {
#define PTX_ENUM(name) name##_bit,
  PTX_FLAGS(PTX_ENUM)
#undef PTX_ENUM
};
enum Flag {
#define PTX_ENUM(name) name##_flag = 1 << name##_bit,
  PTX_FLAGS(PTX_ENUM)
#undef PTX_ENUM
};

struct Instruction {
  int32_t op, type, from, mode, flags;
  int32_t guard;         // predicate register, -1 for none
  int32_t target;        // of a branch
  int32_t meet;          // where the two sides of a branch come together again
  int32_t first, count;  // its numbers among the operands
  int32_t line;          // of the PTX
  int32_t space;
  bool has(Flag flag) const { return flags & flag; }
};

inline int bytes_of(int type) {
  switch (type) {
    case b8_:
    case u8_:
    case s8_:
    case pred_:
      return 1;
    case b16_:
    case u16_:
    case s16_:
    case f16_:
    case bf16_:
      return 2;
    case b64_:
    case u64_:
    case s64_:
    case f64_:
      return 8;
    default:
      return 4;
  }
}

}  // namespace ptx
