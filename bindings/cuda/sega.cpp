// Launches semantic guidance and percentiles.
#include <tuple>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "sega_inputs.h"

namespace {

// Memory of a call that its launches alone see; none where they need none.
class Scratch {
 public:
  Scratch(const Tensor& like, size_t bytes) {
    if (bytes == 0) return;
    memory_ = allocate(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    data_ = memory_.data_ptr();
  }
  void* data() const { return data_; }

 private:
  Tensor memory_;
  void* data_ = nullptr;
};

std::tuple<Tensor, Tensor> percentile_mask(const Tensor& x, double level) {
  const PercentileCall call(x, level);
  const Scratch scratch(x, percentile_mask_scratch_bytes(call.p));
  launch_like(x, percentile_mask_cuda, call.p, scratch.data());
  return {call.masked, call.threshold};
}

std::tuple<Tensor, Tensor, Tensor> sega_guidance(
    const Tensor& eps_uncond, const Tensor& eps_text, const Tensor& eps_edits, const Tensor& momentum,
    double guidance_scale, const std::vector<double>& edit_guidance_scale, const std::vector<double>& edit_threshold,
    const std::vector<double>& weights, const std::vector<double>& partials, bool all_warm,
    const std::vector<bool>& reverse, double edit_momentum_scale, double edit_mom_beta,
    const std::optional<Tensor>& user_mask, bool sum_channels) {
  const SegaNumbers numbers{guidance_scale, edit_guidance_scale, edit_threshold, weights, partials, all_warm,
                            reverse,        edit_momentum_scale, edit_mom_beta};
  const SegaCall call(eps_uncond, eps_text, eps_edits, momentum, numbers, user_mask, sum_channels);
  require_device("eps_text", eps_text, "eps_uncond", eps_uncond);
  require_device("eps_edits", eps_edits, "eps_uncond", eps_uncond);
  require_device("momentum", momentum, "eps_uncond", eps_uncond);
  if (user_mask) require_device("user_mask", *user_mask, "eps_uncond", eps_uncond);
  const Scratch scratch(eps_uncond, sega_guidance_scratch_bytes(call.p));
  launch_like(eps_uncond, sega_guidance_cuda, call.p, scratch.data());
  return {call.eps, call.momentum_out, call.thresholds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_attn_cuda, DENSE_ATTN_DEVICE, m) {
  m.impl("percentile_mask", TORCH_BOX(&percentile_mask));
  m.impl("sega_guidance", TORCH_BOX(&sega_guidance));
}
