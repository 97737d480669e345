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

std::string thread(uint32_t program, int warp, uint8_t lane, int warps) {
  if (warp >= warps) return "a bulk copy of program " + std::to_string(program);
  std::string lanes = lane == kManyLanes ? "several lanes" : "lane " + std::to_string(lane);
  return "program " + std::to_string(program) + ", warp " + std::to_string(warp) + ", " + lanes;
}

}  // namespace

void join(Clock& to, const Clock& from) {
  to.resize(std::max(to.size(), from.size()));
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

int Order::add_agent() {
  int agent = int(seen[0].size());
  for (Clock& clock : seen) clock.push_back(0);
  return agent;
}

void Order::meet(int warp, const Clock& known, uint32_t tick) {
  join(seen[warp], known);
  if (!known.empty()) own[warp] = std::max(own[warp], known[warp]);
  met[warp] = tick;
}

bool Order::knows(int warp, const Clock& clock) const {
  for (size_t i = 0; i < clock.size(); ++i)
    if (clock[i] > seen[warp][i]) return false;
  return true;
}

void Order::tell(int warp, uint32_t lanes, uint32_t alive, uint32_t tick, Clock& to) const {
  join(to, seen[warp]);
  for (int lane = 0; lane <= kLanes; ++lane) {
    bool tells = lane == kLanes ? lanes == alive : lanes >> lane & 1;
    if (!tells && touched[warp][lane] >= own[warp]) tick = own[warp];  // the others have not met these lanes since
  }
  to[warp] = std::max(to[warp], tick);
}

Memory::Memory(const uint64_t* storages, int count, size_t shared_bytes, int warps)
    : shared(shared_bytes), shared_region_{kSharedBase, kSharedBase + shared_bytes, {}}, warps_(warps) {
  for (int i = 0; i < count; ++i) storages_.push_back({storages[2 * i], storages[2 * i + 1], {}});
  shared_region_.reads.reset(new Read[shared_bytes * warps]);  // each is written before it is read
}

void Memory::start_program(uint32_t garbage) {
  auto words = reinterpret_cast<uint32_t*>(shared.data());
  std::fill(words, words + shared.size() / 4, garbage);
  std::fill(shared_region_.cells.begin(), shared_region_.cells.end(), Cell{});
  order = Order(warps_);
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

uint64_t Memory::offset_of(const Region& region, const uint8_t* at) const {
  if (&region == &shared_region_) return kSharedBase + (at - shared.data());
  return reinterpret_cast<uint64_t>(at);
}

void Memory::note_read(Region& region, Cell& cell, uint64_t address, const Who& who) {
  uint32_t mine = 1u << (who.warp & 31);
  if (region.reads) {
    Read& read = region.read_by(who.warp, address);
    bool also = cell.read_warps & mine && read.lane != who.lane && read.tick >= order.own[who.warp];
    read = {who.tick, also ? kManyLanes : who.lane};
    cell.read_warps |= mine;
    return;
  }
  if (cell.read_program != who.program) {
    cell.many_programs |= cell.read_warps != 0;
    cell.read_warps = 0;
  }
  for (uint32_t warps = cell.read_warps; warps; warps &= warps - 1) {
    int warp = std::countr_zero(warps);  // what it has read and told cannot race with what comes behind it
    bool told = cell.read_tick < (warp == who.warp ? order.own : order.seen[who.warp])[warp];
    if (told) cell.read_warps &= ~(1u << warp);
  }
  cell.read_lane = !cell.read_warps || cell.read_lane == who.lane ? who.lane : kManyLanes;
  cell.read_warps |= mine;
  cell.read_program = who.program;
  cell.read_tick = who.tick;
}

void Memory::read(Region& region, const uint8_t* at, int size, const Who& who) {
  uint64_t address = offset_of(region, at);
  Cell* cell = region.at(address);
  if (region.reads && !who.atomic) order.touched[who.warp][std::min<int>(who.lane, kLanes)] = who.tick;
  for (const Cell* end = cell + size; cell < end; ++cell, ++address) {
    if (cell->coming) throw Fault("reads bytes of a copy that has not been waited for");
    bool mine = cell->write_program == who.program;
    if (cell->written && !(cell->atomic && who.atomic) &&
        !(mine && ordered(cell->write_tick, cell->write_warp, cell->write_lane, who)))
      throw Fault("race: reads what " + thread(cell->write_program, cell->write_warp, cell->write_lane, warps_) +
                  " writes");
    note_read(region, *cell, address, who);
  }
}

void Memory::refuse_race(const Region& region, const Cell& cell, uint64_t address, bool same, const Who& who) {
  if (cell.leaving) throw Fault("writes bytes that a bulk copy has yet to read");
  bool both_atomic = cell.atomic && who.atomic;
  if (cell.written && !same && !both_atomic) {
    bool mine = cell.write_program == who.program;
    bool at_once = mine && cell.write_tick == who.tick && cell.write_warp == who.warp;
    if (at_once && cell.write_lane != who.lane)
      throw Fault("lane " + std::to_string(cell.write_lane) +
                  " of this instruction writes another value to the same address");
    if (!mine || !ordered(cell.write_tick, cell.write_warp, cell.write_lane, who))
      throw Fault("race: overwrites what " + thread(cell.write_program, cell.write_warp, cell.write_lane, warps_) +
                  " writes");
  }
  if (!cell.read_warps || who.atomic) return;
  auto race = [&](int warp, uint32_t lane) {
    uint32_t program = region.reads ? who.program : cell.read_program;
    throw Fault("race: writes what " + thread(program, warp, uint8_t(lane), warps_) + " reads");
  };
  bool elsewhere = !region.reads && cell.read_program != who.program;
  if (!region.reads && (elsewhere || cell.many_programs) && !(same && elsewhere))
    race(std::countr_zero(cell.read_warps), cell.read_lane);
  if (elsewhere) return;
  for (uint32_t warps = cell.read_warps; warps; warps &= warps - 1) {
    int warp = std::countr_zero(warps);
    Read read = region.reads ? region.read_by(warp, address) : Read{cell.read_tick, cell.read_lane};
    if (!ordered(read.tick, warp, uint8_t(read.lane), who)) race(warp, read.lane);
  }
}

void Memory::write(Region& region, uint8_t* at, const uint8_t* value, int size, const Who& who) {
  uint64_t address = offset_of(region, at);
  Cell* cell = region.at(address);
  bool same = std::memcmp(at, value, size) == 0;
  if (region.reads && !who.atomic) order.touched[who.warp][std::min<int>(who.lane, kLanes)] = who.tick;
  for (const Cell* end = cell + size; cell < end; ++cell, ++address) {
    if (cell->coming) throw Fault("writes bytes of a copy that has not been waited for");
    refuse_race(region, *cell, address, same, who);
    set(region, *cell, who);
    cell->generic = true;
  }
  std::memcpy(at, value, size);
}

void Memory::set(const Region& region, Cell& cell, const Who& who) {
  if (region.reads && !who.atomic) cell.read_warps = 0;  // who is ordered behind this write is so behind these reads
  cell.written = true;
  cell.write_program = who.program;
  cell.write_tick = who.tick;
  cell.write_warp = who.warp;
  cell.write_lane = who.lane;
  cell.atomic = who.atomic;
  cell.barrier = false;
}

void Memory::refuse_unready(const Cell& cell, const Who& who, uint32_t issued) const {
  if (cell.coming) throw Fault("a product or bulk copy reads bytes of a copy that has not been waited for");
  if (!cell.written) return;
  if (cell.write_tick >= issued) throw Fault("an operand of a product or bulk copy changes before its wait");
  if (!ordered(cell.write_tick, cell.write_warp, kManyLanes, who))
    throw Fault("race: a product or bulk copy reads what " +
                thread(cell.write_program, cell.write_warp, cell.write_lane, warps_) + " writes");
  if (cell.generic && order.proxy_fence[cell.write_warp] <= cell.write_tick &&
      order.proxy_fence[who.warp] < order.met[who.warp])
    throw Fault("a product or bulk copy reads what was stored without fence.proxy.async");
}

void Memory::read_async(Region& region, uint64_t address, int size, const Who& who, uint32_t issued) {
  Cell* cell = region.at(address);
  for (const Cell* end = cell + size; cell < end; ++cell, ++address) {
    refuse_unready(*cell, who, issued);
    note_read(region, *cell, address, who);
  }
}

void Memory::lend(Region& region, uint64_t address, int size, const Who& who) {
  Cell* cell = region.at(address);
  for (const Cell* end = cell + size; cell < end; ++cell) {
    refuse_unready(*cell, who, who.tick);
    ++cell->leaving;
  }
}

void Memory::leave(Region& region, uint64_t address, int size, const Who& who) {
  Cell* cell = region.at(address);
  for (const Cell* end = cell + size; cell < end; ++cell, ++address) {
    --cell->leaving;
    note_read(region, *cell, address, who);
  }
}

void Memory::announce(Region& region, uint8_t* at, int size, const Who& who) {
  uint64_t address = offset_of(region, at);
  Cell* cell = region.at(address);
  for (const Cell* end = cell + size; cell < end; ++cell, ++address) {
    if (cell->coming) throw Fault("a copy goes where another is on its way");
    refuse_race(region, *cell, address, false, who);
    cell->coming = true;
  }
}

void Memory::land(Region& region, uint8_t* at, const uint8_t* value, int size, const Who& who) {
  Cell* cell = region.at(offset_of(region, at));
  for (const Cell* end = cell + size; cell < end; ++cell) {
    cell->coming = cell->generic = false;
    set(region, *cell, who);
  }
  std::memcpy(at, value, size);
}

}  // namespace ptx
