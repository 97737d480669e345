// What the backward kernels of layout attention leave each other of every row, and the kernel that begins it.
#pragma once

#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/layout_attention/bwd_tiles.cuh"

namespace DENSE_ATTN_CLASS {

struct Record {
  float factor, add_in, add_out;  // a weight is exp2(raw * factor + add)
  float shift;                    // -delta * factor
};
static_assert(sizeof(Record) == 16);

// Arrays of all rows of all heads, in the order of visits.
struct Scratch {
  Record* records;
  float *delta, *through;  // <grad_out, out> without lse's gradient; gradients of the largest and least score
  int *words, *places;     // regions; the keys of the largest and the least score

  __device__ __forceinline__ explicit Scratch(const LayoutAttentionBwdParams& p) {
    const int64_t rows = p.batch * p.num_heads * p.seqlen_q;
    records = static_cast<Record*>(p.partials);
    delta = reinterpret_cast<float*>(records + rows);
    through = delta + rows;
    words = reinterpret_cast<int*>(through + 2 * rows);
    places = words + rows;
  }
};

// The head and the tile of a block.
struct Place {
  int batch, head, first;
  int64_t index;  // of the head

  __device__ __forceinline__ Place(const LayoutAttentionBwdParams& p, int64_t seqlen, int block_rows) {
    const int tiles = static_cast<int>((seqlen + block_rows - 1) / block_rows);
    index = blockIdx.x / tiles;
    first = static_cast<int>(blockIdx.x % tiles) * block_rows;
    batch = static_cast<int>(index / p.num_heads), head = static_cast<int>(index % p.num_heads);
  }
};

// The power of 2 that weights are multiplied by, as its exponent: half floats of gradients times the factor would else
// have fewer digits than those times the temperature, or not fit.
template <class T>
__device__ __forceinline__ float lift_of(double scale) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return 0;
  const float above = fabsf(static_cast<float>(scale)) * kLog2EFloat;
  return static_cast<float>(min(max(126 - (__float_as_int(above) >> 23), -1), 8));  // above < 2^-that
}

template <class T>
__device__ __forceinline__ float row_gradient(const LayoutAttentionBwdParams& p, int batch, int head, int row) {
  return p.grad_lse.data ? *p.grad_lse.at<float>(batch, head, row) : 0;
}

constexpr int kLanes = 8, kBlockRows = kThreads / kLanes;  // of a row, and rows of a block

template <class T, Modulation kModulation>
__global__ void __launch_bounds__(kThreads)
    layout_attention_bwd_rows_kernel(const __grid_constant__ LayoutAttentionBwdParams p) {
  const Place place(p, p.seqlen_q, kBlockRows);
  const int visit = place.first + threadIdx.x / kLanes, row = row_at(p, place.batch, visit);
  const T* grad = p.grad_out.at<const T>(place.batch, place.head, row);
  const T* out = p.out.at<const T>(place.batch, place.head, row);
  float delta = 0;
  for (int column = threadIdx.x % kLanes * 2; column < p.head_dim; column += 2 * kLanes) {
    const float2 x = load_pair(grad + column), y = load_pair(out + column);
    delta = fmaf(x.x, y.x, fmaf(x.y, y.y, delta));
  }
  delta = quad_sum(delta);
  delta += __shfl_xor_sync(~0u, delta, 4);
  if (threadIdx.x % kLanes != 0 || visit >= p.seqlen_q) return;
  delta -= row_gradient<T>(p, place.batch, place.head, row);
  const float4 stats = *reinterpret_cast<const float4*>(p.stats.at<float>(place.batch, place.head, row));
  const float strength = row_strength(p, place.batch, place.head, row);
  const float factor = row_factor<kModulation>(strength, fabsf(static_cast<float>(p.scale)));
  const float anchored = row_anchor<kModulation>(factor, stats.x, stats.y) * factor, lift = lift_of<T>(p.scale);
  const Scratch scratch(p);
  const int64_t at = place.index * p.seqlen_q + visit;
  scratch.records[at] = {factor, stats.z - anchored + lift, stats.w - anchored + lift, -delta * factor};
  scratch.delta[at] = delta;
  scratch.words[at] = row_words(p, place.batch, row);
}

}  // namespace DENSE_ATTN_CLASS
