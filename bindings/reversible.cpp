// Hands ranges of the elements of a reversible step to torch's threads.
#include <atomic>
#include <cmath>

#include "cpu.h"
#include "reversible_steps.h"

namespace {

constexpr int64_t kGrain = 16384;  // elements that are not worth another thread

template <class Params>
void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& p, const Tensor& like) {
  torch::stable::parallel_for(0, like.numel(), kGrain, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

template <class Params>
void run(double (*kernel)(const Params&, int64_t, int64_t), const Params& p, const Tensor& like) {
  std::atomic<double> off_grid{0};
  torch::stable::parallel_for(0, like.numel(), kGrain, [&](int64_t begin, int64_t end) {
    const double found = kernel(p, begin, end);
    if (found != 0) off_grid = found;
  });
  const double got = off_grid;
  REQUIRE(got == 0, "eps must be finite and keep the latents within the grid of 2^50 steps, got ",
          std::isnan(got) ? std::fabs(got) : got, " steps");
}

template <auto kernel, class Params>
void on_threads(const Params& p, const Tensor& like) {
  run(kernels().reversible.*kernel, p, like);
}

}  // namespace

int64_t most_elements() { return INT64_MAX; }

STABLE_TORCH_LIBRARY_IMPL(dense_attn, CPU, m) {
  m.impl("ddim_step", TORCH_BOX(&ddim_step<on_threads<&ReversibleCpu::ddim_step>>));
  m.impl("leapfrog_step", TORCH_BOX(&leapfrog_step<on_threads<&ReversibleCpu::leapfrog_step>>));
  m.impl("edict_mix", TORCH_BOX(&edict<on_threads<&ReversibleCpu::edict_mix>>));
  m.impl("edict_unmix", TORCH_BOX(&edict<on_threads<&ReversibleCpu::edict_unmix>>));
  m.impl("exact_couple", TORCH_BOX(&exact_couple<on_threads<&ReversibleCpu::exact_leapfrog>>));
  m.impl("exact_leapfrog", TORCH_BOX(&exact_leapfrog<on_threads<&ReversibleCpu::exact_leapfrog>>));
  m.impl("exact_mix", TORCH_BOX(&exact_edict<on_threads<&ReversibleCpu::exact_mix>>));
  m.impl("exact_unmix", TORCH_BOX(&exact_edict<on_threads<&ReversibleCpu::exact_unmix>>));
}
