#include "memory.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace ptx {
namespace {

std::string hex(uint64_t value) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string thread(uint32_t program, int warp, uint8_t lane) {
  std::string lanes = lane == kManyLanes ? "several lanes" : "lane " + std::to_string(lane);
  return "program " + std::to_string(program) + ", warp " + std::to_string(warp) + ", " + lanes;
}

// Which of a cell's bytes an access touches.
uint8_t touched(uint64_t cell_begin, uint64_t begin, uint64_t end) {
  uint8_t bytes = 0;
  for (int i = 0; i < kCellBytes; ++i)
    if (cell_begin + i >= begin && cell_begin + i < end) bytes |= 1 << i;
  return bytes;
}

}  // namespace

Memory::Memory(const uint64_t* storages, int count, size_t shared_bytes)
    : shared(shared_bytes), shared_region_{kSharedBase, kSharedBase + shared_bytes, {}} {
  for (int i = 0; i < count; ++i) storages_.push_back({storages[2 * i], storages[2 * i + 1], {}});
}

void Memory::start_program(uint32_t garbage, int warps) {
  auto words = reinterpret_cast<uint32_t*>(shared.data());
  std::fill(words, words + shared.size() / 4, garbage);
  std::fill(shared_region_.cells.begin(), shared_region_.cells.end(), Cell{});
  order = Order(warps);
}

uint8_t* Memory::find(int space, uint64_t address, int size, Region*& region, int aligned) {
  if (aligned == 0) aligned = size;
  if (address % std::min(aligned, 16))
    throw Fault("address " + hex(address) + " must be aligned to " + std::to_string(aligned) + " bytes");
  if (space == generic_ && address & kSharedWindow) space = shared_, address &= ~kSharedWindow;
  if (space == shared_) {
    address = uint32_t(address);
    region = &shared_region_;
    if (address < region->begin || address + size > region->end)
      throw Fault("shared address " + std::to_string(int64_t(address) - int64_t(kSharedBase)) + " is outside of the " +
                  std::to_string(shared.size()) + " bytes");
    return shared.data() + (address - region->begin);
  }
  for (size_t i = 0; i <= storages_.size(); ++i) {
    size_t at = i ? i - 1 : last_found_;
    if (at < storages_.size() && address >= storages_[at].begin && address < storages_[at].end &&
        uint64_t(size) <= storages_[at].end - address) {
      last_found_ = at;
      region = &storages_[at];
      return reinterpret_cast<uint8_t*>(address);
    }
  }
  uint64_t distance = ~uint64_t(0);
  for (const Region& one : storages_)
    if (address >= one.begin) distance = std::min(distance, address - one.end);
  throw Fault("global address is outside of every tensor" +
              (distance < (1 << 30) ? ", " + std::to_string(distance) + " bytes behind one" : std::string()));
}

bool Memory::ordered(uint32_t tick, int warp, uint8_t lane, const Who& who) const {
  if (warp != who.warp) return tick < order.seen[who.warp][warp];
  return lane == who.lane || tick == who.tick || tick < std::max(order.own[warp], order.last[warp]);
}

uint64_t Memory::offset_of(const Region& region, const uint8_t* at) const {
  if (&region == &shared_region_) return kSharedBase + (at - shared.data());
  return reinterpret_cast<uint64_t>(at);
}

void Memory::read(Region& region, const uint8_t* at, int size, const Who& who) {
  uint64_t begin = offset_of(region, at), end = begin + size;
  for (uint64_t a = begin & ~uint64_t(kCellBytes - 1); a < end; a += kCellBytes) {
    Cell& cell = region.at(a);
    if (cell.coming) throw Fault("reads bytes of a copy that has not been waited for");
    bool mine = cell.write_program == who.program;
    if (cell.write_bytes && !(cell.atomic && who.atomic) && cell.write_bytes & touched(a, begin, end) &&
        !(mine && ordered(cell.write_tick, cell.write_warp, cell.write_lane, who)))
      throw Fault("race: reads what " + thread(cell.write_program, cell.write_warp, cell.write_lane) + " writes");
    if (cell.read_program != who.program) {
      cell.many_programs |= cell.read_bytes != 0;
      cell.read_warps = 0;
    } else if (cell.read_tick < order.last[who.warp]) {
      cell.read_warps = 0;  // what was read before a barrier cannot race with what comes behind it
    }
    bool first = cell.read_warps == 0;
    cell.read_warps |= 1u << (who.warp & 31);
    cell.read_lane = first || cell.read_lane == who.lane ? who.lane : kManyLanes;
    cell.read_bytes = (first ? 0 : cell.read_bytes) | touched(a, begin, end);
    cell.read_program = who.program;
    cell.read_tick = who.tick;
  }
}

void Memory::refuse_race(const Cell& cell, uint8_t bytes, bool same, const Who& who) const {
  bool both_atomic = cell.atomic && who.atomic;
  if (cell.write_bytes & bytes && !same && !both_atomic) {
    bool mine = cell.write_program == who.program;
    bool at_once = mine && cell.write_tick == who.tick && cell.write_warp == who.warp;
    if (at_once && cell.write_lane != who.lane)
      throw Fault("lane " + std::to_string(cell.write_lane) +
                  " of this instruction writes another value to the same address");
    if (!mine || !ordered(cell.write_tick, cell.write_warp, cell.write_lane, who))
      throw Fault("race: overwrites what " + thread(cell.write_program, cell.write_warp, cell.write_lane) + " writes");
  }
  if (cell.read_bytes & bytes && !who.atomic) {
    bool others = cell.many_programs || cell.read_program != who.program;
    int reader = std::countr_zero(cell.read_warps);
    for (uint32_t warps = cell.read_warps; warps && !others; warps &= warps - 1) {
      reader = std::countr_zero(warps);
      others = !ordered(cell.read_tick, reader, cell.read_lane, who);
    }
    if (others && !(same && cell.read_program != who.program))
      throw Fault("race: writes what " + thread(cell.read_program, reader, cell.read_lane) + " reads");
  }
}

void Memory::write(Region& region, uint8_t* at, const uint8_t* value, int size, const Who& who) {
  uint64_t begin = offset_of(region, at), end = begin + size;
  bool same = std::memcmp(at, value, size) == 0;
  for (uint64_t a = begin & ~uint64_t(kCellBytes - 1); a < end; a += kCellBytes) {
    Cell& cell = region.at(a);
    uint8_t bytes = touched(a, begin, end);
    if (cell.coming) throw Fault("writes bytes of a copy that has not been waited for");
    refuse_race(cell, bytes, same, who);
    bool keeps = cell.write_program == who.program && cell.write_tick == who.tick;
    cell.write_bytes = (keeps ? cell.write_bytes : 0) | bytes;
    cell.write_program = who.program;
    cell.write_tick = who.tick;
    cell.write_warp = who.warp;
    cell.write_lane = who.lane;
    cell.atomic = who.atomic;
    cell.generic = true;
  }
  std::memcpy(at, value, size);
}

void Memory::read_async(Region& region, uint64_t address, int size, const Who& who, uint32_t issued) {
  for (uint64_t a = address; a < address + size; a += kCellBytes) {
    Cell& cell = region.at(a);
    if (cell.coming) throw Fault("a product reads bytes of a copy that has not been waited for");
    if (!cell.write_bytes) continue;
    if (cell.write_tick >= issued) throw Fault("an operand of a product changes before its wait");
    if (!ordered(cell.write_tick, cell.write_warp, kManyLanes, who))
      throw Fault("race: a product reads what " + thread(cell.write_program, cell.write_warp, cell.write_lane) +
                  " writes");
    if (cell.generic && order.proxy_fence[cell.write_warp] <= cell.write_tick &&
        order.proxy_fence[who.warp] < order.last[who.warp])
      throw Fault("a product reads what was stored without fence.proxy.async");
  }
  for (uint64_t a = address; a < address + size; a += kCellBytes) {
    Cell& cell = region.at(a);
    if (cell.read_tick < order.last[who.warp]) cell.read_warps = 0;
    cell.read_warps |= 1u << (who.warp & 31);
    cell.read_bytes = (1 << kCellBytes) - 1;
    cell.read_program = who.program;
    cell.read_lane = kManyLanes;
    cell.read_tick = who.tick;
  }
}

void Memory::announce(Region& region, uint8_t* at, int size, const Who& who) {
  uint64_t begin = offset_of(region, at);
  for (uint64_t a = begin; a < begin + size; a += kCellBytes) {
    Cell& cell = region.at(a);
    if (cell.coming) throw Fault("a copy goes where another is on its way");
    refuse_race(cell, touched(a, begin, begin + size), false, who);
    cell.coming = true;
  }
}

void Memory::land(Region& region, uint8_t* at, const uint8_t* value, int size, const Who& who) {
  uint64_t begin = offset_of(region, at);
  for (uint64_t a = begin; a < begin + size; a += kCellBytes) region.at(a).coming = false;
  write(region, at, value, size, who);
  for (uint64_t a = begin; a < begin + size; a += kCellBytes) region.at(a).generic = false;
}

}  // namespace ptx
