// Percentiles and semantic guidance as ops, for every device: each fills its params and hands them to `run`.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "memory.h"
#include "sega.h"
#include "tensor_view.h"

// As many rows, or channels of all samples, as the kernels of a library's device take.
int64_t most_rows(const PercentileParams&);
int64_t most_channels(const SegaParams&);

inline void require_level(const char* name, double level) {
  REQUIRE(level >= 0 && level <= 1, name, " must be from 0 to 1, got ", level);
}

template <void (*run)(const PercentileParams&, const Tensor& like)>
std::tuple<Tensor, Tensor> percentile_mask(const Tensor& x, double level) {
  PercentileParams p{};
  p.dtype = dtype_of("x", x);
  REQUIRE(x.dim() == 2, "x must have 2 dimensions, got ", shape_of(x));
  p.rows = x.size(0), p.count = x.size(1), p.level = level, p.parts = 1;
  p.x = view("x", x, x.scalar_type(), {p.rows, p.count});
  require_level("level", level);
  REQUIRE(p.rows == 0 || p.count > 0, "x must have values in each row, got ", shape_of(x));
  REQUIRE(p.rows <= most_rows(p), "x must have at most ", most_rows(p), " rows of ", p.count, " values, got ", p.rows);
  const Tensor masked = allocate(x, {p.rows, p.count}, x.scalar_type());
  const Tensor threshold = allocate(x, {p.rows}, accumulation_dtype(x));
  p.masked = view("masked", masked, x.scalar_type(), {p.rows, p.count});
  p.threshold = view("threshold", threshold, accumulation_dtype(x), {p.rows});
  if (p.rows) run(p, x);
  return {masked, threshold};
}

// [..., N] of a tensor of this shape, its axes from kDims - 1 on as one.
template <int kDims>
TensorView<kDims> view_channels(const char* name, const Tensor& tensor, ScalarType dtype,
                                const std::vector<int64_t>& shape) {
  require_kind(name, tensor, dtype);
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == shape[i];
  if (!same) {
    std::string expected = "[";
    for (size_t i = 0; i < shape.size(); ++i) expected += (i ? ", " : "") + std::to_string(shape[i]);
    refuse(name, " must have shape ", expected, "], got ", shape_of(tensor));
  }
  TensorView<kDims> result;
  result.data = tensor.data_ptr();
  for (int i = 0; i + 1 < kDims; ++i) result.sizes[i] = tensor.size(i), result.strides[i] = tensor.stride(i);
  int64_t& count = result.sizes[kDims - 1] = 1;
  int64_t& stride = result.strides[kDims - 1] = 1;
  for (int64_t i = tensor.dim() - 1; i >= kDims - 1; --i) {
    if (tensor.size(i) != 1 && count == 1) stride = tensor.stride(i);
    REQUIRE(tensor.size(i) == 1 || tensor.numel() == 0 || tensor.stride(i) == stride * count, name,
            " must have trailing axes that collapse, got strides ", strides_of(tensor));
    count *= tensor.size(i);
  }
  return result;
}

template <class T>
void require_entries(const char* name, const std::vector<T>& list, int64_t concepts) {
  REQUIRE(static_cast<int64_t>(list.size()) == concepts, name, " must have ", concepts, " entries, got ", list.size());
}

// What is read; returns the shape of eps_uncond.
inline std::vector<int64_t> fill_inputs(SegaParams& p, const Tensor& eps_uncond, const Tensor& eps_text,
                                        const Tensor& eps_edits, const Tensor& momentum,
                                        const std::optional<Tensor>& user_mask) {
  p.dtype = dtype_of("eps_uncond", eps_uncond);
  const ScalarType dtype = eps_uncond.scalar_type(), wide = accumulation_dtype(eps_uncond);
  REQUIRE(eps_uncond.dim() >= 2, "eps_uncond must have at least 2 dimensions, got ", shape_of(eps_uncond));
  REQUIRE(eps_edits.dim() >= 1, "eps_edits must have a dimension of concepts, got ", shape_of(eps_edits));
  std::vector<int64_t> shape, edits_shape{eps_edits.size(0)};
  for (int64_t i = 0; i < eps_uncond.dim(); ++i) shape.push_back(eps_uncond.size(i));
  edits_shape.insert(edits_shape.end(), shape.begin(), shape.end());
  p.concepts = edits_shape[0], p.batch = shape[0], p.channels = shape[1];
  p.uncond = view_channels<3>("eps_uncond", eps_uncond, dtype, shape);
  p.text = view_channels<3>("eps_text", eps_text, dtype, shape);
  p.edits = view_channels<4>("eps_edits", eps_edits, dtype, edits_shape);
  p.momentum = view_channels<3>("momentum", momentum, wide, shape);
  require_device("eps_text", eps_text, "eps_uncond", eps_uncond);
  require_device("eps_edits", eps_edits, "eps_uncond", eps_uncond);
  require_device("momentum", momentum, "eps_uncond", eps_uncond);
  if (user_mask) require_device("user_mask", *user_mask, "eps_uncond", eps_uncond);
  if (user_mask) p.user_mask = view_channels<4>("user_mask", *user_mask, wide, edits_shape);
  p.count = p.uncond.sizes[2];
  return shape;
}

template <void (*run)(const SegaParams&, const Tensor& like)>
std::tuple<Tensor, Tensor, Tensor> sega_guidance(
    const Tensor& eps_uncond, const Tensor& eps_text, const Tensor& eps_edits, const Tensor& momentum,
    double guidance_scale, const std::vector<double>& edit_guidance_scale, const std::vector<double>& edit_threshold,
    const std::vector<double>& weights, const std::vector<double>& partials, bool all_warm,
    const std::vector<bool>& reverse, double edit_momentum_scale, double edit_mom_beta,
    const std::optional<Tensor>& user_mask, bool sum_channels) {
  SegaParams p{};
  const std::vector<int64_t> shape = fill_inputs(p, eps_uncond, eps_text, eps_edits, momentum, user_mask);
  p.sum_channels = sum_channels;
  require_entries("edit_guidance_scale", edit_guidance_scale, p.concepts);
  require_entries("edit_threshold", edit_threshold, p.concepts);
  require_entries("weights", weights, p.concepts);
  require_entries("partials", partials, p.concepts);
  require_entries("reverse", reverse, p.concepts);
  for (const double level : edit_threshold) require_level("edit_threshold", level);
  const int64_t thresholds_of_concept = p.batch * (sum_channels ? 1 : p.channels);
  REQUIRE(p.count > 0 || thresholds_of_concept * p.concepts == 0, "eps_uncond must have values in each channel, got ",
          shape_of(eps_uncond));
  const int64_t channels = p.batch * std::max<int64_t>(p.channels, 1);
  REQUIRE(channels <= most_channels(p), "eps_uncond must have at most ", most_channels(p), " channels of ", p.count,
          " values, got ", channels);

  std::vector<double> scales = edit_guidance_scale;
  for (int64_t e = 0; e < p.concepts; ++e) scales[e] = reverse[e] ? -scales[e] : scales[e];
  p.scales = scales.data(), p.levels = edit_threshold.data();
  p.weights = weights.data(), p.partials = partials.data(), p.all_warm = all_warm;
  p.guidance_scale = guidance_scale, p.momentum_scale = edit_momentum_scale, p.momentum_beta = edit_mom_beta;
  const ScalarType dtype = eps_uncond.scalar_type(), wide = accumulation_dtype(eps_uncond);
  const Tensor eps = allocate(eps_uncond, shape, dtype);
  const Tensor momentum_out = allocate(eps_uncond, shape, wide);
  const Tensor thresholds = allocate(eps_uncond, {p.concepts, p.batch, sum_channels ? 1 : p.channels}, wide);
  p.eps = view_channels<3>("eps", eps, dtype, shape);
  p.momentum_out = view_channels<3>("momentum_out", momentum_out, wide, shape);
  p.thresholds = view("thresholds", thresholds, wide, {p.concepts, p.batch, sum_channels ? 1 : p.channels});
  if (thresholds_of_concept && p.count) run(p, eps_uncond);
  return {eps, momentum_out, thresholds};
}
