// How keys, values and words reach shared memory: tiles in the order of visits, some tiles ahead of their use.
#pragma once

#include "cuda/primitives.cuh"
#include "layout_attention.h"

// The eight rows that a matrix load reads at once lie in different banks: their pitch is an odd number of 16-byte
// chunks or, where that would take too much memory, the last three bits of a row turn those of its chunks.
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

// A stage of shared memory holds rows of keys, rows of values, words, and the tokens of the tile that is fetched when
// this one is used. A row is copied by some neighbouring threads, 16 bytes each; columns beyond the head dim are 0 from
// the start.
template <class T, int kHeadDim, int kValueDim, int kKeys, int kStages, int kThreads>
struct KeyTiles {
  static constexpr int kKeyPitch = kRowPitch<kHeadDim>, kValuePitch = kRowPitch<kValueDim>;
  static constexpr int kValues = kKeys * kKeyPitch, kWords = kValues + kKeys * kValuePitch;
  static constexpr int kTokens = kWords + kKeys * 4, kStageBytes = kTokens + kKeys * 4;
  static constexpr int kLanes = kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;
  static constexpr int kRows = kThreads / kLanes, kPasses = kKeys / kRows;  // rows that are copied at once
  static_assert(kPasses * kRows == kKeys && kKeys <= kThreads && kRows % 8 == 0 && kStageBytes % 128 == 0);
  enum Flags { kFast = 1, kKeyThere = 2, kValueThere = 4, kHasWord = 8 };

  const LayoutAttentionParams& p;
  char* const smem;
  const char *keys, *values;  // this thread's chunk of the head's first row
  const char *words, *order;  // of the sample
  uint32_t key_to, value_to;  // in the first stage
  uint32_t last, flags;
  uint32_t key_step, value_step, word_step;  // strides in bytes, right where kFast

  __device__ __forceinline__ KeyTiles(const LayoutAttentionParams& params, char* shared, int batch, int head, int part,
                                      int seqlen_k)
      : p(params),
        smem(shared),
        keys(reinterpret_cast<const char*>(p.k.at<const T>(batch, head))),
        values(reinterpret_cast<const char*>(p.v.at<const T>(batch, head)) + part * kValueDim * sizeof(T)),
        words(reinterpret_cast<const char*>(p.k_regions.at<const int32_t>(batch))),
        order(reinterpret_cast<const char*>(p.k_order.at<const int32_t>(p.k_order.data ? batch : 0))),
        last(static_cast<uint32_t>(seqlen_k) - 1) {
    const uint32_t row = threadIdx.x / kLanes, chunk = threadIdx.x % kLanes;
    const auto bits = reinterpret_cast<uintptr_t>(keys) | reinterpret_cast<uintptr_t>(values);
    const uint64_t key_stride = bytes(p.k.strides[2], sizeof(T)), value_stride = bytes(p.v.strides[2], sizeof(T));
    const uint64_t word_stride = bytes(p.k_regions.strides[1], 4);
    const bool fast =
        (bits | key_stride | value_stride) % 16 == 0 && (key_stride | value_stride | word_stride) >> 32 == 0;
    const bool key_there = chunk * 8 < p.head_dim;
    const bool value_there = chunk < kValueDim / 8 && part * kValueDim + chunk * 8 < p.head_dim;
    flags = kept(fast * kFast | key_there * kKeyThere | value_there * kValueThere | (threadIdx.x < kKeys) * kHasWord);
    key_step = kept(key_stride), value_step = kept(value_stride), word_step = kept(word_stride);
    keys = kept(keys + chunk * 16), values = kept(values + chunk * 16), words = kept(words);
    key_to = kept(shared_address(smem) + chunk_at<kHeadDim>(row, chunk));
    value_to = kept(shared_address(smem) + kValues + chunk_at<kValueDim>(row, chunk));
    for (int i = 0; i < kStages * kPasses; ++i) {
      char* const at = smem + i / kPasses * kStageBytes;
      const uint32_t to = i % kPasses * kRows + row;
      const uint4 zeros = {};
      if (chunk < kHeadDim / 8 && !key_there) *reinterpret_cast<uint4*>(at + chunk_at<kHeadDim>(to, chunk)) = zeros;
      if (chunk < kValueDim / 8 && !value_there) {
        *reinterpret_cast<uint4*>(at + kValues + chunk_at<kValueDim>(to, chunk)) = zeros;
      }
    }
  }
  static __device__ __forceinline__ uint64_t bytes(int64_t stride, uint64_t size) { return stride * size; }

  // The token of a tile's row; beyond the last place it comes again. It was fetched with the tile in use, but for the
  // first tiles. An order leads to no other memory.
  template <bool kFirst>
  __device__ __forceinline__ uint32_t token_of(uint32_t tile, uint32_t row, uint32_t used) const {
    uint32_t token = tile * kKeys + row;
    if (order != nullptr) {
      const char* at = kFirst ? order_at(token) : smem + used + kTokens + 4 * row;
      token = *reinterpret_cast<const uint32_t*>(at);
    }
    return min(token, last);
  }
  __device__ __forceinline__ const char* order_at(uint32_t place) const {
    return row_of(order, min(place, last), bytes(p.k_order.strides[1], 4));
  }

  // Copies a tile to a stage while another stage is used; stages are given as their places in bytes.
  template <bool kFirst>
  __device__ __forceinline__ void fetch(uint32_t tile, uint32_t stage, uint32_t used) const {
    const uint32_t row = threadIdx.x / kLanes;
    uint32_t tokens[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) tokens[i] = token_of<kFirst>(tile, i * kRows + row, used);
    if ((flags & kFast) == 0) {
      copy_elements(tokens, stage);
    } else if (flags & kKeyThere) {
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        copy_async(key_to + stage + i * kRows * kKeyPitch, row_of(keys, tokens[i], key_step));
        if (kValueDim == kHeadDim || (flags & kValueThere)) {
          copy_async(value_to + stage + i * kRows * kValuePitch, row_of(values, tokens[i], value_step));
        }
      }
    }
    if (flags & kHasWord) {
      const uint32_t token = token_of<kFirst>(tile, threadIdx.x, used);
      const uint32_t to = shared_address(smem) + stage + kWords + 4 * threadIdx.x;
      copy_word_async(to, (flags & kFast) ? row_of(words, token, word_step)
                                          : row_of(words, token, bytes(p.k_regions.strides[1], 4)));
      if (order != nullptr)
        copy_word_async(to + kTokens - kWords, order_at((tile + kStages - 1) * kKeys + threadIdx.x));
    }
  }

  // For rows that do not begin where 16 bytes can be copied at once.
  __device__ __forceinline__ void copy_elements(const uint32_t (&tokens)[kPasses], uint32_t stage) const {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const char* key = row_of(keys, tokens[i], bytes(p.k.strides[2], sizeof(T)));
      const char* value = row_of(values, tokens[i], bytes(p.v.strides[2], sizeof(T)));
      if (flags & kKeyThere) copy_chunk(key_to + stage + i * kRows * kKeyPitch, key);
      if (flags & kValueThere) copy_chunk(value_to + stage + i * kRows * kValuePitch, value);
    }
  }
  static __device__ __forceinline__ void copy_chunk(uint32_t to, const char* from) {
#pragma unroll 1
    for (int i = 0; i < 16; i += 2) {
      const uint16_t element = *reinterpret_cast<const uint16_t*>(from + i);
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + i), "h"(element) : "memory");
    }
  }
};
