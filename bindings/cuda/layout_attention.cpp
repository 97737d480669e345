// Launches layout attention. An order of the tokens is not looked at, which would wait for the GPU: the kernels read no
// other memory by it.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "layout_attention_inputs.h"

namespace {

void require_rows(const char* name, const LayoutAttentionParams& p, int64_t seqlen) {
  const int64_t rows = p.batch * p.num_heads * seqlen;
  REQUIRE(rows <= kMaxRows, name, " must have at most ", kMaxRows, " rows in all heads, got ", rows);
}

// What the kernels of both passes take.
void require_attention(const LayoutAttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v,
                       const Tensor& q_regions, const Tensor& k_regions, const std::optional<Tensor>& strength,
                       const std::optional<Tensor>& q_order, const std::optional<Tensor>& k_order,
                       const std::optional<Tensor>& seqlens_k) {
  require_device("k", k, "q", q);
  require_device("v", v, "q", q);
  require_device("q_regions", q_regions, "q", q);
  require_device("k_regions", k_regions, "q", q);
  if (strength) require_device("strength", *strength, "q", q);
  if (q_order) require_device("q_order", *q_order, "q", q);
  if (k_order) require_device("k_order", *k_order, "q", q);
  if (seqlens_k) require_device("seqlens_k", *seqlens_k, "q", q);
  REQUIRE(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16, "q must be float16 or bfloat16, got ",
          torch::headeronly::toString(q.scalar_type()));
  REQUIRE(p.head_dim % kHeadDimStep == 0, "q must have a head dim that is a multiple of ", kHeadDimStep, ", got ",
          p.head_dim);
  require_rows("q", p, p.seqlen_q);
  require_rows("k", p, p.seqlen_k);
}

std::tuple<Tensor, Tensor, Tensor> layout_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_regions, const Tensor& k_regions,
    const std::optional<Tensor>& strength, const std::string& modulation, double scale,
    const std::optional<Tensor>& q_order, const std::optional<Tensor>& k_order, const std::optional<Tensor>& tiles,
    const std::optional<Tensor>& counts, const std::optional<Tensor>& k_words, double every_strength, bool with_lse,
    bool with_stats, const std::optional<Tensor>& seqlens_k) {
  LayoutAttentionParams p{};
  fill_inputs(p, q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order, every_strength,
              seqlens_k);
  require_lists(tiles, counts, k_words);
  require_attention(p, q, k, v, q_regions, k_regions, strength, q_order, k_order, seqlens_k);
  const FwdResults results(p, q, with_lse, with_stats);
  if (p.batch * p.num_heads * p.seqlen_q > 0) launch_like(q, layout_attention_fwd_cuda, p);
  return {results.out, results.lse, results.stats};
}

// Rows as the backward kernels read them, 16 bytes at once; copied where they lie otherwise.
Tensor in_pieces(const Tensor& x) {
  constexpr int64_t kFurthest = int64_t{1} << 30;  // so that bytes from row to row are 32 bits
  bool pieces = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(2) < kFurthest;
  for (int64_t i = 0; i < 3; ++i) pieces &= x.size(i) <= 1 || x.stride(i) % kHeadDimStep == 0;
  if (pieces) return x;
  Tensor copy = allocate(x, x.sizes(), x.scalar_type());
  return torch::stable::copy_(copy, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_gradient(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& q_regions, const Tensor& k_regions, const std::optional<Tensor>& strength, const Tensor& out,
    const Tensor& stats, const std::string& modulation, double scale, const std::optional<Tensor>& q_order,
    const std::optional<Tensor>& k_order, double every_strength, const std::optional<Tensor>& seqlens_k) {
  LayoutAttentionBwdParams p{};
  fill_inputs(p, q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order, every_strength,
              seqlens_k);
  require_attention(p, q, k, v, q_regions, k_regions, strength, q_order, k_order, seqlens_k);
  REQUIRE(p.head_dim <= kMaxBwdHeadDim, "q must have a head dim of at most ", kMaxBwdHeadDim,
          " where gradients are wanted, got ", p.head_dim);
  require_device("grad_out", grad_out, "q", q);
  require_device("out", out, "q", q);
  require_device("stats", stats, "q", q);
  if (grad_lse) require_device("grad_lse", *grad_lse, "q", q);
  const int64_t row_sizes[4] = {p.batch, p.num_heads, p.seqlen_q, p.head_dim},
                rows[3] = {p.batch, p.num_heads, p.seqlen_q};
  const int64_t key_sizes[4] = {p.batch, k.size(1), p.seqlen_k, p.head_dim};
  view_rows("grad_out", grad_out, q.scalar_type(), row_sizes);
  view_rows("out", out, q.scalar_type(), row_sizes);
  p.stats = view_rows("stats", stats, ScalarType::Float, {p.batch, p.num_heads, p.seqlen_q, kStats});
  REQUIRE(stats.is_contiguous() && reinterpret_cast<uintptr_t>(p.stats.data) % 16 == 0,
          "stats must be contiguous and begin at 16 bytes, got strides ", strides_of(stats), " at byte ",
          reinterpret_cast<uintptr_t>(p.stats.data) % 16);
  if (grad_lse) p.grad_lse = view("grad_lse", *grad_lse, ScalarType::Float, rows);
  // dk and dv of grouped heads are those of each head of q, whose sums are the caller's.
  const int64_t grad_sizes[4] = {p.batch, p.num_heads, p.seqlen_k, p.head_dim};
  const auto of_keys = [&](const Tensor& x) {
    return p.group == 1 ? empty_rows_like(x) : allocate(x, grad_sizes, x.scalar_type());
  };
  Tensor dq = empty_rows_like(q), dk = of_keys(k), dv = of_keys(v), dstrength = new_rows(q);
  if (p.batch * p.num_heads * p.seqlen_q * p.seqlen_k == 0) {
    for (Tensor* grad : {&dq, &dk, &dv, &dstrength}) torch::stable::zero_(*grad);
    return {dq, dk, dv, dstrength};
  }
  const Tensor q_rows = in_pieces(q), k_rows = in_pieces(k), v_rows = in_pieces(v), grad_rows = in_pieces(grad_out),
               out_rows = in_pieces(out);
  p.q = view_rows("q", q_rows, q.scalar_type(), row_sizes);
  p.k = view_rows("k", k_rows, q.scalar_type(), key_sizes);
  p.v = view_rows("v", v_rows, q.scalar_type(), key_sizes);
  p.grad_out = view_rows("grad_out", grad_rows, q.scalar_type(), row_sizes);
  p.out = view_rows("out", out_rows, q.scalar_type(), row_sizes);
  p.dq = view_rows("dq", dq, q.scalar_type(), row_sizes);
  p.dk = view_rows("dk", dk, q.scalar_type(), grad_sizes);
  p.dv = view_rows("dv", dv, q.scalar_type(), grad_sizes);
  p.dstrength = view("dstrength", dstrength, ScalarType::Float, rows);
  const Tensor scratch = allocate(q, {static_cast<int64_t>(layout_attention_bwd_scratch_bytes(p))}, ScalarType::Byte);
  launch_like(q, layout_attention_bwd_cuda, p, scratch.data_ptr());
  return {dq, dk, dv, dstrength};
}

}  // namespace

// The kernels behind layout_attention_bwd, which Python hands to those that are to take a call; of the same arguments.
STABLE_TORCH_LIBRARY_FRAGMENT(dense_attn_cuda, m) {
  m.def(
      "attention_gradient(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor q_regions, "
      "Tensor k_regions, Tensor? strength, Tensor out, Tensor stats, str modulation, float scale, Tensor? q_order, "
      "Tensor? k_order, float every_strength=1., Tensor? seqlens_k=None) -> (Tensor dq, Tensor dk, Tensor dv, Tensor "
      "dstrength)");
}

STABLE_TORCH_LIBRARY_IMPL(dense_attn_cuda, DENSE_ATTN_DEVICE, m) {
  m.impl("layout_attention_fwd", TORCH_BOX(&layout_attention_fwd));
  m.impl("attention_gradient", TORCH_BOX(&attention_gradient));
}
