// Rows of a head as they lie in shared memory: how they get there, and where a matrix instruction finds them.
#pragma once

#include <cstdint>

#include "cuda/primitives.cuh"

// Rows of kHeadDim 16-bit numbers, apart by an odd number of 16 bytes: eight of them lie in all banks.
template <int kHeadDim>
constexpr int kRowStride = kHeadDim % 16 ? kHeadDim : kHeadDim + 8;

// How all rows of a tensor may be read or written: in pieces of 16 bytes, or one number at a time.
template <class Tensor>
__device__ __forceinline__ bool in_pieces(const Tensor& x, int64_t head_dim) {
  const int64_t strides = x.strides[0] | x.strides[1] | x.strides[2] | head_dim;
  return strides % 8 == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Copies this thread's half of a row, the even pieces of 16 bytes or the odd ones, and zeros behind the head dim; of a
// row that is not there zeros alone.
template <int kHeadDim, class T>
__device__ __forceinline__ void fetch_row(T* to, const T* from, int half, int head_dim, bool there, bool pieces) {
  if (pieces) {
#pragma unroll
    for (int piece = 0; piece < kHeadDim / 8; piece += 2) {
      const int column = (piece + half) * 8;
      if (column < kHeadDim) copy_async(shared_address(to + column), from + column, there && column < head_dim);
    }
  } else {
    for (int column = half; column < kHeadDim; column += 2) {
      to[column] = there && column < head_dim ? from[column] : T(0.f);
    }
  }
}

// The inverse of `fetch_row`.
template <int kHeadDim, class T>
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
    for (int column = half; column < head_dim; column += 2) to[column] = from[column];
  }
}
