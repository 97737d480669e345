// The rule of modulation of one row, in float32: what kernels on a GPU and the tests of it on a CPU share.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "layout_attention.h"

constexpr float kLog2EFloat = 1.4426950408889634f;
constexpr float kLn2Float = 0.6931471805599453f;

HOST_DEVICE bool is_finite(float x) { return fabsf(x) < INFINITY; }

// A row's weights are exp2((raw - anchor) * factor + the offset of the key's population), where raw is <q, k>, or minus
// that if the scale is negative. At the anchor weighs most what a population can have, so the larger offset is above
// every exponent.
struct RowRule {
  float factor;
  float anchor;
  float offset_in, offset_out;  // of matched keys and of the others, -inf where they weigh nothing
  float common;                 // what lse has beside the exponents, in natural units
};

// Within 2^-22, or one part in as many.
HOST_DEVICE float log2_approx(float x) {
#ifdef __CUDA_ARCH__
  return __log2f(x);
#else
  return log2f(x);
#endif
}

// The factor of raw scores, known before the row is; the scale without its sign.
template <Modulation kModulation>
HOST_DEVICE float row_factor(float strength, float scale) {
  if constexpr (kModulation == Modulation::kRange) return (1 - strength) * (scale * kLog2EFloat);
  // Scores of -inf, which "mask" gives to the others, stay that by any scale.
  if constexpr (kModulation == Modulation::kMask) return fmaxf(scale, 1e-30f) * kLog2EFloat;
  return scale * kLog2EFloat;
}

// The raw score that weighs most in each population; the Triton kernels find it from a row's record by the same rule.
template <Modulation kModulation>
HOST_DEVICE float row_anchor(float factor, float raw_max, float raw_min) {
  const float anchor = kModulation == Modulation::kRange && factor < 0 ? raw_min : raw_max;
  return is_finite(anchor) ? anchor : 0;
}

// From the extremes over all keys (with "mask" the largest over the matched ones). A term that both populations get is
// taken off before anything is rounded: c * max + (1 - c) * max is max.
template <Modulation kModulation>
HOST_DEVICE RowRule row_rule(float strength, float scale, float raw_max, float raw_min) {
  RowRule rule;
  rule.factor = row_factor<kModulation>(strength, scale);
  rule.anchor = row_anchor<kModulation>(rule.factor, raw_max, raw_min);
  rule.common = scale * rule.anchor;
  rule.offset_in = rule.offset_out = 0;
  if constexpr (kModulation == Modulation::kRange) {
    const float range = raw_max - raw_min, gap = strength * (scale * kLog2EFloat) * range;
    (rule.factor < 0 ? rule.offset_in : rule.offset_out) = rule.factor < 0 ? gap : -gap;
    if (!is_finite(range)) {  // as the definition has it, with its infinities
      const float anchored = rule.anchor * rule.factor, per_raw = strength * (scale * kLog2EFloat);
      rule.offset_in = anchored + per_raw * raw_max;
      rule.offset_out = anchored + per_raw * raw_min;
      rule.common = 0;
    }
  } else if constexpr (kModulation == Modulation::kMax) {
    rule.offset_in = strength * (scale * kLog2EFloat) * raw_max;
    rule.offset_out = 0 * rule.offset_in;  // no number where the maximum is infinite
  } else if constexpr (kModulation == Modulation::kBias) {
    rule.offset_in = strength * kLog2EFloat;
  } else {
    rule.offset_out = -INFINITY;
  }
  return rule;
}

// Two states of a row, one a population: sums of exp2(raw * factor - shift), 0 for one without keys. What each counts
// in a row whose weights are measured from `largest`, the largest exponent without the common term, or near it.
struct RowMerge {
  float weight_in, weight_out, largest;
};

HOST_DEVICE RowMerge merge_states(const RowRule& rule, float sum_in, float shift_in, float sum_out, float shift_out) {
  const float exponent_in = fmaf(-rule.anchor, rule.factor, shift_in) + rule.offset_in;
  const float exponent_out = fmaf(-rule.anchor, rule.factor, shift_out) + rule.offset_out;
  const float largest = fmaxf(sum_in == 0 ? -INFINITY : exponent_in, sum_out == 0 ? -INFINITY : exponent_out);
  RowMerge merge;
  merge.largest = is_finite(largest) ? largest : 0;
  merge.weight_in = sum_in == 0 ? 0 : exp2f(exponent_in - merge.largest);
  merge.weight_out = sum_out == 0 ? 0 : exp2f(exponent_out - merge.largest);
  return merge;
}

// Of a row whose weights, measured from `largest`, add up to `sum`; a row without keys that count has no weights.
HOST_DEVICE float row_lse(const RowRule& rule, float largest, float sum) {
  return sum == 0 ? -INFINITY : (largest + log2_approx(sum)) * kLn2Float + rule.common;
}

// What the backward kernels on a GPU, Triton's among them, need of a row: its extremes, and the offsets under which the
// weights add up to 1, of matched keys and of the others.
enum RowRecord { kRecordMax, kRecordMin, kRecordOffsetIn, kRecordOffsetOut, kRowRecord };
static_assert(int(kRowRecord) == int(kStats));

struct RowOffsets {
  float in, out;
};

HOST_DEVICE RowOffsets record_offsets(const RowRule& rule, float largest, float sum) {
  if (sum == 0) return {-INFINITY, -INFINITY};
  const float log_sum = log2_approx(sum);
  return {rule.offset_in - largest - log_sum, rule.offset_out - largest - log_sum};
}
