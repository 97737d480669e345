// Tensors of layout attention -> its params, for every device.
#pragma once

#include <cmath>
#include <iterator>
#include <limits>
#include <optional>

#include "layout_attention.h"
#include "memory.h"
#include "tensor_view.h"

inline Modulation modulation_of(const std::string& name) {
  std::string all;
  for (size_t i = 0; i < std::size(kModulations); ++i) {
    if (name == kModulations[i]) return static_cast<Modulation>(i);
    all += (i ? ", " : "") + std::string(kModulations[i]);
  }
  refuse("modulation must be one of ", all, ", got ", name);
}

// q, k, v, words, strength and orders: what both passes read. The strength of all rows is a number of the params.
inline void fill_inputs(LayoutAttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& q_regions, const Tensor& k_regions, const std::optional<Tensor>& strength,
                        const std::string& modulation, double scale, const std::optional<Tensor>& q_order,
                        const std::optional<Tensor>& k_order, double every_strength,
                        const std::optional<Tensor>& seqlens_k) {
  p.dtype = dtype_of("q", q);
  p.modulation = modulation_of(modulation);
  p.scale = scale;
  REQUIRE(std::isfinite(scale), "scale must be finite, got ", scale);
  REQUIRE(q.dim() == 4, "q must have 4 dimensions, got ", shape_of(q));
  REQUIRE(k.dim() == 4, "k must have 4 dimensions, got ", shape_of(k));
  p.batch = q.size(0), p.num_heads = q.size(1), p.seqlen_q = q.size(2), p.head_dim = q.size(3);
  p.seqlen_k = k.size(2);
  REQUIRE(p.head_dim >= 1 && p.head_dim <= kMaxHeadDim, "q must have a head dim of 1 to ", kMaxHeadDim, ", got ",
          p.head_dim);
  p.q = view_rows("q", q, q.scalar_type(), {p.batch, p.num_heads, p.seqlen_q, p.head_dim});
  const int64_t key_heads = k.size(1);
  REQUIRE(key_heads == p.num_heads || (key_heads > 0 && p.num_heads % key_heads == 0),
          "k must have a number of heads that divides q's ", p.num_heads, ", got ", key_heads);
  p.group = std::max<int64_t>(1, key_heads > 0 ? p.num_heads / key_heads : 1);
  p.k = view_rows("k", k, q.scalar_type(), {p.batch, key_heads, p.seqlen_k, p.head_dim});
  p.v = view_rows("v", v, q.scalar_type(), {p.batch, key_heads, p.seqlen_k, p.head_dim});
  p.q_regions = view_words("q_regions", q_regions, p.batch, p.seqlen_q);
  p.k_regions = view_words("k_regions", k_regions, p.batch, p.seqlen_k);
  REQUIRE(std::isfinite(every_strength), "every_strength must be finite, got ", every_strength);
  REQUIRE(accumulation_dtype(q) == ScalarType::Double || std::abs(every_strength) <= std::numeric_limits<float>::max(),
          "every_strength must be finite in float32, got ", every_strength);
  p.every_strength = every_strength;
  if (strength) p.strength = view("strength", *strength, accumulation_dtype(q), {p.batch, p.num_heads, p.seqlen_q});
  if (q_order) p.q_order = view_words("q_order", *q_order, p.batch, p.seqlen_q);
  if (k_order) p.k_order = view_words("k_order", *k_order, p.batch, p.seqlen_k);
  if (seqlens_k) p.seqlens_k = view("seqlens_k", *seqlens_k, ScalarType::Int, {p.batch});
}

inline Tensor new_rows(const Tensor& q) {
  return allocate(q, {q.size(0), q.size(1), q.size(2)}, accumulation_dtype(q));
}

// In q's memory order, unless that leaves the last axis apart (overlapping views); the fake kernel has the same rule.
inline Tensor empty_rows_like(const Tensor& q) {
  const Tensor like = allocate_like(q);
  if (q.size(3) == 1 || like.stride(3) == 1) return like;
  return allocate(q, q.sizes(), q.scalar_type());
}

// The results of the forward pass; those that are not asked for are [0].
struct FwdResults {
  FwdResults(LayoutAttentionParams& p, const Tensor& q, bool with_lse, bool with_stats)
      : out(empty_rows_like(q)),
        lse(with_lse ? new_rows(q) : allocate(q, {0}, accumulation_dtype(q))),
        stats(with_stats ? allocate(q, {p.batch, p.num_heads, p.seqlen_q, kStats}, accumulation_dtype(q))
                         : allocate(q, {0}, accumulation_dtype(q))) {
    const ScalarType wide = accumulation_dtype(q);
    p.out = view_rows("out", out, q.scalar_type(), {p.batch, p.num_heads, p.seqlen_q, p.head_dim});
    if (with_lse) p.lse = view("lse", lse, wide, {p.batch, p.num_heads, p.seqlen_q});
    if (with_stats) p.stats = view_rows("stats", stats, wide, {p.batch, p.num_heads, p.seqlen_q, kStats});
  }
  Tensor out, lse, stats;
};

// Lists of tiles are for kernels that skip tiles.
inline void require_lists(const std::optional<Tensor>& tiles, const std::optional<Tensor>& counts,
                          const std::optional<Tensor>& k_words) {
  if (tiles) require_kind("tiles", *tiles, ScalarType::Int);
  if (counts) require_kind("counts", *counts, ScalarType::Int);
  if (k_words) require_kind("k_words", *k_words, ScalarType::Int);
}
