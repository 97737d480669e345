// A tensor as kernels see it: pointer, sizes, strides in elements. No ownership, no torch.
#pragma once

#include <cstdint>

#include "common/host_device.h"

enum class DType { kFloat32, kFloat64, kFloat16, kBFloat16 };

template <int kDims>
struct TensorView {
  void* data = nullptr;
  int64_t sizes[kDims] = {};
  int64_t strides[kDims] = {};

  template <class T, class... Index>
  HOST_DEVICE T* at(Index... index) const {
    static_assert(sizeof...(index) <= kDims);
    T* pointer = static_cast<T*>(data);
    int axis = 0;
    ((pointer += (int64_t)index * strides[axis++]), ...);
    return pointer;
  }
};
