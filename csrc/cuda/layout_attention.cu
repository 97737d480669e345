// Which kernel takes a call of layout attention.
#include <cuda_runtime_api.h>

#include "cuda/kernels.h"

#define DENSE_ATTN_DECLARE(head_dim)                                                     \
  namespace DENSE_ATTN_CLASS_OF(head_dim) {                                              \
  cudaError_t layout_attention_fwd_cuda(const LayoutAttentionParams&, cudaStream_t);     \
  cudaError_t layout_attention_row_fwd_cuda(const LayoutAttentionParams&, cudaStream_t); \
  cudaError_t layout_attention_bwd_cuda(const LayoutAttentionBwdParams&, cudaStream_t);  \
  }
DENSE_ATTN_HEAD_DIMS(DENSE_ATTN_DECLARE)

namespace {

using Launch = cudaError_t(const LayoutAttentionParams&, cudaStream_t);

cudaError_t launch_either(Launch& row, Launch& any, const LayoutAttentionParams& p, cudaStream_t stream) {
  if (p.seqlen_k > kMaxRowKeys) return any(p, stream);
  const cudaError_t error = row(p, stream);
  if (error != cudaErrorInvalidValue) return error;
  cudaGetLastError();  // wide keys that a block of this GPU has not the shared memory for
  return any(p, stream);
}

}  // namespace

cudaError_t layout_attention_fwd_cuda(const LayoutAttentionParams& p, cudaStream_t stream) {
#define DENSE_ATTN_CALL(largest)                                                              \
  if (p.head_dim <= largest) {                                                                \
    return launch_either(DENSE_ATTN_CLASS_OF(largest)::layout_attention_row_fwd_cuda,         \
                         DENSE_ATTN_CLASS_OF(largest)::layout_attention_fwd_cuda, p, stream); \
  }
  DENSE_ATTN_HEAD_DIMS(DENSE_ATTN_CALL)
  return cudaErrorInvalidValue;
}

// Of each row of a head a record of four numbers, two numbers more, and two of each extreme.
size_t layout_attention_bwd_scratch_bytes(const LayoutAttentionBwdParams& p) {
  return p.batch * p.num_heads * p.seqlen_q * (4 + 2 + 2 * 2) * sizeof(float);
}

cudaError_t layout_attention_bwd_cuda(const LayoutAttentionBwdParams& given, void* scratch, cudaStream_t stream) {
  LayoutAttentionBwdParams p = given;
  p.partials = scratch;
  if (p.batch * p.num_heads * p.seqlen_q * p.seqlen_k == 0) return cudaSuccess;
#define DENSE_ATTN_CALL_BWD(largest) \
  if (p.head_dim <= largest) return DENSE_ATTN_CLASS_OF(largest)::layout_attention_bwd_cuda(p, stream);
  DENSE_ATTN_HEAD_DIMS(DENSE_ATTN_CALL_BWD)
  return cudaErrorInvalidValue;
}
