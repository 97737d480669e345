// Loads, stores, atomics, asynchronous copies, and matrices in shared memory.
#include <algorithm>
#include <bit>
#include <cstring>

#include "warp.h"

namespace ptx {
namespace {

bool is_local(int space, uint64_t address) { return space == local_ || (space == generic_ && address & kLocalWindow); }

uint8_t* local_memory(Warp& warp, uint64_t address, int size, int lane) {
  address &= ~kLocalWindow;
  std::vector<uint8_t>& memory = warp.local[lane];
  if (address % size) throw Fault("local address must be aligned to " + std::to_string(size) + " bytes");
  if (address + size > memory.size()) throw Fault("local address is outside of the thread's arrays");
  return memory.data() + address;
}

Bits changed(int type, int how, Bits old, Bits by, Bits other) {  // what an atomic leaves behind
  int64_t a = integer(old, type), b = integer(by, type);
  bool sign = is_signed(type), less = sign ? a < b : uint64_t(a) < uint64_t(b);
  switch (how) {
    case m_add_:
      if (type == f32_) return result(f32(old) + f32(by), false);
      if (type == f64_) return result(f64(old) + f64(by));
      return Bits(a + b);
    case m_min_:
      return less ? old : by;
    case m_max_:
      return less ? by : old;
    case m_and_:
      return old & by;
    case m_or_:
      return old | by;
    case m_xor_:
      return old ^ by;
    case exch_:
      return by;
    case cas_:
      return old == by ? other : old;
    case inc_:
      return uint64_t(a) >= uint64_t(b) ? 0 : Bits(a + 1);
    case dec_:
      return a == 0 || uint64_t(a) > uint64_t(b) ? by : Bits(a - 1);
    default:
      throw Fault("no such atomic");
  }
}

void load(Step& step) {  // [base, offset, type of the registers, registers ...]
  const Instruction& in = step.in;
  int size = bytes_of(in.type), parts = in.count - 3, whole = size * parts;
  int width = step.number(2);
  std::array<std::array<Bits, kLanes>, 8> found;
  step.each_in_turn([&](int lane) {
    uint64_t address = step.address(0, lane);
    const uint8_t* from;
    if (in.space == param_) {
      uint64_t most = uint64_t(step.options().num_params);
      if (address > most || most - address < uint64_t(whole)) throw Fault("parameter out of range");
      from = step.params() + address;
    } else if (is_local(in.space, address)) {
      from = local_memory(step.warp, address, whole, lane);
    } else {
      Region* region;
      from = step.memory().find(in.space, address, whole, region);
      step.memory().read(*region, from, whole, step.who(lane));
    }
    for (int part = 0; part < parts; ++part) {
      Bits value = 0;
      std::memcpy(&value, from + part * size, size);
      found[part][lane] = cut(is_float(in.type) ? value : Bits(integer(value, in.type)), width);
    }
  });
  for (int part = 0; part < parts; ++part) {
    if (step.number(3 + part) < 0) continue;
    Bits* to = step.target(3 + part);
    step.each([&](int lane) { to[lane] = found[part][lane]; });
  }
}

void store(Step& step) {  // [base, offset, registers ...]
  const Instruction& in = step.in;
  int size = bytes_of(in.type), parts = in.count - 2, whole = size * parts;
  step.each_in_turn([&](int lane) {
    uint8_t value[64];
    for (int part = 0; part < parts; ++part) std::memcpy(value + part * size, &step.source(2 + part)[lane], size);
    uint64_t address = step.address(0, lane);
    if (is_local(in.space, address)) {
      std::memcpy(local_memory(step.warp, address, whole, lane), value, whole);
      return;
    }
    Region* region;
    uint8_t* to = step.memory().find(in.space, address, whole, region);
    step.memory().write(*region, to, value, whole, step.who(lane));
  });
}

void atomic(Step& step) {  // [register or -1, base, offset, by, other or -1]
  const Instruction& in = step.in;
  int size = bytes_of(in.type);
  std::array<Bits, kLanes> before;
  step.each_in_turn([&](int lane) {
    Region* region;
    uint8_t* at = step.memory().find(in.space, step.address(1, lane), size, region);
    Who who = step.who(lane);
    who.atomic = true;
    step.memory().read(*region, at, size, who);
    Bits old = 0;
    std::memcpy(&old, at, size);
    Bits other = step.number(4) < 0 ? 0 : step.source(4)[lane];
    Bits now = changed(in.type, in.mode, old, cut(step.source(3)[lane], in.type), other);
    step.memory().write(*region, at, reinterpret_cast<uint8_t*>(&now), size, who);
    before[lane] = old;
  });
  if (step.number(0) < 0) return;
  Bits* to = step.target(0);
  step.each([&](int lane) { to[lane] = before[lane]; });
}

void start_copy(Step& step) {  // [to, offset, from, offset, bytes, bytes read or -1, unless or -1]
  step.each_in_turn([&](int lane) {
    Copy copy{step.address(0, lane), step.address(2, lane), step.number(4), step.number(4), uint8_t(lane), &step.in};
    if (step.number(5) >= 0) copy.read = std::min<int>(copy.size, uint32_t(step.source(5)[lane]));
    if (step.number(6) >= 0 && step.source(6)[lane]) copy.read = 0;
    Region* region;
    uint8_t* to = step.memory().find(shared_, copy.to, copy.size, region);
    step.memory().announce(*region, to, copy.size, step.who(lane));
    if (copy.read) step.memory().find(global_, copy.from, copy.read, region, copy.size);
    std::memset(to, 0xa5, copy.size);
    step.warp.open_copies.push_back(copy);
  });
}

void matrices(Step& step, bool stores) {  // [base, offset, how many, registers ...]
  step.need_all("a matrix of shared memory");
  int count = step.number(2);
  std::array<uint8_t*, kLanes> rows{};
  std::array<Region*, kLanes> regions{};
  for (int lane = 0; lane < 8 * count; ++lane) {
    step.machine.at_lane(lane);
    rows[lane] = step.memory().find(shared_, step.address(0, lane), 16, regions[lane]);
    if (!stores) step.memory().read(*regions[lane], rows[lane], 16, step.who(lane));
  }
  bool trans = step.in.has(trans_flag);
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t values[8][8];
    auto at = [&](int lane, int i) -> uint16_t& {
      int across = 2 * (lane % 4) + i, along = lane / 4;
      return trans ? values[across][along] : values[along][across];
    };
    if (stores) {
      const Bits* from = step.source(3 + matrix);
      for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < 2; ++i) at(lane, i) = uint16_t(from[lane] >> 16 * i);
      for (int row = 0; row < 8; ++row) {
        int lane = 8 * matrix + row;
        auto value = reinterpret_cast<uint8_t*>(values[row]);
        step.machine.at_lane(lane);
        Who all = step.who(lane);
        all.lane = kManyLanes;  // each brings a part of every row
        step.memory().write(*regions[lane], rows[lane], value, 16, all);
      }
    } else {
      for (int row = 0; row < 8; ++row) std::memcpy(values[row], rows[8 * matrix + row], 16);
      Bits* to = step.target(3 + matrix);
      for (int lane = 0; lane < kLanes; ++lane) to[lane] = at(lane, 0) | Bits(at(lane, 1)) << 16;
    }
  }
  step.machine.at_lane(-1);
}

}  // namespace

void Step::wait_copies(size_t pending) {
  for (; warp.copies.size() > pending; warp.copies.pop_front()) {
    for (const Copy& copy : warp.copies.front()) {
      machine.at_lane(copy.lane);
      uint8_t value[16] = {};
      Region* region;
      if (copy.read) {
        const uint8_t* from = memory().find(global_, copy.from, copy.read, region, copy.size);
        memory().read(*region, from, copy.read, who(copy.lane));
        std::memcpy(value, from, copy.read);
      }
      uint8_t* to = memory().find(shared_, copy.to, copy.size, region);
      memory().land(*region, to, value, copy.size, who(copy.lane));
    }
  }
  machine.at_lane(-1);
}

bool Step::access() {
  switch (in.op) {
    case ld_:
      load(*this);
      return true;
    case st_:
      store(*this);
      return true;
    case atom_:
      atomic(*this);
      return true;
    case cp_async_:
      start_copy(*this);
      return true;
    case cp_async_commit_group_:
      warp.copies.push_back(std::move(warp.open_copies));
      warp.open_copies.clear();
      return true;
    case cp_async_wait_group_:
      if (number(0) < 0) {  // all, committed or not
        warp.copies.push_back(std::move(warp.open_copies));
        warp.open_copies.clear();
      }
      wait_copies(size_t(std::max(number(0), 0)));
      return true;
    case ldmatrix_:
      matrices(*this, false);
      return true;
    case stmatrix_:
      matrices(*this, true);
      return true;
    case cvta_: {  // [to, from, to a space?]; addresses of global memory are the same in both
      uint64_t windows[] = {0, 0, kSharedWindow, kLocalWindow, kParamWindow}, window = windows[in.space];
      const Bits* from = source(1);
      Bits* to = target(0);
      each([&](int lane) { to[lane] = number(2) ? from[lane] & ~window : from[lane] | window; });
      return true;
    }
    default:
      return false;
  }
}

}  // namespace ptx
