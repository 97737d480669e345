// Which kernel takes a call of layout attention.
#include "cuda/kernels.h"

#define DENSE_ATTN_DECLARE(head_dim)                                                     \
  namespace DENSE_ATTN_CLASS_OF(head_dim) {                                              \
  cudaError_t layout_attention_fwd_cuda(const LayoutAttentionParams&, cudaStream_t);     \
  cudaError_t layout_attention_row_fwd_cuda(const LayoutAttentionParams&, cudaStream_t); \
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
