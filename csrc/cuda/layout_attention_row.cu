// Launches layout attention of up to 128 keys for head dims up to one.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout_attention/row.cuh"

namespace DENSE_ATTN_CLASS::row {

template <class T, Modulation kModulation, int kKeys>
cudaError_t launch_row(const LayoutAttentionParams& p, cudaStream_t stream) {
  constexpr int64_t kEnough = 384, kMostSteps = 4;  // blocks that fill a GPU: with more of them, rows share keys
  const int64_t heads = p.batch * p.num_heads, tiles = (p.seqlen_q + kWarps * kRows - 1) / (kWarps * kRows);
  if (heads * tiles == 0) return cudaSuccess;
  int64_t steps = 1;
  while (steps < kMostSteps && heads * tiles >= 2 * steps * kEnough) steps *= 2;
  const int64_t blocks = std::min<int64_t>((tiles + steps - 1) / steps, UINT16_MAX);
  const dim3 grid(static_cast<unsigned>(heads), static_cast<unsigned>(blocks));
  return launch(layout_attention_row_fwd_kernel<T, kModulation, kKeys>, grid, kWarps * kWarp, sizeof(Shared<T, kKeys>),
                stream, p);
}

template <class T, Modulation kModulation>
cudaError_t launch_keys(const LayoutAttentionParams& p, cudaStream_t stream) {
  return p.seqlen_k <= 80 ? launch_row<T, kModulation, 80>(p, stream) : launch_row<T, kModulation, 128>(p, stream);
}

template <class T>
cudaError_t launch_modulation(const LayoutAttentionParams& p, cudaStream_t stream) {
  switch (p.modulation) {
    case Modulation::kRange:
      return launch_keys<T, Modulation::kRange>(p, stream);
    case Modulation::kMax:
      return launch_keys<T, Modulation::kMax>(p, stream);
    case Modulation::kBias:
      return launch_keys<T, Modulation::kBias>(p, stream);
    default:
      return launch_keys<T, Modulation::kMask>(p, stream);
  }
}

}  // namespace DENSE_ATTN_CLASS::row

namespace DENSE_ATTN_CLASS {

cudaError_t layout_attention_row_fwd_cuda(const LayoutAttentionParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) return row::launch_modulation<__half>(p, stream);
  return row::launch_modulation<__nv_bfloat16>(p, stream);
}

}  // namespace DENSE_ATTN_CLASS
