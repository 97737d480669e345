// A launch of a kernel, and the error of it that stays.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

// Launches a kernel of these arguments, its dynamic shared memory allowed first where it may pass, with the kernel's
// own, what all kernels have: one bound for most sizes, so that no other thread's launch lowers it.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  constexpr size_t kAlwaysAllowed = 47 << 10, kUsual = 96 << 10;
  if (shared_bytes > kAlwaysAllowed) {
    const size_t bound = shared_bytes > kUsual ? shared_bytes : kUsual;
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bound));
    if (error != cudaSuccess) {
      cudaGetLastError();  // the next launch is not to report it
      return error;
    }
  }
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}
