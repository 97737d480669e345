// Layout attention backward for head dims up to one: the records of rows, then the pass over queries, then the one over
// keys, which takes what the others have found.
#include "cuda/launch.h"
#include "cuda/layout_attention/bwd_kv.cuh"

namespace DENSE_ATTN_CLASS {

template <class T, Modulation kModulation>
cudaError_t launch_passes(const LayoutAttentionBwdParams& p, cudaStream_t stream) {
  const auto blocks = [&](int64_t seqlen, int64_t rows) {
    return dim3(static_cast<unsigned>(p.batch * p.num_heads * ((seqlen + rows - 1) / rows)));
  };
  cudaError_t error =
      launch(layout_attention_bwd_rows_kernel<T, kModulation>, blocks(p.seqlen_q, kBlockRows), kThreads, 0, stream, p);
  if (error != cudaSuccess) return error;
  error = launch(layout_attention_bwd_q_kernel<T, kModulation>, blocks(p.seqlen_q, kBlockOwn), kThreads,
                 sizeof(QueryShared), stream, p);
  if (error != cudaSuccess) return error;
  return launch(layout_attention_bwd_kv_kernel<T, kModulation>, blocks(p.seqlen_k, kBlockOwn), kThreads,
                sizeof(KeyShared), stream, p);
}

template <class T>
cudaError_t launch_modulation(const LayoutAttentionBwdParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim <= kMaxBwdHeadDim) {  // two sums of longer rows fill all registers
    switch (p.modulation) {
      case Modulation::kRange:
        return launch_passes<T, Modulation::kRange>(p, stream);
      case Modulation::kMax:
        return launch_passes<T, Modulation::kMax>(p, stream);
      case Modulation::kBias:
        return launch_passes<T, Modulation::kBias>(p, stream);
      default:
        return launch_passes<T, Modulation::kMask>(p, stream);
    }
  }
  return cudaErrorInvalidValue;
}

cudaError_t layout_attention_bwd_cuda(const LayoutAttentionBwdParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) return launch_modulation<__half>(p, stream);
  return launch_modulation<__nv_bfloat16>(p, stream);
}

}  // namespace DENSE_ATTN_CLASS
