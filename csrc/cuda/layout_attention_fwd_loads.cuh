// How keys, values and words reach shared memory: tiles in the order of visits, some tiles ahead of their use.
#pragma once

#include "cuda/primitives.cuh"
#include "layout_attention.h"

// The eight rows that a matrix load reads at once lie in different banks: their pitch is an odd number of 16-byte chunks
// or, where that would take too much memory, the last three bits of a row turn those of its chunks.
template <int kColumns>
constexpr bool kSwizzled = kColumns % 128 == 0;
template <int kColumns>
constexpr int kRowPitch = kSwizzled<kColumns> ? kColumns * 2 : (kColumns / 8 | 1) * 16;

// Where a chunk of a row lies, and from there the one that is 2 * i further.
template <int kColumns>
__device__ __forceinline__ uint32_t chunk_at(uint32_t row, uint32_t chunk) {
  return row * kRowPitch<kColumns> + (kSwizzled<kColumns> ? chunk ^ row % 8 : chunk) * 16;
}
template <int kColumns>
__device__ __forceinline__ uint32_t further(uint32_t at, int i) {
  return kSwizzled<kColumns> ? (at ^ (i % 4 * 32)) + i / 4 * 128 : at + i * 32;
}

__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_word_async(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// The same number, which the compiler must keep: it would make it anew from what it is made of at every tile.
__device__ __forceinline__ uint32_t kept(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
__device__ __forceinline__ const char* kept(const char* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// The row of a tensor whose rows begin at `data`, some bytes apart; by one instruction if those have 32 bits.
__device__ __forceinline__ const char* row_of(const char* data, uint32_t row, uint64_t stride) {
  return data + row * stride;
}
__device__ __forceinline__ const char* row_of(const char* data, uint32_t row, uint32_t stride) {
  const char* at;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(row), "r"(stride), "l"(data));
  return at;
}

// A stage of shared memory holds rows of keys, rows of values and words. A row is copied by some neighbouring threads,
// 16 bytes each, columns beyond the head dim are 0 from the start.
template <class T, int kHeadDim, int kValueDim, int kKeys, int kStages, int kThreads>
struct KeyTiles {
  static constexpr int kKeyPitch = kRowPitch<kHeadDim>, kValuePitch = kRowPitch<kValueDim>;
  static constexpr int kValues = kKeys * kKeyPitch, kWords = kValues + kKeys * kValuePitch;
  static constexpr int kStageBytes = kWords + kKeys * 4;
  static constexpr int kLanes = kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;
  static constexpr int kRows = kThreads / kLanes, kPasses = kKeys / kRows;  // rows that are copied at once
  static_assert(kPasses * kRows == kKeys && kKeys <= kThreads && kRows % 8 == 0 && kStageBytes % 128 == 0);

  const LayoutAttentionParams& p;
  char* const smem;
  const char *keys, *values;  // this thread's chunk of the head's first row
  const char *words, *order;  // of the sample
  uint32_t row, chunk, last, key_to, value_to;
  bool key_there, value_there;
  uint32_t fast, key_step, value_step, word_step;  // strides, if each has 32 bits and chunks begin at their multiples
  uint32_t tokens[kPasses], word_token;

  __device__ __forceinline__ KeyTiles(const LayoutAttentionParams& params, char* shared, int batch, int head, int part)
      : p(params),
        smem(shared),
        keys(reinterpret_cast<const char*>(p.k.at<const T>(batch, head))),
        values(reinterpret_cast<const char*>(p.v.at<const T>(batch, head)) + part * kValueDim * sizeof(T)),
        words(reinterpret_cast<const char*>(p.k_regions.at<const int32_t>(batch))),
        order(reinterpret_cast<const char*>(p.k_order.at<const int32_t>(p.k_order.data ? batch : 0))),
        row(threadIdx.x / kLanes),
        chunk(threadIdx.x % kLanes),
        last(static_cast<uint32_t>(p.seqlen_k) - 1),
        key_there(chunk * 8 < p.head_dim),
        value_there(chunk < kValueDim / 8 && part * kValueDim + chunk * 8 < p.head_dim) {
    const uint64_t key_stride = stride_of(p.k), value_stride = stride_of(p.v);
    const uint64_t word_stride = p.k_regions.strides[1] * 4;
    const auto bits = reinterpret_cast<uintptr_t>(keys) | reinterpret_cast<uintptr_t>(values);
    fast = kept((bits | key_stride | value_stride) % 16 == 0 && (key_stride | value_stride | word_stride) >> 32 == 0);
    key_step = kept(key_stride), value_step = kept(value_stride), word_step = kept(word_stride);
    keys = kept(keys + chunk * 16), values = kept(values + chunk * 16), words = kept(words);
    key_to = kept(shared_address(key_at(0, row))), value_to = kept(shared_address(value_at(0, row)));
    for (int i = 0; i < kStages * kKeys / kRows; ++i) {
      const uint32_t at = i / kPasses * kStageBytes, to = i % kPasses * kRows + row;
      const uint4 zeros = {};
      if (chunk < kHeadDim / 8 && !key_there) *reinterpret_cast<uint4*>(key_at(at, to)) = zeros;
      if (chunk < kValueDim / 8 && !value_there) *reinterpret_cast<uint4*>(value_at(at, to)) = zeros;
    }
  }

  __device__ __forceinline__ char* key_at(uint32_t stage, uint32_t to) const {
    return smem + stage + chunk_at<kHeadDim>(to, chunk);
  }
  __device__ __forceinline__ char* value_at(uint32_t stage, uint32_t to) const {
    return smem + stage + kValues + chunk_at<kValueDim>(to, chunk);
  }

  // Finds the tokens of a tile, a tile before they are fetched; beyond the last it comes again.
  __device__ __forceinline__ void look_up(uint32_t tile) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) tokens[i] = min(tile * kKeys + i * kRows + row, last);
    word_token = min(tile * kKeys + threadIdx.x, last);
    if (order == nullptr) return;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) tokens[i] = token_at(tokens[i]);
    if (threadIdx.x < kKeys) word_token = token_at(word_token);
  }
  // An order leads to no other memory.
  __device__ __forceinline__ uint32_t token_at(uint32_t place) const {
    return min(*reinterpret_cast<const uint32_t*>(row_of(order, place, static_cast<uint64_t>(p.k_order.strides[1] * 4))), last);
  }

  // Copies a tile to a stage, which is given as its place in bytes.
  __device__ __forceinline__ void fetch(uint32_t stage) const {
    if (!fast) {
      fetch_elements(stage);
      return;
    }
    if (key_there) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        copy_async(key_to + stage + i * kRows * kKeyPitch, row_of(keys, tokens[i], key_step));
        if (kValueDim == kHeadDim || value_there) {
          copy_async(value_to + stage + i * kRows * kValuePitch, row_of(values, tokens[i], value_step));
        }
      }
    }
    if (threadIdx.x < kKeys) {
      copy_word_async(shared_address(smem) + stage + kWords + 4 * threadIdx.x, row_of(words, word_token, word_step));
    }
  }

  // For rows that do not begin where 16 bytes can be copied at once.
  __device__ __forceinline__ void fetch_elements(uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const uint32_t to = i * kRows + row;
      if (key_there) copy_elements(key_at(stage, to), row_of(keys, tokens[i], stride_of(p.k)));
      if (value_there) copy_elements(value_at(stage, to), row_of(values, tokens[i], stride_of(p.v)));
    }
    if (threadIdx.x < kKeys) {
      const char* from = row_of(words, word_token, static_cast<uint64_t>(p.k_regions.strides[1] * 4));
      reinterpret_cast<int32_t*>(smem + stage + kWords)[threadIdx.x] = *reinterpret_cast<const int32_t*>(from);
    }
  }
  static __device__ __forceinline__ uint64_t stride_of(const TensorView<4>& x) { return x.strides[2] * sizeof(T); }
  static __device__ __forceinline__ void copy_elements(char* to, const char* from) {
#pragma unroll 1
    for (int i = 0; i < 16; i += 2) {
      *reinterpret_cast<uint16_t*>(to + i) = *reinterpret_cast<const uint16_t*>(from + i);
    }
  }
};
