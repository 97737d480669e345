// Memory that knows its bounds, who touched it since the last barrier and which copies are on their way.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "instruction.h"

namespace ptx {

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

// The last write and the last reads of a byte.
struct Cell {
  uint32_t write_tick = 0, read_tick = 0;
  uint32_t write_program = 0, read_program = 0;
  uint32_t read_warps = 0;
  uint16_t write_warp = 0;
  uint8_t write_lane = 0, read_lane = 0, write_bytes = 0, read_bytes = 0;
  bool atomic = false, generic = false, many_programs = false;
  bool coming = false;  // a copy will write here and has not been waited for
};
constexpr uint8_t kManyLanes = 255;
constexpr int kCellBytes = 1;  // two would be a fifth faster, and take neighbouring bytes for one

struct Region {
  uint64_t begin, end;
  std::vector<Cell> cells;  // made when first touched
  Cell& at(uint64_t address) {
    if (cells.empty()) cells.resize((end - begin + kCellBytes - 1) / kCellBytes);
    return cells[(address - begin) / kCellBytes];
  }
};

constexpr uint64_t kSharedWindow = uint64_t(1) << 56;  // generic addresses of shared memory
constexpr uint64_t kLocalWindow = uint64_t(1) << 57;
constexpr uint64_t kSharedBase = 1024;  // so that a wrong pointer of 0 is seen

// What has happened between warps: before `seen[a][b]` all that b did is known to a.
struct Order {
  std::vector<std::vector<uint32_t>> seen;
  std::vector<uint32_t> own;          // the tick of each warp's last barrier among its own lanes
  std::vector<uint32_t> last;         // the tick of each warp's last barrier with others
  std::vector<uint32_t> proxy_fence;  // the tick of each warp's last fence of the async proxy
  explicit Order(int warps) : seen(warps, std::vector<uint32_t>(warps)), own(warps), last(warps), proxy_fence(warps) {}
};

class Memory {
 public:
  Memory(const uint64_t* storages, int count, size_t shared_bytes);
  void start_program(uint32_t garbage, int warps);

  // The memory of an access of `size` bytes, checked; Fault otherwise.
  // An address must be a multiple of `aligned`, or of the size where it is 0.
  uint8_t* find(int space, uint64_t address, int size, Region*& region, int aligned = 0);
  void read(Region& region, const uint8_t* at, int size, const Who& who);
  void write(Region& region, uint8_t* at, const uint8_t* value, int size, const Who& who);
  // The bytes that an asynchronous product reads: unchanged since `issued`, and fenced.
  void read_async(Region& region, uint64_t offset, int size, const Who& who, uint32_t issued);
  void announce(Region& region, uint8_t* at, int size, const Who& who);  // a copy is on its way here
  void land(Region& region, uint8_t* at, const uint8_t* value, int size, const Who& who);

  std::vector<uint8_t> shared;
  Order order{1};

 private:
  void refuse_race(const Cell& cell, uint8_t bytes, bool same, const Who& who) const;  // of a write
  bool ordered(uint32_t tick, int other_warp, uint8_t other_lane, const Who& who) const;
  uint64_t offset_of(const Region& region, const uint8_t* at) const;
  std::vector<Region> storages_;
  Region shared_region_;
  size_t last_found_ = 0;
};

}  // namespace ptx
