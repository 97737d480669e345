// Layout attention backward for the head dims of a class: the records of rows, then the pass over queries, then the one
// over keys, which takes what the others have found.
#include "cuda/launch.h"
#include "cuda/layout_attention_bwd_kv.cuh"

namespace {

template <class T, Modulation kModulation>
cudaError_t launch_passes(const LayoutAttentionBwdParams& p, cudaStream_t stream) {
  const auto blocks = [&](int64_t seqlen, int64_t rows) {
    return dim3(static_cast<unsigned>(p.batch * p.num_heads * ((seqlen + rows - 1) / rows)));
  };
  const dim3 threads(kThreads);
  cudaError_t error = launch(layout_attention_bwd_rows_kernel<T, kModulation>, blocks(p.seqlen_q, kThreads / 8), threads,
                             0, stream, p);
  if (error != cudaSuccess) return error;
  error = launch(layout_attention_bwd_q_kernel<T, kModulation>, blocks(p.seqlen_q, kBlockOwn), threads,
                 sizeof(QueryShared), stream, p);
  if (error != cudaSuccess) return error;
  return launch(layout_attention_bwd_kv_kernel<T, kModulation>, blocks(p.seqlen_k, kBlockOwn), threads,
                sizeof(KeyShared), stream, p);
}

template <class T>
cudaError_t launch_modulation(const LayoutAttentionBwdParams& p, cudaStream_t stream) {
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

}  // namespace

namespace DENSE_ATTN_CLASS {

cudaError_t layout_attention_bwd(const LayoutAttentionBwdParams& p, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch_modulation<__half>(p, stream) : launch_modulation<__nv_bfloat16>(p, stream);
}

}  // namespace DENSE_ATTN_CLASS
