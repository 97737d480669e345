// Layout attention forward where a warp holds whole rows of scores: up to 128 keys.
#pragma once

#include "cuda/layout_attention/row_steps.cuh"

namespace DENSE_ATTN_CLASS::row {

// Blocks whose registers fit a multiprocessor: without the number the compiler spills to fit one more.
template <int kKeys>
constexpr int kResident = kKeys > 80 ? 2 : 3;

template <class T, Modulation kModulation, int kKeys>
__global__ void __launch_bounds__(kWarps* kWarp, kResident<kKeys>)
    layout_attention_row_fwd_kernel(const __grid_constant__ LayoutAttentionParams p) {
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<Shared<T, kKeys>*>(memory);
  const Lane lane;
  const int num_heads = p.num_heads, seqlen_q = p.seqlen_q, head_dim = p.head_dim, warp = threadIdx.x / kWarp;
  const int batch = blockIdx.x / num_heads, head = blockIdx.x % num_heads, seqlen_k = keys_there(p, batch);
  auto& queries = shared.rows[warp][0];
  auto& out = shared.rows[warp][kAhead ? 1 : 0];
  const bool q_pieces = in_pieces(p.q, head_dim), out_pieces = in_pieces(p.out, head_dim);
  const auto fetch = [&](const Row& row) {
    fetch_row(queries[lane.own], p.q.at<T>(batch, head, row.token), lane.half, head_dim, seqlen_k > 0, q_pieces);
    commit_copies();
  };
  int place = (blockIdx.y * kWarps + warp) * kRows;
  Row row(p, batch, head, place + lane.own, seqlen_k);
  fetch_keys(shared, p, batch, key_head_of(p, head), seqlen_k);
  fetch(row);
  wait_for_copies<0>();
  __syncthreads();
  const KeyWords<kKeys> words(shared.words, lane);
  const bool numbers = p.lse.data || p.stats.data;
  const float signed_scale = p.scale, scale = fabsf(signed_scale);
  for (const int step = gridDim.y * kWarps * kRows; place < seqlen_q; place += step) {
    const bool more = place + step < seqlen_q;
    Row next = row;
    if (more) next = Row(p, batch, head, place + step + lane.own, seqlen_k);
    wait_for_copies<0>();
    __syncwarp();
    Scores<kKeys> s;
    multiply_keys(s, shared, queries, lane, signed_scale < 0);
    __syncwarp();
    if (kAhead && more) fetch(next);

    int32_t both_words[2];
    lane.to_both(row.words, both_words);
    if constexpr (kModulation == Modulation::kMask) exclude(s, words, both_words);
    const float high = extreme<true>(s, lane);
    const float low = kModulation == Modulation::kRange ? extreme<false>(s, lane) : high;
    const RowRule rule = row_rule<kModulation>(row.strength, scale, high, low);
    float largest = fmaxf(rule.offset_in, rule.offset_out) - kMost<T>, anchored = rule.anchor * rule.factor;
    if (__any_sync(~0u, is_steep<T, kModulation>(rule))) {
      largest = search_top<kModulation>(s, words, both_words, rule, lane);
      anchored = 0;
    }
    Exponents exponents;
    lane.to_both(rule.factor, exponents.factor);
    lane.to_both(rule.offset_in - largest - anchored, exponents.in);
    lane.to_both(rule.offset_out - largest - anchored, exponents.out);
    weigh<kModulation>(s, words, both_words, exponents);
    const float sum = numbers ? sum_own(s, seqlen_k, lane) : 0;
    Weights<kKeys> weights;
    round_weights<T>(weights, s);
    float sums[2], inverse[2];
    sum_weights(sums, weights, shared, lane);
    for (int r = 0; r < 2; ++r) inverse[r] = sums[r] == 0 ? 0 : reciprocal_approx(sums[r]);
#pragma unroll 1
    for (int column = 0; column < kHeadDim; column += kColumns) {
      multiply_values(out, weights, inverse, shared, column, lane);
    }
    __syncwarp();
    if (place + lane.own < seqlen_q) {
      store_row(p.out.at<T>(batch, head, row.token), out[lane.own], lane.half, head_dim, out_pieces);
      if (numbers && lane.half == 0) {
        store_row_numbers<kModulation>(p, batch, head, row.token, rule, high, low, largest, sum);
      }
    }
    if (!kAhead && more) {
      __syncwarp();
      fetch(next);
    }
    row = next;
  }
}

}  // namespace DENSE_ATTN_CLASS::row
