// New tensors, or a refusal that says how much was wanted: torch's own names a line of its dispatcher.
#pragma once

#include <array>
#include <cstdio>

#include "tensor_view.h"

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    default:
      return 8;
  }
}

// In the words of torch's allocator, which programs that try again with less look for.
[[noreturn]] inline void refuse_memory(Sizes sizes, ScalarType dtype) {
  double bytes = static_cast<double>(element_size(dtype));  // may be more than an integer holds
  std::string shape;
  for (const int64_t size : sizes) bytes *= size, shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  char number[400];
  std::snprintf(number, sizeof(number), "%.0f", bytes);
  refuse(kOnGpu ? "CUDA out of memory. Tried" : "DefaultCPUAllocator: can't allocate memory: you tried",
         " to allocate ", number, " bytes for a tensor [", shape, "] of ", torch::headeronly::toString(dtype));
}

inline Tensor allocate(const Tensor& like, Sizes sizes, ScalarType dtype) {
  try {
    return torch::stable::new_empty(like, sizes, std::make_optional(dtype));
  } catch (const std::exception&) {
    refuse_memory(sizes, dtype);
  }
}

// In the memory order of another.
inline Tensor allocate_like(const Tensor& like, ScalarType dtype) {
  std::array<StableIValue, 6> stack;  // self, dtype, layout, device, pin_memory, memory_format
  stack.fill(torch::stable::detail::from(std::nullopt));
  stack[0] = torch::stable::detail::from(like);
  stack[1] = torch::stable::detail::from(std::make_optional(dtype));
  if (torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS) {
    refuse_memory(like.sizes(), dtype);
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}
inline Tensor allocate_like(const Tensor& like) { return allocate_like(like, like.scalar_type()); }
