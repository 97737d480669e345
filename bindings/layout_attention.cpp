// Fills the params of layout attention and hands the work to torch's threads.
#include "layout_attention.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "tensor_view.h"

namespace {

Modulation modulation_of(const std::string& name) {
  std::string all;
  for (size_t i = 0; i < std::size(kModulations); ++i) {
    if (name == kModulations[i]) return static_cast<Modulation>(i);
    all += (i ? ", " : "") + std::string(kModulations[i]);
  }
  refuse("modulation must be one of ", all, ", got ", name);
}

// An order that misses a row would leave it unwritten, one that leaves the range would write elsewhere.
void require_permutation(const TensorView<2>& order) {
  std::vector<bool> seen(order.sizes[1]);
  const int64_t distinct = order.strides[0] == 0 ? std::min<int64_t>(order.sizes[0], 1) : order.sizes[0];
  for (int64_t b = 0; b < distinct; ++b) {
    std::fill(seen.begin(), seen.end(), false);
    for (int64_t i = 0; i < order.sizes[1]; ++i) {
      const int32_t token = *order.at<int32_t>(b, i);
      REQUIRE(token >= 0 && token < order.sizes[1] && !seen[token], "q_order must be a permutation of the tokens, got ",
              token, " at ", i);
      seen[token] = true;
    }
  }
}

// The strength of all rows, where they have no tensor of their own.
struct EveryStrength {
  EveryStrength(double number, const Tensor& q) : wide(number) {
    REQUIRE(std::isfinite(number), "every_strength must be finite, got ", number);
    is_wide = accumulation_dtype(q) == ScalarType::Double;
    REQUIRE(is_wide || std::abs(number) <= std::numeric_limits<float>::max(),
            "every_strength must be finite in float32, got ", number);
    if (!is_wide) narrow = static_cast<float>(number);
  }
  TensorView<3> view() {
    TensorView<3> result;
    result.data = is_wide ? static_cast<void*>(&wide) : static_cast<void*>(&narrow);
    return result;
  }
  double wide;
  float narrow = 0;
  bool is_wide;
};

// q, k, v, words, strength and order: what both passes read.
void fill_inputs(LayoutAttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_regions,
                 const Tensor& k_regions, const std::optional<Tensor>& strength, const std::string& modulation,
                 double scale, const std::optional<Tensor>& q_order, const std::optional<Tensor>& k_order,
                 EveryStrength& every) {
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
  p.k = view_rows("k", k, q.scalar_type(), {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  p.v = view_rows("v", v, q.scalar_type(), {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  p.q_regions = view_words("q_regions", q_regions, p.batch, p.seqlen_q);
  p.k_regions = view_words("k_regions", k_regions, p.batch, p.seqlen_k);
  p.strength = every.view();
  if (strength) p.strength = view("strength", *strength, accumulation_dtype(q), {p.batch, p.num_heads, p.seqlen_q});
  if (q_order) {
    p.q_order = view_words("q_order", *q_order, p.batch, p.seqlen_q);
    require_permutation(p.q_order);
  }
  if (k_order) view_words("k_order", *k_order, p.batch, p.seqlen_k);  // keys are visited as they lie
}

Tensor new_rows(const Tensor& q) { return allocate(q, {q.size(0), q.size(1), q.size(2)}, accumulation_dtype(q)); }

// In q's memory order, unless that leaves the last axis apart (overlapping views); the fake kernel has the same rule.
Tensor empty_rows_like(const Tensor& q) {
  const Tensor like = allocate_like(q);
  if (q.size(3) == 1 || like.stride(3) == 1) return like;
  return allocate(q, q.sizes(), q.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> layout_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_regions, const Tensor& k_regions,
    const std::optional<Tensor>& strength, const std::string& modulation, double scale,
    const std::optional<Tensor>& q_order, const std::optional<Tensor>& k_order, const std::optional<Tensor>& tiles,
    const std::optional<Tensor>& counts, const std::optional<Tensor>& k_words, double every_strength, bool with_lse,
    bool with_stats) {
  LayoutAttentionParams p{};
  EveryStrength every(every_strength, q);
  fill_inputs(p, q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order, every);
  if (tiles) require_kind("tiles", *tiles, ScalarType::Int);  // the lists are for kernels that skip tiles
  if (counts) require_kind("counts", *counts, ScalarType::Int);
  if (k_words) require_kind("k_words", *k_words, ScalarType::Int);
  const Tensor out = empty_rows_like(q);
  const ScalarType wide = accumulation_dtype(q);
  const Tensor lse = with_lse ? new_rows(q) : allocate(q, {0}, wide);
  const Tensor stats =
      with_stats ? allocate(q, {q.size(0), q.size(1), q.size(2), kStats}, wide) : allocate(q, {0}, wide);
  p.out = view_rows("out", out, q.scalar_type(), {p.batch, p.num_heads, p.seqlen_q, p.head_dim});
  if (with_lse) p.lse = view("lse", lse, wide, {p.batch, p.num_heads, p.seqlen_q});
  if (with_stats) p.stats = view_rows("stats", stats, wide, {p.batch, p.num_heads, p.seqlen_q, kStats});
  const LayoutAttentionCpu& cpu = kernels().layout_attention;
  const int64_t items = p.batch * p.num_heads * p.seqlen_q > 0 ? cpu.fwd_items(p) : 0;
  if (items) {
    parallel(items, cpu.fwd_scratch_bytes(p), q,
             [&](int64_t begin, int64_t end, void* scratch) { cpu.fwd(p, begin, end, scratch); });
  }
  return {out, lse, stats};
}

// Splits heads into as many parts as keep the threads evenly busy; one when the heads alone do.
int64_t parts_per_head(int64_t heads, int64_t seqlen_q) {
  const int64_t threads = torch::stable::get_num_threads();
  constexpr int64_t kRowsPerPart = 96;
  const int64_t most = std::clamp<int64_t>(seqlen_q / kRowsPerPart, 1, threads);
  for (int64_t parts = 1; parts < most; ++parts) {
    const int64_t rounds = (heads * parts + threads - 1) / threads;
    if (rounds * threads * 10 <= heads * parts * 11) return parts;
  }
  return most;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layout_attention_bwd(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& q_regions, const Tensor& k_regions, const std::optional<Tensor>& strength, const Tensor& out,
    const Tensor& stats, const std::string& modulation, double scale, const std::optional<Tensor>& q_order,
    const std::optional<Tensor>& k_order, double every_strength) {
  LayoutAttentionBwdParams p{};
  EveryStrength every(every_strength, q);
  fill_inputs(p, q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order, every);
  const int64_t out_sizes[4] = {p.batch, p.num_heads, p.seqlen_q, p.head_dim};
  const int64_t rows[3] = {p.batch, p.num_heads, p.seqlen_q};
  p.grad_out = view_rows("grad_out", grad_out, q.scalar_type(), out_sizes);
  p.out = view_rows("out", out, q.scalar_type(), out_sizes);
  p.stats = view_rows("stats", stats, accumulation_dtype(q), {p.batch, p.num_heads, p.seqlen_q, kStats});
  if (grad_lse) p.grad_lse = view("grad_lse", *grad_lse, accumulation_dtype(q), rows);
  Tensor dq = empty_rows_like(q), dk = empty_rows_like(k), dv = empty_rows_like(v);
  Tensor dstrength = new_rows(q);
  if (p.batch * p.num_heads * p.seqlen_q * p.seqlen_k == 0) {
    for (Tensor* grad : {&dq, &dk, &dv, &dstrength}) torch::stable::zero_(*grad);
    return {dq, dk, dv, dstrength};
  }
  p.dq = view_rows("dq", dq, q.scalar_type(), out_sizes);
  p.dk = view_rows("dk", dk, q.scalar_type(), {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  p.dv = view_rows("dv", dv, q.scalar_type(), {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  p.dstrength = view("dstrength", dstrength, accumulation_dtype(q), rows);
  const int64_t heads = p.batch * p.num_heads;
  p.parts = parts_per_head(heads, p.seqlen_q);
  const LayoutAttentionCpu& cpu = kernels().layout_attention;
  const Tensor partials = allocate(q, {static_cast<int64_t>(cpu.bwd_partial_bytes(p))}, ScalarType::Byte);
  p.partials = partials.data_ptr();
  parallel(cpu.bwd_items(p), cpu.bwd_scratch_bytes(p), q,
           [&](int64_t begin, int64_t end, void* scratch) { cpu.bwd(p, begin, end, scratch); });
  if (p.parts > 1) {
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) { cpu.bwd_reduce(p, begin, end); });
  }
  return {dq, dk, dv, dstrength};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_attn, CPU, m) {
  m.impl("layout_attention_fwd", TORCH_BOX(&layout_attention_fwd));
  m.impl("layout_attention_bwd", TORCH_BOX(&layout_attention_bwd));
}
