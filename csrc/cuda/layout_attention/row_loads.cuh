// What the row kernel has in shared memory, and how it gets there.
#pragma once

#include <cstdint>

#include "cuda/head_dims.h"
#include "cuda/layout_attention/rows.cuh"
#include "cuda/primitives.cuh"

namespace DENSE_ATTN_CLASS::row {

constexpr int kHeadDim = DENSE_ATTN_HEAD_DIM;
// From a row to the next an odd number of 16 bytes: eight of them lie in all banks.
constexpr int kStride = kHeadDim % 16 ? kHeadDim : kHeadDim + 8;
constexpr int kRows = 16;                       // of a warp at a time
constexpr int kWarps = kHeadDim > 160 ? 2 : 4;  // of a block
constexpr bool kAhead = kHeadDim <= 96;         // the next rows are fetched while these are worked on
constexpr int kColumns = kHeadDim > 128       ? 32
                         : kHeadDim % 64 == 0 ? 64
                         : kHeadDim > 40      ? kHeadDim / 2
                                              : kHeadDim;  // of out at a time
static_assert(kHeadDim % kColumns == 0 && kColumns % 8 == 0);

template <class T, int kKeys>
struct Shared {
  alignas(16) T k[kKeys][kStride];
  alignas(16) T v[kKeys][kStride];
  alignas(16) T rows[kWarps][kAhead ? 2 : 1][kRows][kStride];  // queries, and out: behind them, or in their place
  alignas(16) T exists[(kKeys + 31) / 32 * 32][8];  // 1 for keys that are there: their product is a row's sum
  alignas(16) int32_t words[kKeys];
};

// How all rows of a tensor may be read or written: in pieces of 16 bytes, or one number at a time.
template <class Tensor>
__device__ __forceinline__ bool in_pieces(const Tensor& x, int64_t head_dim) {
  const int64_t strides = x.strides[0] | x.strides[1] | x.strides[2] | head_dim;
  return strides % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Copies this thread's half of a row, the even pieces of 16 bytes or the odd ones, and zeros behind the head dim; of a
// row that is not there zeros alone.
template <class T>
__device__ __forceinline__ void fetch_row(T* to, const T* from, int half, int head_dim, bool there, bool pieces) {
  if (pieces) {
#pragma unroll
    for (int piece = 0; piece < kHeadDim / 8; piece += 2) {
      const int column = (piece + half) * 8;
      if (column < kHeadDim) copy_async(shared_address(to + column), from + column, there && column < head_dim);
    }
  } else {
#pragma unroll 1
    for (int column = half; column < kHeadDim; column += 2) {
      to[column] = there && column < head_dim ? from[column] : T(0.f);
    }
  }
}

// The inverse of `fetch_row`.
template <class T>
__device__ __forceinline__ void store_row(T* to, const T* from, int half, int head_dim, bool pieces) {
  if (pieces) {
#pragma unroll
    for (int piece = 0; piece < kHeadDim / 8; piece += 2) {
      const int column = (piece + half) * 8;
      if (column < kHeadDim && column < head_dim) {
        *reinterpret_cast<uint4*>(to + column) = *reinterpret_cast<const uint4*>(from + column);
      }
    }
  } else {
#pragma unroll 1
    for (int column = half; column < head_dim; column += 2) to[column] = from[column];
  }
}

// Keys, values and words of a head. Behind the last key it comes again, which changes no extreme; its weight is not
// counted then.
template <class T, int kKeys>
__device__ __forceinline__ void fetch_keys(Shared<T, kKeys>& shared, const LayoutAttentionParams& p, int batch,
                                           int head, int seqlen_k) {
  const int head_dim = p.head_dim, half = threadIdx.x % 2;
  const bool k_pieces = in_pieces(p.k, head_dim), v_pieces = in_pieces(p.v, head_dim);
  for (int key = threadIdx.x / 2; key < kKeys; key += kWarps * kWarp / 2) {
    const int from = max(min(key, seqlen_k - 1), 0);
    fetch_row(shared.k[key], p.k.at<T>(batch, head, from), half, head_dim, seqlen_k > 0, k_pieces);
    fetch_row(shared.v[key], p.v.at<T>(batch, head, from), half, head_dim, key < seqlen_k, v_pieces);
  }
  for (int key = threadIdx.x; key < kKeys; key += kWarps * kWarp) {
    shared.words[key] = seqlen_k > 0 ? *p.k_regions.at<int32_t>(batch, min(key, seqlen_k - 1)) : 0;
  }
  for (int i = threadIdx.x; i < int(sizeof(shared.exists) / sizeof(T)); i += kWarps * kWarp) {
    shared.exists[i / 8][i % 8] = T(i / 8 < seqlen_k ? 1.f : 0.f);
  }
}

// What is read of a query row beside itself; without keys neither counts, whatever is there.
struct Row {
  int token;
  int32_t words;
  float strength;

  __device__ __forceinline__ Row(const LayoutAttentionParams& p, int batch, int head, int place, int seqlen_k)
      : token(row_at(p, batch, place)),
        words(row_words(p, batch, token)),
        strength(seqlen_k > 0 ? row_strength(p, batch, head, token) : 0) {}
};

}  // namespace DENSE_ATTN_CLASS::row
