// The CPU's kernels and torch's threads, for every op.
#pragma once

#include <algorithm>
#include <atomic>

#include "cpu/kernels.h"
#include "memory.h"

// Those of the best instruction set, or of the one that DENSE_ATTN_ISA names; chosen once.
const CpuKernels& kernels();

// Runs f(begin, end, scratch) over the items on torch's threads, each range with a scratch of its own.
template <class F>
void parallel(int64_t items, size_t scratch_bytes, const Tensor& like, const F& f) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
  constexpr size_t kAlign = 64;
  const size_t stride = (scratch_bytes + kAlign - 1) / kAlign * kAlign;
  const Tensor memory = allocate(like, {static_cast<int64_t>(stride * threads + kAlign)}, ScalarType::Byte);
  char* base = static_cast<char*>(memory.data_ptr());
  base += (kAlign - reinterpret_cast<uintptr_t>(base) % kAlign) % kAlign;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { f(begin, end, base + next++ * stride); });
}
