// Tensor -> TensorView, refusing what a kernel cannot read: the one place where raw calls are checked.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "common/tensor_view.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device whose tensors a library takes, as torch names its dispatch key; the build says CUDA where it is.
#ifndef DENSE_ATTN_DEVICE
#define DENSE_ATTN_DEVICE CPU
#endif
enum class Device { CPU, CUDA };
constexpr bool kOnGpu = Device::DENSE_ATTN_DEVICE == Device::CUDA;
constexpr const char* kDeviceName = kOnGpu ? "cuda" : "cpu";

template <class... Part>
[[noreturn]] void refuse(const Part&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// One sentence, `<argument> must <rule>, got <value>`, put together only when it is needed.
#define REQUIRE(condition, ...) \
  if (!(condition)) refuse(__VA_ARGS__)

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline std::string strides_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.stride(i));
  return text + "]";
}

inline void require_kind(const char* name, const Tensor& tensor, ScalarType dtype) {
  REQUIRE(kOnGpu ? tensor.is_cuda() : tensor.is_cpu(), name, " must be a ", kDeviceName, " tensor, got another device");
  REQUIRE(tensor.layout() == torch::headeronly::Layout::Strided, name, " must be strided, got another layout");
  REQUIRE(tensor.scalar_type() == dtype, name, " must have dtype ", torch::headeronly::toString(dtype), ", got ",
          torch::headeronly::toString(tensor.scalar_type()));
}

// Of several GPUs, a call runs on one.
inline void require_device(const char* name, const Tensor& tensor, const char* first_name, const Tensor& first) {
  REQUIRE(tensor.get_device_index() == first.get_device_index(), name, " must be on ", kDeviceName, ":",
          first.get_device_index(), " like ", first_name, ", got ", kDeviceName, ":", tensor.get_device_index());
}

inline DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      refuse(name, " must be float32, float64, float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  }
}
inline DType dtype_of(const char* name, const Tensor& tensor) { return dtype_of(name, tensor.scalar_type()); }

// What kernels compute with, and the dtype of what they hand out beside the result.
inline ScalarType accumulation_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A view of exactly these sizes.
template <int kDims>
TensorView<kDims> view(const char* name, const Tensor& tensor, ScalarType dtype, const int64_t (&sizes)[kDims]) {
  require_kind(name, tensor, dtype);
  bool same = tensor.dim() == kDims;
  for (int i = 0; same && i < kDims; ++i) same = tensor.size(i) == sizes[i];
  if (!same) {
    std::string expected = "[";
    for (int i = 0; i < kDims; ++i) expected += (i ? ", " : "") + std::to_string(sizes[i]);
    refuse(name, " must have shape ", expected, "], got ", shape_of(tensor));
  }
  TensorView<kDims> result;
  result.data = tensor.data_ptr();
  for (int i = 0; i < kDims; ++i) result.sizes[i] = sizes[i], result.strides[i] = tensor.stride(i);
  return result;
}

// The same, with the last axis contiguous.
inline TensorView<4> view_rows(const char* name, const Tensor& tensor, ScalarType dtype, const int64_t (&sizes)[4]) {
  const TensorView<4> result = view(name, tensor, dtype, sizes);
  REQUIRE(sizes[3] == 1 || result.strides[3] == 1 || tensor.numel() == 0, name,
          " must have a contiguous last dimension, got stride ", result.strides[3]);
  return result;
}

// int32 [tokens] or [1 or batch, tokens], read as [batch, tokens].
inline TensorView<2> view_words(const char* name, const Tensor& tensor, int64_t batch, int64_t tokens) {
  require_kind(name, tensor, ScalarType::Int);
  const int64_t dims = tensor.dim();
  const bool rows = dims == 2 && (tensor.size(0) == 1 || tensor.size(0) == batch);
  REQUIRE((dims == 1 || rows) && tensor.size(dims - 1) == tokens, name, " must have shape [", tokens, "] or [1 or ",
          batch, ", ", tokens, "], got ", shape_of(tensor));
  TensorView<2> result;
  result.data = tensor.data_ptr();
  result.sizes[0] = batch, result.sizes[1] = tokens;
  result.strides[0] = rows && tensor.size(0) > 1 ? tensor.stride(0) : 0;
  result.strides[1] = tensor.stride(dims - 1);
  return result;
}
