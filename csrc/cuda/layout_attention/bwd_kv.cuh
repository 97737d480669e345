// Layout attention backward, the pass over keys: a warp's keys against all rows. dk and dv, from scores [keys, rows].
#pragma once

#include "cuda/layout_attention/bwd_q.cuh"

namespace DENSE_ATTN_CLASS {

// Operands of keys and of values, and two sums, would not all fit in registers.
constexpr bool kValuesShared = kHeadDim == 64 || kHeadDim > 128;

struct RowTile {
  alignas(16) uint16_t q[kVisited * kStride], grad[kVisited * kStride];
  alignas(16) Record records[kVisited];
  alignas(16) int words[kVisited];
};
struct KeyShared {
  union {
    RowTile stages[kStages];
    struct {
      alignas(16) uint16_t keys[kBlockOwn * kStride], values[kValuesShared ? 8 : kBlockOwn * kStride];
    } own;
  };
  alignas(16) uint16_t kept[kValuesShared ? kBlockOwn * kStride : 8];

  __device__ __forceinline__ uint16_t* values() { return kValuesShared ? kept : own.values; }
};
static_assert(sizeof(Listed) <= sizeof(RowTile));

// One tile of rows further. Gradients of scores have their row's factor.
template <class T, Modulation kModulation, Pairs kPairs>
__device__ __forceinline__ void visit_rows(Sums& dk, Sums& dv, const Operand (&k)[kOwnTiles],
                                           const Operand (&v)[kOwnTiles], uint32_t own_values,
                                           const int (&key_words)[kOwnTiles][2], const RowTile& tile, bool matched) {
  const uint32_t q = shared_address(tile.q), grad = shared_address(tile.grad);
#pragma unroll 1
  for (int row = 0; row < kVisited; row += 16) {
    constexpr Numbers kNothing = {};
    Scores weights, ds;
    multiply<T>(weights, k, q + 2 * row * kStride, kNothing);
    if constexpr (kValuesShared) {
      Operand values[kOwnTiles];
#pragma unroll
      for (int own = 0; own < kOwnTiles; ++own) {
        load_operand<T>(values[own], own_values + 2 * own * 16 * kStride, false);
      }
      multiply<T>(ds, values, grad + 2 * row * kStride, kNothing);
    } else {
      multiply<T>(ds, v, grad + 2 * row * kStride, kNothing);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2, column = i % 2, at = row + n * 8 + lane_of_warp() % 4 * 2 + column;
      const float4 record = *reinterpret_cast<const float4*>(tile.records + at);
      const float uniform = matched ? record.y : record.z;
      const int words = kPairs == Pairs::kUniform ? 0 : tile.words[at];
#pragma unroll
      for (int half = 0; half < 2 * kOwnTiles; ++half) {
        const int own = half / 2, place = half % 2 * 2 + column;
        float& x = weights[own][n][place];
        if constexpr (kPairs == Pairs::kUniform) {
          x = exp2_approx(fmaf(x, record.x, uniform));
        } else {
          const bool meets = (words & key_words[own][half % 2]) != 0;
          x = exp2_approx(fmaf(x, record.x, meets ? record.y : record.z));
          if constexpr (kModulation == Modulation::kMask) x = meets ? x : 0;
        }
        ds[own][n][place] = x * fmaf(ds[own][n][place], record.x, record.w);
      }
    }
    uint32_t packed[kOwnTiles][4];
    pack_scores<T>(packed, weights);
    add_product<T>(dv, packed, grad + 2 * row * kStride);
    pack_scores<T>(packed, ds);
    add_product<T>(dk, packed, q + 2 * row * kStride);
  }
}

// Rows of queries and of their gradients, records and words on their way.
template <class T>
struct RowSource : Source<T> {
  const LayoutAttentionBwdParams& p;
  const Record* records;
  const int* words;
  int batch;

  __device__ __forceinline__ RowSource(const LayoutAttentionBwdParams& params, const Place& place)
      : Source<T>(params.q, params.grad_out, place.batch, place.head), p(params), batch(place.batch) {
    const Scratch scratch(params);
    records = scratch.records + place.index * params.seqlen_q;
    words = scratch.words + place.index * params.seqlen_q;
  }
  __device__ __forceinline__ void find(int tile) {
    const int last = static_cast<int>(p.seqlen_q) - 1;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      this->tokens[i] = min(tile * kVisited + min(this->row + i * kRowsAtOnce, kVisited - 1), last);
    }
    if (!p.q_order.data) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) this->tokens[i] = row_at(p, batch, this->tokens[i]);
  }
  // Zeros of rows that are not there, whose pairs then add nothing.
  __device__ __forceinline__ void fetch(RowTile& tile, int first) {
    const int count = static_cast<int>(p.seqlen_q) - first;
    Source<T>::fetch(shared_address(tile.q), shared_address(tile.grad), p.head_dim, count);
    if (threadIdx.x < kVisited) {
      const int row = threadIdx.x;
      const bool there = row < count;
      copy_async(shared_address(tile.records + row), records + (there ? first + row : 0), there);
      copy_word_async(shared_address(tile.words + row), words + (there ? first + row : 0), there);
    }
    commit_copies();
  }
};

// dk plus the gradients through the extremes that are at the block's keys: a row has two among all keys, so that a list
// of those that are here spares two comparisons a score.
template <class T, Modulation kModulation>
__device__ __forceinline__ void add_extremes(Sums& dk, const LayoutAttentionBwdParams& p, const Place& place,
                                             KeyShared& shared, RowSource<T>& source) {
  Listed& listed = *reinterpret_cast<Listed*>(shared.stages + 1);
  RowTile& tile = shared.stages[0];
  const Scratch scratch(p);
  const int seqlen = p.seqlen_q, count = kExtremes<kModulation> * seqlen, lane = lane_of_warp();
  const int* places = scratch.places + 2 * place.index * seqlen;
  const float* through = scratch.through + 2 * place.index * seqlen;
  const float factor = fabsf(static_cast<float>(p.scale)) * kLog2EFloat * exp2f(lift_of<T>(p.scale));
  const int own = threadIdx.x / kWarp * kOwn + lane / 4;
  for (int first = 0; first < count; first += kListed) {
    __syncthreads();
    const int found = listed.find(places + first, through + first, count - first, place.first);
    for (int begin = 0; begin < found; begin += kVisited) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        const int at = min(begin + min(source.row + i * kRowsAtOnce, kVisited - 1), found - 1);
        source.tokens[i] = row_at(p, place.batch, (first + listed.rows[at]) % seqlen);
      }
      source.Source<T>::fetch(shared_address(tile.q), shared_address(tile.grad), p.head_dim, found - begin);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      for (int row = 0; row < kVisited && begin + row < found; row += 16) {
        uint32_t grad[kOwnTiles][4];
#pragma unroll
        for (int i = 0; i < 4 * kOwnTiles; ++i) {
          const int key = own + i / 4 * 16 + i % 2 * 8, at = begin + row + i / 2 % 2 * 8 + lane % 4 * 2;
          float two[2];
          for (int j = 0; j < 2; ++j) {
            const bool here = at + j < found && listed.keys[min(at + j, found - 1)] == key;
            two[j] = here ? factor * listed.gradients[min(at + j, found - 1)] : 0;
          }
          grad[i / 4][i % 4] = pack<T>(two[0], two[1]);
        }
        add_product<T>(dk, grad, shared_address(tile.q) + 2 * row * kStride);
      }
      __syncthreads();
    }
  }
}

template <class T>
__device__ __forceinline__ void store_sums(const TensorView<4>& to, const LayoutAttentionBwdParams& p,
                                           const Place& place, const Sums& sums, const int (&keys)[kOwnTiles][2],
                                           float factor, int left) {
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    const int key = keys[i / 2][i % 2];
    if (key < 0) continue;
    T* row = to.at<T>(place.batch, place.head, key);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int column = n * 8 + lane_of_warp() % 4 * 2;
      if (column >= p.head_dim) break;
      const float* two = sums[i / 2][n] + i % 2 * 2;
      if (i * 8 >= left) {  // a key that is not there, whatever its pairs have summed up to
        *reinterpret_cast<uint32_t*>(row + column) = 0;
        continue;
      }
      *reinterpret_cast<uint32_t*>(row + column) = pack<T>(factor * two[0], factor * two[1]);
    }
  }
}

template <class T, Modulation kModulation>
__global__ void __launch_bounds__(kThreads, 2)
    layout_attention_bwd_kv_kernel(const __grid_constant__ LayoutAttentionBwdParams p) {
  extern __shared__ __align__(16) char bytes[];
  KeyShared& shared = *reinterpret_cast<KeyShared*>(bytes);
  const Place place(p, p.seqlen_k, kBlockOwn);
  const int own = threadIdx.x / kWarp * kOwn;
  const KeySource<T, kModulation> order(p, place, p.seqlen_k);
  const int seqlen_k = keys_there(p, place.batch);
  Place at_keys = place;
  at_keys.head = key_head_of(p, place.head);
  fetch_own<T>(shared.own.keys, shared.values(), p.k, p.v, at_keys, seqlen_k, p.head_dim,
               [&](int at) { return order.key_at(at); });
  Operand k[kOwnTiles], v[kOwnTiles];
  int keys[kOwnTiles][2], key_words[kOwnTiles][2];
  bool there[kOwnTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    const int at = place.first + own + i * 8 + lane_of_warp() / 4, key = order.key_at(at);
    there[i / 2][i % 2] = at < seqlen_k;
    keys[i / 2][i % 2] = at < p.seqlen_k ? key : -1;
    key_words[i / 2][i % 2] = *p.k_regions.at<int32_t>(place.batch, key);
  }
  if (place.first >= seqlen_k) {
    store_sums<T>(p.dv, p, place, {}, keys, 0, 0);
    store_sums<T>(p.dk, p, place, {}, keys, 0, 0);
    return;
  }
  const uint32_t own_values = shared_address(shared.values() + own * kStride);
#pragma unroll
  for (int tile = 0; tile < kOwnTiles; ++tile) {
    load_operand<T>(k[tile], shared_address(shared.own.keys + (own + 16 * tile) * kStride), p.scale < 0);
    if constexpr (!kValuesShared) load_operand<T>(v[tile], own_values + 2 * tile * 16 * kStride, false);
  }
  const Common common = common_words(key_words, there);
  __syncthreads();

  Sums dk = {}, dv = {};
  const int tiles = (static_cast<int>(p.seqlen_q) + kVisited - 1) / kVisited;
  RowSource<T> source(p, place);
  source.find(0);
  source.fetch(shared.stages[0], 0);
  source.find(1);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    if (tile + 1 < tiles) source.fetch(shared.stages[(tile + 1) % kStages], (tile + 1) * kVisited);
    source.find(tile + 2);
    const RowTile& stage = shared.stages[tile % kStages];
    bool matched, others;
    common.judge(stage.words, matched, others);
    if (kModulation == Modulation::kMask && others) continue;
    if (matched || others) {
      visit_rows<T, kModulation, Pairs::kUniform>(dk, dv, k, v, own_values, key_words, stage, matched);
    } else {
      visit_rows<T, kModulation, Pairs::kMixed>(dk, dv, k, v, own_values, key_words, stage, false);
    }
  }
  const float back = exp2f(-lift_of<T>(p.scale));
  const int left = keys_there(p, place.batch) - (place.first + own + lane_of_warp() / 4);
  store_sums<T>(p.dv, p, place, dv, keys, back, left);
  if constexpr (kExtremes<kModulation> > 0) add_extremes<T, kModulation>(dk, p, place, shared, source);
  store_sums<T>(p.dk, p, place, dk, keys, p.scale < 0 ? -back * kLn2Float : back * kLn2Float, left);
}

}  // namespace DENSE_ATTN_CLASS
