// Exact percentiles and the step of semantic guidance. Compiled once per instruction set, with DENSE_ATTN_ISA as its
// name, and without contraction: differences round as in the reference, so thresholds are equal to the last bit.
#include "sega.h"

#include "cpu/select.h"

namespace DENSE_ATTN_ISA {
namespace {

template <class T>
void store_row(const typename Dtype<T>::Acc* from, int64_t count, T* to) {
  using Acc = typename Dtype<T>::Acc;
  for (int64_t i = 0; i < count; i += kLanes<Acc>) store_lanes(to + i, load<VecOf<Acc>>(from + i), count - i);
}

// Those of magnitude reached by a threshold, 0 for the rest.
template <class T>
void mask_range(const PercentileParams& p, int64_t row, int64_t begin, int64_t end) {
  using Acc = typename Dtype<T>::Acc;
  const Acc threshold = *p.threshold.at<Acc>(row);
  alignas(kVecBytes) Acc values[kKeyBlock];
  for (; begin < end; begin += kKeyBlock) {
    const int64_t count = end - begin < kKeyBlock ? end - begin : kKeyBlock;
    load_row(p.x.at<T>(row, begin), p.x.strides[1], count, values);
    for (int64_t i = 0; i < count; ++i) values[i] = magnitude(values[i]) >= threshold ? values[i] : 0;
    store_row(values, count, p.masked.at<T>(row, begin));
  }
}

template <class T>
void search_part(const PercentileParams& p, int64_t row, int64_t part, void* scratch) {
  Search<typename Dtype<T>::Acc>::at(scratch).pass(p.x.at<T>(row), p.x.strides[1], part);
}

template <class T>
bool narrow_row(const PercentileParams& p, int64_t row, void* scratch) {
  using Acc = typename Dtype<T>::Acc;
  auto& search = Search<Acc>::at(scratch);
  const bool more = search.narrow();
  if (!more) *p.threshold.at<Acc>(row) = search.quantile();
  return more;
}

size_t percentile_scratch_bytes(const PercentileParams& p) {
  return with_dtype(p.dtype, [&](auto x) { return Search<typename Dtype<decltype(x)>::Acc>::bytes(p.count, p.parts); });
}

bool is_long(const PercentileParams& p) { return p.count > kGathered; }

void start(const PercentileParams& p, void* scratch) {
  with_dtype(p.dtype,
             [&](auto x) { Search<typename Dtype<decltype(x)>::Acc>::at(scratch).start(p.level, p.count, p.parts); });
}

void search(const PercentileParams& p, int64_t row, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto x) {
    for (int64_t part = begin; part < end; ++part) search_part<decltype(x)>(p, row, part, scratch);
  });
}

bool narrow(const PercentileParams& p, int64_t row, void* scratch) {
  return with_dtype(p.dtype, [&](auto x) { return narrow_row<decltype(x)>(p, row, scratch); });
}

void mask(const PercentileParams& p, int64_t row, int64_t begin, int64_t end) {
  with_dtype(p.dtype,
             [&](auto x) { mask_range<decltype(x)>(p, row, p.count * begin / p.parts, p.count * end / p.parts); });
}

void percentile(const PercentileParams& p, int64_t begin, int64_t end, void* scratch) {
  for (int64_t row = begin; row < end; ++row) {
    start(p, scratch);
    do {
      search(p, row, 0, p.parts, scratch);
    } while (narrow(p, row, scratch));
    mask(p, row, 0, p.parts);
  }
}

// One channel of one sample, or all channels of a sample when they share their thresholds.
template <class T>
struct Guidance {
  using Acc = typename Dtype<T>::Acc;

  const SegaParams& p;
  int64_t planes, width;  // channels of an item, and the values of each, in whole registers
  size_t scratch_bytes = 0;
  char* base;
  Acc* uncond;       // [planes, width]
  Acc* differences;  // [E, planes, width]
  Acc* sums;         // [E, width]: of the magnitudes over the channels
  Acc* thresholds;   // [E]
  void* search;

  Guidance(const SegaParams& params, void* scratch)
      : p(params),
        planes(p.sum_channels ? p.channels : 1),
        width((p.count + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>),
        base(static_cast<char*>(scratch)) {
    uncond = static_cast<Acc*>(take(planes * width * sizeof(Acc)));
    differences = static_cast<Acc*>(take(p.concepts * planes * width * sizeof(Acc)));
    sums = static_cast<Acc*>(take((p.sum_channels ? p.concepts * width : 0) * sizeof(Acc)));
    thresholds = static_cast<Acc*>(take(p.concepts * sizeof(Acc)));
    search = take(Search<Acc>::bytes(p.count, 1));
  }

  void* take(size_t bytes) {
    void* piece = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(base) + scratch_bytes);
    scratch_bytes += (bytes + 63) / 64 * 64;
    return piece;
  }

  Acc* difference(int64_t concept_, int64_t plane) const { return differences + (concept_ * planes + plane) * width; }

  void run(int64_t item) {
    const int64_t batch = p.sum_channels ? item : item / p.channels;
    const int64_t channel = p.sum_channels ? 0 : item % p.channels;
    for (int64_t plane = 0; plane < planes; ++plane) {
      load_row(p.uncond.at<T>(batch, channel + plane), p.uncond.strides[2], p.count, uncond + plane * width);
    }
    for (int64_t e = 0; e < p.concepts; ++e) {
      for (int64_t plane = 0; plane < planes; ++plane) subtract(e, batch, channel + plane, plane);
      if (p.sum_channels) sum_planes(e);
      thresholds[e] = quantile(compared(e, 0), p.levels[e]);
      *p.thresholds.at<Acc>(e, batch, channel) = thresholds[e];
    }
    for (int64_t plane = 0; plane < planes; ++plane) combine(batch, channel + plane, plane);
  }

  const Acc* compared(int64_t e, int64_t plane) const {
    return p.sum_channels ? sums + e * width : difference(e, plane);
  }

  void subtract(int64_t e, int64_t batch, int64_t channel, int64_t plane) const {
    Acc* __restrict to = difference(e, plane);
    const Acc* __restrict from = uncond + plane * width;
    const Acc scale = p.scales[e];
    load_row(p.edits.at<T>(e, batch, channel), p.edits.strides[3], p.count, to);
    for (int64_t i = 0; i < p.count; ++i) to[i] = (to[i] - from[i]) * scale;
  }

  void sum_planes(int64_t e) const {
    Acc* __restrict to = sums + e * width;
    for (int64_t i = 0; i < p.count; ++i) to[i] = 0;
    for (int64_t plane = 0; plane < planes; ++plane) {
      const Acc* __restrict from = difference(e, plane);
      for (int64_t i = 0; i < p.count; ++i) to[i] += magnitude(from[i]);
    }
  }

  Acc quantile(const Acc* row, double level) const {
    auto& found = Search<Acc>::at(search);
    found.start(level, p.count, 1);
    do {
      found.pass(row, 1, 0);
    } while (found.narrow());
    return found.quantile();
  }

  // eps and momentum of one channel, block by block.
  void combine(int64_t batch, int64_t channel, int64_t plane) const {
    alignas(kVecBytes) Acc eps[kKeyBlock], steer[kKeyBlock], momentum[kKeyBlock];
    const Acc guidance_scale = p.guidance_scale, momentum_scale = p.momentum_scale;
    const Acc beta = p.momentum_beta, rest = 1 - p.momentum_beta;
    for (int64_t begin = 0; begin < p.count; begin += kKeyBlock) {
      const int64_t count = p.count - begin < kKeyBlock ? p.count - begin : kKeyBlock;
      const Acc* from = uncond + plane * width + begin;
      load_row(p.text.at<T>(batch, channel, begin), p.text.strides[2], count, eps);
      load_row(p.momentum.at<Acc>(batch, channel, begin), p.momentum.strides[2], count, momentum);
      for (int64_t i = 0; i < count; ++i) {
        eps[i] = from[i] + guidance_scale * (eps[i] - from[i]);
        steer[i] = momentum_scale * momentum[i];
      }
      for (int64_t e = 0; e < p.concepts; ++e) add_concept(e, batch, channel, plane, begin, count, eps, steer);
      for (int64_t i = 0; i < count; ++i) {
        eps[i] = p.all_warm ? eps[i] + steer[i] : eps[i];
        momentum[i] = beta * momentum[i] + rest * steer[i];
      }
      store_row(eps, count, p.eps.at<T>(batch, channel, begin));
      store_row(momentum, count, p.momentum_out.at<Acc>(batch, channel, begin));
    }
  }

  void add_concept(int64_t e, int64_t batch, int64_t channel, int64_t plane, int64_t begin, int64_t count,
                   Acc* __restrict eps, Acc* __restrict steer) const {
    if (p.weights[e] == 0 && p.partials[e] == 0) return;
    alignas(kVecBytes) Acc kept[kKeyBlock], user[kKeyBlock];
    const Acc weight = p.weights[e], partial = p.partials[e];
    const Acc* values = compared(e, plane) + begin;
    const Acc* from = difference(e, plane) + begin;
    const Acc threshold = thresholds[e];
    for (int64_t i = 0; i < count; ++i) kept[i] = magnitude(values[i]) >= threshold ? from[i] : 0;
    if (p.user_mask.data) {
      load_row(p.user_mask.at<Acc>(e, batch, channel, begin), p.user_mask.strides[3], count, user);
      for (int64_t i = 0; i < count; ++i) kept[i] *= user[i];
    }
    if (p.weights[e] != 0) {
      for (int64_t i = 0; i < count; ++i) steer[i] += weight * kept[i];
    }
    if (p.partials[e] != 0) {
      for (int64_t i = 0; i < count; ++i) eps[i] += partial * kept[i];
    }
  }
};

int64_t guidance_items(const SegaParams& p) { return p.sum_channels ? p.batch : p.batch * p.channels; }

size_t guidance_scratch_bytes(const SegaParams& p) {
  return with_dtype(p.dtype, [&](auto x) { return Guidance<decltype(x)>(p, nullptr).scratch_bytes; });
}

void guidance(const SegaParams& p, int64_t begin, int64_t end, void* scratch) {
  with_dtype(p.dtype, [&](auto x) {
    Guidance<decltype(x)> step(p, scratch);
    for (int64_t item = begin; item < end; ++item) step.run(item);
  });
}

}  // namespace

extern const SegaCpu kSega;
const SegaCpu kSega = {percentile_scratch_bytes, percentile, is_long, start, search, narrow, mask, guidance_items,
                       guidance_scratch_bytes,   guidance};

}  // namespace DENSE_ATTN_ISA
