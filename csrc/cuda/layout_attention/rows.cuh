// What the attention kernels know of query rows: where they lie, their words and strengths, what is stored of them.
#pragma once

#include <cstdint>

#include "cuda/primitives.cuh"
#include "layout_attention_rules.h"

// The query row that is visited in a place; an order leads to no other memory.
__device__ __forceinline__ int row_at(const LayoutAttentionParams& p, int batch, int place) {
  const int last = static_cast<int>(p.seqlen_q) - 1;
  place = min(place, last);  // places beyond the rows repeat the last one, and are not stored
  return p.q_order.data ? max(min(*p.q_order.at<int32_t>(batch, place), last), 0) : place;
}

// The keys of a sample that are there, and the head of keys that a head of queries meets. Most calls have all, and one
// for each.
__device__ __forceinline__ int keys_there(const LayoutAttentionParams& p, int batch) {
  return p.seqlens_k.data ? static_cast<int>(keys_of(p, batch)) : static_cast<int>(p.seqlen_k);
}
__device__ __forceinline__ int key_head_of(const LayoutAttentionParams& p, int head) {
  return p.group == 1 ? head : head / static_cast<int>(p.group);
}

__device__ __forceinline__ int32_t row_words(const LayoutAttentionParams& p, int batch, int row) {
  return *p.q_regions.at<int32_t>(batch, row);
}

__device__ __forceinline__ float row_strength(const LayoutAttentionParams& p, int batch, int head, int row) {
  return p.strength.data ? *p.strength.at<float>(batch, head, row) : static_cast<float>(p.every_strength);
}

// lse and the record of a row, each where it is asked for; weights measured from `largest` add up to `sum`.
template <Modulation kModulation>
__device__ __forceinline__ void store_row_numbers(const LayoutAttentionParams& p, int batch, int head, int row,
                                                  const RowRule& rule, float raw_max, float raw_min, float largest,
                                                  float sum) {
  if (p.lse.data) *p.lse.at<float>(batch, head, row) = row_lse(rule, largest, sum);
  if (p.stats.data) {
    const RowOffsets offsets = record_offsets(rule, largest, sum);
    const float low = kModulation == Modulation::kRange ? raw_min : raw_max;
    auto* record = reinterpret_cast<float4*>(p.stats.at<float>(batch, head, row));
    *record = make_float4(raw_max, low, offsets.in, offsets.out);
  }
}
