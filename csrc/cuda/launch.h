// A launch of a kernel, and the error of it that stays; the element types that kernels are made for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>

#include "common/tensor_view.h"

// Calls f with a value of the element type in memory.
#pragma nv_exec_check_disable  // f is of the side that it is called on
template <class F>
HOST_DEVICE auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

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
