// Vectors of one register, on the compiler's vector extension; intrinsics only where it has no word for an instruction.
// Compiled once per instruction set: everything lives in the namespace DENSE_ATTN_ISA, so no two builds share a symbol.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace DENSE_ATTN_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
constexpr int kTileRows = 8;  // 8 x 3 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
constexpr int kTileRows = 4;  // 4 x 3 accumulators of 16 registers
#elif defined(__aarch64__)
constexpr int kVecBytes = 16;
constexpr int kTileRows = 8;
#else
constexpr int kVecBytes = 16;
constexpr int kTileRows = 4;
#endif

// One lane of a product over two bfloat16 values, as the dot-product instruction takes them.
struct Pair {
  uint32_t bits;
};

template <class Acc>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVecBytes)));
  typedef int32_t Int __attribute__((vector_size(kVecBytes)));
  using IntLane = int32_t;
#if defined(__AVX512F__)
  using Mask = __mmask16;
#else
  using Mask = Int;
#endif
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVecBytes)));
  typedef int64_t Int __attribute__((vector_size(kVecBytes)));
  using IntLane = int64_t;
#if defined(__AVX512F__)
  using Mask = __mmask8;
#else
  using Mask = Int;
#endif
};

template <class Acc>
using VecOf = typename Simd<Acc>::Vec;
template <class Acc>
using IntOf = typename Simd<Acc>::Int;
template <class Acc>
using MaskOf = typename Simd<Acc>::Mask;
template <class Acc>
constexpr int kLanes = kVecBytes / sizeof(Acc);

template <class V, class T>
inline V load(const T* pointer) {
  V value;
  std::memcpy(&value, pointer, sizeof(V));
  return value;
}

template <class V, class T>
inline void store(T* pointer, const V& value) {
  std::memcpy(pointer, &value, sizeof(V));
}

// The same lanes in double: what is computed once a row is computed to the last digit.
template <class Acc>
struct WideLanes {
  typedef double Vec __attribute__((vector_size(kLanes<Acc> * sizeof(double))));
};
template <class Acc>
using WideOf = typename WideLanes<Acc>::Vec;

template <class Acc>
inline WideOf<Acc> widen(VecOf<Acc> x) {
  return __builtin_convertvector(x, WideOf<Acc>);
}
template <class Acc>
inline VecOf<Acc> narrow(WideOf<Acc> x) {
  return __builtin_convertvector(x, VecOf<Acc>);
}

template <class Acc>
inline VecOf<Acc> set1(Acc x) {
  return x - VecOf<Acc>{};  // x - 0 and not x + 0: keeps the sign of zero
}

template <class Acc>
inline IntOf<Acc> set1_int(typename Simd<Acc>::IntLane x) {
  return x - IntOf<Acc>{};
}

// max and min let a NaN in x pass and lose one in bound.
template <class V>
inline V max_keep_nan(V x, V bound) {
  return bound > x ? bound : x;
}

#if defined(__AVX512F__)
inline __mmask16 meet(Simd<float>::Int a, Simd<float>::Int b) { return _mm512_test_epi32_mask((__m512i)a, (__m512i)b); }
inline __mmask8 meet(Simd<double>::Int a, Simd<double>::Int b) {
  return _mm512_test_epi64_mask((__m512i)a, (__m512i)b);
}
inline Simd<float>::Vec select(__mmask16 mask, Simd<float>::Vec a, Simd<float>::Vec b) {
  return _mm512_mask_blend_ps(mask, b, a);
}
inline Simd<double>::Vec select(__mmask8 mask, Simd<double>::Vec a, Simd<double>::Vec b) {
  return _mm512_mask_blend_pd(mask, b, a);
}
inline Simd<float>::Int select(__mmask16 mask, Simd<float>::Int a, Simd<float>::Int b) {
  return (Simd<float>::Int)_mm512_mask_blend_epi32(mask, (__m512i)b, (__m512i)a);
}
inline Simd<double>::Int select(__mmask8 mask, Simd<double>::Int a, Simd<double>::Int b) {
  return (Simd<double>::Int)_mm512_mask_blend_epi64(mask, (__m512i)b, (__m512i)a);
}
inline __mmask16 less(Simd<float>::Vec a, Simd<float>::Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline __mmask8 less(Simd<double>::Vec a, Simd<double>::Vec b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
inline __mmask16 invert(__mmask16 mask) { return (__mmask16)~mask; }
inline __mmask8 invert(__mmask8 mask) { return (__mmask8)~mask; }
// bound where mask, else unchanged: max and min over one population.
inline void max_where(Simd<float>::Vec& bound, __mmask16 mask, Simd<float>::Vec x) {
  bound = _mm512_mask_max_ps(bound, mask, x, bound);
}
inline void max_where(Simd<double>::Vec& bound, __mmask8 mask, Simd<double>::Vec x) {
  bound = _mm512_mask_max_pd(bound, mask, x, bound);
}
inline void min_where(Simd<float>::Vec& bound, __mmask16 mask, Simd<float>::Vec x) {
  bound = _mm512_mask_min_ps(bound, mask, x, bound);
}
inline void min_where(Simd<double>::Vec& bound, __mmask8 mask, Simd<double>::Vec x) {
  bound = _mm512_mask_min_pd(bound, mask, x, bound);
}
#else
template <class I>
inline I meet(I a, I b) {
  return (I)((a & b) != 0);
}
template <class I, class V>
inline V select(I mask, V a, V b) {
  return mask ? a : b;
}
inline Simd<float>::Int less(Simd<float>::Vec a, Simd<float>::Vec b) { return (Simd<float>::Int)(a < b); }
inline Simd<double>::Int less(Simd<double>::Vec a, Simd<double>::Vec b) { return (Simd<double>::Int)(a < b); }
template <class I>
inline I invert(I mask) {
  return ~mask;
}
template <class V, class I>
inline void max_where(V& bound, I mask, V x) {
  const V candidate = mask ? x : bound;
  bound = candidate > bound ? candidate : bound;
}
template <class V, class I>
inline void min_where(V& bound, I mask, V x) {
  const V candidate = mask ? x : bound;
  bound = candidate < bound ? candidate : bound;
}
#endif

// acc + a * b, lane by lane; a Pair's lane is two products.
inline Simd<float>::Vec madd(Simd<float>::Vec acc, Simd<float>::Vec b, float a) { return a * b + acc; }
inline Simd<double>::Vec madd(Simd<double>::Vec acc, Simd<double>::Vec b, double a) { return a * b + acc; }
#if defined(__AVX512BF16__)
inline Simd<float>::Vec madd(Simd<float>::Vec acc, Simd<float>::Int b, Pair a) {
  return _mm512_dpbf16_ps(acc, (__m512bh)b, (__m512bh)_mm512_set1_epi32((int)a.bits));
}
#endif

template <class Elem>
struct Operand {
  using Vec = VecOf<Elem>;
};
template <>
struct Operand<Pair> {
  using Vec = Simd<float>::Int;
};

// 2^f for |f| <= 1/2: relative error 2e-9 (float), 3e-18 (double) before rounding.
template <class Acc>
inline VecOf<Acc> exp2_polynomial(VecOf<Acc> f);

template <>
inline VecOf<float> exp2_polynomial<float>(VecOf<float> f) {
  VecOf<float> p = 1.54614447e-4f * f + 1.34004281e-3f;
  p = p * f + 9.61805668e-3f;
  p = p * f + 5.55032723e-2f;
  p = p * f + 2.40226509e-1f;
  p = p * f + 6.93147207e-1f;
  return p * f + 1.0f;
}

template <>
inline VecOf<double> exp2_polynomial<double>(VecOf<double> f) {
  constexpr double kCoefficients[] = {4.45581790833606449e-10, 7.07419429728852101e-9, 1.01780570877339411e-7,
                                      1.32154325359123762e-6,  1.52527338415567726e-5, 1.54035304637243542e-4,
                                      1.33335581464063707e-3,  9.61812910758725667e-3, 5.5504108664821627e-2,
                                      2.40226506959101596e-1,  6.93147180559945309e-1, 1.0};
  VecOf<double> p = set1<double>(kCoefficients[0]);
#pragma GCC unroll 11
  for (int i = 1; i < 12; ++i) p = p * f + kCoefficients[i];
  return p;
}

// The integer nearest to x, and 2^n times p for n from kLowest<Acc>, where p * 2^n is 0 or rounds to it, up.
#if defined(__AVX512F__)
template <class Acc>
constexpr Acc kLowest = sizeof(Acc) == 4 ? -160 : -1090;

inline Simd<float>::Vec nearest(Simd<float>::Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Simd<double>::Vec nearest(Simd<double>::Vec x) {
  return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Simd<float>::Vec times_exp2(Simd<float>::Vec p, Simd<float>::Vec n) { return _mm512_scalef_ps(p, n); }
inline Simd<double>::Vec times_exp2(Simd<double>::Vec p, Simd<double>::Vec n) { return _mm512_scalef_pd(p, n); }
#else
template <class Acc>
constexpr Acc kLowest = sizeof(Acc) == 4 ? -126 : -1022;
template <class Acc>
constexpr Acc kRounder = sizeof(Acc) == 4 ? 12582912.0 : 6755399441055744.0;  // 1.5 * 2^mantissa bits

template <class V, class Acc = std::remove_reference_t<decltype(V{}[0])> >
inline V nearest(V x) {
  return (x + kRounder<Acc>)-kRounder<Acc>;
}
template <class V, class Acc = std::remove_reference_t<decltype(V{}[0])> >
inline V times_exp2(V p, V n) {
  constexpr int kMantissa = sizeof(Acc) == 4 ? 23 : 52;
  using Lane = std::conditional_t<sizeof(Acc) == 4, uint32_t, uint64_t>;  // sums that wrap are flushed
  typedef Lane Bits __attribute__((vector_size(sizeof(V))));
  const V scaled = (V)((Bits)p + ((Bits)(n + kRounder<Acc>) << kMantissa));
  const V flushed = n <= kLowest<Acc> ? V{} : scaled;
  return p == p ? flushed : p;
}
#endif

// 2^(s * factor + offset), at most about 2, factor and offset in two parts: the exponent's integer part is taken off
// before the product is added, so it is not rounded. Relative error 1e-7 (float), 3e-16 (double); exactly 0 for -inf,
// NaN stays NaN.
template <class Acc>
inline VecOf<Acc> exp2(VecOf<Acc> s, VecOf<Acc> factor, VecOf<Acc> factor_low, VecOf<Acc> offset,
                       VecOf<Acc> offset_low) {
  const VecOf<Acc> x = s * factor + offset, n = nearest(x);
  const VecOf<Acc> f = (s * factor + (offset - n)) + (s * factor_low + offset_low);
  const VecOf<Acc> result = times_exp2(exp2_polynomial<Acc>(f), n);
  return select(less(x, set1<Acc>(kLowest<Acc>)), VecOf<Acc>{}, result);  // -inf left no f
}

template <class Acc>
inline VecOf<Acc> exp2(VecOf<Acc> x) {
  const VecOf<Acc> zero{};
  return exp2<Acc>(zero, zero, zero, x, zero);
}

// 2^x for weights of 16-bit values: relative error 8e-6, far below their rounding; exactly 0 for -inf, NaN stays NaN.
inline Simd<float>::Vec exp2_coarse(Simd<float>::Vec x) {
#if defined(__AVX512F__)
  constexpr int kFloor = 1;
  const Simd<float>::Vec f = _mm512_reduce_ps(x, kFloor);  // x - floor(x), 0 for -inf
  Simd<float>::Vec p = 1.27631139e-2f * f + 5.34410293e-2f;
  p = p * f + 2.40647048e-1f;
  p = p * f + 6.93133993e-1f;
  return _mm512_scalef_ps(p * f + 1.0f, x);  // times 2^floor(x)
#else
  x = max_keep_nan(x, set1<float>(kLowest<float>));
  const Simd<float>::Vec n = nearest(x), f = x - n;
  Simd<float>::Vec p = 9.66636852e-3f * f + 5.59219758e-2f;
  p = p * f + 2.4022349e-1f;
  p = p * f + 6.93121045e-1f;
  return times_exp2(p * f + 1.0f, n);
#endif
}

// Full-width zip of two registers: (a0 b0 a1 b1 ...), lower and upper half.
template <class V>
inline void zip(V a, V b, V& low, V& high) {
  constexpr int n = sizeof(V) / sizeof(a[0]);
  if constexpr (n == 16) {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (n == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (n == 4) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  }
}

// Transposes a square of registers: log2(n) rounds of zips.
template <class V, int n>
inline void transpose(V (&rows)[n]) {
  for (int round = 1; round < n; round *= 2) {
    V next[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) zip(rows[i], rows[i + n / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace DENSE_ATTN_ISA
