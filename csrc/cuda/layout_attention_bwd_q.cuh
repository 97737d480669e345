// Backward over queries: a warp's rows against all keys. dq, the sum of matched ds', and the rows' first extremes.
#pragma once

#include "cuda/layout_attention_bwd_tiles.cuh"

constexpr int kGroup = 8;  // keys side by side of which a lane remembers that one is the extreme

// What both passes read of a row, in the order of visits.
struct Record {
  float factor, add_in, add_out, shift;  // exponent = raw * factor + add; shift: -delta * factor
};

// The key at a place of a tile: neighbours in one lane, so that lanes, groups and keys have one order.
__device__ __forceinline__ int key_at(int place) { return place / 2 % 4 * 16 + place / 8 * 2 + place % 2; }

constexpr int kUnrollQ = UNROLLQ;
struct QStage {
  alignas(16) uint16_t k[kVisited * kStride], v[kVisited * kStride];
  alignas(16) int words[kVisited];
};

struct QScratch {
  const Record* records;
  const float* delta;
  const int* words;
  float* through;
  int* places;
};

template <int kTiles>
struct RowNumbers {
  float factor[kTiles][2], add_in[kTiles][2], add_out[kTiles][2], minus_delta[kTiles][2];
  int words[kTiles][2];
};
template <int kTiles>
struct RowSums {
  float matched[kTiles][2];
  float best[kTiles][2], least[kTiles][2];
  int best_at[kTiles][2], least_at[kTiles][2];
};

enum class Tile { kUniform, kMixed, kTail };

// One tile of keys.
template <class T, Modulation kModulation, Tile kTile, int kTiles>
__device__ __forceinline__ void visit_keys(float (&acc)[kTiles][kAccTiles][4], RowSums<kTiles>& sums,
                                           const RowNumbers<kTiles>& row, const Own (&q)[kTiles],
                                           const Own (&grad)[kTiles], const QStage& stage, int first, bool matched,
                                           int count) {
  constexpr bool kHasMax = kModulation == Modulation::kRange || kModulation == Modulation::kMax;
  constexpr bool kHasMin = kModulation == Modulation::kRange;
  constexpr float kInfinity = __builtin_huge_valf();
  const int lane = threadIdx.x % kWarp;
  const uint32_t k = shared_address(stage.k), v = shared_address(stage.v);
  float add[kTiles][2], total[kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    add[i / 2][i % 2] = matched ? row.add_in[i / 2][i % 2] : row.add_out[i / 2][i % 2];
    total[i / 2][i % 2] = 0;
  }
  float best[kTiles][2], least[kTiles][2];
#pragma unroll kUnrollQ
  for (int pair = 0; pair < kVisited / 32; ++pair)
#pragma unroll
  for (int chunk = 2 * pair; chunk < 2 * pair + 2; ++chunk) {
    const uint32_t at = 2 * chunk * 16 * kStride;
    constexpr float kZero[kTiles][2] = {};
    float s[kTiles][2][4], slope[kTiles][2][4];
    products<T>(s, q, k + at, kZero);
    products<T>(slope, grad, v + at, row.minus_delta);
    int2 words[2];
    if constexpr (kTile != Tile::kUniform) {
#pragma unroll
      for (int n = 0; n < 2; ++n) words[n] = *(const int2*)(stage.words + chunk * 16 + n * 8 + lane % 4 * 2);
    }
    if (chunk % 2 == 0) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        best[i / 2][i % 2] = sums.best[i / 2][i % 2], least[i / 2][i % 2] = sums.least[i / 2][i % 2];
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int half = i / 2;
          const float raw = s[tile][n][i];
          const bool there = kTile != Tile::kTail || lane % 4 * 16 + chunk * 4 + n * 2 + i % 2 < count;
          if constexpr (kHasMax) best[tile][half] = fmaxf(best[tile][half], there ? raw : -kInfinity);
          if constexpr (kHasMin) least[tile][half] = fminf(least[tile][half], there ? raw : kInfinity);
          float weight, ds;
          if constexpr (kTile == Tile::kUniform) {
            weight = exp2_approx(fmaf(raw, row.factor[tile][half], add[tile][half]));
            ds = weight * slope[tile][n][i];
            if constexpr (kModulation != Modulation::kMask) total[tile][half] += ds;
          } else {
            const bool meets = ((i % 2 ? words[n].y : words[n].x) & row.words[tile][half]) != 0;
            const float to_add = meets ? row.add_in[tile][half] : row.add_out[tile][half];
            weight = exp2_approx(fmaf(raw, row.factor[tile][half], to_add));
            if constexpr (kModulation == Modulation::kMask) weight = meets ? weight : 0;
            if constexpr (kTile == Tile::kTail) weight = there ? weight : 0;
            ds = weight * slope[tile][n][i];
            if constexpr (kModulation != Modulation::kMask) {
              if (meets) sums.matched[tile][half] += ds;
            }
          }
          s[tile][n][i] = ds;
        }
      }
    }
    uint32_t ds[kTiles][4];
    pack_tiles<T>(ds, s);
    add_products<T>(acc, ds, k + at);
    if (chunk % 2 == 1) {
      const int place = first + (chunk - 1) * 4;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const int tile = i / 2, half = i % 2;
        if constexpr (kHasMax) {
          sums.best_at[tile][half] = best[tile][half] > sums.best[tile][half] ? place : sums.best_at[tile][half];
          sums.best[tile][half] = best[tile][half];
        }
        if constexpr (kHasMin) {
          sums.least_at[tile][half] = least[tile][half] < sums.least[tile][half] ? place : sums.least_at[tile][half];
          sums.least[tile][half] = least[tile][half];
        }
      }
    }
  }
  if constexpr (kTile == Tile::kUniform && kModulation != Modulation::kMask) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) sums.matched[i / 2][i % 2] += matched ? total[i / 2][i % 2] : 0;
  }
}

// Keys, values and words of a tile on their way to a stage.
template <class T>
struct KeySource {
  const T *k, *v;  // of this thread's first row in the next tile
  const int* words;
  int k_step, v_step;  // bytes from a row to the next
  int word_step, key, left;  // left: keys from the next tile on

  __device__ __forceinline__ void fetch(QStage& stage, const Copier& copier) {
    const uint32_t to_k = shared_address(stage.k) + copier.to, to_v = shared_address(stage.v) + copier.to;
    const bool whole = left >= kVisited;
    const int bytes = copier.there ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      constexpr int kStep = kRowsAtOnce / 4;  // keys from a copy's row to the next one's
      if (!copier.in_tile(i, kVisited)) continue;
      const bool there = whole || key + i * kStep < left;
      const int64_t from = there ? i * kStep : -key;
      copy_async_bytes(to_k + 2 * i * kRowsAtOnce * kStride, (const char*)k + from * k_step, there ? bytes : 0);
      copy_async_bytes(to_v + 2 * i * kRowsAtOnce * kStride, (const char*)v + from * v_step, there ? bytes : 0);
    }
    if (threadIdx.x < kVisited) {
      const int at = key_at(threadIdx.x);
      const bool there = at < left;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(stage.words + threadIdx.x)),
                   "l"(words + (there ? at : 0) * (int64_t)word_step), "r"(there ? 4 : 0)
                   : "memory");
    }
    commit_copies();
    k = (const T*)((const char*)k + (int64_t)kVisited * k_step);
    v = (const T*)((const char*)v + (int64_t)kVisited * v_step);
    words += (int64_t)kVisited * word_step;
    left -= kVisited;
  }
};
