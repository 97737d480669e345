// Steps of a warp's 16 query rows over a tile of keys. A thread has rows lane / 4 and lane / 4 + 8 of every product.
#pragma once

#include "cuda/layout_attention/fwd_loads.cuh"
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

// Where a lane's rows of matrix loads lie in a tile: of four matrices for sixteen keys or for sixteen columns of
// values, and of four in the last eight columns, which are four times eight rows. And where the words of its columns
// begin.
struct MatrixLanes {
  uint32_t keys, keys_left, values, values_left, words;

  template <int kHeadDim, int kValueDim>
  static __device__ __forceinline__ MatrixLanes of() {
    const uint32_t lane = threadIdx.x % kWarp;
    return {kept(chunk_at<kHeadDim>(lane / 16 * 8 + lane % 8, lane / 8 % 2)),
            kept(chunk_at<kHeadDim>(lane, kHeadDim / 8 - 1)), kept(chunk_at<kValueDim>(lane % 16, lane / 16)),
            kept(chunk_at<kValueDim>(lane, kValueDim / 8 - 1)), kept(lane % 4 * 8)};
  }
};

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
  // Measures the weights from an exponent that is at least as large as that of `top`, this thread's largest score.
  __device__ __forceinline__ void raise(int r, float top, float factor) {
    top = quad_max(top);
    const float exponent = top == -INFINITY ? kNoShift : fminf(top * factor, -kNoShift);
    const float raised = fmaxf(shift[r], exponent), alpha = exp2_approx(shift[r] - raised);
    shift[r] = raised;
    sum[r] *= alpha;
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) acc[c][2 * r] *= alpha, acc[c][2 * r + 1] *= alpha;
  }
};

// Words of a thread's two rows.
struct RowWords {
  int32_t of[2];
};

// Some keys of a tile, and what a warp has of its rows to meet them with.
template <class T, int kHeadDim, int kValueDim, int kKeys>
struct Step {
  const Queries<T, kHeadDim>& q;
  const MatrixLanes& lanes;
  const float (&factor)[2];  // of raw scores, in exponents of 2, at least 0
  uint32_t keys, values;     // in shared memory

  __device__ __forceinline__ void score(Scores<kKeys>& s) const {
    constexpr int kPitch = kRowPitch<kHeadDim>;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) s.of[n][0] = s.of[n][1] = s.of[n][2] = s.of[n][3] = 0;
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        uint32_t b[4];
        load_matrix_x4(b, further<kHeadDim>(keys + lanes.keys, i) + n * 16 * kPitch);
        mma_k16<T>(s.of[2 * n], q.wide[i], b[0], b[1]);
        mma_k16<T>(s.of[2 * n + 1], q.wide[i], b[2], b[3]);
      }
    }
    if constexpr (kHeadDim % 16) {
#pragma unroll
      for (int n = 0; n < kKeys / 32; ++n) {
        uint32_t b[4];
        load_matrix_x4(b, keys + lanes.keys_left + n * 32 * kPitch);
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_k8<T>(s.of[4 * n + i], q.narrow[0], q.narrow[1], b[i]);
      }
    }
  }

  // Hands out the operands of a product with the values: sixteen rows of eight columns, numbered.
  template <class Accumulate>
  __device__ __forceinline__ void with_values(const Accumulate& accumulate) const {
    constexpr int kPitch = kRowPitch<kValueDim>;
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
      for (int c = 0; c < kValueDim / 16; ++c) {
        uint32_t b[4];
        load_matrix_x4_trans(b, further<kValueDim>(values + lanes.values, c) + n * 16 * kPitch);
        accumulate(2 * c, n, b[0], b[1]);
        accumulate(2 * c + 1, n, b[2], b[3]);
      }
    }
    if constexpr (kValueDim % 16) {
#pragma unroll
      for (int n = 0; n < kKeys / 32; ++n) {
        uint32_t b[4];
        load_matrix_x4_trans(b, values + lanes.values_left + n * 32 * kPitch);
        accumulate(kValueDim / 8 - 1, 2 * n, b[0], b[1]);
        accumulate(kValueDim / 8 - 1, 2 * n + 1, b[2], b[3]);
      }
    }
  }

  // Keys that are all of one population to all rows. Scores are had again where the shift must move, so that nobody
  // holds them for it.
  __device__ __forceinline__ void absorb(Population<kValueDim>& x, Scores<kKeys>& s) const {
    Weights<kKeys> weights;
    float sum[2];
    weigh(weights, sum, s, x);
    if (__any_sync(~0u, fmaxf(sum[0], sum[1]) > kLargestSum<T>)) {
      score(s);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s.of[n][2 * r], s.of[n][2 * r + 1]));
        x.raise(r, top, factor[r]);
      }
      weigh(weights, sum, s, x);
    }
    x.sum[0] += sum[0], x.sum[1] += sum[1];
    with_values([&](int c, int n, uint32_t b0, uint32_t b1) { mma_k16<T>(x.acc[c], weights.of[n], b0, b1); });
  }

  __device__ __forceinline__ void weigh(Weights<kKeys>& weights, float (&sum)[2], const Scores<kKeys>& s,
                                        const Population<kValueDim>& x) const {
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
  }

  // Keys of both populations, `count` of them there.
  template <bool kOthers>
  __device__ __forceinline__ void absorb_mixed(Population<kValueDim> (&x)[2], Scores<kKeys>& s,
                                               const RowWords& row_words, const int32_t* key_words, int count) const {
    Weights<kKeys> weights[2];
    float sum[2][2];
    bool weighed = false;
    if (count >= kKeys) {
      weigh_mixed<kOthers, false>(weights, sum, s, x, row_words, key_words, count);
      const float largest = fmaxf(fmaxf(sum[0][0], sum[0][1]), fmaxf(sum[1][0], sum[1][1]));
      weighed = !__any_sync(~0u, largest > kLargestSum<T>);
    }
    if (!weighed) {
      score(s);
      raise_mixed<kOthers>(x, s, row_words, key_words);
      weigh_mixed<kOthers, true>(weights, sum, s, x, row_words, key_words, count);
    }
    with_values([&](int c, int n, uint32_t b0, uint32_t b1) {
      mma_k16<T>(x[0].acc[c], weights[0].of[n], b0, b1);
      if constexpr (kOthers) mma_k16<T>(x[1].acc[c], weights[1].of[n], b0, b1);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) x[0].sum[r] += sum[0][r], x[1].sum[r] += sum[1][r];
  }

  // The weights of both populations, 0 where a pair is of the other one or, in a tail, a key is not there.
  template <bool kOthers, bool kTail>
  __device__ __forceinline__ void weigh_mixed(Weights<kKeys> (&weights)[2], float (&sum)[2][2], const Scores<kKeys>& s,
                                              const Population<kValueDim> (&x)[2], const RowWords& row_words,
                                              const int32_t* key_words, int count) const {
    sum[0][0] = sum[0][1] = sum[1][0] = sum[1][1] = 0;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const int2 words = *reinterpret_cast<const int2*>(key_words + n * 8);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float in[2], out[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool matched = (row_words.of[r] & (i ? words.y : words.x)) != 0;
          const bool there = !kTail || n * 8 + i < count - static_cast<int>(threadIdx.x % 4 * 2);
          const float shift = matched || !kOthers ? x[0].shift[r] : x[1].shift[r];
          const float weight = exp2_approx(fmaf(s.of[n][2 * r + i], factor[r], -shift));
          in[i] = matched && there ? weight : 0;
          out[i] = matched || !there ? 0 : weight;
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

  template <bool kOthers>
  __device__ __forceinline__ void raise_mixed(Population<kValueDim> (&x)[2], const Scores<kKeys>& s,
                                              const RowWords& row_words, const int32_t* key_words) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top_in = -INFINITY, top_out = -INFINITY;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool matched = (row_words.of[r] & key_words[n * 8 + i]) != 0;
          const float score = s.of[n][2 * r + i];
          top_in = matched ? fmaxf(top_in, score) : top_in;
          top_out = matched ? top_out : fmaxf(top_out, score);
        }
      }
      x[0].raise(r, top_in, factor[r]);
      if constexpr (kOthers) x[1].raise(r, top_out, factor[r]);
    }
  }
};
