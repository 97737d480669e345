// The CUDA kernels: each is launched on a stream and returns what the launch said.
#pragma once

#include <cuda_runtime_api.h>

#include "sega.h"

size_t percentile_mask_scratch_bytes(const PercentileParams&);
cudaError_t percentile_mask_cuda(const PercentileParams&, void* scratch, cudaStream_t);
size_t sega_guidance_scratch_bytes(const SegaParams&);
cudaError_t sega_guidance_cuda(const SegaParams&, void* scratch, cudaStream_t);
