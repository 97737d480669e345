// A warp, its program and the machine that runs them.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <vector>

#include "memory.h"
#include "values.h"

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAll = 0xffffffff;

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
  int barrier = -1, expected = 0;  // the one it waits at, and for how many warps
  bool done = false;
};

struct Options {
  int32_t grid[3], block[3];
  int32_t order;  // 0 forward, 1 backward, 2 random
  int32_t harsh;
  uint32_t seed;
  int32_t num_registers, num_params, local_bytes, shared_bytes, num_storages;
  uint64_t most;  // instructions of a launch
};

class Machine {
 public:
  Machine(const Instruction* code, const int32_t* operands, const Bits* constants, const uint8_t* params,
          const uint64_t* storages, const Options& options);
  void run();
  std::string where() const;
  const Instruction* now = nullptr;
  uint64_t executed = 0;
  void at_lane(int lane) { lane_ = lane; }

 private:
  friend struct Step;
  void run_program(uint32_t program);
  void run_warp(Warp& warp);
  void start(Warp& warp, uint32_t program);
  bool release(std::vector<Warp*>& waiting);
  std::vector<Warp*> in_order();

  const Instruction* code_;
  const int32_t* operands_;
  const Bits* constants_;
  const uint8_t* params_;
  Options options_;
  Memory memory_;
  std::vector<Warp> warps_;
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
  void wait_copies(size_t pending);
  void wait_products(size_t pending);
};

}  // namespace ptx
