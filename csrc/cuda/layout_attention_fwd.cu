// Launches layout attention forward for head dims up to one.
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout_attention/fwd.cuh"

namespace DENSE_ATTN_CLASS {

template <class T, Modulation kModulation>
cudaError_t launch_fwd(const LayoutAttentionParams& p, cudaStream_t stream) {
  const int64_t programs = p.batch * p.num_heads * ((p.seqlen_q + kBlockM - 1) / kBlockM);
  if (programs == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(programs), kHeadDim / kValueDim);
  return launch(layout_attention_fwd_kernel<T, kModulation>, grid, kThreads, kStages * Tiles<T>::kStageBytes, stream,
                p);
}

template <class T>
cudaError_t launch_modulation(const LayoutAttentionParams& p, cudaStream_t stream) {
  switch (p.modulation) {
    case Modulation::kRange:
      return launch_fwd<T, Modulation::kRange>(p, stream);
    case Modulation::kMax:
      return launch_fwd<T, Modulation::kMax>(p, stream);
    case Modulation::kBias:
      return launch_fwd<T, Modulation::kBias>(p, stream);
    default:
      return launch_fwd<T, Modulation::kMask>(p, stream);
  }
}

cudaError_t layout_attention_fwd_cuda(const LayoutAttentionParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) return launch_modulation<__half>(p, stream);
  return launch_modulation<__nv_bfloat16>(p, stream);
}

}  // namespace DENSE_ATTN_CLASS
