// Hands semantic guidance and percentiles to torch's threads.
#include <tuple>

#include "cpu.h"
#include "sega_inputs.h"

namespace {

constexpr int64_t kWorthThreads = 16384;  // values; no more than these are done before another thread has woken up

// Runs f(begin, end, scratch) over the items, on one thread when there is little to do.
template <class F>
void parallel_if_large(int64_t items, int64_t values, size_t scratch_bytes, const Tensor& like, const F& f) {
  if (values > kWorthThreads) return parallel(items, scratch_bytes, like, f);
  parallel(1, scratch_bytes, like, [&](int64_t, int64_t, void* scratch) { f(0, items, scratch); });
}

// Every part of every pass on a thread of its own.
void percentile_of_long_rows(const SegaCpu& cpu, PercentileParams& p, const Tensor& x) {
  p.parts = torch::stable::get_num_threads();
  const Tensor memory = allocate(x, {static_cast<int64_t>(cpu.percentile_scratch_bytes(p))}, ScalarType::Byte);
  void* scratch = memory.data_ptr();
  for (int64_t row = 0; row < p.rows; ++row) {
    cpu.start(p, scratch);
    do {
      torch::stable::parallel_for(0, p.parts, 1,
                                  [&](int64_t begin, int64_t end) { cpu.search(p, row, begin, end, scratch); });
    } while (cpu.narrow(p, row, scratch));
    torch::stable::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) { cpu.mask(p, row, begin, end); });
  }
}

std::tuple<Tensor, Tensor> percentile_mask(const Tensor& x, double level) {
  PercentileCall call(x, level);
  PercentileParams& p = call.p;
  const SegaCpu& cpu = kernels().sega;
  if (p.rows == 0) return {call.masked, call.threshold};
  if (cpu.is_long(p) && p.rows < torch::stable::get_num_threads()) {
    percentile_of_long_rows(cpu, p, x);
  } else {
    parallel_if_large(p.rows, p.rows * p.count, cpu.percentile_scratch_bytes(p), x,
                      [&](int64_t begin, int64_t end, void* scratch) { cpu.percentile(p, begin, end, scratch); });
  }
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
  const SegaParams& p = call.p;
  const SegaCpu& cpu = kernels().sega;
  const int64_t items = cpu.guidance_items(p);
  if (items && p.count) {
    parallel_if_large(items, (p.concepts + 1) * call.eps.numel(), cpu.guidance_scratch_bytes(p), eps_uncond,
                      [&](int64_t begin, int64_t end, void* scratch) { cpu.guidance(p, begin, end, scratch); });
  }
  return {call.eps, call.momentum_out, call.thresholds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_attn, CPU, m) {
  m.impl("percentile_mask", TORCH_BOX(&percentile_mask));
  m.impl("sega_guidance", TORCH_BOX(&sega_guidance));
}
