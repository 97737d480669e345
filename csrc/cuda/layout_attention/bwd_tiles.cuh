// Tiles of rows for the backward kernels of one head dim: on their way to shared memory, and as operands of products.
#pragma once

#include "cuda/head_dims.h"
#include "cuda/layout_attention/rows.cuh"

namespace DENSE_ATTN_CLASS {

constexpr int kHeadDim = DENSE_ATTN_HEAD_DIM;
constexpr int kStride = (kHeadDim / 8 | 1) * 8;  // an odd number of 16 bytes: eight rows lie in all banks
constexpr int kSteps = kHeadDim / 16, kParts = (kHeadDim + 15) / 16;  // whole steps of 16 columns, and all
constexpr int kColumns = kHeadDim / 8;                                // results of 8 columns a row has
constexpr int kWarps = 4, kThreads = kWarps * kWarp, kStages = 2;
constexpr int kOwnTiles = kHeadDim <= 64 ? 2 : 1;                // of 16 rows that a warp owns, as registers allow
constexpr int kOwn = 16 * kOwnTiles, kBlockOwn = kWarps * kOwn;  // rows of a warp, and of a block
constexpr int kVisited = kHeadDim <= 128 ? 64 : 32;  // rows of a tile that passes by, as 99 KB of memory allow
constexpr int kRowsAtOnce = kThreads / kColumns;     // that all threads copy 16 bytes each of
constexpr int kCopies = (kVisited + kRowsAtOnce - 1) / kRowsAtOnce;
constexpr float kInfinity = __builtin_huge_valf();

// 16 rows as the left operand, 16 columns at a time.
struct Operand {
  uint32_t a[kParts][4];
};
// Products of 16 rows: with 16 others, and with all columns.
using Scores = float[kOwnTiles][2][4];
using Sums = float[kOwnTiles][kColumns][4];
using Numbers = float[kOwnTiles][2];  // of a lane's rows: lane / 4 and the eighth from it of each tile

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % kWarp; }

template <class T>
__device__ __forceinline__ void load_operand(Operand& x, uint32_t rows, bool negate) {
  const int lane = lane_of_warp();
  const uint32_t at = rows + 2 * (lane % 16 * kStride + lane / 16 * 8);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) load_matrix_x4(x.a[step], at + 32 * step);
  if constexpr (kParts > kSteps)
    load_matrix_x2(x.a[kSteps][0], x.a[kSteps][1], rows + 2 * (lane % 16 * kStride + 16 * kSteps));
  if (negate) {
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i) x.a[i / 4][i % 4] ^= 0x80008000;
  }
}

// x = start + own rows * 16 rows of a tile.
template <class T>
__device__ __forceinline__ void multiply(Scores& x, const Operand (&own)[kOwnTiles], uint32_t rows,
                                         const Numbers& start) {
  const int lane = lane_of_warp();
  const uint32_t at = rows + 2 * ((lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8);
#pragma unroll
  for (int i = 0; i < 8 * kOwnTiles; ++i) x[i / 8][i / 4 % 2][i % 4] = start[i / 8][i / 2 % 2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t b[4];
    load_matrix_x4(b, at + 32 * step);
#pragma unroll
    for (int tile = 0; tile < kOwnTiles; ++tile) {
      mma_k16<T>(x[tile][0], own[tile].a[step], b[0], b[1]);
      mma_k16<T>(x[tile][1], own[tile].a[step], b[2], b[3]);
    }
  }
  if constexpr (kParts > kSteps) {
    uint32_t b0, b1;
    load_matrix_x2(b0, b1, rows + 2 * (lane % 16 * kStride + 16 * kSteps));
#pragma unroll
    for (int tile = 0; tile < kOwnTiles; ++tile) {
      mma_k8<T>(x[tile][0], own[tile].a[kSteps][0], own[tile].a[kSteps][1], b0);
      mma_k8<T>(x[tile][1], own[tile].a[kSteps][0], own[tile].a[kSteps][1], b1);
    }
  }
}

// acc += x * 16 rows of a tile, for x [own, 16] packed.
template <class T>
__device__ __forceinline__ void add_product(Sums& acc, const uint32_t (&x)[kOwnTiles][4], uint32_t rows) {
  const int lane = lane_of_warp();
  const uint32_t at = rows + 2 * (lane % 16 * kStride + lane / 16 * 8);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t b[4];
    load_matrix_x4_trans(b, at + 32 * step);
#pragma unroll
    for (int tile = 0; tile < kOwnTiles; ++tile) {
      mma_k16<T>(acc[tile][2 * step], x[tile], b[0], b[1]);
      mma_k16<T>(acc[tile][2 * step + 1], x[tile], b[2], b[3]);
    }
  }
  if constexpr (kParts > kSteps) {
    uint32_t b0, b1;
    load_matrix_x2_trans(b0, b1, rows + 2 * (lane % 16 * kStride + 16 * kSteps));
#pragma unroll
    for (int tile = 0; tile < kOwnTiles; ++tile) mma_k16<T>(acc[tile][2 * kSteps], x[tile], b0, b1);
  }
}

// Results of a product as the left operand of the next.
template <class T>
__device__ __forceinline__ void pack_scores(uint32_t (&a)[kOwnTiles][4], const Scores& x) {
#pragma unroll
  for (int i = 0; i < 4 * kOwnTiles; ++i) {
    const int tile = i / 4, n = i / 2 % 2, half = i % 2;
    a[tile][i % 4] = pack<T>(x[tile][n][2 * half], x[tile][n][2 * half + 1]);
  }
}

// Two tensors' rows of one head, a tile at a time; a thread copies 16 bytes of every kRowsAtOnce-th row.
template <class T>
struct Source {
  const T *a, *b;      // at this thread's column
  int a_step, b_step;  // bytes from a row to the next
  int row, column;
  int tokens[kCopies];

  __device__ __forceinline__ Source(const TensorView<4>& a_view, const TensorView<4>& b_view, int batch, int head)
      : a_step(2 * static_cast<int>(a_view.strides[2])), b_step(2 * static_cast<int>(b_view.strides[2])) {
    row = threadIdx.x / kColumns;
    column = threadIdx.x % kColumns * 8;
    if (row >= kRowsAtOnce) row = 1 << 20;
    a = a_view.at<const T>(batch, head) + column;
    b = b_view.at<const T>(batch, head) + column;
  }

  // Copies the rows of `tokens`, or zeros of those that are not there.
  __device__ __forceinline__ void fetch(uint32_t to_a, uint32_t to_b, int head_dim, int count) {
    const uint32_t at = 2 * (row * kStride + column);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int to = row + i * kRowsAtOnce;
      if (to >= kVisited) continue;
      const bool there = column < head_dim && to < count;
      const uint32_t below = at + 2 * i * kRowsAtOnce * kStride;
      copy_async(to_a + below, reinterpret_cast<const char*>(a) + static_cast<int64_t>(tokens[i]) * a_step, there);
      copy_async(to_b + below, reinterpret_cast<const char*>(b) + static_cast<int64_t>(tokens[i]) * b_step, there);
    }
  }
};

__device__ __forceinline__ void copy_word_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(there ? 4 : 0) : "memory");
}

// The words that a warp's own rows have in common, and all that any of them has.
struct Common {
  int every, some;

  // Whether a tile's pairs are all matched, or none is.
  __device__ __forceinline__ void judge(const int* words, bool& matched, bool& others) const {
    bool all = true, none = true;
#pragma unroll
    for (int i = 0; i < kVisited / kWarp; ++i) {
      const int word = words[i * kWarp + lane_of_warp()];
      all &= (word & every) != 0, none &= (word & some) == 0;
    }
    matched = __all_sync(~0u, all), others = __all_sync(~0u, none);
  }
};
__device__ __forceinline__ Common common_words(const int (&words)[kOwnTiles][2], const bool (&there)[kOwnTiles][2]) {
  Common found = {-1, 0};
#pragma unroll
  for (int i = 0; i < 2 * kOwnTiles; ++i) {
    if (!there[i / 2][i % 2]) continue;
    found.every &= words[i / 2][i % 2];
    found.some |= words[i / 2][i % 2];
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    found.every &= __shfl_xor_sync(~0u, found.every, lanes);
    found.some |= __shfl_xor_sync(~0u, found.some, lanes);
  }
  return found;
}

// Two neighbours of a row in memory.
template <class T>
__device__ __forceinline__ float2 load_pair(const T* at) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(at);
  T two[2];
  __builtin_memcpy(two, &pair, sizeof(pair));
  return {static_cast<float>(two[0]), static_cast<float>(two[1])};
}

}  // namespace DENSE_ATTN_CLASS
