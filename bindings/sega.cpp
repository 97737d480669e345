// Hands rows of percentiles, and channels of semantic guidance, to torch's threads.
#include "cpu.h"
#include "sega_ops.h"

namespace {

constexpr int64_t kWorthThreads = 16384;  // values; no more than these are done before another thread has woken up

// Runs f(begin, end, scratch) over the items, on one thread when there is little to do.
template <class F>
void parallel_if_large(int64_t items, int64_t values, size_t scratch_bytes, const Tensor& like, const F& f) {
  if (values > kWorthThreads) return parallel(items, scratch_bytes, like, f);
  parallel(1, scratch_bytes, like, [&](int64_t, int64_t, void* scratch) { f(0, items, scratch); });
}

// Every part of every pass on a thread of its own.
void percentile_of_long_rows(const SegaCpu& cpu, PercentileParams p, const Tensor& x) {
  p.parts = torch::stable::get_num_threads();
  const Tensor memory = allocate(x, {static_cast<int64_t>(cpu.percentile_scratch_bytes(p))}, ScalarType::Byte);
  void* scratch = memory.data_ptr();
  for (int64_t row = 0; row < p.rows; ++row) {
    cpu.start(p, scratch);
    do {
      torch::stable::parallel_for(0, p.parts, 1,
                                  [&](int64_t begin, int64_t end) { cpu.search(p, row, begin, end, scratch); });
    } while (cpu.narrow(p, row, scratch));
    torch::stable::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) { cpu.mask(p, row, begin, end); });
  }
}

void percentile_on_threads(const PercentileParams& p, const Tensor& x) {
  const SegaCpu& cpu = kernels().sega;
  if (cpu.is_long(p) && p.rows < torch::stable::get_num_threads()) return percentile_of_long_rows(cpu, p, x);
  parallel_if_large(p.rows, p.rows * p.count, cpu.percentile_scratch_bytes(p), x,
                    [&](int64_t begin, int64_t end, void* scratch) { cpu.percentile(p, begin, end, scratch); });
}

void guidance_on_threads(const SegaParams& p, const Tensor& like) {
  const SegaCpu& cpu = kernels().sega;
  parallel_if_large(cpu.guidance_items(p), (p.concepts + 1) * like.numel(), cpu.guidance_scratch_bytes(p), like,
                    [&](int64_t begin, int64_t end, void* scratch) { cpu.guidance(p, begin, end, scratch); });
}

}  // namespace

int64_t most_rows(const PercentileParams&) { return INT64_MAX; }
int64_t most_channels(const SegaParams&) { return INT64_MAX; }

STABLE_TORCH_LIBRARY_IMPL(dense_attn, CPU, m) {
  m.impl("percentile_mask", TORCH_BOX(&percentile_mask<percentile_on_threads>));
  m.impl("sega_guidance", TORCH_BOX(&sega_guidance<guidance_on_threads>));
}
