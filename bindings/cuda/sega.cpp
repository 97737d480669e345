// Launches percentiles and semantic guidance, long rows with scratch memory of torch's.
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "sega_ops.h"

namespace {

template <class Params, class Kernel>
void launch_with_scratch(const Params& p, const Tensor& like, size_t bytes, Kernel kernel) {
  std::optional<Tensor> scratch;
  if (bytes > 0) scratch = allocate(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  launch_like(like, kernel, p, scratch ? scratch->data_ptr() : nullptr);
}

void percentile_on_gpu(const PercentileParams& p, const Tensor& x) {
  launch_with_scratch(p, x, percentile_mask_scratch_bytes(p), percentile_mask_cuda);
}

void guidance_on_gpu(const SegaParams& p, const Tensor& like) {
  launch_with_scratch(p, like, sega_guidance_scratch_bytes(p), sega_guidance_cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dense_attn_cuda, DENSE_ATTN_DEVICE, m) {
  m.impl("percentile_mask", TORCH_BOX(&percentile_mask<percentile_on_gpu>));
  m.impl("sega_guidance", TORCH_BOX(&sega_guidance<guidance_on_gpu>));
}
