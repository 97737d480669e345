// One schema line an op.
#include <cstdlib>

#include "cpu.h"

const CpuKernels& kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
    const char* isa = std::getenv("DENSE_ATTN_ISA");
    const char* reason = nullptr;
    const CpuKernels* found = cpu_kernels(isa, &reason);
    REQUIRE(found != nullptr, "DENSE_ATTN_ISA must ", reason, ", got ", isa);
    return *found;
  }();
  return chosen;
}

static std::string cpu_isa() { return kernels().isa; }

STABLE_TORCH_LIBRARY(dense_attn, m) {
  m.def("cpu_isa() -> str");
  m.def(
      "layout_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor q_regions, Tensor k_regions, Tensor strength, "
      "str modulation, float scale, Tensor? q_order) -> (Tensor out, Tensor lse, Tensor stats)");
  m.def(
      "layout_attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor q_regions, "
      "Tensor k_regions, Tensor strength, Tensor out, Tensor stats, str modulation, float scale, Tensor? q_order) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dstrength)");
  m.def("percentile_mask(Tensor x, float level) -> (Tensor masked, Tensor threshold)");
  m.def(
      "sega_guidance(Tensor eps_uncond, Tensor eps_text, Tensor eps_edits, Tensor momentum, *, float guidance_scale, "
      "float[] edit_guidance_scale, float[] edit_threshold, float[] weights, float[] partials, bool all_warm, "
      "bool[] reverse, float edit_momentum_scale, float edit_mom_beta, Tensor? user_mask, bool sum_channels) -> "
      "(Tensor eps, Tensor momentum_out, Tensor thresholds)");
  m.def("ddim_step(Tensor x, Tensor eps, Tensor? eps_uncond, float a, float b, float guidance_scale) -> Tensor");
  m.def("leapfrog_step(Tensor far, Tensor near, Tensor eps, float c_far, float c_near, float c_eps) -> Tensor");
  m.def(
      "edict_mix(Tensor x, Tensor y, Tensor? eps, float a, float b, float mix, bool couple_x) -> "
      "(Tensor x_out, Tensor y_out)");
  m.def(
      "edict_unmix(Tensor x, Tensor y, Tensor? eps, float a, float b, float mix, bool couple_x) -> "
      "(Tensor x_out, Tensor y_out)");
  m.def(
      "exact_couple(Tensor z, Tensor eps, float step, float to_latent, ScalarType dtype) -> "
      "(Tensor z_out, Tensor latent)");
  m.def(
      "exact_leapfrog(Tensor far, Tensor near, Tensor eps, float c_near, float c_eps, float to_latent, "
      "ScalarType dtype) -> (Tensor z_out, Tensor latent)");
  m.def(
      "exact_mix(Tensor x, Tensor y, Tensor? eps, float step, float mix, bool couple_x, float to_latent, "
      "bool latent_x, ScalarType dtype) -> (Tensor x_out, Tensor y_out, Tensor latent)");
  m.def(
      "exact_unmix(Tensor x, Tensor y, Tensor? eps, float step, float mix, bool couple_x, float to_latent, "
      "bool latent_x, ScalarType dtype) -> (Tensor x_out, Tensor y_out, Tensor latent)");
}

STABLE_TORCH_LIBRARY_IMPL(dense_attn, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
