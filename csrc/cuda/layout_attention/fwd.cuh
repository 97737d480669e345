// Layout attention forward for any number of keys: one loop over tiles of keys with both populations at hand. A warp
// owns 16 query rows and finds out from the words whether a tile is of one population for all of them. Weights are
// measured from a shift that a population keeps until they could pass what their dtype or a sum holds.
#pragma once

#include "cuda/head_dims.h"
#include "cuda/layout_attention/fwd_steps.cuh"
#include "cuda/layout_attention/rows.cuh"

namespace DENSE_ATTN_CLASS {

constexpr int kHeadDim = DENSE_ATTN_HEAD_DIM;
constexpr int kValueDim = kHeadDim == 256 ? 128 : kHeadDim;  // two programs share the values' columns of the widest
constexpr int kWarps = 8, kThreads = kWarps * kWarp, kBlockM = kWarps * 16;
constexpr int kBlockN = kHeadDim <= 128 ? 64 : 32, kStages = kHeadDim <= 128 ? 3 : 4;
constexpr int kStepN = kHeadDim <= 96 ? 64 : kHeadDim <= 128 ? 32 : 16;  // keys whose scores are held at once

template <class T>
using Tiles = KeyTiles<T, kHeadDim, kValueDim, kBlockN, kStages, kThreads>;
static_assert(kStages * Tiles<__half>::kStageBytes <= 99 << 10, "what a block has on 8.6, 8.9 and 12.0");

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
  __device__ __forceinline__ void meet(const Scores<kStepN>& s) {
#pragma unroll
    for (int n = 0; n < kStepN / 8; ++n) {
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

// Whether a key of the row has no weight that is a number, as the rule says with infinite extremes. The sums of a
// population do not tell: a score of -inf has left nothing in them.
template <class T, Modulation kModulation>
__device__ __forceinline__ bool is_undefined(const Rows<T, kModulation>& rows, int r, const RowRule& rule) {
  const LayoutAttentionParams& p = rows.p;
  if (kModulation > Modulation::kMax || (is_finite(rule.offset_in) && is_finite(rule.offset_out))) return false;
  const T* q = rows.queries(r);
  bool found = false;
  for (int key = threadIdx.x % 4; key < keys_there(p, rows.batch); key += 4) {
    const T* k = p.k.at<const T>(rows.batch, key_head_of(p, rows.head), key);
    float raw = 0;
    for (int i = 0; i < p.head_dim; ++i) raw = fmaf(static_cast<float>(q[i]), static_cast<float>(k[i]), raw);
    const bool matched = (rows.words(r) & *p.k_regions.at<const int32_t>(rows.batch, key)) != 0;
    const float exponent = (p.scale < 0 ? -raw : raw) * rule.factor + (matched ? rule.offset_in : rule.offset_out);
    found |= isnan(exponent);
  }
  return found;
}

// Merges both populations of a row, now that its extremes are known, and stores what is asked for.
template <class T, Modulation kModulation>
__device__ __forceinline__ void store_rows(const Rows<T, kModulation>& rows, const Population<kValueDim> (&x)[2],
                                           const Extremes& extremes) {
  const LayoutAttentionParams& p = rows.p;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float high = quad_max(extremes.high[r]), low = quad_min(extremes.low[r]);
    const bool turned = rows.factor(r) < 0;
    float raw_max = turned ? -low : high, raw_min = turned ? -high : low;
    if constexpr (kModulation > Modulation::kMax) raw_max = raw_min = 0;  // exponents are measured from anywhere
    const RowRule rule = row_rule<kModulation>(rows.strength(r), rows.scale(), raw_max, raw_min);
    const float sum_in = quad_sum(x[0].sum[r]), sum_out = quad_sum(x[1].sum[r]);
    const RowMerge merge = merge_states(rule, sum_in, x[0].shift[r], sum_out, x[1].shift[r]);
    const float undefined = quad_max(is_undefined(rows, r, rule));
    const float sum = undefined ? NAN : sum_in * merge.weight_in + sum_out * merge.weight_out;
    if (!rows.exist(r)) continue;
    const float inverse = sum == 0 ? 0 : 1 / sum;
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
  extern __shared__ __align__(128) char smem[];
  const int row_tiles = (static_cast<int>(p.seqlen_q) + kBlockM - 1) / kBlockM;
  const int index = blockIdx.x / row_tiles, num_heads = p.num_heads;
  const int first = blockIdx.x % row_tiles * kBlockM + threadIdx.x / kWarp * 16;
  const Rows<T, kModulation> rows{p, index / num_heads, index % num_heads, first};
  const int seqlen_k = keys_there(p, rows.batch);
  Tiles<T> tiles(p, smem, rows.batch, key_head_of(p, rows.head), blockIdx.y, seqlen_k);
  const int count = (seqlen_k + kBlockN - 1) / kBlockN;
#pragma unroll
  for (int tile = 0; tile < kStages - 1; ++tile) {
    if (tile < count) tiles.template fetch<true>(tile, tile * Tiles<T>::kStageBytes, 0);
    commit_copies();
  }

  const RowWords words = {{rows.words(0), rows.words(1)}};
  const int32_t any_word = __reduce_or_sync(~0u, words.of[0] | words.of[1]);
  const int32_t all_words = __reduce_and_sync(~0u, words.of[0] & words.of[1]);
  const float factors[2] = {rows.factor(0), rows.factor(1)}, factor[2] = {fabsf(factors[0]), fabsf(factors[1])};
  const bool plain = kOthers && __all_sync(~0u, rows.strength(0) == 0 && rows.strength(1) == 0);
  const bool negate = p.scale < 0, turned[2] = {(factors[0] < 0) != negate, (factors[1] < 0) != negate};
  Queries<T, kHeadDim> q;
  q.load({rows.queries(0), rows.queries(1)}, turned, p.head_dim);
  Population<kValueDim> x[2];
  x[0].reset(), x[1].reset();
  Extremes extremes;
  const MatrixLanes lanes = MatrixLanes::of<kHeadDim, kValueDim>();
  const bool idle = __all_sync(~0u, first >= static_cast<int>(p.seqlen_q));  // a vote is the same to all lanes

  constexpr uint32_t kEnd = kStages * Tiles<T>::kStageBytes;
  uint32_t stage = 0, before = kEnd - Tiles<T>::kStageBytes;
  for (int tile = 0; tile < count; ++tile) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the tile is there, and nobody reads the one before
    if (tile + kStages - 1 < count) tiles.template fetch<false>(tile + kStages - 1, before, stage);
    commit_copies();
    const char* at = smem + stage;
    before = stage;
    stage = stage == kEnd - Tiles<T>::kStageBytes ? 0 : stage + Tiles<T>::kStageBytes;
    const int32_t* key_words = reinterpret_cast<const int32_t*>(at + Tiles<T>::kWords);
    const int2 two = reinterpret_cast<const int2*>(key_words)[threadIdx.x % (kBlockN / 2)];
    const int32_t any_key = __reduce_or_sync(~0u, two.x | two.y), all_keys = __reduce_and_sync(~0u, two.x & two.y);
    const bool none = (any_key & any_word) == 0, all = (all_keys & all_words) != 0;
    if (idle || (!kOthers && none)) continue;

    const uint32_t keys = shared_address(at), values = keys + Tiles<T>::kValues;
    const bool whole = tile < seqlen_k / kBlockN, matched = whole && (all || plain), others = whole && none;
#pragma unroll 1
    for (int step = 0; step < kBlockN; step += kStepN) {
      const Step<T, kHeadDim, kValueDim, kStepN> these{q, lanes, factor, keys + step * Tiles<T>::kKeyPitch,
                                                       values + step * Tiles<T>::kValuePitch};
      Scores<kStepN> s;
      these.score(s);
      extremes.meet<kModulation>(s);
      if (matched) {
        these.absorb(x[0], s);
      } else if (kOthers && others) {
        these.absorb(x[1], s);
      } else {
        const char* own = at + Tiles<T>::kWords + 4 * step + lanes.words;
        const int left = seqlen_k - tile * kBlockN - step;
        these.template absorb_mixed<kOthers>(x, s, words, reinterpret_cast<const int32_t*>(own), left);
      }
    }
  }
  store_rows(rows, x, extremes);
}

}  // namespace DENSE_ATTN_CLASS
