// Numbers as PTX has them: narrow floats, flushes to zero, roundings, extremes that drop NaN.
#pragma once

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "instruction.h"

namespace ptx {

using Bits = uint64_t;
using std::bit_cast;

inline float f32(Bits x) { return bit_cast<float>(uint32_t(x)); }
inline double f64(Bits x) { return bit_cast<double>(x); }
inline Bits bits(float x) { return bit_cast<uint32_t>(x); }
inline Bits bits(double x) { return bit_cast<uint64_t>(x); }

constexpr uint32_t kNaN32 = 0x7fffffff;  // the one that every f32 operation makes
constexpr uint64_t kNaN64 = 0xfff8000000000000;
constexpr uint16_t kNaN16 = 0x7fff;

inline float flush(float x, bool ftz) { return ftz && std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline Bits result(float x, bool ftz) { return std::isnan(x) ? kNaN32 : bits(flush(x, ftz)); }
inline Bits result(double x) { return std::isnan(x) ? kNaN64 : bits(x); }

inline double half(Bits x) { return double(float(bit_cast<_Float16>(uint16_t(x)))); }
inline double bfloat(Bits x) { return double(bit_cast<float>(uint32_t(uint16_t(x)) << 16)); }
inline double narrow(Bits x, int type) { return type == f16_ ? half(x) : bfloat(x); }

// A value rounded to a significand of `digits` and exponents from `lowest`, as rn or rz has it.
inline double rounded(double x, int digits, int lowest, int mode) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent = std::max(std::ilogb(x), lowest);
  double unit = std::ldexp(1.0, exponent - digits + 1), steps = x / unit;
  switch (mode) {
    case rz_:
      return std::trunc(steps) * unit;
    case rm_:
      return std::floor(steps) * unit;
    case rp_:
      return std::ceil(steps) * unit;
    case rna_:
      return std::round(steps) * unit;
    default:
      return std::nearbyint(steps) * unit;
  }
}

// Whether a number beyond the most stays finite, as the rounding has it.
inline bool stays_finite(double x, int mode) { return mode == rz_ || mode == (x > 0 ? rm_ : rp_); }

inline Bits to_narrow(double x, int type, int mode) {
  if (std::isnan(x)) return kNaN16;
  bool is_half = type == f16_;
  double value = is_half ? rounded(x, 11, -14, mode) : rounded(x, 8, -126, mode);
  double most = is_half ? 65504.0 : double(bit_cast<float>(0x7f7f0000u));
  if (std::fabs(value) > most && std::isfinite(x)) value = std::copysign(stays_finite(x, mode) ? most : INFINITY, x);
  if (is_half) return bit_cast<uint16_t>(_Float16(float(value)));
  return bits(float(value)) >> 16;
}

inline float to_f32(double x, int mode) {
  if (mode == plain_ || mode == rn_ || !std::isfinite(x)) return float(x);
  double value = rounded(x, 24, -126, mode);
  if (std::fabs(value) > std::numeric_limits<float>::max() && stays_finite(x, mode))
    return std::copysign(std::numeric_limits<float>::max(), float(x));
  return float(value);
}

// x + y rounded to odd, so that a second rounding to fewer digits is that of the exact sum.
inline double sum_to_odd(double x, double y) {
  double sum = x + y, part = sum - x, lost = (x - (sum - part)) + (y - part);
  if (lost == 0 || !std::isfinite(sum) || bit_cast<uint64_t>(sum) & 1) return sum;
  return std::nextafter(sum, lost > 0 ? INFINITY : -INFINITY);
}

// tf32 keeps ten bits below the leading one.
inline float tf32(Bits x) { return bit_cast<float>(uint32_t(x) & 0xffffe000u); }

inline double whole(double x, int mode) {
  switch (mode) {
    case rzi_:
    case rz_:
      return std::trunc(x);
    case rmi_:
    case rm_:
      return std::floor(x);
    case rpi_:
    case rp_:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

template <class T>
T extreme(T a, T b, bool largest, bool propagate) {
  if (std::isnan(a) || std::isnan(b)) {
    if (propagate) return std::numeric_limits<T>::quiet_NaN();
    return std::isnan(a) ? b : a;
  }
  if (a == b) return std::signbit(a) == largest ? b : a;  // +0 is above -0
  return (a < b) == largest ? b : a;
}

template <class T>
bool compare(T a, T b, int mode) {
  bool unordered = false;
  if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(a) || std::isnan(b);
  switch (mode) {
    case eq_:
      return !unordered && a == b;
    case ne_:
      return !unordered && a != b;
    case lt_:
      return !unordered && a < b;
    case le_:
      return !unordered && a <= b;
    case gt_:
      return !unordered && a > b;
    case ge_:
      return !unordered && a >= b;
    case equ_:
      return unordered || a == b;
    case neu_:
      return unordered || a != b;
    case ltu_:
      return unordered || a < b;
    case leu_:
      return unordered || a <= b;
    case gtu_:
      return unordered || a > b;
    case geu_:
      return unordered || a >= b;
    case num_:
      return !unordered;
    default:
      return unordered;
  }
}

// An integer of the type in the low bits, sign extended where the type has a sign.
inline int64_t integer(Bits x, int type) {
  switch (type) {
    case s8_:
      return int8_t(x);
    case s16_:
      return int16_t(x);
    case s32_:
      return int32_t(x);
    case b8_:
    case u8_:
      return uint8_t(x);
    case b16_:
    case u16_:
      return uint16_t(x);
    case b32_:
    case u32_:
      return uint32_t(x);
    default:
      return int64_t(x);
  }
}
inline bool is_signed(int type) { return type == s8_ || type == s16_ || type == s32_ || type == s64_; }
inline bool is_float(int type) { return type >= f16_; }
inline Bits cut(Bits x, int type) {
  int size = bytes_of(type);
  return size == 8 ? x : x & ((Bits(1) << 8 * size) - 1);
}

// A number nearby in place of what an approximation gives: up to two units in the last place off.
inline float off(float x, uint32_t seed, bool harsh) {
  if (!harsh || !std::isnormal(x) || std::fabs(x) > 1e38f || std::fabs(x) < 1.2e-38f) return x;
  uint32_t hash = (uint32_t(bits(x)) ^ seed) * 2654435761u;
  return bit_cast<float>(uint32_t(int32_t(bits(x)) + int32_t((hash >> 16) % 5) - 2));
}

}  // namespace ptx
