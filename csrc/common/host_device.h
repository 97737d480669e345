// Functions that the CPU's and CUDA's kernels share. Always inlined: the CPU has them once an instruction set.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif
