// Steps of a warp's 16 query rows over a tile of keys. A thread has rows lane / 4 and lane / 4 + 8 of every product.
#pragma once

#include "cuda/layout_attention_fwd_loads.cuh"
#include "cuda/primitives.cuh"

// The shift of a row without keys of a population: the first finite score has a weight of infinity, one of -inf has 0.
constexpr float kNoShift = -3.4e38f;

// Sums of weights of a tile, of one thread, that float16 or what is summed of products of bfloat16 has room for.
template <class T>
constexpr float kLargestSum = 0x1p60f;
template <>
constexpr float kLargestSum<__half> = 0x1p15f;

template <int kKeys>
struct Scores {
  float of[kKeys / 8][4];
};
template <int kKeys>
struct Weights {
  uint32_t of[kKeys / 16][4];  // operands of a product with the values
};

// A warp's query rows as operands of products, columns in sixteens and eight that may be left.
template <class T, int kHeadDim>
struct Queries {
  uint32_t wide[kHeadDim / 16][4], narrow[2];

  // Rows with their sign turned where a minus is to be had; columns beyond the head dim are 0.
  __device__ __forceinline__ void load(const T* const (&rows)[2], const bool (&turned)[2], int head_dim) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const int column = i * 8 + lane % 4 * 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t pair = i * 8 < head_dim ? load_pair(rows[r] + column) : 0;
        if (turned[r]) pair ^= 0x80008000;
        (i < kHeadDim / 16 * 2 ? wide[i / 2][i % 2 * 2 + r] : narrow[r]) = pair;
      }
    }
  }
  static __device__ __forceinline__ uint32_t load_pair(const T* at) {
    if (reinterpret_cast<uintptr_t>(at) % 4 == 0) return *reinterpret_cast<const uint32_t*>(at);
    const auto* halves = reinterpret_cast<const uint16_t*>(at);
    return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
  }
};

template <class T, int kHeadDim, int kKeys>
__device__ __forceinline__ void score(Scores<kKeys>& s, const Queries<T, kHeadDim>& q, uint32_t keys) {
  constexpr int kPitch = kRowPitch<kHeadDim>;
  const int lane = threadIdx.x % kWarp;
  const uint32_t wide_at = keys + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) s.of[n][0] = s.of[n][1] = s.of[n][2] = s.of[n][3] = 0;
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t b[4];
      load_matrix_x4(b, wide_at + n * 16 * kPitch + i * 32);
      mma_k16<T>(s.of[2 * n], q.wide[i], b[0], b[1]);
      mma_k16<T>(s.of[2 * n + 1], q.wide[i], b[2], b[3]);
    }
  }
  if constexpr (kHeadDim % 16) {
#pragma unroll
    for (int n = 0; n < kKeys / 32; ++n) {
      uint32_t b[4];
      load_matrix_x4(b, keys + (n * 32 + lane) * kPitch + kHeadDim / 16 * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_k8<T>(s.of[4 * n + i], q.narrow[0], q.narrow[1], b[i]);
    }
  }
}

// Sums over the keys of one population that have been visited: weights are exp2(raw * factor - shift).
template <int kColumns>
struct Population {
  float acc[kColumns / 8][4], sum[2], shift[2];

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) acc[c][0] = acc[c][1] = acc[c][2] = acc[c][3] = 0;
    sum[0] = sum[1] = 0;
    shift[0] = shift[1] = kNoShift;
  }
  // Measures the weights from an exponent that is at least as large as `top`, this thread's largest.
  __device__ __forceinline__ void raise(int r, float top) {
    const float raised = fmaxf(shift[r], fminf(quad_max(top), -kNoShift)), alpha = exp2_approx(shift[r] - raised);
    shift[r] = raised;
    sum[r] *= alpha;
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) acc[c][2 * r] *= alpha, acc[c][2 * r + 1] *= alpha;
  }
};

// acc += weights * values, for one or two matrices of weights.
template <class T, int kColumns, int kKeys, class Accumulate>
__device__ __forceinline__ void with_values(uint32_t values, const Accumulate& accumulate) {
  constexpr int kPitch = kRowPitch<kColumns>;
  const int lane = threadIdx.x % kWarp;
  const uint32_t at = values + lane % 16 * kPitch + lane / 16 * 16;
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
    for (int c = 0; c < kColumns / 16; ++c) {
      uint32_t b[4];
      load_matrix_x4_trans(b, at + n * 16 * kPitch + c * 32);
      accumulate(2 * c, n, b[0], b[1]);
      accumulate(2 * c + 1, n, b[2], b[3]);
    }
  }
  if constexpr (kColumns % 16) {
#pragma unroll
    for (int n = 0; n < kKeys / 32; ++n) {
      uint32_t b[4];
      load_matrix_x4_trans(b, values + (n * 32 + lane) * kPitch + kColumns / 16 * 32);
      accumulate(kColumns / 8 - 1, 2 * n, b[0], b[1]);
      accumulate(kColumns / 8 - 1, 2 * n + 1, b[2], b[3]);
    }
  }
}

// A tile whose pairs are all of one population.
template <class T, int kColumns, int kKeys>
__device__ __forceinline__ void absorb(Population<kColumns>& x, const Scores<kKeys>& s, const float (&factor)[2],
                                       uint32_t values) {
  Weights<kKeys> weights;
  float sum[2];
  for (bool raised = false;; raised = true) {
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float a = exp2_approx(fmaf(s.of[n][2 * r], factor[r], -x.shift[r]));
        const float b = exp2_approx(fmaf(s.of[n][2 * r + 1], factor[r], -x.shift[r]));
        sum[r] += a + b;
        weights.of[n / 2][n % 2 * 2 + r] = pack<T>(a, b);
      }
    }
    if (raised || !__any_sync(~0u, fmaxf(sum[0], sum[1]) > kLargestSum<T>)) break;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s.of[n][2 * r], s.of[n][2 * r + 1]));
      x.raise(r, top * factor[r]);
    }
  }
  x.sum[0] += sum[0], x.sum[1] += sum[1];
  with_values<T, kColumns, kKeys>(
      values, [&](int c, int n, uint32_t b0, uint32_t b1) { mma_k16<T>(x.acc[c], weights.of[n], b0, b1); });
}

// The weights of both populations in a tile, 0 where a pair is of the other one or, in a tail, beyond the keys.
template <class T, bool kOthers, bool kTail, int kColumns, int kKeys>
__device__ __forceinline__ void weigh_mixed(Weights<kKeys> (&weights)[2], float (&sum)[2][2], const Scores<kKeys>& s,
                                            const Population<kColumns> (&x)[2], const float (&factor)[2],
                                            const int32_t (&row_words)[2], const int32_t* key_words, int count) {
  const int column = threadIdx.x % 4 * 2;
  sum[0][0] = sum[0][1] = sum[1][0] = sum[1][1] = 0;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    const int2 words = *reinterpret_cast<const int2*>(key_words + n * 8 + column);
    const bool there[2] = {!kTail || n * 8 + column < count, !kTail || n * 8 + column + 1 < count};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float in[2], out[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool matched = (row_words[r] & (i ? words.y : words.x)) != 0;
        const float shift = matched || !kOthers ? x[0].shift[r] : x[1].shift[r];
        const float weight = exp2_approx(fmaf(s.of[n][2 * r + i], factor[r], -shift));
        in[i] = matched && there[i] ? weight : 0;
        out[i] = matched || !there[i] ? 0 : weight;
      }
      sum[0][r] += in[0] + in[1];
      weights[0].of[n / 2][n % 2 * 2 + r] = pack<T>(in[0], in[1]);
      if constexpr (kOthers) {
        sum[1][r] += out[0] + out[1];
        weights[1].of[n / 2][n % 2 * 2 + r] = pack<T>(out[0], out[1]);
      }
    }
  }
}

// A tile that may have pairs of both populations, `count` of its keys there.
template <class T, bool kOthers, int kColumns, int kKeys>
__device__ __forceinline__ void absorb_mixed(Population<kColumns> (&x)[2], const Scores<kKeys>& s,
                                             const float (&factor)[2], const int32_t (&row_words)[2],
                                             const int32_t* key_words, int count, uint32_t values) {
  Weights<kKeys> weights[2];
  float sum[2][2];
  for (bool raised = false;; raised = true) {
    if (count < kKeys) {
      weigh_mixed<T, kOthers, true>(weights, sum, s, x, factor, row_words, key_words, count);
    } else {
      weigh_mixed<T, kOthers, false>(weights, sum, s, x, factor, row_words, key_words, count);
    }
    const float largest = fmaxf(fmaxf(sum[0][0], sum[0][1]), fmaxf(sum[1][0], sum[1][1]));
    if (raised || !__any_sync(~0u, largest > kLargestSum<T>)) break;
    float top[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}};
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t word = key_words[n * 8 + threadIdx.x % 4 * 2 + i % 2];
        const bool matched = (row_words[i / 2] & word) != 0;
        top[0][i / 2] = matched ? fmaxf(top[0][i / 2], s.of[n][i]) : top[0][i / 2];
        top[1][i / 2] = matched ? top[1][i / 2] : fmaxf(top[1][i / 2], s.of[n][i]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[0].raise(r, top[0][r] * factor[r]);
      if constexpr (kOthers) x[1].raise(r, top[1][r] * factor[r]);
    }
  }
  with_values<T, kColumns, kKeys>(values, [&](int c, int n, uint32_t b0, uint32_t b1) {
    mma_k16<T>(x[0].acc[c], weights[0].of[n], b0, b1);
    if constexpr (kOthers) mma_k16<T>(x[1].acc[c], weights[1].of[n], b0, b1);
  });
#pragma unroll
  for (int r = 0; r < 2; ++r) x[0].sum[r] += sum[0][r], x[1].sum[r] += sum[1][r];
}
