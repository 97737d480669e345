// One schema line an op.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(dense_attn, m) {
  m.def("cpu_isa() -> str");
  m.def(
      "layout_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor q_regions, Tensor k_regions, Tensor strength, "
      "str modulation, float scale, Tensor? q_order) -> (Tensor out, Tensor lse, Tensor stats)");
  m.def(
      "layout_attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor q_regions, "
      "Tensor k_regions, Tensor strength, Tensor out, Tensor stats, str modulation, float scale, Tensor? q_order) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dstrength)");
}
