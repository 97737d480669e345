// The table of one instruction set's kernels. Compiled once per instruction set, with DENSE_ATTN_ISA as its name.
#include "cpu/layout_attention_bwd.h"
#include "cpu/layout_attention_fwd.h"
#if defined(__AMX_BF16__)
#include "cpu/layout_attention_fwd_amx.h"
#endif

namespace DENSE_ATTN_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

#if defined(__AMX_BF16__)
template <class T>
using ForwardOf = std::conditional_t<std::is_same_v<T, BFloat16>, ForwardAmx, Forward<T, false>>;
#else
template <class T>
using ForwardOf = Forward<T, kHasDot && std::is_same_v<T, BFloat16>>;
#endif

int64_t fwd_items(const LayoutAttentionParams& p) {
  return with_dtype(p.dtype, [&](auto x) { return ForwardOf<decltype(x)>::items(p); });
}

size_t fwd_scratch_bytes(const LayoutAttentionParams& p) {
  return with_dtype(p.dtype, [&](auto x) { return ForwardOf<decltype(x)>(p, nullptr).scratch_bytes; });
}

void fwd(const LayoutAttentionParams& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto x) {
    ForwardOf<decltype(x)> forward(p, scratch);
    for (int64_t item = begin; item < end; ++item) forward.run(item);
  });
}

int64_t bwd_items(const LayoutAttentionBwdParams& p) { return p.batch * p.num_heads / p.group * p.parts; }

size_t bwd_scratch_bytes(const LayoutAttentionBwdParams& p) {
  return with_dtype(p.dtype, [&](auto x) { return Backward<decltype(x)>(p, nullptr).scratch_bytes; });
}

size_t bwd_partial_bytes(const LayoutAttentionBwdParams& p) {
  return with_dtype(p.dtype, [&](auto x) {
    using B = Backward<decltype(x)>;
    return p.parts == 1 ? 0 : bwd_items(p) * B::partial_size(p) * sizeof(typename B::Acc);
  });
}

void bwd(const LayoutAttentionBwdParams& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto x) {
    Backward<decltype(x)> backward(p, scratch);
    for (int64_t item = begin; item < end; ++item) backward.run(item);
  });
}

void bwd_reduce(const LayoutAttentionBwdParams& p, int64_t begin, int64_t end) {
  with_dtype(p.dtype, [&](auto x) {
    const Backward<decltype(x)> backward(p, nullptr);
    for (int64_t head = begin; head < end; ++head) backward.reduce(head);
  });
}

}  // namespace

extern const LayoutAttentionCpu kLayoutAttention;
const LayoutAttentionCpu kLayoutAttention = {fwd_items,         fwd_scratch_bytes, fwd, bwd_items,
                                             bwd_scratch_bytes, bwd_partial_bytes, bwd, bwd_reduce};

}  // namespace DENSE_ATTN_ISA
