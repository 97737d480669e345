// Semantic guidance and exact percentiles: parameters and entry points. The maths is in dense_attn/reference/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/tensor_view.h"

struct PercentileParams {
  DType dtype;
  double level;
  int64_t rows, count;
  TensorView<2> x;          // [R, N]
  TensorView<2> masked;     // [R, N], contiguous
  TensorView<1> threshold;  // [R], float or, with double inputs, double
  int64_t parts;            // of one row, each searched by a thread of its own
};

struct SegaParams {
  DType dtype;
  int64_t concepts, batch, channels, count;  // E, B, C, and N values in each channel
  bool sum_channels;
  TensorView<3> uncond, text;  // [B, C, N]
  TensorView<4> edits;         // [E, B, C, N]
  TensorView<3> momentum;      // [B, C, N], float or, with double inputs, double; so are the three below
  TensorView<4> user_mask;     // [E, B, C, N] or no data
  TensorView<3> eps;           // [B, C, N], contiguous
  TensorView<3> momentum_out;  // [B, C, N], contiguous
  TensorView<3> thresholds;    // [E, B, C or 1]
  const double* scales;        // [E]: of the differences, negative for a reversed concept
  const double* levels;        // [E]
  const double* weights;       // [E]: in the momentum
  const double* partials;      // [E]: in what is added to eps beside the momentum
  bool all_warm;
  double guidance_scale, momentum_scale, momentum_beta;
};

// Magnitudes order like their bits, which are keys: no key is negative.
template <class Acc>
using KeyOf = std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>;
template <class Acc>
constexpr KeyOf<Acc> kInfinity = __builtin_bit_cast(KeyOf<Acc>, static_cast<Acc>(__builtin_inf()));
template <class Acc>
constexpr KeyOf<Acc> kNoKey = sizeof(Acc) == 4 ? INT32_MAX : INT64_MAX;  // that of a NaN

// A quantile's place among sorted values.
struct QuantileRank {
  int64_t below;
  double fraction;
};
HOST_DEVICE QuantileRank quantile_rank(double level, int64_t count) {
  const double rank = level * static_cast<double>(count - 1);
  const int64_t below = static_cast<int64_t>(rank);
  return {below, rank - static_cast<double>(below)};
}

// Between two neighbouring order statistics in double, rounded once; between equals, as inf - inf is no number,
// nothing.
template <class Acc>
HOST_DEVICE Acc interpolate(Acc lower, Acc upper, double fraction) {
  if (fraction == 0 || !(lower < upper)) return lower;
  const double from = lower, to = upper;
  return static_cast<Acc>(from + (to - from) * fraction);
}

// CPU: work is a range of items, any of which may run on any thread with that thread's scratch.
struct SegaCpu {
  // Rows, each by one thread.
  size_t (*percentile_scratch_bytes)(const PercentileParams&);  // for all parts
  void (*percentile)(const PercentileParams&, int64_t begin, int64_t end, void* scratch);
  // One long row by all threads: start, then search every part and narrow until that returns false, then mask.
  bool (*is_long)(const PercentileParams&);
  void (*start)(const PercentileParams&, void* scratch);
  void (*search)(const PercentileParams&, int64_t row, int64_t begin, int64_t end, void* scratch);
  bool (*narrow)(const PercentileParams&, int64_t row, void* scratch);
  void (*mask)(const PercentileParams&, int64_t row, int64_t begin, int64_t end);
  // Items are channels, or samples when the channels are summed.
  int64_t (*guidance_items)(const SegaParams&);
  size_t (*guidance_scratch_bytes)(const SegaParams&);
  void (*guidance)(const SegaParams&, int64_t begin, int64_t end, void* scratch);
};
