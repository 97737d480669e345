// The GPU of a call's tensors, and launches on its current stream.
#pragma once

#include <driver_types.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "tensor_view.h"

// The sentence of an error of CUDA.
[[noreturn]] void refuse_launch(cudaError_t error);

// The current stream of a GPU.
cudaStream_t current_stream(int32_t device);

// Calls `kernel(..., stream)` with the GPU of a tensor as the current one. Emulated, there is none.
template <class Kernel, class... Arguments>
void launch_like(const Tensor& like, Kernel kernel, const Arguments&... arguments) {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (kOnGpu) guard.emplace(like.get_device_index());
  const cudaError_t error = kernel(arguments..., kOnGpu ? current_stream(like.get_device_index()) : nullptr);
  if (error != cudaSuccess) refuse_launch(error);
}
