// Fills the params of layout attention and hands the work to torch's threads.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu.h"
#include "layout_attention_inputs.h"

namespace {

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

// A count of other keys would be read as one of these.
void require_counts(const LayoutAttentionParams& p) {
  for (int64_t b = 0; p.seqlens_k.data != nullptr && b < p.batch; ++b) {
    const int32_t count = *p.seqlens_k.at<int32_t>(b);
    REQUIRE(count >= 0 && count <= p.seqlen_k, "seqlens_k must count 0 to ", p.seqlen_k, " keys, got ", count);
  }
}

// The strength of all rows, where they have no tensor of their own: kernels read it where they would read theirs.
class EveryStrength {
 public:
  explicit EveryStrength(LayoutAttentionParams& p)
      : wide_(p.every_strength), narrow_(static_cast<float>(p.every_strength)) {
    if (p.strength.data != nullptr) return;
    p.strength.data = p.dtype == DType::kFloat64 ? static_cast<void*>(&wide_) : static_cast<void*>(&narrow_);
  }
  EveryStrength(const EveryStrength&) = delete;

 private:
  double wide_;
  float narrow_;
};

std::tuple<Tensor, Tensor, Tensor> layout_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_regions, const Tensor& k_regions,
    const std::optional<Tensor>& strength, const std::string& modulation, double scale,
    const std::optional<Tensor>& q_order, const std::optional<Tensor>& k_order, const std::optional<Tensor>& tiles,
    const std::optional<Tensor>& counts, const std::optional<Tensor>& k_words, double every_strength, bool with_lse,
    bool with_stats, const std::optional<Tensor>& seqlens_k) {
  LayoutAttentionParams p{};
  fill_inputs(p, q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order, every_strength,
              seqlens_k);
  const EveryStrength every(p);
  if (q_order) require_permutation(p.q_order);
  require_counts(p);
  require_lists(tiles, counts, k_words);
  const FwdResults results(p, q, with_lse, with_stats);
  const LayoutAttentionCpu& cpu = kernels().layout_attention;
  const int64_t items = p.batch * p.num_heads * p.seqlen_q > 0 ? cpu.fwd_items(p) : 0;
  if (items) {
    parallel(items, cpu.fwd_scratch_bytes(p), q,
             [&](int64_t begin, int64_t end, void* scratch) { cpu.fwd(p, begin, end, scratch); });
  }
  return {results.out, results.lse, results.stats};
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
    const std::optional<Tensor>& k_order, double every_strength, const std::optional<Tensor>& seqlens_k) {
  LayoutAttentionBwdParams p{};
  fill_inputs(p, q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order, every_strength,
              seqlens_k);
  const EveryStrength every(p);
  if (q_order) require_permutation(p.q_order);
  require_counts(p);
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
  p.dk = view_rows("dk", dk, q.scalar_type(), {p.batch, p.num_heads / p.group, p.seqlen_k, p.head_dim});
  p.dv = view_rows("dv", dv, q.scalar_type(), {p.batch, p.num_heads / p.group, p.seqlen_k, p.head_dim});
  p.dstrength = view("dstrength", dstrength, accumulation_dtype(q), rows);
  const int64_t heads = p.batch * p.num_heads / p.group;
  p.parts = parts_per_head(heads, p.seqlen_q * p.group);
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
