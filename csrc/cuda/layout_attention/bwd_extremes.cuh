// Gradients through a row's largest and smallest score, each at its first key.
#pragma once

#include "cuda/layout_attention/bwd_rows.cuh"

namespace DENSE_ATTN_CLASS {

constexpr int kGroup = 8;              // keys side by side, of which a lane remembers that one has the extreme
constexpr int kListed = 4 * kThreads;  // extremes that are looked through at once

template <Modulation kModulation>
constexpr int kExtremes = kModulation == Modulation::kRange ? 2
                          : kModulation == Modulation::kMax ? 1
                                                            : 0;

// The key at a row of a tile in shared memory: neighbours go to one lane, so that the order of keys is that of lanes,
// groups and columns.
__device__ __forceinline__ int key_of(int row) { return row / 2 % 4 * (kVisited / 4) + row / 8 * 2 + row % 2; }

// A lane's extremes and the first keys of their groups.
struct Extremes {
  Numbers best, least;
  int best_at[kOwnTiles][2], least_at[kOwnTiles][2];

  __device__ __forceinline__ Extremes() {
#pragma unroll
    for (int i = 0; i < 2 * kOwnTiles; ++i) {
      best[i / 2][i % 2] = -kInfinity, least[i / 2][i % 2] = kInfinity;
      best_at[i / 2][i % 2] = least_at[i / 2][i % 2] = 0;
    }
  }

  // One group further, `high` and `low` with what was before.
  template <int kCount>
  __device__ __forceinline__ void add(const Numbers& high, const Numbers& low, int place) {
#pragma unroll
    for (int i = 0; i < 2 * kOwnTiles; ++i) {
      const int tile = i / 2, half = i % 2;
      if constexpr (kCount > 0) {
        best_at[tile][half] = high[tile][half] > best[tile][half] ? place : best_at[tile][half];
        best[tile][half] = high[tile][half];
      }
      if constexpr (kCount > 1) {
        least_at[tile][half] = low[tile][half] < least[tile][half] ? place : least_at[tile][half];
        least[tile][half] = low[tile][half];
      }
    }
  }
};

__device__ __forceinline__ int quad_min_int(int x) {
  x = min(x, __shfl_xor_sync(~0u, x, 1));
  return min(x, __shfl_xor_sync(~0u, x, 2));
}

// The first group of a row over its four lanes.
__device__ __forceinline__ int first_group(float extreme, float of_row, int place) {
  return quad_min_int(extreme == of_row ? place : 0x7fffffff);
}

// The first key of a group with the largest product; four lanes together, two keys each.
template <class T>
__device__ __forceinline__ int first_key(const T* q, const T* k, int64_t step, int group, int seqlen, int head_dim,
                                         float sign) {
  float most = -kInfinity;
  int key = 0x7fffffff;
#pragma unroll 1
  for (int i = 0; i < kGroup / 4; ++i) {
    const int other = group + lane_of_warp() % 4 * (kGroup / 4) + i;
    if (other >= seqlen) break;
    float product = 0;
    for (int column = 0; column < head_dim; column += 2) {
      const float2 x = load_pair(q + column), y = load_pair(k + other * step + column);
      product = fmaf(x.x, y.x, fmaf(x.y, y.y, product));
    }
    product *= sign;
    if (product > most || key == 0x7fffffff) most = product, key = other;
  }
  const float top = quad_max(key == 0x7fffffff ? -kInfinity : most);
  key = quad_min_int(most == top ? key : 0x7fffffff);
  return key == 0x7fffffff ? min(group, seqlen - 1) : key;
}

// Which of some extremes are at a block's keys, in their order, and the gradients there.
struct Listed {
  int rows[kListed], keys[kListed], counts[kListed / kWarp];
  float gradients[kListed];

  // The number of them among `count` places; all threads together.
  __device__ __forceinline__ int find(const int* places, const float* through, int count, int first) {
    const int lane = lane_of_warp(), warp = threadIdx.x / kWarp;
    unsigned found[kListed / kThreads];
#pragma unroll
    for (int i = 0; i < kListed / kThreads; ++i) {
      const int at = i * kThreads + threadIdx.x;
      const unsigned key = at < count ? places[at] - first : ~0u;
      found[i] = __ballot_sync(~0u, key < kBlockOwn);
      if (lane == 0) counts[i * kWarps + warp] = __popc(found[i]);
    }
    __syncthreads();
    int begin = 0, next = 0;
#pragma unroll
    for (int i = 0; i < kListed / kThreads; ++i) {
      for (; next < i * kWarps + warp; ++next) begin += counts[next];
      const int at = i * kThreads + threadIdx.x;
      if (found[i] >> lane & 1) {
        const int to = begin + __popc(found[i] & ((1u << lane) - 1));
        rows[to] = at, keys[to] = places[at] - first, gradients[to] = through[at];
      }
    }
    for (; next < kListed / kWarp; ++next) begin += counts[next];
    __syncthreads();
    return begin;
  }
};

}  // namespace DENSE_ATTN_CLASS
