// How keys, values and words reach shared memory: tiles in the order of visits, some tiles ahead of their use.
#pragma once

#include "cuda/primitives.cuh"
#include "layout_attention.h"

// Bytes from one row of a tile to the next: an odd number of 16-byte chunks, so that the eight rows that a matrix load
// reads at once lie in different banks.
template <int kColumns>
constexpr int kRowPitch = (kColumns / 8 | 1) * 16;

__device__ __forceinline__ void copy_word_async(uint32_t to, const int32_t* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// The token in a place; an order leads to no other memory. As an unsigned number what is negative is large.
__device__ __forceinline__ int token_at(const TensorView<2>& order, int batch, int place, int last) {
  place = min(place, last);  // places beyond the last repeat it
  if (order.data == nullptr) return place;
  return min(static_cast<unsigned>(*order.at<const int32_t>(batch, place)), static_cast<unsigned>(last));
}

// A stage of shared memory: rows of keys, rows of values, words.
template <class T, int kHeadDim, int kValueDim, int kKeys, int kThreads>
struct KeyTiles {
  static constexpr int kKeyPitch = kRowPitch<kHeadDim>, kValuePitch = kRowPitch<kValueDim>;
  static constexpr int kValues = kKeys * kKeyPitch, kWords = kValues + kKeys * kValuePitch;
  static constexpr int kStageBytes = kWords + kKeys * 4;
  static constexpr int kLanes = kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;  // threads that copy a row
  static constexpr int kRows = kThreads / kLanes, kPasses = kKeys / kRows;       // rows that are copied at once
  static_assert(kPasses * kRows == kKeys && kKeys <= kThreads);

  const LayoutAttentionParams& p;
  char* const smem;
  const int batch, row, chunk;
  const bool key_there, value_there, aligned;
  const char *k, *v;  // this thread's chunk of the head's first key and value
  const int32_t* words;
  int tokens[kPasses], word_token;

  __device__ __forceinline__ KeyTiles(const LayoutAttentionParams& params, char* shared, int sample, int head, int part)
      : p(params),
        smem(shared),
        batch(sample),
        row(threadIdx.x / kLanes),
        chunk(threadIdx.x % kLanes),
        key_there(chunk * 8 < p.head_dim),
        value_there(part * kValueDim + chunk * 8 < p.head_dim),
        aligned(is_aligned(p.k, sample, head) && is_aligned(p.v, sample, head)),
        k(p.k.at<const char>() + 2 * (sample * p.k.strides[0] + head * p.k.strides[1] + chunk * 8)),
        v(p.v.at<const char>() + 2 * (sample * p.v.strides[0] + head * p.v.strides[1] + part * kValueDim + chunk * 8)),
        words(p.k_regions.at<const int32_t>(sample)) {}

  // Whether every row of a head begins where 16 bytes can be copied at once.
  static __device__ __forceinline__ bool is_aligned(const TensorView<4>& x, int sample, int head) {
    return (reinterpret_cast<uintptr_t>(x.at<const T>(sample, head)) | x.strides[2] * sizeof(T)) % 16 == 0;
  }

  // Finds the tokens of a tile, a tile before they are fetched.
  __device__ __forceinline__ void look_up(int tile) {
    const int first = tile * kKeys, last = static_cast<int>(p.seqlen_k) - 1;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) tokens[i] = token_at(p.k_order, batch, first + i * kRows + row, last);
    if (threadIdx.x < kKeys) word_token = token_at(p.k_order, batch, first + static_cast<int>(threadIdx.x), last);
  }

  __device__ __forceinline__ void fetch(int stage) {
    char* const at = smem + stage * kStageBytes;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int to = i * kRows + row;
      if (chunk < kHeadDim / 8) {
        copy(at + to * kKeyPitch + chunk * 16, k + tokens[i] * (p.k.strides[2] * 2), key_there);
      }
      if (chunk < kValueDim / 8) {
        copy(at + kValues + to * kValuePitch + chunk * 16, v + tokens[i] * (p.v.strides[2] * 2), value_there);
      }
    }
    if (threadIdx.x < kKeys) {
      copy_word_async(shared_address(at + kWords + 4 * threadIdx.x), words + word_token * p.k_regions.strides[1]);
    }
  }

  __device__ __forceinline__ void copy(char* to, const char* from, bool there) const {
    if (aligned) {
      copy_async(shared_address(to), from, there);
    } else {
      for (int i = 0; i < 16; i += 2) {
        *reinterpret_cast<uint16_t*>(to + i) = there ? *reinterpret_cast<const uint16_t*>(from + i) : uint16_t{};
      }
    }
  }
};
