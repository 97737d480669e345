// Memory that knows its bounds, who touched it since the last barrier and which copies are on their way.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction.h"

namespace ptx {

constexpr int kLanes = 32;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who touches: a thread of a program, at a tick of the machine's clock.
struct Who {
  uint32_t program, tick;
  uint16_t warp;
  uint8_t lane;
  bool atomic = false;
};

constexpr uint8_t kManyLanes = 255;

// The last write and the last reads of a byte.
struct Cell {
  uint32_t write_tick = 0, read_tick = 0;  // of reads, in global memory
  uint32_t write_program = 0, read_program = 0;
  uint32_t read_warps = 0;
  uint16_t write_warp = 0;  // or an mbarrier, see Order
  uint8_t write_lane = 0, read_lane = 0;
  bool written = false;
  bool atomic = false, generic = false, many_programs = false;
  bool coming = false;   // a copy will write here and has not been waited for
  bool barrier = false;  // a part of an mbarrier
  uint8_t leaving = 0;   // copies that will read here and have not been waited for
};

struct Read {
  uint32_t tick, lane;
};

struct Region {
  uint64_t begin, end;
  std::vector<Cell> cells;                  // made when first touched
  std::unique_ptr<Read[]> reads = nullptr;  // of shared memory, by each warp: [warp][byte]
  Cell* at(uint64_t address) {
    if (cells.empty()) cells.resize(end - begin);
    return &cells[address - begin];
  }
  Read& read_by(int warp, uint64_t address) const { return reads[size_t(warp) * (end - begin) + (address - begin)]; }
};

constexpr uint64_t kSharedWindow = uint64_t(1) << 56;  // generic addresses of shared memory
constexpr uint64_t kLocalWindow = uint64_t(1) << 57;
constexpr uint64_t kParamWindow = uint64_t(1) << 58;
constexpr uint64_t kSharedBase = 1024;  // so that a wrong pointer of 0 is seen

// What has happened between warps: before `seen[a][b]` all that b did is known to a. Behind the warps come the
// mbarriers in turn, for the copies that each of them counts.
using Clock = std::vector<uint32_t>;
void join(Clock& to, const Clock& from);
struct Order {
  std::vector<Clock> seen;
  Clock own;                                              // the tick of each warp's last barrier among its own lanes
  Clock met;                                              // the tick of each warp's last meeting with others
  Clock proxy_fence;                                      // the tick of each warp's last fence of the async proxy
  std::vector<std::array<uint32_t, kLanes + 1>> touched;  // shared memory, by each lane or by many at once: ticks
  explicit Order(int warps) : seen(warps, Clock(warps)), own(warps), met(warps), proxy_fence(warps), touched(warps) {}
  int add_agent();
  void meet(int warp, const Clock& known, uint32_t tick);
  bool knows(int warp, const Clock& clock) const;
  // What a warp, or some of its lanes, have done and know, as they tell it.
  void tell(int warp, uint32_t lanes, uint32_t alive, uint32_t tick, Clock& to) const;
};

class Memory {
 public:
  Memory(const uint64_t* storages, int count, size_t shared_bytes, int warps);
  void start_program(uint32_t garbage);

  // The memory of an access of `size` bytes, checked; Fault otherwise.
  // An address must be a multiple of `aligned`, or of the size where it is 0.
  uint8_t* find(int space, uint64_t address, int size, Region*& region, int aligned = 0);
  void read(Region& region, const uint8_t* at, int size, const Who& who);
  void write(Region& region, uint8_t* at, const uint8_t* value, int size, const Who& who);
  // The bytes that an asynchronous product reads: unchanged since `issued`, and fenced.
  void read_async(Region& region, uint64_t offset, int size, const Who& who, uint32_t issued);
  void announce(Region& region, uint8_t* at, int size, const Who& who);  // a copy is on its way here
  void land(Region& region, uint8_t* at, const uint8_t* value, int size, const Who& who);
  // A copy will read here, until it has left.
  void lend(Region& region, uint64_t address, int size, const Who& who);
  void leave(Region& region, uint64_t address, int size, const Who& who);
  Cell* cells(Region& region, const uint8_t* at) { return region.at(offset_of(region, at)); }

  std::vector<uint8_t> shared;
  Order order{1};

 private:
  void refuse_race(const Region& region, const Cell& cell, uint64_t address, bool same, const Who& who);  // of a write
  void refuse_unready(const Cell& cell, const Who& who, uint32_t issued) const;  // of a read by the async proxy
  void note_read(Region& region, Cell& cell, uint64_t address, const Who& who);
  void set(const Region& region, Cell& cell, const Who& who);
  bool ordered(uint32_t tick, int warp, uint8_t lane, const Who& who) const {
    if (warp != who.warp) return tick < order.seen[who.warp][warp];
    return lane == who.lane || tick == who.tick || tick < order.own[warp];
  }
  uint64_t offset_of(const Region& region, const uint8_t* at) const;
  std::vector<Region> storages_;
  Region shared_region_;
  size_t last_found_ = 0;
  int warps_;
};

}  // namespace ptx
