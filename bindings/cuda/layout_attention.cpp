// Launches layout attention. An order of the tokens is not looked at, which would wait for the GPU: the kernels read no
// other memory by it.
#include <tuple>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "layout_attention_inputs.h"

namespace {

std::tuple<Tensor, Tensor, Tensor> layout_attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_regions, const Tensor& k_regions,
    const std::optional<Tensor>& strength, const std::string& modulation, double scale,
    const std::optional<Tensor>& q_order, const std::optional<Tensor>& k_order, const std::optional<Tensor>& tiles,
    const std::optional<Tensor>& counts, const std::optional<Tensor>& k_words, double every_strength, bool with_lse,
    bool with_stats) {
  LayoutAttentionParams p{};
  fill_inputs(p, q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order, every_strength);
  require_lists(tiles, counts, k_words);
  require_device("k", k, "q", q);
  require_device("v", v, "q", q);
  require_device("q_regions", q_regions, "q", q);
  require_device("k_regions", k_regions, "q", q);
  if (strength) require_device("strength", *strength, "q", q);
  if (q_order) require_device("q_order", *q_order, "q", q);
  if (k_order) require_device("k_order", *k_order, "q", q);
  REQUIRE(p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16, "q must be float16 or bfloat16, got ",
          torch::headeronly::toString(q.scalar_type()));
  REQUIRE(p.head_dim % kHeadDimStep == 0, "q must have a head dim that is a multiple of ", kHeadDimStep, ", got ",
          p.head_dim);
  const FwdResults results(p, q, with_lse, with_stats);
  if (p.batch * p.num_heads * p.seqlen_q > 0) launch_like(q, layout_attention_fwd_cuda, p);
  return {results.out, results.lse, results.stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_attn_cuda, DENSE_ATTN_DEVICE, m) {
  m.impl("layout_attention_fwd", TORCH_BOX(&layout_attention_fwd));
}
