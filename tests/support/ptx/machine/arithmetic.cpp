// What a lane computes from its own registers.
#include <algorithm>
#include <bit>

#include "integers.h"
#include "warp.h"

namespace ptx {
namespace {

float single(const Instruction& in, Bits xb, Bits yb, Bits zb, bool harsh, uint32_t seed) {
  bool ftz = in.has(ftz_flag);
  float x = flush(f32(xb), ftz), y = flush(f32(yb), ftz), z = flush(f32(zb), ftz);
  auto near = [&](float value, bool exact = false) { return exact ? value : off(value, seed, harsh); };
  switch (in.op) {
    case add_:
      return in.mode <= rn_ ? x + y : to_f32(sum_to_odd(x, y), in.mode);
    case sub_:
      return in.mode <= rn_ ? x - y : to_f32(sum_to_odd(x, -y), in.mode);
    case mul_:
      return in.mode <= rn_ ? x * y : to_f32(double(x) * y, in.mode);
    case fma_:
    case mad_:
      return in.mode <= rn_ ? std::fma(x, y, z) : to_f32(sum_to_odd(double(x) * y, z), in.mode);
    case div_:
      return in.has(approx_flag) || in.has(full_flag) ? near(x / y) : x / y;
    case min_:
      return extreme(x, y, false, in.has(propagate_flag));
    case max_:
      return extreme(x, y, true, in.has(propagate_flag));
    case abs_:
      return std::fabs(x);
    case neg_:
      return -x;
    case copysign_:
      return std::copysign(y, x);
    case ex2_:
      return near(float(std::exp2(double(x))), x == 0);
    case lg2_:
      return near(float(std::log2(double(x))), x == 1);
    case rcp_:
      return in.has(approx_flag) ? near(1 / x, x == 1) : 1 / x;
    case sqrt_:
      return in.has(approx_flag) ? near(std::sqrt(x)) : std::sqrt(x);
    case rsqrt_:
      return near(float(1 / std::sqrt(double(x))), x == 1);
    case sin_:
      return near(float(std::sin(double(x))), x == 0);
    case cos_:
      return near(float(std::cos(double(x))), x == 0);
    case tanh_:
      return near(float(std::tanh(double(x))), x == 0);
    default:
      throw Fault("no such operation on float32");
  }
}

double twice(const Instruction& in, double x, double y, double z) {
  switch (in.op) {
    case add_:
      return x + y;
    case sub_:
      return x - y;
    case mul_:
      return x * y;
    case fma_:
    case mad_:
      return std::fma(x, y, z);
    case div_:
      return x / y;
    case min_:
      return extreme(x, y, false, in.has(propagate_flag));
    case max_:
      return extreme(x, y, true, in.has(propagate_flag));
    case abs_:
      return std::fabs(x);
    case neg_:
      return -x;
    case copysign_:
      return std::copysign(y, x);
    case rcp_:
      return 1 / x;
    case sqrt_:
      return std::sqrt(x);
    default:
      throw Fault("no such operation on float64");
  }
}

Bits floating(const Instruction& in, Bits x, Bits y, Bits z, bool harsh, uint32_t seed) {
  if (in.type == f64_) {
    if (in.op == neg_ || in.op == abs_) return bits(twice(in, f64(x), 0, 0));
    return result(twice(in, f64(x), f64(y), f64(z)));
  }
  if (in.type == f32_) {
    float found = single(in, x, y, z, harsh, seed);
    if (in.op == neg_ || in.op == abs_ || in.op == copysign_) return bits(found);
    if (in.has(sat_flag)) found = std::isnan(found) ? 0 : std::clamp(found, 0.0f, 1.0f);
    return result(found, in.has(ftz_flag));
  }
  bool pairs = in.type == f16x2_ || in.type == bf16x2_;
  int part = in.type == f16x2_ ? int(f16_) : in.type == bf16x2_ ? int(bf16_) : in.type;
  Bits found = 0;
  for (int shift = 0; shift <= (pairs ? 16 : 0); shift += 16) {
    Bits a = x >> shift & 0xffff, b = y >> shift & 0xffff, c = z >> shift & 0xffff, one;
    if (in.op == neg_)
      one = a ^ 0x8000;
    else if (in.op == abs_)
      one = a & 0x7fff;
    else if (in.op == fma_)
      one = to_narrow(sum_to_odd(narrow(a, part) * narrow(b, part), narrow(c, part)), part, rn_);
    else
      one = to_narrow(twice(in, narrow(a, part), narrow(b, part), narrow(c, part)), part, rn_);
    found |= one << shift;
  }
  return found;
}

double number_of(Bits x, int type, bool ftz) {
  switch (type) {
    case f64_:
      return f64(x);
    case f32_:
      return flush(f32(x), ftz);
    case tf32_:
      return tf32(x);
    default:
      return narrow(x, type);
  }
}

Bits to_integer(double value, int type, int from) {
  int width = 8 * bytes_of(type);
  if (std::isnan(value)) return width == 64 || from == f64_ ? Bits(1) << (width - 1) : 0;
  double low = is_signed(type) ? -std::ldexp(1.0, width - 1) : 0;
  double high = std::ldexp(1.0, is_signed(type) ? width - 1 : width);  // one above the most
  if (value <= low) return Bits(int64_t(low));
  if (value >= high) return (is_signed(type) ? Bits(1) << (width - 1) : Bits(0)) - 1;
  return is_signed(type) ? Bits(int64_t(value)) : Bits(uint64_t(value));
}

Bits converted(const Instruction& in, Bits x) {  // in.type from in.from
  if (!is_float(in.from) && !is_float(in.type)) {
    int64_t value = integer(x, in.from);
    if (!in.has(sat_flag)) return Bits(value);
    Wide whole = in.from == u64_ ? Wide(uint64_t(value)) : Wide(value), one = 1;
    int digits = 8 * bytes_of(in.type) - is_signed(in.type);
    return Bits(std::clamp(whole, is_signed(in.type) ? -(one << digits) : 0, (one << digits) - 1));
  }
  if (!is_float(in.from)) {
    int64_t value = integer(x, in.from);
    bool wide = in.from == u64_;
    if (in.type == f64_) return bits(wide ? double(uint64_t(value)) : double(value));
    if (in.type == f32_ && in.mode <= rn_) return bits(wide ? float(uint64_t(value)) : float(value));
    double exact = wide ? double(uint64_t(value)) : double(value);
    return in.type == f32_ ? bits(to_f32(exact, in.mode)) : to_narrow(exact, in.type, in.mode);
  }
  double value = number_of(x, in.from, in.has(ftz_flag));
  if (!is_float(in.type)) return to_integer(whole(value, in.mode), in.type, in.from);
  if (in.mode >= rni_ && in.mode <= rpi_) value = whole(value, in.mode);
  if (in.has(sat_flag)) value = std::isnan(value) ? 0 : std::clamp(value, 0.0, 1.0);
  switch (in.type) {
    case f64_:
      return result(value);
    case f32_:
      return result(to_f32(value, in.mode), in.has(ftz_flag));
    case tf32_:
      return std::isnan(value) ? kNaN32 : bits(float(rounded(value, 11, -126, in.mode)));
    default:
      return to_narrow(value, in.type, in.mode);
  }
}

bool compared(const Instruction& in, Bits x, Bits y) {
  bool ftz = in.has(ftz_flag);
  if (in.type == f64_) return compare(f64(x), f64(y), in.mode);
  if (in.type == f32_) return compare(flush(f32(x), ftz), flush(f32(y), ftz), in.mode);
  if (is_float(in.type)) return compare(narrow(x, in.type), narrow(y, in.type), in.mode);
  int64_t a = integer(x, in.type), b = integer(y, in.type);
  return is_signed(in.type) ? compare(a, b, in.mode) : compare(uint64_t(a), uint64_t(b), in.mode);
}

}  // namespace

bool Step::arithmetic() {
  switch (in.op) {
    case mov_: {
      Bits* to = target(0);
      const Bits* x = source(1);
      each([&](int i) { to[i] = cut(x[i], in.type); });
      return true;
    }
    case setp_: {  // [p, q, a, b, c, how c is combined, whether c is negated]
      const Bits *x = source(2), *y = source(3), *c = number(4) < 0 ? nullptr : source(4);
      Bits* p = target(0);
      Bits* q = number(1) < 0 ? nullptr : target(1);
      each([&](int i) {
        bool found = compared(in, x[i], y[i]), other = c && (c[i] != 0) != (number(6) != 0);
        auto joined = [&](bool value) {
          if (!c) return value;
          return number(5) == m_and_ ? value && other : number(5) == m_or_ ? value || other : value != other;
        };
        if (q) q[i] = joined(!found);
        p[i] = joined(found);
      });
      return true;
    }
    case selp_: {
      const Bits *x = source(1), *y = source(2), *p = source(3);
      Bits* to = target(0);
      each([&](int i) { to[i] = cut(p[i] ? x[i] : y[i], in.type); });
      return true;
    }
    case cvt_: {
      const Bits* x = source(1);
      Bits* to = target(0);
      int type = number(2);  // of the register, which may be wider than the result
      each([&](int i) {
        Bits found = converted(in, x[i]);
        to[i] = cut(is_float(in.type) ? found : Bits(integer(found, in.type)), type);
      });
      return true;
    }
    case cvt_pack_: {
      const Bits *high = source(1), *low = source(2);
      Bits* to = target(0);
      int part = in.type == f16x2_ ? f16_ : bf16_;
      each(
          [&](int i) { to[i] = to_narrow(f32(high[i]), part, in.mode) << 16 | to_narrow(f32(low[i]), part, in.mode); });
      return true;
    }
    case pack_: {  // one register of several, the first one lowest
      int parts = in.count - 1, width = 8 * bytes_of(in.type) / parts;
      std::array<Bits, kLanes> whole{};
      each([&](int i) {
        for (int part = 0; part < parts; ++part)
          whole[i] |= (source(part + 1)[i] & (~Bits(0) >> (64 - width))) << width * part;
      });
      Bits* to = target(0);
      each([&](int i) { to[i] = whole[i]; });
      return true;
    }
    case unpack_: {  // several registers of one, the last number
      int parts = in.count - 1, width = 8 * bytes_of(in.type) / parts;
      std::array<Bits, kLanes> whole;
      each([&](int i) { whole[i] = source(parts)[i]; });
      for (int part = 0; part < parts; ++part) {
        if (number(part) < 0) continue;
        Bits* to = target(part);
        each([&](int i) { to[i] = whole[i] >> width * part & (~Bits(0) >> (64 - width)); });
      }
      return true;
    }
    case bfe_:
    case bfi_:
    case prmt_:
    case lop3_:
    case shf_: {
      const Bits *x = source(1), *y = source(2), *z = source(3);
      Bits* to = target(0);
      each([&](int i) {
        Bits found = in.op == bfe_    ? field(in, x[i], y[i], z[i])
                     : in.op == prmt_ ? permuted(x[i], y[i], z[i])
                     : in.op == lop3_ ? looked_up(x[i], y[i], z[i], number(4))
                     : in.op == shf_  ? funnel(in, x[i], y[i], z[i])
                                      : inserted(in, x[i], y[i], z[i], source(4)[i]);
        to[i] = cut(found, in.type);
      });
      return true;
    }
    default:
      break;
  }
  if (in.op > copysign_) return false;
  const Bits* x = source(1);
  const Bits* y = in.count > 2 ? source(2) : x;
  const Bits* z = in.count > 3 ? source(3) : x;
  Bits* to = target(0);
  if (is_float(in.type)) {
    bool harsh = options().harsh;
    if (in.type == f32_ && in.op == fma_ && in.mode <= rn_ && !in.flags) {
      each([&](int i) { to[i] = result(std::fma(f32(x[i]), f32(y[i]), f32(z[i])), false); });
    } else {
      each([&](int i) { to[i] = floating(in, x[i], y[i], z[i], harsh, options().seed); });
    }
  } else {
    bool counts = in.op == popc_ || in.op == clz_ || in.op == bfind_;
    bool wide = in.op == mul_wide_ || in.op == mad_wide_;
    int type = counts ? u32_ : wide ? (bytes_of(in.type) == 4 ? u64_ : u32_) : in.type;
    each([&](int i) {
      Bits found = whole_number(in, x[i], y[i], z[i]);
      to[i] = in.has(relu_flag) && int64_t(found) < 0 ? 0 : cut(found, type);
    });
  }
  return true;
}

}  // namespace ptx
