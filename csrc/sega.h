// Semantic guidance and exact percentiles: parameters and entry points. The maths is in dense_attn/reference/.
#pragma once

#include <cstddef>
#include <cstdint>

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
