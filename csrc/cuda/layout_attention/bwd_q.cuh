// Layout attention backward, the pass over queries: a warp's rows against all keys. dq and dstrength, and what the pass
// over keys needs of a row's extremes.
#pragma once

#include "cuda/layout_attention/bwd_extremes.cuh"

namespace DENSE_ATTN_CLASS {

struct KeyTile {
  alignas(16) uint16_t k[kVisited * kStride], v[kVisited * kStride];
  alignas(16) int words[kVisited];
};
struct QueryShared {
  union {
    KeyTile stages[kStages];
    struct {
      alignas(16) uint16_t q[kBlockOwn * kStride], grad[kBlockOwn * kStride];
    } own;
  };
  int groups[2][kBlockOwn], keys[2][kBlockOwn];
};

enum class Pairs { kUniform, kMixed, kTail };  // all pairs of a tile matched or none, some, some beyond the keys

// What is known of a lane's rows before the keys are.
struct QueryRows {
  Numbers factor, add_in, add_out, start;  // start: -delta
  int words[kOwnTiles][2];
  bool there[kOwnTiles][2];

  __device__ __forceinline__ QueryRows(const LayoutAttentionBwdParams& p, const Place& place) {
    const Scratch scratch(p);
    const int first = place.first + threadIdx.x / kWarp * kOwn + lane_of_warp() / 4;
#pragma unroll
    for (int i = 0; i < 2 * kOwnTiles; ++i) {
      const int visit = first + i * 8, last = static_cast<int>(p.seqlen_q) - 1;
      const int64_t at = place.index * p.seqlen_q + min(visit, last);
      const Record record = scratch.records[at];
      factor[i / 2][i % 2] = record.factor;
      add_in[i / 2][i % 2] = record.add_in, add_out[i / 2][i % 2] = record.add_out;
      start[i / 2][i % 2] = -scratch.delta[at];
      words[i / 2][i % 2] = scratch.words[at];
      there[i / 2][i % 2] = visit <= last;
    }
  }
};

// One tile of keys further; `first`: this lane's first key there, of which those below `count` exist.
template <class T, Modulation kModulation, Pairs kPairs>
__device__ __forceinline__ void visit_keys(Sums& acc, Numbers& matched_grad, Extremes& extremes, const QueryRows& rows,
                                           const Operand (&q)[kOwnTiles], const Operand (&grad)[kOwnTiles],
                                           const KeyTile& tile, int first, int count, bool matched) {
  constexpr bool kSums = kModulation != Modulation::kMask;
  const uint32_t k = shared_address(tile.k), v = shared_address(tile.v);
  Numbers add, total = {};
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    add[i / 2][i % 2] = matched ? rows.add_in[i / 2][i % 2] : rows.add_out[i / 2][i % 2];
  }
#pragma unroll 1
  for (int group = 0; group < kVisited / 4 / kGroup; ++group) {
    Numbers high, low;
#pragma unroll
    for (int i = 0; i < 2 * kOwnTiles; ++i) {
      high[i / 2][i % 2] = extremes.best[i / 2][i % 2], low[i / 2][i % 2] = extremes.least[i / 2][i % 2];
    }
#pragma unroll
    for (int chunk = 0; chunk < kGroup / 4; ++chunk) {
      const int row = (group * kGroup / 4 + chunk) * 16;
      constexpr Numbers kNothing = {};
      Scores raw, slope;
      multiply<T>(raw, q, k + 2 * row * kStride, kNothing);
      multiply<T>(slope, grad, v + 2 * row * kStride, rows.start);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        int words[2] = {};
        if constexpr (kPairs != Pairs::kUniform) {
          const int2 two = *reinterpret_cast<const int2*>(tile.words + row + n * 8 + lane_of_warp() % 4 * 2);
          words[0] = two.x, words[1] = two.y;
        }
#pragma unroll
        for (int i = 0; i < 4 * kOwnTiles; ++i) {
          const int own = i / 4, half = i / 2 % 2, column = i % 2;
          float& x = raw[own][n][i % 4];
          if constexpr (kExtremes<kModulation> > 0) high[own][half] = fmaxf(high[own][half], x);
          if constexpr (kExtremes<kModulation> > 1) low[own][half] = fminf(low[own][half], x);
          if constexpr (kPairs == Pairs::kUniform) {
            const float weight = exp2_approx(fmaf(x, rows.factor[own][half], add[own][half]));
            x = weight * slope[own][n][i % 4];
            if constexpr (kSums) total[own][half] += x;
          } else {
            const bool meets = (words[column] & rows.words[own][half]) != 0;
            const float to_add = meets ? rows.add_in[own][half] : rows.add_out[own][half];
            float weight = exp2_approx(fmaf(x, rows.factor[own][half], to_add));
            if constexpr (kModulation == Modulation::kMask) weight = meets ? weight : 0;
            if constexpr (kPairs == Pairs::kTail) {
              weight = group * kGroup + chunk * 4 + n * 2 + column < count ? weight : 0;
            }
            x = weight * slope[own][n][i % 4];
            if constexpr (kSums) {
              if (meets) matched_grad[own][half] += x;
            }
          }
        }
      }
      uint32_t ds[kOwnTiles][4];
      pack_scores<T>(ds, raw);
      add_product<T>(acc, ds, k + 2 * row * kStride);
    }
    extremes.add<kExtremes<kModulation>>(high, low, first + group * kGroup);
  }
  if constexpr (kPairs == Pairs::kUniform && kSums) {
#pragma unroll
    for (int i = 0; i < 2 * kOwnTiles; ++i) matched_grad[i / 2][i % 2] += matched ? total[i / 2][i % 2] : 0;
  }
}

// Keys, values and words on their way. Where keys lack, the last one stands in.
template <class T, Modulation kModulation>
struct KeySource : Source<T> {
  const LayoutAttentionBwdParams& p;
  int batch, last, word_token;

  __device__ __forceinline__ KeySource(const LayoutAttentionBwdParams& params, const Place& place, int seqlen_k)
      : Source<T>(params.k, params.v, place.batch, key_head_of(params, place.head)),
        p(params),
        batch(place.batch),
        last(max(seqlen_k - 1, 0)) {}

  // The key in a place. Extremes are at their first key, so keys keep their order there.
  __device__ __forceinline__ bool ordered() const { return kExtremes<kModulation> == 0 && p.k_order.data; }
  __device__ __forceinline__ int key_at(int place) const {
    place = min(place, last);
    return ordered() ? max(min(*p.k_order.at<int32_t>(batch, place), last), 0) : place;
  }
  __device__ __forceinline__ void find(int tile) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      this->tokens[i] = min(tile * kVisited + key_of(min(this->row + i * kRowsAtOnce, kVisited - 1)), last);
    }
    word_token = min(tile * kVisited + key_of(threadIdx.x % kVisited), last);
    if (!ordered()) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) this->tokens[i] = key_at(this->tokens[i]);
    word_token = key_at(word_token);
  }
  __device__ __forceinline__ void fetch(KeyTile& tile) {
    Source<T>::fetch(shared_address(tile.k), shared_address(tile.v), p.head_dim, kVisited);
    if (threadIdx.x < kVisited) {
      copy_word_async(shared_address(tile.words + threadIdx.x), p.k_regions.at<int32_t>(batch, word_token), true);
    }
    commit_copies();
  }
};

// The block's own rows of two tensors, to registers.
template <class T, class FindRow>
__device__ __forceinline__ void fetch_own(uint16_t* to_a, uint16_t* to_b, const TensorView<4>& a,
                                          const TensorView<4>& b, const Place& place, int seqlen, int head_dim,
                                          const FindRow& find_row) {
  for (int i = threadIdx.x; i < kBlockOwn * kColumns; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns * 8, token = find_row(place.first + row);
    const bool there = column < head_dim && place.first + row < seqlen;
    const uint32_t at = 2 * (row * kStride + column);
    copy_async(shared_address(to_a) + at, a.at<const T>(place.batch, place.head, token) + (there ? column : 0), there);
    copy_async(shared_address(to_b) + at, b.at<const T>(place.batch, place.head, token) + (there ? column : 0), there);
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
}

// The first keys of the block's rows' extremes, to shared memory and to what the pass over keys reads.
template <class T, Modulation kModulation>
__device__ __forceinline__ void find_extremes(const LayoutAttentionBwdParams& p, const Place& place,
                                              QueryShared& shared, const Extremes& extremes) {
  const int lane = lane_of_warp(), own = threadIdx.x / kWarp * kOwn;
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    const float best = extremes.best[i / 2][i % 2], least = extremes.least[i / 2][i % 2];
    const int best_group = first_group(best, quad_max(best), extremes.best_at[i / 2][i % 2]);
    const int least_group = first_group(least, quad_min(least), extremes.least_at[i / 2][i % 2]);
    if (lane % 4 == 0) {
      shared.groups[0][own + i * 8 + lane / 4] = best_group;
      shared.groups[1][own + i * 8 + lane / 4] = least_group;
    }
  }
  __syncwarp();
  const T* k = p.k.at<const T>(place.batch, key_head_of(p, place.head));
  const Scratch scratch(p);
  const float sign = p.scale < 0 ? -1 : 1;
  const int seqlen_k = keys_there(p, place.batch);
#pragma unroll 1
  for (int i = 0; i < 2 * kOwnTiles * kExtremes<kModulation>; ++i) {
    const int which = i / (2 * kOwnTiles), row = own + i % (2 * kOwnTiles) * 8 + lane / 4, visit = place.first + row;
    const T* q = p.q.at<const T>(place.batch, place.head, row_at(p, place.batch, visit));
    const int key =
        first_key(q, k, p.k.strides[2], shared.groups[which][row], seqlen_k, p.head_dim, which == 0 ? sign : -sign);
    if (lane % 4 == 0) {
      shared.keys[which][row] = key;
      if (visit < p.seqlen_q) scratch.places[(2 * place.index + which) * p.seqlen_q + visit] = key;
    }
  }
  __syncwarp();
}

// Finishes a row: its gradients through the extremes, dstrength, and dq.
template <class T, Modulation kModulation>
__device__ __forceinline__ void store_row_of_queries(const LayoutAttentionBwdParams& p, const Place& place,
                                                     const QueryShared& shared, int row,
                                                     const float (&acc)[kColumns][4], int half, float grad_in,
                                                     float raw_grad) {
  const int lane = lane_of_warp(), visit = place.first + row;
  if (visit >= p.seqlen_q) return;
  const int token = row_at(p, place.batch, visit);
  const float scale = fabsf(static_cast<float>(p.scale)), c = row_strength(p, place.batch, place.head, token);
  const float lse_grad = row_gradient<T>(p, place.batch, place.head, token), back = exp2f(-lift_of<T>(p.scale));
  const float4 stats = *reinterpret_cast<const float4*>(p.stats.at<float>(place.batch, place.head, token));
  grad_in *= back, raw_grad *= back;
  float dstrength = 0;
  if constexpr (kModulation == Modulation::kRange) {
    dstrength = scale * (stats.x * grad_in + stats.y * (lse_grad - grad_in) - raw_grad);
  } else if constexpr (kModulation == Modulation::kMax) {
    dstrength = scale * (stats.x * grad_in);
  } else if constexpr (kModulation == Modulation::kBias) {
    dstrength = grad_in;
  }
  const bool keys = keys_there(p, place.batch) > 0;
  if (!keys) dstrength = 0;  // of a row without keys extremes are no numbers
  const float through[2] = {keys ? c * grad_in : 0, keys ? c * (lse_grad - grad_in) : 0};
  if (lane % 4 == 0) {
    *p.dstrength.at<float>(place.batch, place.head, token) = dstrength;
    const Scratch scratch(p);
#pragma unroll
    for (int i = 0; i < kExtremes<kModulation>; ++i) {
      scratch.through[(2 * place.index + i) * p.seqlen_q + visit] = through[i];
    }
  }
  const float signed_scale = static_cast<float>(p.scale);
  const float temperature = kModulation == Modulation::kRange ? 1 - c : 1;
  T* dq = p.dq.at<T>(place.batch, place.head, token);
  const T* k = p.k.at<const T>(place.batch, key_head_of(p, place.head));
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const int column = n * 8 + lane % 4 * 2;
    if (column >= p.head_dim) break;
    float2 x = {acc[n][2 * half] * (temperature * signed_scale * back),
                acc[n][2 * half + 1] * (temperature * signed_scale * back)};
#pragma unroll
    for (int i = 0; i < kExtremes<kModulation>; ++i) {
      if (!keys) break;
      const float2 key = load_pair(k + shared.keys[i][row] * p.k.strides[2] + column);
      x.x = fmaf(signed_scale * through[i], key.x, x.x), x.y = fmaf(signed_scale * through[i], key.y, x.y);
    }
    *reinterpret_cast<uint32_t*>(dq + column) = pack<T>(x.x, x.y);
  }
}

template <class T, Modulation kModulation>
__global__ void __launch_bounds__(kThreads, 2)
    layout_attention_bwd_q_kernel(const __grid_constant__ LayoutAttentionBwdParams p) {
  extern __shared__ __align__(16) char bytes[];
  QueryShared& shared = *reinterpret_cast<QueryShared*>(bytes);
  const Place place(p, p.seqlen_q, kBlockOwn);
  const int own = threadIdx.x / kWarp * kOwn;
  fetch_own<T>(shared.own.q, shared.own.grad, p.q, p.grad_out, place, p.seqlen_q, p.head_dim,
               [&](int visit) { return row_at(p, place.batch, visit); });
  Operand q[kOwnTiles], grad[kOwnTiles];
#pragma unroll
  for (int tile = 0; tile < kOwnTiles; ++tile) {
    load_operand<T>(q[tile], shared_address(shared.own.q + (own + 16 * tile) * kStride), p.scale < 0);
    load_operand<T>(grad[tile], shared_address(shared.own.grad + (own + 16 * tile) * kStride), false);
  }
  const QueryRows rows(p, place);
  const Common common = common_words(rows.words, rows.there);
  __syncthreads();

  Sums acc = {};
  Numbers matched_grad = {};
  Extremes extremes;
  const int tiles = (keys_there(p, place.batch) + kVisited - 1) / kVisited;
  KeySource<T, kModulation> source(p, place, keys_there(p, place.batch));
  source.find(0);
  if (tiles > 0) source.fetch(shared.stages[0]);
  source.find(1);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    if (tile + 1 < tiles) source.fetch(shared.stages[(tile + 1) % kStages]);
    source.find(tile + 2);
    const KeyTile& stage = shared.stages[tile % kStages];
    const int first = tile * kVisited + lane_of_warp() % 4 * (kVisited / 4), count = source.last + 1 - first;
    bool matched, others;
    common.judge(stage.words, matched, others);
    if (kModulation == Modulation::kMask && others) continue;
    if ((tile + 1) * kVisited > source.last + 1) {
      visit_keys<T, kModulation, Pairs::kTail>(acc, matched_grad, extremes, rows, q, grad, stage, first, count, false);
    } else if (matched || others) {
      visit_keys<T, kModulation, Pairs::kUniform>(acc, matched_grad, extremes, rows, q, grad, stage, first, count,
                                                  matched);
    } else {
      visit_keys<T, kModulation, Pairs::kMixed>(acc, matched_grad, extremes, rows, q, grad, stage, first, count, false);
    }
  }
  if constexpr (kExtremes<kModulation> > 0) find_extremes<T, kModulation>(p, place, shared, extremes);
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    const int tile = i / 2, half = i % 2;
    float raw_grad = 0;  // the sum of ds' times the raw scores
    if constexpr (kModulation == Modulation::kRange) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        T two[2];
        __builtin_memcpy(two, &q[tile].a[n / 2][n % 2 * 2 + half], sizeof(uint32_t));
        raw_grad = fmaf(acc[tile][n][2 * half], static_cast<float>(two[0]), raw_grad);
        raw_grad = fmaf(acc[tile][n][2 * half + 1], static_cast<float>(two[1]), raw_grad);
      }
      raw_grad = quad_sum(raw_grad);
    }
    store_row_of_queries<T, kModulation>(p, place, shared, own + i * 8 + lane_of_warp() / 4, acc[tile], half,
                                         quad_sum(matched_grad[tile][half]), raw_grad);
  }
}

}  // namespace DENSE_ATTN_CLASS
