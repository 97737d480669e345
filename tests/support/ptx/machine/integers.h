// Whole numbers and bits, as PTX has them.
#pragma once

#include <algorithm>
#include <bit>

#include "memory.h"
#include "values.h"

namespace ptx {

using Wide = __int128;

inline Bits whole_number(const Instruction& in, Bits x, Bits y, Bits z) {
  int type = in.type, width = 8 * bytes_of(type);
  int64_t a = integer(x, type), b = integer(y, type);
  auto ua = uint64_t(a), ub = uint64_t(b);
  bool sign = is_signed(type);
  auto product = [&] { return sign ? Wide(a) * b : Wide((unsigned __int128)(ua)*ub); };
  uint64_t places = std::min<uint64_t>(uint32_t(y), width);
  switch (in.op) {
    case add_:
      return ua + ub;
    case sub_:
      return ua - ub;
    case mul_:
      return ua * ub;
    case mul_hi_:
      return Bits(product() >> width);
    case mul_wide_:
      return Bits(product());
    case mad_:
      return ua * ub + z;
    case mad_hi_:
      return Bits(product() >> width) + z;
    case mad_wide_:
      return Bits(product()) + z;
    case div_:
      if (b == 0) return ~Bits(0);
      if (sign && b == -1) return -ua;
      return sign ? Bits(a / b) : ua / ub;
    case rem_:
      if (b == 0) return ua;
      if (sign && b == -1) return 0;
      return sign ? Bits(a % b) : ua % ub;
    case min_:
      return (sign ? a < b : ua < ub) ? ua : ub;
    case max_:
      return (sign ? a > b : ua > ub) ? ua : ub;
    case abs_:
      return a < 0 ? -ua : ua;
    case neg_:
      return -ua;
    case not_:
      return type == pred_ ? !x : ~ua;
    case cnot_:
      return ua == 0;
    case and_:
      return ua & ub;
    case or_:
      return ua | ub;
    case xor_:
      return ua ^ ub;
    case shl_:
      return places >= 64 ? 0 : ua << places;
    case shr_:
      if (places >= 64) return a < 0 && sign ? ~Bits(0) : 0;
      return sign ? Bits(a >> places) : ua >> places;
    case popc_:
      return std::popcount(ua);
    case clz_:
      return std::countl_zero(ua) - (64 - width);
    case brev_: {
      uint64_t reversed = 0;
      for (int i = 0; i < width; ++i) reversed |= (ua >> i & 1) << (width - 1 - i);
      return reversed;
    }
    case bfind_: {
      uint64_t value = sign && a < 0 ? ~ua : ua;
      return value == 0 ? 0xffffffff : 63 - std::countl_zero(value);
    }
    default:
      throw Fault("no such operation on whole numbers");
  }
}

inline Bits field(const Instruction& in, Bits x, Bits start_bits, Bits length_bits) {  // bfe
  int width = 8 * bytes_of(in.type), start = start_bits & 255, length = length_bits & 255;
  uint64_t value = uint64_t(integer(x, in.type)), found = 0;
  bool fill = is_signed(in.type) && length && value >> std::min(start + length - 1, width - 1) & 1;
  for (int i = 0; i < width; ++i) {
    bool inside = i < length && start + i < width;
    found |= uint64_t(inside ? value >> (start + i) & 1 : fill) << i;
  }
  return found;
}

inline Bits inserted(const Instruction& in, Bits piece, Bits into, Bits start_bits, Bits length_bits) {
  int width = 8 * bytes_of(in.type), start = start_bits & 255, length = length_bits & 255;
  for (int i = 0; i < length && start + i < width; ++i) {
    Bits bit = Bits(1) << (start + i);
    into = (into & ~bit) | (piece >> i & 1 ? bit : 0);
  }
  return into;
}

inline Bits permuted(Bits low, Bits high, Bits selector) {  // prmt
  uint64_t bytes = uint32_t(low) | high << 32;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) {
    int choice = selector >> 4 * i & 15;
    uint8_t byte = bytes >> 8 * (choice & 7);
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    found |= uint32_t(byte) << 8 * i;
  }
  return found;
}

inline Bits looked_up(Bits a, Bits b, Bits c, int table) {  // lop3
  uint32_t found = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) found |= uint32_t(i & 4 ? a : ~a) & uint32_t(i & 2 ? b : ~b) & uint32_t(i & 1 ? c : ~c);
  return found;
}

inline Bits funnel(const Instruction& in, Bits low, Bits high, Bits by) {  // shf
  uint32_t places = in.has(wrap_flag) ? by & 31 : std::min<uint32_t>(uint32_t(by), 32);
  uint64_t both = uint32_t(low) | high << 32;
  return in.mode == left_ ? uint32_t((both << places) >> 32) : uint32_t(both >> places);
}

}  // namespace ptx
