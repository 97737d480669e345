// Backward over keys: a warp's keys against all query rows. dk and dv, scores as [keys, rows].
#pragma once

#include "cuda/layout_attention_bwd_q.cuh"

constexpr int kUnrollKv = UNROLLKV;
struct KvStage {
  alignas(16) uint16_t q[kVisited * kStride], grad[kVisited * kStride];
  alignas(16) Record records[kVisited];
  alignas(16) int words[kVisited];
};

// One tile of rows. Gradients of scores carry their row's factor.
template <class T, Modulation kModulation, bool kMixed, bool kValuesInShared, int kTiles>
__device__ __forceinline__ void visit_rows(float (&dk)[kTiles][kAccTiles][4], float (&dv)[kTiles][kAccTiles][4],
                                           const Own (&k)[kTiles], const Own (&v)[kTiles], uint32_t own_values,
                                           const int (&key_words)[kTiles][2], const KvStage& stage, bool matched) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t q = shared_address(stage.q), grad = shared_address(stage.grad);
  constexpr float kZero[kTiles][2] = {};
#pragma unroll kUnrollKv
  for (int chunk = 0; chunk < kVisited / 16; ++chunk) {
    const uint32_t at = 2 * chunk * 16 * kStride;
    float s[kTiles][2][4], slope[kTiles][2][4];
    products<T>(s, k, q + at, kZero);
    if constexpr (kValuesInShared) {
      Own values[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) load_own<T>(values[tile], own_values + 2 * tile * 16 * kStride);
      products<T>(slope, values, grad + at, kZero);
    } else {
      products<T>(slope, v, grad + at, kZero);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int first = chunk * 16 + n * 8 + lane % 4 * 2;
      int2 words;
      if constexpr (kMixed) words = *(const int2*)(stage.words + first);
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const float4 record = *(const float4*)(stage.records + first + column);
        const float uniform = matched ? record.y : record.z;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int i = half * 2 + column;
            float weight;
            if constexpr (kMixed) {
              const bool meets = ((column ? words.y : words.x) & key_words[tile][half]) != 0;
              weight = exp2_approx(fmaf(s[tile][n][i], record.x, meets ? record.y : record.z));
              if constexpr (kModulation == Modulation::kMask) weight = meets ? weight : 0;
            } else {
              weight = exp2_approx(fmaf(s[tile][n][i], record.x, uniform));
            }
            s[tile][n][i] = weight;
            slope[tile][n][i] = weight * fmaf(slope[tile][n][i], record.x, record.w);
          }
        }
      }
    }
    uint32_t weights[kTiles][4], ds[kTiles][4];
    pack_tiles<T>(weights, s);
    add_products<T>(dv, weights, grad + at);
    pack_tiles<T>(ds, slope);
    add_products<T>(dk, ds, q + at);
  }
}

template <class T>
__device__ __forceinline__ void fetch_rows(KvStage& stage, const Copier& copier, const T* q, const T* grad,
                                           int q_step, int grad_step, const Record* records,
                                           const int* words, const int (&tokens)[kCopies], int first, int seqlen) {
  const uint32_t to_q = shared_address(stage.q) + copier.to, to_grad = shared_address(stage.grad) + copier.to;
#pragma unroll
  for (int i = 0; i < kCopies; ++i) {
    if (!copier.in_tile(i, kVisited)) continue;
    const int bytes = copier.there && first + copier.row + i * kRowsAtOnce < seqlen ? 16 : 0;
    copy_async_bytes(to_q + 2 * i * kRowsAtOnce * kStride, (const char*)q + (int64_t)tokens[i] * q_step, bytes);
    copy_async_bytes(to_grad + 2 * i * kRowsAtOnce * kStride, (const char*)grad + (int64_t)tokens[i] * grad_step, bytes);
  }
  if (threadIdx.x < kVisited) {
    const int row = first + threadIdx.x;
    const bool there = row < seqlen;
    copy_async(shared_address(stage.records + threadIdx.x), records + (there ? row : 0), there);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(stage.words + threadIdx.x)),
                 "l"(words + (there ? row : 0)), "r"(there ? 4 : 0)
                 : "memory");
  }
  commit_copies();
}
