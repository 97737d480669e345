// A warp, its program and the machine that runs them.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <vector>

#include "memory.h"
#include "values.h"

namespace ptx {

constexpr uint32_t kAll = 0xffffffff;

inline uint32_t next_random(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

struct Path {  // lanes that go the same way until `meet`
  int32_t next, meet;
  uint32_t lanes;
};

struct Copy {
  uint64_t to, from;
  int size, read;  // bytes written, and how many of them come from memory
  uint8_t lane;
  const Instruction* at;
};

struct Product {  // a wgmma on its way
  const Instruction* at;
  std::array<uint64_t, 2> descriptors;
  bool accumulate;
  uint32_t issued;
};

// A tensor map, in 128 bytes of the emulator's own: whoever makes one, launch or kernel, fills these fields.
struct TensorMap {
  uint64_t address, strides[4];  // bytes between neighbours of each dimension but the first
  uint32_t sizes[5], box[5], steps[5];
  uint8_t last, type, interleave, swizzle, fill, zero[3];  // the last dimension, the type as tensormap.replace has it
  uint32_t set;                                            // which fields have been
  uint8_t unused[16];
};
static_assert(sizeof(TensorMap) == 128);

// A box of a tensor, on its way into shared memory or out of it.
struct Box {
  TensorMap map;
  std::array<int32_t, 5> at;
  uint64_t shared, barrier;  // addresses; a barrier counts what comes in
  int warp;
  uint8_t lane;
  const Instruction* by;
  std::vector<uint8_t> bytes = {};  // of a box on its way out, when they have been read
};

// The stores of a lane, by the groups that it waits for.
struct Stores {
  std::vector<Box> open;
  std::deque<std::vector<Box>> groups;
};

struct Mbarrier {
  int agent;  // in Order, for the copies that it counts
  uint32_t expected, pending;
  int64_t bytes = 0;               // that are expected, less those that have come
  uint32_t phase = 0;              // how many have been completed
  int copies = 0;                  // on their way
  Clock told = {}, complete = {};  // by those that arrived, and so far when the last phase was complete
  void end_phase();                // where all have arrived
};

struct Warp {
  int index;
  std::vector<Bits> registers;              // [register][lane]
  std::vector<uint32_t> written, read;      // ticks of the last write and read of each register
  std::vector<Path> paths;                  // the last one runs
  std::vector<std::vector<uint8_t>> local;  // [lane][byte]
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> products;
  std::map<int, std::array<float, kLanes>> accumulators;  // of products on their way
  uint32_t register_fence = 0;                            // tick of the last wgmma.fence
  uint32_t exited = 0;
  int barrier = -1, expected = 0;             // the one it waits at, and for how many warps
  bool paused = false;                        // others are to run before it goes on
  uint64_t mbarrier = 0;                      // where it waits for the end of a phase, 0 for nowhere
  uint32_t parity = 0;                        // of that phase
  std::pair<uint64_t, uint32_t> tried{0, 0};  // the barrier and parity that it has waited for in vain
  int quota = 0, asked = 0;                   // registers of a thread, and those that it waits for
  std::map<int, Stores> stores;               // by lanes
  const Instruction* at = nullptr;            // the last one that it ran
  bool done = false;
};

struct Options {
  int32_t grid[3], block[3];
  int32_t order;  // 0 forward, 1 backward, 2 random
  int32_t harsh;
  uint32_t seed;
  int32_t num_registers, num_params, local_bytes, shared_bytes, num_storages;
  uint64_t most;          // instructions of a launch
  int32_t max_registers;  // of a thread at its start, 0 where the kernel does not say
};

void refuse_unread(int lane, const Stores& stores);  // Fault where memory that a store reads may soon be gone

class Machine {
 public:
  Machine(const Instruction* code, const int32_t* operands, const Bits* constants, const uint8_t* params,
          const uint64_t* storages, const Options& options);
  void run();
  std::string where() const;
  const Instruction* now = nullptr;
  uint64_t executed = 0;
  void at_lane(int lane) { lane_ = lane; }
  std::pair<uint32_t, int> map_fence(uint64_t address) const;  // (tick, warp) of the last one of a tensor map

 private:
  friend struct Step;
  void run_program(uint32_t program);
  void run_warp(Warp& warp);
  void start(Warp& warp, uint32_t program);
  bool release();
  bool meet(int barrier);
  bool waits(Warp& warp);
  void land_box();
  void write_box(const Box& box);
  uint32_t next_random() { return ptx::next_random(random_); }
  void end_program();
  [[noreturn]] void report_deadlock();
  std::vector<Warp*> in_order();

  const Instruction* code_;
  const int32_t* operands_;
  const Bits* constants_;
  const uint8_t* params_;
  Options options_;
  Memory memory_;
  std::vector<Warp> warps_;
  struct Arrivals {
    int warps = 0, expected = 0;
    Clock told = {};
  };
  std::array<Arrivals, 16> arrivals_;       // at barriers where they do not wait
  std::map<uint64_t, Mbarrier> mbarriers_;  // by address
  std::map<uint64_t, int> agents_;          // of all that have been, by address
  std::deque<Box> coming_;
  std::map<uint64_t, std::pair<uint32_t, int>> map_fences_;  // (tick, warp) of the last one of a tensor map
  Warp* current_ = nullptr;
  int lane_ = -1;
  uint32_t program_ = 0, tick_ = 1, random_;
};

// One instruction of one warp: what the parts of the machine see.
struct Step {
  Machine& machine;
  Warp& warp;
  const Instruction& in;
  uint32_t lanes;

  int number(int i) const { return machine.operands_[in.first + i]; }
  const Bits* source(int i) const {
    int index = number(i);
    if (index < machine.options_.num_registers) warp.read[index] = machine.tick_;
    return value(index);
  }
  const Bits* value(int index) const {
    int registers = machine.options_.num_registers;
    return index < registers ? &warp.registers[size_t(index) * kLanes]
                             : machine.constants_ + size_t(index - registers) * kLanes;
  }
  Bits* target(int i) {
    int index = number(i);
    warp.written[index] = machine.tick_;
    return &warp.registers[size_t(index) * kLanes];
  }
  template <class F>
  void each(F&& act) {
    if (lanes == kAll) {
      for (int lane = 0; lane < kLanes; ++lane) act(lane);
    } else {
      for (uint32_t left = lanes; left; left &= left - 1) act(std::countr_zero(left));
    }
  }
  template <class F>
  void each_in_turn(F&& act) {  // where an access may fault
    each([&](int lane) { act(machine.lane_ = lane); });
    machine.lane_ = -1;
  }
  void need_all(const char* what) const {
    if (lanes != kAll) throw Fault(std::string(what) + " must be run by all lanes of a warp");
  }
  Who who(int lane) const { return {machine.program_, machine.tick_, uint16_t(warp.index), uint8_t(lane)}; }
  Memory& memory() const { return machine.memory_; }
  const Options& options() const { return machine.options_; }
  const uint8_t* params() const { return machine.params_; }
  uint32_t tick() const { return machine.tick_; }
  uint64_t address(int i, int lane) const { return source(i)[lane] + int64_t(number(i + 1)); }

  bool arithmetic();  // false where the instruction is of another part
  bool access();
  bool exchange();
  bool tensor();
  bool phases();
  bool bulk();
  void wait_copies(size_t pending);
  void wait_products(size_t pending);
  Mbarrier& mbarrier(uint64_t address, int lane);
  void make_mbarrier();
  void arrive();
  void wait_phase();
  void load_box();
  void store_box();
  void read_box(Box& box);
  void wait_stores();
  void replace();
  void copy_map();
  uint32_t alive() const { return kAll & ~warp.exited; }
  Order& order() const { return machine.memory_.order; }
};

}  // namespace ptx
