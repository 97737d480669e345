// Which kernel takes a call of layout attention.
#include "cuda/kernels.h"

#define DENSE_ATTN_DECLARE(head_dim)                                                     \
  namespace DENSE_ATTN_CLASS_OF(head_dim) {                                              \
  cudaError_t layout_attention_fwd_cuda(const LayoutAttentionParams&, cudaStream_t);     \
  cudaError_t layout_attention_row_fwd_cuda(const LayoutAttentionParams&, cudaStream_t); \
  cudaError_t layout_attention_bwd_cuda(const LayoutAttentionBwdParams&, cudaStream_t);  \
  }
DENSE_ATTN_HEAD_DIMS(DENSE_ATTN_DECLARE)

cudaError_t layout_attention_fwd_cuda(const LayoutAttentionParams& p, cudaStream_t stream) {
  const bool row = p.seqlen_k <= kMaxRowKeys;
#define DENSE_ATTN_CALL(largest)                                                        \
  if (p.head_dim <= largest) {                                                          \
    return row ? DENSE_ATTN_CLASS_OF(largest)::layout_attention_row_fwd_cuda(p, stream) \
               : DENSE_ATTN_CLASS_OF(largest)::layout_attention_fwd_cuda(p, stream);    \
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
