// Launches percentiles and semantic guidance, long rows with scratch memory of torch's.
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "sega_ops.h"

namespace {

template <auto scratch_bytes, auto kernel, class Params>
void launch_with_scratch(const Params& p, const Tensor& like) {
  const int64_t bytes = static_cast<int64_t>(scratch_bytes(p));
  std::optional<Tensor> scratch;
  if (bytes > 0) scratch = allocate(like, {bytes}, ScalarType::Byte);
  launch_like(like, kernel, p, bytes > 0 ? scratch->data_ptr() : nullptr);
}

constexpr auto percentile_on_gpu =
    launch_with_scratch<percentile_mask_scratch_bytes, percentile_mask_cuda, PercentileParams>;
constexpr auto guidance_on_gpu = launch_with_scratch<sega_guidance_scratch_bytes, sega_guidance_cuda, SegaParams>;

}  // namespace

int64_t most_rows(const PercentileParams& p) { return percentile_mask_most_rows(p); }
int64_t most_channels(const SegaParams& p) { return sega_guidance_most_channels(p); }

STABLE_TORCH_LIBRARY_IMPL(dense_attn_cuda, DENSE_ATTN_DEVICE, m) {
  m.impl("percentile_mask", TORCH_BOX(&percentile_mask<percentile_on_gpu>));
  m.impl("sega_guidance", TORCH_BOX(&sega_guidance<guidance_on_gpu>));
}
