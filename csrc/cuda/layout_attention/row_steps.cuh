// What a warp of the row kernel does with its rows: scores, weights, sums.
#pragma once

#include "cuda/layout_attention/row_loads.cuh"

namespace DENSE_ATTN_CLASS::row {

// What a lane of a warp has of an mma's tile: rows `group` and `group` + 8. Numbers of a row are worked out by the
// lanes whose own it is: two of its quad for each of the two.
struct Lane {
  int index = threadIdx.x % kWarp, group = index / 4, column = index % 4 * 2, quad = index & ~3;
  int own = group + index % 2 * 8, half = index / 2 % 2;

  __device__ float of_own(float first, float second) const { return index % 2 ? second : first; }
  template <class Number>
  __device__ void to_both(Number own_number, Number (&both)[2]) const {
    both[0] = __shfl_sync(~0u, own_number, quad);
    both[1] = __shfl_sync(~0u, own_number, quad + 1);
  }
};

// As mma leaves them: of 8 keys a time, two of each row.
template <int kKeys>
struct Scores {
  float of_keys[kKeys / 8][4];
  __device__ __forceinline__ float (&operator[](int n))[4] { return of_keys[n]; }
  __device__ __forceinline__ const float (&operator[](int n) const)[4] { return of_keys[n]; }
};

// In 16 bits, as mma takes them: of 16 keys a time.
template <int kKeys>
struct Weights {
  uint32_t of_keys[kKeys / 16][4];
};

template <class T, int kKeys>
__device__ __forceinline__ void multiply_keys(Scores<kKeys>& s, const Shared<T, kKeys>& shared,
                                              const T (*rows)[kStride], const Lane& lane, bool negate) {
  const uint32_t sign = negate ? 0x80008000u : 0u;
  const int i = lane.index;
  const uint32_t q_at = shared_address(&rows[i % 16][i / 16 * 8]);
  const uint32_t k_at = shared_address(&shared.k[i / 16 * 8 + i % 8][i / 8 % 2 * 8]);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t a[4];
    load_matrix_x4(a, q_at + d * 32);
    if (negate) a[0] ^= sign, a[1] ^= sign, a[2] ^= sign, a[3] ^= sign;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t b[4];
      load_matrix_x4(b, k_at + (n * 8 * kStride + d * 16) * sizeof(T));
      mma_k16<T>(s[n], a, b[0], b[1]);
      mma_k16<T>(s[n + 1], a, b[2], b[3]);
    }
  }
  if constexpr (kHeadDim % 16 == 8) {
    uint32_t a0, a1;
    load_matrix_x2(a0, a1, shared_address(&rows[i % 16][kHeadDim - 8]));
    if (negate) a0 ^= sign, a1 ^= sign;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t b0, b1;
      load_matrix_x2(b0, b1, shared_address(&shared.k[n * 8 + i % 16][kHeadDim - 8]));
      mma_k8<T>(s[n], a0, a1, b0);
      mma_k8<T>(s[n + 1], a0, a1, b1);
    }
  }
}

// The larger number, or the smaller, of all that the lanes of a quad have of their own row.
template <bool kLargest>
__device__ __forceinline__ float choose(float a, float b) {
  return kLargest ? fmaxf(a, b) : fminf(a, b);
}

template <bool kLargest>
__device__ __forceinline__ float reduce_own(const Lane& lane, float first, float second) {
  const float mine = lane.of_own(first, second), others = lane.of_own(second, first);
  const float pair = choose<kLargest>(mine, __shfl_xor_sync(~0u, others, 1));
  return choose<kLargest>(pair, __shfl_xor_sync(~0u, pair, 2));
}

template <bool kLargest, int kKeys>
__device__ __forceinline__ float extreme(const Scores<kKeys>& s, const Lane& lane) {
  float first = choose<kLargest>(s[0][0], s[0][1]), second = choose<kLargest>(s[0][2], s[0][3]);
#pragma unroll
  for (int n = 1; n < kKeys / 8; ++n) {
    first = choose<kLargest>(first, choose<kLargest>(s[n][0], s[n][1]));
    second = choose<kLargest>(second, choose<kLargest>(s[n][2], s[n][3]));
  }
  return reduce_own<kLargest>(lane, first, second);
}

template <int kKeys>
struct KeyWords {
  int2 at[kKeys / 8];

  __device__ __forceinline__ KeyWords(const int32_t* words, const Lane& lane) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) at[n] = *reinterpret_cast<const int2*>(words + n * 8 + lane.column);
  }
  __device__ __forceinline__ bool meet(int32_t word, int n, int i) const {
    return (word & (i % 2 ? at[n].y : at[n].x)) != 0;
  }
};

// "mask" leaves matched scores alone.
template <int kKeys>
__device__ __forceinline__ void exclude(Scores<kKeys>& s, const KeyWords<kKeys>& words, const int32_t (&row_words)[2]) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = words.meet(row_words[i / 2], n, i) ? s[n][i] : -INFINITY;
  }
}

// Exponents of both rows: raw * factor + in, or + out.
struct Exponents {
  float factor[2], in[2], out[2];

  __device__ __forceinline__ float of(float raw, int i, bool matched) const {
    return fmaf(raw, factor[i / 2], matched ? in[i / 2] : out[i / 2]);
  }
};

// Weights of a row lie below 2^kMost, the largest of them above 1, as long as exponents are off by no more than kSteep.
template <class T>
constexpr float kMost = 0;
template <>
constexpr float kMost<__half> = 14;
template <class T>
constexpr float kSteep = 60;
template <>
constexpr float kSteep<__half> = 14;
constexpr float kRounded = 4096;  // larger products lose digits that weights need

// Whether weights cannot be measured from the larger offset, or not by one fused multiply-add.
template <class T, Modulation kModulation>
__device__ __forceinline__ bool is_steep(const RowRule& rule) {
  const bool far = kModulation != Modulation::kMask && !(fabsf(rule.offset_in - rule.offset_out) <= kSteep<T>);
  return far || !(fabsf(rule.anchor * rule.factor) <= kRounded);
}

// Scores as they are from the anchor on, and the largest exponent of the own row.
template <Modulation kModulation, int kKeys>
__device__ __forceinline__ float search_top(Scores<kKeys>& s, const KeyWords<kKeys>& words,
                                            const int32_t (&row_words)[2], const RowRule& rule, const Lane& lane) {
  Exponents exponents;
  float anchor[2], first = -INFINITY, second = -INFINITY;
  lane.to_both(rule.anchor, anchor);
  lane.to_both(rule.factor, exponents.factor);
  lane.to_both(rule.offset_in, exponents.in);
  lane.to_both(rule.offset_out, exponents.out);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] -= anchor[i / 2];
      const bool matched = kModulation == Modulation::kMask || words.meet(row_words[i / 2], n, i);
      const float exponent = exponents.of(s[n][i], i, matched);
      (i < 2 ? first : second) = fmaxf(i < 2 ? first : second, exponent);
    }
  }
  const float top = reduce_own<true>(lane, first, second);
  return is_finite(top) ? top : 0;
}

// Scores become weights.
template <Modulation kModulation, int kKeys>
__device__ __forceinline__ void weigh(Scores<kKeys>& s, const KeyWords<kKeys>& words, const int32_t (&row_words)[2],
                                      const Exponents& exponents) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool matched = kModulation == Modulation::kMask || words.meet(row_words[i / 2], n, i);
      s[n][i] = exp2_approx(exponents.of(s[n][i], i, matched));
    }
  }
}

// The sum of the own row's weights before they are rounded.
template <int kKeys>
__device__ __forceinline__ float sum_own(const Scores<kKeys>& weights, int seqlen_k, const Lane& lane) {
  float first = 0, second = 0;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = n * 8 + lane.column + i % 2 < seqlen_k ? weights[n][i] : 0;
      (i < 2 ? first : second) += weight;
    }
  }
  const float mine = lane.of_own(first, second), others = lane.of_own(second, first);
  const float pair = mine + __shfl_xor_sync(~0u, others, 1);
  return pair + __shfl_xor_sync(~0u, pair, 2);
}

template <class T, int kKeys>
__device__ __forceinline__ void round_weights(Weights<kKeys>& rounded, const Scores<kKeys>& weights) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    rounded.of_keys[n / 2][n % 2 * 2] = pack<T>(weights[n][0], weights[n][1]);
    rounded.of_keys[n / 2][n % 2 * 2 + 1] = pack<T>(weights[n][2], weights[n][3]);
  }
}

// The sums of both rows' weights as they are multiplied with values.
template <class T, int kKeys>
__device__ __forceinline__ void sum_weights(float (&sums)[2], const Weights<kKeys>& weights,
                                            const Shared<T, kKeys>& shared, const Lane& lane) {
  float acc[4] = {};
  const uint32_t at = shared_address(shared.exists[lane.index]);
#pragma unroll
  for (int n = 0; n < kKeys / 16; n += 2) {
    uint32_t b[4];
    load_matrix_x4_trans(b, at + n * 16 * sizeof(shared.exists[0]));
    mma_k16<T>(acc, weights.of_keys[n], b[0], b[1]);
    if (n + 1 < kKeys / 16) mma_k16<T>(acc, weights.of_keys[n + 1], b[2], b[3]);
  }
  sums[0] = acc[0], sums[1] = acc[2];
}

// kColumns columns of out from `column` on, into shared memory.
template <class T, int kKeys>
__device__ __forceinline__ void multiply_values(T (*out)[kStride], const Weights<kKeys>& weights,
                                                const float (&inverse)[2], const Shared<T, kKeys>& shared, int column,
                                                const Lane& lane) {
  float acc[kColumns / 8][4] = {};
  const int i = lane.index;
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
    for (int d = 0; d < kColumns / 8; d += 2) {
      uint32_t b[4];
      if (d + 1 < kColumns / 8) {
        load_matrix_x4_trans(b, shared_address(&shared.v[n * 16 + i % 16][column + d * 8 + i / 16 * 8]));
        mma_k16<T>(acc[d + 1], weights.of_keys[n], b[2], b[3]);
      } else {
        load_matrix_x2_trans(b[0], b[1], shared_address(&shared.v[n * 16 + i % 16][column + d * 8]));
      }
      mma_k16<T>(acc[d], weights.of_keys[n], b[0], b[1]);
    }
  }
#pragma unroll
  for (int d = 0; d < kColumns / 8; ++d) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<uint32_t*>(&out[lane.group + r * 8][column + d * 8 + lane.column]) =
          pack<T>(acc[d][2 * r] * inverse[r], acc[d][2 * r + 1] * inverse[r]);
    }
  }
}

}  // namespace DENSE_ATTN_CLASS::row
