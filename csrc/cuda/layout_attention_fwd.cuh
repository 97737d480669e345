// Layout attention forward for any number of keys: one loop over tiles of keys with both populations at hand. A warp
// owns 16 query rows and finds out from the words whether a tile is of one population for all of them. Weights are
// measured from a shift that a population keeps until they could pass what their dtype or a sum holds.
#pragma once

#include "cuda/head_dims.h"
#include "cuda/layout_attention_fwd_steps.cuh"
#include "cuda/layout_attention_rows.cuh"

namespace DENSE_ATTN_CLASS {

constexpr int kHeadDim = DENSE_ATTN_HEAD_DIM;
constexpr int kValueDim = kHeadDim == 256 ? 128 : kHeadDim;  // two programs share the values' columns of the widest
constexpr int kWarps = 8, kThreads = kWarps * kWarp, kBlockM = kWarps * 16;
constexpr int kBlockN = kHeadDim <= 96 ? 64 : 32, kStages = kHeadDim <= 96 ? 3 : 4;

template <class T>
using Tiles = KeyTiles<T, kHeadDim, kValueDim, kBlockN, kThreads>;

// What a warp knows of its query rows.
template <class T, Modulation kModulation>
struct Rows {
  const LayoutAttentionParams& p;
  int batch, head, first;

  __device__ __forceinline__ bool exist(int r) const { return place(r) < p.seqlen_q; }
  __device__ __forceinline__ int place(int r) const { return first + threadIdx.x % kWarp / 4 + 8 * r; }
  __device__ __forceinline__ int row(int r) const { return row_at(p, batch, place(r)); }
  __device__ __forceinline__ int32_t words(int r) const { return row_words(p, batch, row(r)); }
  __device__ __forceinline__ float strength(int r) const { return row_strength(p, batch, head, row(r)); }
  __device__ __forceinline__ float scale() const { return fabsf(static_cast<float>(p.scale)); }
  __device__ __forceinline__ float factor(int r) const { return row_factor<kModulation>(strength(r), scale()); }
  __device__ __forceinline__ const T* queries(int r) const { return p.q.at<const T>(batch, head, row(r)); }
};

// The largest and the smallest score of both rows, of this thread's columns.
struct Extremes {
  float high[2] = {-INFINITY, -INFINITY}, low[2] = {INFINITY, INFINITY};

  template <Modulation kModulation>
  __device__ __forceinline__ void meet(const Scores<kBlockN>& s) {
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float a = s.of[n][2 * r], b = s.of[n][2 * r + 1];
        if constexpr (kModulation <= Modulation::kMax) high[r] = fmaxf(high[r], fmaxf(a, b));
        if constexpr (kModulation == Modulation::kRange) low[r] = fminf(low[r], fminf(a, b));
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void store_pair(T* at, uint32_t pair) {
  if (reinterpret_cast<uintptr_t>(at) % 4 == 0) {
    *reinterpret_cast<uint32_t*>(at) = pair;
  } else {
    reinterpret_cast<uint16_t*>(at)[0] = pair, reinterpret_cast<uint16_t*>(at)[1] = pair >> 16;
  }
}

// Merges both populations of a row, now that its extremes are known, and stores what is asked for.
template <class T, Modulation kModulation>
__device__ __forceinline__ void store_rows(const Rows<T, kModulation>& rows, Population<kValueDim> (&x)[2],
                                           const Extremes& extremes, bool plain) {
  const LayoutAttentionParams& p = rows.p;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float high = quad_max(extremes.high[r]), low = quad_min(extremes.low[r]);
    const float sum_in = quad_sum(x[0].sum[r]), sum_out = quad_sum(x[1].sum[r]);
    if (!rows.exist(r)) continue;
    const float strength = rows.strength(r);
    const bool turned = rows.factor(r) < 0;
    float raw_max = turned ? -low : high, raw_min = turned ? -high : low;
    if constexpr (kModulation > Modulation::kMax) raw_max = raw_min = 0;  // exponents are measured from anywhere
    const RowRule rule = row_rule<kModulation>(strength, rows.scale(), raw_max, raw_min);
    const RowMerge merge = merge_states(rule, sum_in, x[0].shift[r], sum_out, x[1].shift[r]);
    const float sum = sum_in * merge.weight_in + sum_out * merge.weight_out, inverse = sum == 0 ? 0 : 1 / sum;
    const float share_in = merge.weight_in * inverse, share_out = merge.weight_out * inverse;
    const int row = rows.row(r), column = threadIdx.x % 4 * 2, begin = blockIdx.y * kValueDim;
    T* out = p.out.at<T>(rows.batch, rows.head, row, begin + column);
#pragma unroll
    for (int c = 0; c < kValueDim / 8; ++c) {
      if (begin + c * 8 >= p.head_dim) break;
      const float a = x[0].acc[c][2 * r] * share_in + x[1].acc[c][2 * r] * share_out;
      const float b = x[0].acc[c][2 * r + 1] * share_in + x[1].acc[c][2 * r + 1] * share_out;
      store_pair(out + c * 8, pack<T>(a, b));
    }
    if (threadIdx.x % 4 == 0 && begin == 0) {
      store_row_numbers<kModulation>(p, rows.batch, rows.head, row, rule, raw_max, raw_min, merge.largest, sum);
    }
  }
}

template <class T, Modulation kModulation>
__global__ void __launch_bounds__(kThreads, 1)
    layout_attention_fwd_kernel(const __grid_constant__ LayoutAttentionParams p) {
  constexpr bool kOthers = kModulation != Modulation::kMask;
  extern __shared__ __align__(16) char smem[];
  const int row_tiles = (static_cast<int>(p.seqlen_q) + kBlockM - 1) / kBlockM;
  const int index = blockIdx.x / row_tiles, num_heads = p.num_heads, seqlen_k = p.seqlen_k;
  const int first = blockIdx.x % row_tiles * kBlockM + threadIdx.x / kWarp * 16;
  const Rows<T, kModulation> rows{p, index / num_heads, index % num_heads, first};
  Tiles<T> tiles(p, smem, rows.batch, rows.head, blockIdx.y);
  const int count = (seqlen_k + kBlockN - 1) / kBlockN;
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < count) tiles.look_up(tile), tiles.fetch(tile);
    commit_copies();
  }
  if (kStages - 1 < count) tiles.look_up(kStages - 1);

  const int32_t words[2] = {rows.words(0), rows.words(1)};
  const int32_t any_word = __reduce_or_sync(~0u, words[0] | words[1]);
  const int32_t all_words = __reduce_and_sync(~0u, words[0] & words[1]);
  const float factors[2] = {rows.factor(0), rows.factor(1)}, factor[2] = {fabsf(factors[0]), fabsf(factors[1])};
  const bool plain = kOthers && __all_sync(~0u, rows.strength(0) == 0 && rows.strength(1) == 0);
  const bool negate = p.scale < 0, turned[2] = {(factors[0] < 0) != negate, (factors[1] < 0) != negate};
  Queries<T, kHeadDim> q;
  q.load({rows.queries(0), rows.queries(1)}, turned, p.head_dim);
  Population<kValueDim> x[2];
  x[0].reset(), x[1].reset();
  Extremes extremes;

  int stage = 0;
  for (int tile = 0; tile < count; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile is there, and nobody reads the one before
    if (tile + kStages - 1 < count) {
      tiles.fetch(stage == 0 ? kStages - 1 : stage - 1);
      if (tile + kStages < count) tiles.look_up(tile + kStages);
    }
    commit_copies();
    const char* at = smem + stage * Tiles<T>::kStageBytes;
    stage = stage == kStages - 1 ? 0 : stage + 1;
    const int32_t* key_words = reinterpret_cast<const int32_t*>(at + Tiles<T>::kWords);
    int32_t any_key = 0, all_keys = -1;
#pragma unroll
    for (int i = threadIdx.x % kWarp; i < kBlockN; i += kWarp) any_key |= key_words[i], all_keys &= key_words[i];
    any_key = __reduce_or_sync(~0u, any_key), all_keys = __reduce_and_sync(~0u, all_keys);
    const bool none = (any_key & any_word) == 0, all = (all_keys & all_words) != 0;
    if (first >= p.seqlen_q || (!kOthers && none)) continue;

    const int left = seqlen_k - tile * kBlockN;
    const uint32_t values = shared_address(at + Tiles<T>::kValues);
    Scores<kBlockN> s;
    score<T, kHeadDim, kBlockN>(s, q, shared_address(at));
    extremes.meet<kModulation>(s);
    if (left >= kBlockN && (all || plain)) {
      absorb<T, kValueDim, kBlockN>(x[0], s, factor, values);
    } else if (kOthers && left >= kBlockN && none) {
      absorb<T, kValueDim, kBlockN>(x[1], s, factor, values);
    } else {
      absorb_mixed<T, kOthers, kValueDim, kBlockN>(x, s, factor, words, key_words, left, values);
    }
  }
  store_rows(rows, x, extremes, plain);
}

}  // namespace DENSE_ATTN_CLASS
