// Tiles of rows in shared memory and as operands of matrix units, for the backward kernels of one head dim.
#pragma once

#include "cuda/primitives.cuh"
#include "layout_attention.h"

constexpr int kHeadDim = DENSE_ATTN_HEAD_DIM;
constexpr int kChunks = kHeadDim / 8;                             // of 16 bytes a row
constexpr int kStride = kHeadDim + (kChunks % 2 == 0 ? 8 : 0);    // an odd number of chunks: no two rows meet in a bank
constexpr int kSteps = kHeadDim / 16;                             // of 16 columns
constexpr bool kHalfStep = kHeadDim % 16 != 0;                    // and 8 more
constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kOwnTiles = kHeadDim <= 64 ? 2 : 1;                 // of 16 rows that a warp owns
constexpr int kOwn = 16 * kOwnTiles, kBlockOwn = kWarps * kOwn;   // rows of a warp, of a thread block
constexpr int kVisited = 64;                                      // rows of a tile that passes by
constexpr int kRowsAtOnce = kThreads / kChunks / 8 * 8;           // rows that one copy of every thread covers
constexpr int kCopies = (kVisited + kRowsAtOnce - 1) / kRowsAtOnce;
constexpr int kAccTiles = kHeadDim / 8;

// A warp's own rows as operand A, 16 columns at a time.
struct Own {
  uint32_t a[kSteps + kHalfStep][4];
};

// d = c + a b.
template <class T>
__device__ __forceinline__ void mma_from(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float c0,
                                         float c1, float c2, float c3) {
  d[0] = c0, d[1] = c1, d[2] = c2, d[3] = c3;
  mma_k16<T>(d, a, b0, b1);
}

template <class T>
__device__ __forceinline__ void load_own(Own& own, uint32_t rows) {  // rows: address of the first of 16
  const int lane = threadIdx.x % kWarp;
  const uint32_t at = rows + 2 * ((lane % 16) * kStride + lane / 16 * 8);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) load_matrix_x4(own.a[step], at + 32 * step);
  if constexpr (kHalfStep) {
    load_matrix_x2(own.a[kSteps][0], own.a[kSteps][1], rows + 2 * ((lane % 16) * kStride + 16 * kSteps));
  }
}

// Products of own rows with 16 rows of a tile, [own, 16] as two results of 8 columns, from `start` of each own row.
template <class T, int kTiles>
__device__ __forceinline__ void products(float (&x)[kTiles][2][4], const Own (&own)[kTiles], uint32_t rows,
                                         const float (&start)[kTiles][2]) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t at = rows + 2 * ((lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[tile][i / 4][i % 4] = start[tile][i % 4 / 2];
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t b[4];
    load_matrix_x4(b, at + 32 * step);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      mma_k16<T>(x[tile][0], own[tile].a[step], b[0], b[1]);
      mma_k16<T>(x[tile][1], own[tile].a[step], b[2], b[3]);
    }
  }
  if constexpr (kHalfStep) {
    uint32_t b0, b1;
    load_matrix_x2(b0, b1, rows + 2 * ((lane % 16) * kStride + 16 * kSteps));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      mma_k8<T>(x[tile][0], own[tile].a[kSteps][0], own[tile].a[kSteps][1], b0);
      mma_k8<T>(x[tile][1], own[tile].a[kSteps][0], own[tile].a[kSteps][1], b1);
    }
  }
}

// acc [own, head dim] += x [own, 16] rows [16, head dim].
template <class T, int kTiles>
__device__ __forceinline__ void add_products(float (&acc)[kTiles][kAccTiles][4], const uint32_t (&x)[kTiles][4],
                                             uint32_t rows) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t at = rows + 2 * ((lane % 16) * kStride + lane / 16 * 8);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t b[4];
    load_matrix_x4_trans(b, at + 32 * step);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      mma_k16<T>(acc[tile][2 * step], x[tile], b[0], b[1]);
      mma_k16<T>(acc[tile][2 * step + 1], x[tile], b[2], b[3]);
    }
  }
  if constexpr (kHalfStep) {
    uint32_t b0, b1;
    load_matrix_x2_trans(b0, b1, rows + 2 * ((lane % 16) * kStride + 16 * kSteps));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) mma_k16<T>(acc[tile][2 * kSteps], x[tile], b0, b1);
  }
}

// Two halves of a tile of scores as operand A of the next product.
template <class T, int kTiles>
__device__ __forceinline__ void pack_tiles(uint32_t (&a)[kTiles][4], const float (&x)[kTiles][2][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[tile][i] = pack<T>(x[tile][i / 2][i % 2 * 2], x[tile][i / 2][i % 2 * 2 + 1]);
  }
}

// Where this thread copies from and to: one chunk of every kRowsAtOnce-th row.
struct Copier {
  int row, column;
  bool works, there;
  uint32_t to;

  __device__ __forceinline__ explicit Copier(int head_dim) {
    row = threadIdx.x / kChunks;
    column = threadIdx.x % kChunks * 8;
    works = row < kRowsAtOnce;
    there = column < head_dim;
    to = 2 * (row * kStride + column);
  }
  __device__ __forceinline__ bool in_tile(int i, int rows) const { return works && row + i * kRowsAtOnce < rows; }
};

// The element of a view at some of its first indices.
template <class T, int kDims, class... Index>
__device__ __forceinline__ T* at(const TensorView<kDims>& view, Index... index) {
  T* pointer = static_cast<T*>(view.data);
  int axis = 0;
  ((pointer += (int64_t)index * view.strides[axis++]), ...);
  return pointer;
}

__device__ __forceinline__ void copy_async_bytes(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
