// Launches reversible steps; what leaves the grid is marked there, since an error would have to wait for the GPU.
#include <cmath>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "reversible_steps.h"

namespace {

template <auto kernel, class Params>
void on_gpu(const Params& p, const Tensor& like) {
  launch_like(like, kernel, p, like.numel());
}

// A GPU's caller looks when a chain ends, and waits only then; where the CPU has the results, it looks at once.
void require_on_grid(const FlatView& z, int64_t numel) {
  for (int64_t i = 0; !kOnGpu && i < numel; ++i) {
    const double got = static_cast<double>(static_cast<const int64_t*>(z.data)[i]);
    REQUIRE(std::abs(got) <= kGridLimit, "eps must be finite and keep the latents within the grid of 2^50 steps, got ",
            got, " steps");
  }
}

void exact_leapfrog_on_gpu(const ExactLeapfrogParams& p, const Tensor& like) {
  on_gpu<exact_leapfrog_cuda>(p, like);
  require_on_grid(p.z_out, like.numel());
}

template <auto kernel>
void exact_edict_on_gpu(const ExactEdictParams& p, const Tensor& like) {
  on_gpu<kernel>(p, like);
  require_on_grid(p.x_out, like.numel());
  require_on_grid(p.y_out, like.numel());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_attn_cuda, DENSE_ATTN_DEVICE, m) {
  m.impl("ddim_step", TORCH_BOX(&ddim_step<on_gpu<ddim_step_cuda>>));
  m.impl("leapfrog_step", TORCH_BOX(&leapfrog_step<on_gpu<leapfrog_step_cuda>>));
  m.impl("edict_mix", TORCH_BOX(&edict<on_gpu<edict_mix_cuda>>));
  m.impl("edict_unmix", TORCH_BOX(&edict<on_gpu<edict_unmix_cuda>>));
  m.impl("exact_couple", TORCH_BOX(&exact_couple<exact_leapfrog_on_gpu>));
  m.impl("exact_leapfrog", TORCH_BOX(&exact_leapfrog<exact_leapfrog_on_gpu>));
  m.impl("exact_mix", TORCH_BOX(&exact_edict<exact_edict_on_gpu<exact_mix_cuda>>));
  m.impl("exact_unmix", TORCH_BOX(&exact_edict<exact_edict_on_gpu<exact_unmix_cuda>>));
}
