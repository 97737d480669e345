// Launches reversible steps; what leaves the grid is marked there, since an error would have to wait for the GPU.
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "reversible_steps.h"

namespace {

template <auto kernel, class Params>
void on_gpu(const Params& p, const Tensor& like) {
  launch_like(like, kernel, p, like.numel());
}

}  // namespace

int64_t most_elements() { return kMaxStepElements; }

STABLE_TORCH_LIBRARY_IMPL(dense_attn_cuda, DENSE_ATTN_DEVICE, m) {
  m.impl("ddim_step", TORCH_BOX(&ddim_step<on_gpu<ddim_step_cuda>>));
  m.impl("leapfrog_step", TORCH_BOX(&leapfrog_step<on_gpu<leapfrog_step_cuda>>));
  m.impl("edict_mix", TORCH_BOX(&edict<on_gpu<edict_mix_cuda>>));
  m.impl("edict_unmix", TORCH_BOX(&edict<on_gpu<edict_unmix_cuda>>));
  m.impl("exact_couple", TORCH_BOX(&exact_couple<on_gpu<exact_leapfrog_cuda>>));
  m.impl("exact_leapfrog", TORCH_BOX(&exact_leapfrog<on_gpu<exact_leapfrog_cuda>>));
  m.impl("exact_mix", TORCH_BOX(&exact_edict<on_gpu<exact_mix_cuda>>));
  m.impl("exact_unmix", TORCH_BOX(&exact_edict<on_gpu<exact_unmix_cuda>>));
}
