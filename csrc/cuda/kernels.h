// The CUDA kernels, each launched by one host function: it chooses the instantiation, allocates nothing and waits for
// nothing.
#pragma once

#include <driver_types.h>

#include "layout_attention.h"
#include "reversible.h"
#include "sega.h"

// Layout attention: any number of keys, and up to kMaxRowKeys of them.
cudaError_t layout_attention_fwd_cuda(const LayoutAttentionParams&, cudaStream_t);
cudaError_t layout_attention_row_fwd_cuda(const LayoutAttentionParams&, cudaStream_t);

// Semantic guidance.
cudaError_t percentile_mask_cuda(const PercentileParams&, cudaStream_t);
cudaError_t sega_guidance_cuda(const SegaParams&, cudaStream_t);

// Reversible steps on this many elements. What leaves the grid becomes kOffGrid, its latent NaN.
cudaError_t ddim_step_cuda(const DdimStepParams&, int64_t numel, cudaStream_t);
cudaError_t leapfrog_step_cuda(const LeapfrogStepParams&, int64_t numel, cudaStream_t);
cudaError_t edict_mix_cuda(const EdictParams&, int64_t numel, cudaStream_t);
cudaError_t edict_unmix_cuda(const EdictParams&, int64_t numel, cudaStream_t);
cudaError_t exact_leapfrog_cuda(const ExactLeapfrogParams&, int64_t numel, cudaStream_t);
cudaError_t exact_mix_cuda(const ExactEdictParams&, int64_t numel, cudaStream_t);
cudaError_t exact_unmix_cuda(const ExactEdictParams&, int64_t numel, cudaStream_t);
