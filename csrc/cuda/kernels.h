// The CUDA kernels, each launched by one host function: it chooses the instantiation, allocates nothing and waits for
// nothing.
#pragma once

#include <driver_types.h>

#include "cuda/head_dims.h"
#include "layout_attention.h"
#include "reversible.h"
#include "sega.h"

constexpr int64_t kMaxBlocks = INT32_MAX;  // of a launch

constexpr int64_t kMaxRowKeys = 128;  // up to them a row of scores is held at once

// Layout attention forward, for float16 and bfloat16, and as many rows of q and of k in all heads: places are ints.
constexpr int64_t kMaxRows = int64_t{1} << 30;
cudaError_t layout_attention_fwd_cuda(const LayoutAttentionParams&, cudaStream_t);

// And backward, for head dims up to kMaxBwdHeadDim and rows that loads of 16 bytes allow, as the gradients' do; where
// there are no rows or no keys it writes nothing.
constexpr int64_t kMaxBwdHeadDim = 160;
size_t layout_attention_bwd_scratch_bytes(const LayoutAttentionBwdParams&);
cudaError_t layout_attention_bwd_cuda(const LayoutAttentionBwdParams&, void* scratch, cudaStream_t);

// Percentiles and semantic guidance, on as many rows, or channels of all samples, and with as many bytes of scratch
// memory as these say; none where the rows are short.
int64_t percentile_mask_most_rows(const PercentileParams&);
size_t percentile_mask_scratch_bytes(const PercentileParams&);
cudaError_t percentile_mask_cuda(const PercentileParams&, void* scratch, cudaStream_t);
int64_t sega_guidance_most_channels(const SegaParams&);
size_t sega_guidance_scratch_bytes(const SegaParams&);
cudaError_t sega_guidance_cuda(const SegaParams&, void* scratch, cudaStream_t);

// Reversible steps on this many elements, at most so many. What leaves the grid becomes kOffGrid, its latent NaN.
constexpr int64_t kMaxStepElements = kMaxBlocks << 10;
cudaError_t ddim_step_cuda(const DdimStepParams&, int64_t numel, cudaStream_t);
cudaError_t leapfrog_step_cuda(const LeapfrogStepParams&, int64_t numel, cudaStream_t);
cudaError_t edict_mix_cuda(const EdictParams&, int64_t numel, cudaStream_t);
cudaError_t edict_unmix_cuda(const EdictParams&, int64_t numel, cudaStream_t);
cudaError_t exact_leapfrog_cuda(const ExactLeapfrogParams&, int64_t numel, cudaStream_t);
cudaError_t exact_mix_cuda(const ExactEdictParams&, int64_t numel, cudaStream_t);
cudaError_t exact_unmix_cuda(const ExactEdictParams&, int64_t numel, cudaStream_t);
