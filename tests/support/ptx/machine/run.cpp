// Programs, warps between barriers, branches, and the door from Python.
#include <algorithm>
#include <bit>
#include <cstring>

#include "warp.h"

namespace ptx {
namespace {

enum Special {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
};
constexpr const char* kSpecials =
    "tid.x,tid.y,tid.z,ntid.x,ntid.y,ntid.z,ctaid.x,ctaid.y,ctaid.z,nctaid.x,nctaid.y,nctaid.z,"
    "laneid,warpid,lanemask_eq,lanemask_lt,lanemask_le,lanemask_gt,lanemask_ge";
constexpr int kNumSpecials = lanemask_ge + 1;  // the first registers of every warp

uint32_t next_random(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

}  // namespace

Machine::Machine(const Instruction* code, const int32_t* operands, const Bits* constants, const uint8_t* params,
                 const uint64_t* storages, const Options& options)
    : code_(code),
      operands_(operands),
      constants_(constants),
      params_(params),
      options_(options),
      memory_(storages, options.num_storages, size_t(options.shared_bytes)),
      random_(options.seed) {
  const int32_t* block = options.block;
  int threads = block[0] * block[1] * block[2];
  warps_.resize(size_t(threads + kLanes - 1) / kLanes);
}

void Machine::run() {
  const int32_t* grid = options_.grid;
  uint32_t count = uint32_t(grid[0]) * grid[1] * grid[2];
  std::vector<uint32_t> programs(count);
  for (uint32_t i = 0; i < count; ++i) programs[i] = i;
  if (options_.order == 1) std::reverse(programs.begin(), programs.end());
  if (options_.order == 2)
    for (uint32_t i = count; i > 1; --i) std::swap(programs[i - 1], programs[next_random(random_) % i]);
  for (uint32_t program : programs) run_program(program);
}

void Machine::start(Warp& warp, uint32_t program) {
  int index = int(&warp - warps_.data());
  warp = Warp{};
  warp.index = index;
  warp.registers.resize(size_t(options_.num_registers) * kLanes);
  warp.written.assign(size_t(options_.num_registers), 0);
  warp.read = warp.written;
  uint32_t garbage = options_.seed;
  for (Bits& bits : warp.registers) bits = 0xffc00000u | next_random(garbage);  // NaN, a far address
  const int32_t *grid = options_.grid, *block = options_.block;
  uint32_t threads = uint32_t(block[0]) * block[1] * block[2];
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    auto set = [&](int special, uint32_t value) { warp.registers[size_t(special) * kLanes + lane] = value; };
    uint32_t thread = uint32_t(index) * kLanes + lane;
    if (thread >= threads) warp.exited |= 1u << lane;
    uint32_t ids[] = {thread, program}, starts[] = {tid_x, ctaid_x};
    const int32_t* sizes[] = {block, grid};
    for (int kind = 0; kind < 2; ++kind) {
      set(int(starts[kind]), ids[kind] % uint32_t(sizes[kind][0]));
      set(int(starts[kind]) + 1, ids[kind] / uint32_t(sizes[kind][0]) % uint32_t(sizes[kind][1]));
      set(int(starts[kind]) + 2, ids[kind] / uint32_t(sizes[kind][0]) / uint32_t(sizes[kind][1]));
      for (int axis = 0; axis < 3; ++axis) set(int(starts[kind]) + 3 + axis, uint32_t(sizes[kind][axis]));
    }
    set(laneid, lane);
    set(warpid, uint32_t(index));
    uint32_t mine = 1u << lane;
    set(lanemask_eq, mine);
    set(lanemask_lt, mine - 1);
    set(lanemask_le, mine | (mine - 1));
    set(lanemask_gt, ~(mine | (mine - 1)));
    set(lanemask_ge, ~(mine - 1));
  }
  warp.local.assign(kLanes, std::vector<uint8_t>(size_t(options_.local_bytes), 0xa5));
  warp.paths = {{0, -1, kAll & ~warp.exited}};
}

std::vector<Warp*> Machine::in_order() {
  std::vector<Warp*> found;
  for (Warp& warp : warps_) found.push_back(&warp);
  if (options_.order == 1) std::reverse(found.begin(), found.end());
  if (options_.order == 2)
    for (size_t i = found.size(); i > 1; --i) std::swap(found[i - 1], found[next_random(random_) % i]);
  return found;
}

void Machine::run_program(uint32_t program) {
  program_ = program;
  memory_.start_program(0xffc00000u | (options_.seed & 0xffff), int(warps_.size()));
  for (Warp& warp : warps_) start(warp, program);
  while (true) {
    bool all_done = true;
    for (Warp* warp : in_order()) {
      if (!warp->done && warp->barrier < 0) run_warp(*warp);
      all_done &= warp->done;
    }
    if (all_done) return;
    std::vector<Warp*> waiting;
    for (Warp& warp : warps_)
      if (!warp.done) waiting.push_back(&warp);
    if (!release(waiting)) throw Fault("deadlock: warps wait at barriers that others never reach");
  }
}

bool Machine::release(std::vector<Warp*>& waiting) {
  std::vector<Warp*> met;
  for (Warp* first : waiting) {
    met.clear();
    for (Warp* warp : waiting)
      if (warp->barrier == first->barrier) met.push_back(warp);
    size_t needed = first->expected ? size_t(first->expected) : waiting.size();
    if (met.size() == needed) break;
    met.clear();
  }
  if (met.empty()) return false;
  ++tick_;
  Order& order = memory_.order;
  std::vector<uint32_t> known(warps_.size());
  for (Warp* warp : met)
    for (size_t i = 0; i < known.size(); ++i) known[i] = std::max(known[i], order.seen[size_t(warp->index)][i]);
  for (Warp* warp : met) known[size_t(warp->index)] = tick_;
  for (Warp* warp : met) {
    order.seen[size_t(warp->index)] = known;
    order.last[size_t(warp->index)] = tick_;
    warp->barrier = -1;
  }
  return true;
}

void Machine::run_warp(Warp& warp) {
  current_ = &warp;
  while (warp.barrier < 0) {
    while (!warp.paths.empty()) {
      Path& path = warp.paths.back();
      path.lanes &= ~warp.exited;
      if (path.lanes && path.next != path.meet) break;
      warp.paths.pop_back();
    }
    if (warp.paths.empty()) {
      bool products = !warp.open_products.empty() || !warp.products.empty();
      auto any = [](const std::vector<Copy>& group) { return !group.empty(); };
      if (products || any(warp.open_copies) || std::any_of(warp.copies.begin(), warp.copies.end(), any))
        throw Fault("a warp ends before the copies and products that it has not waited for");
      warp.done = true;
      return;
    }
    Path& path = warp.paths.back();
    now = &code_[path.next++];
    ++tick_;
    if (++executed > options_.most) throw Fault("runs on without an end");
    Step step{*this, warp, *now, path.lanes};
    if (now->guard >= 0) {
      const Bits* guard = step.value(now->guard);
      uint32_t passes = 0;
      for (int lane = 0; lane < kLanes; ++lane) passes |= uint32_t(guard[lane] != 0) << lane;
      step.lanes &= now->has(negated_guard_flag) ? ~passes : passes;
      if (!step.lanes) continue;
    }
    if (!step.arithmetic() && !step.access() && !step.exchange() && !step.tensor()) throw Fault("no such instruction");
  }
}

bool Step::exchange() {
  Path& path = warp.paths.back();
  auto together = [&](const char* what) {
    if (lanes != (kAll & ~warp.exited)) throw Fault(std::string(what) + " in code that some lanes skip");
  };
  auto all_named_here = [&](int members) {
    each([&](int lane) {
      if (~source(members)[lane] >> lane & 1) throw Fault("an exchange does not name its own lane");
      if (source(members)[lane] & ~warp.exited & ~lanes & kAll) throw Fault("an exchange names lanes that skip it");
    });
  };
  switch (in.op) {
    case bra_: {
      uint32_t others = path.lanes & ~lanes;
      if (!others) {
        path.next = in.target;
      } else {
        int32_t behind = path.next;
        path.next = in.meet;
        warp.paths.push_back({behind, in.meet, others});
        warp.paths.push_back({in.target, in.meet, lanes});
      }
      return true;
    }
    case exit_:
      warp.exited |= lanes;
      return true;
    case trap_:
      throw Fault("trap");
    case nop_:
      return true;
    case bar_:  // [number, threads or 0]
      together("a barrier");
      warp.barrier = int(source(0)[0]);
      warp.expected = int(source(1)[0]) / kLanes;
      return true;
    case bar_warp_:
      memory().order.own[size_t(warp.index)] = tick();
      return true;
    case fence_:
      return true;
    case fence_proxy_:
      memory().order.proxy_fence[size_t(warp.index)] = tick();
      return true;
    case activemask_: {
      Bits* to = target(0);
      each([&](int lane) { to[lane] = lanes; });
      return true;
    }
    case shfl_: {  // [to, in range or -1, from, lane, bounds, members]
      std::array<Bits, kLanes> from;
      std::copy_n(source(2), kLanes, from.begin());
      std::array<Bits, kLanes> found, inside;
      all_named_here(5);
      each([&](int lane) {
        int by = source(3)[lane] & 31, bounds = int(source(4)[lane]), segment = bounds >> 8 & 31;
        int most = (lane & segment) | (bounds & 31 & ~segment);
        int other = in.mode == up_     ? lane - by
                    : in.mode == down_ ? lane + by
                    : in.mode == bfly_ ? lane ^ by
                                       : (lane & segment) | (by & ~segment);
        inside[lane] = in.mode == up_ ? other >= most : other <= most;
        int taken = inside[lane] ? other : lane;
        found[lane] = lanes >> taken & 1 ? from[taken] : Bits(0x7fc0beef);
      });
      Bits* to = target(0);
      each([&](int lane) { to[lane] = cut(found[lane], b32_); });
      if (number(1) >= 0) {
        Bits* p = target(1);
        each([&](int lane) { p[lane] = inside[lane]; });
      }
      return true;
    }
    case vote_: {  // [to, predicate, whether negated, members]
      uint32_t passes = 0;
      const Bits* p = source(1);
      all_named_here(3);
      each([&](int lane) { passes |= uint32_t((p[lane] != 0) != (number(2) != 0)) << lane; });
      bool all = passes == lanes, any = passes != 0;
      Bits found = in.mode == ballot_ ? passes : in.mode == all_ ? all : in.mode == any_ ? any : all || !any;
      Bits* to = target(0);
      each([&](int lane) { to[lane] = found; });
      return true;
    }
    case redux_: {  // [to, from, members]
      const Bits* from = source(1);
      int64_t sum = 0;
      bool first = true;
      all_named_here(2);
      each([&](int lane) {
        int64_t x = integer(from[lane], in.type);
        sum = first               ? x
              : in.mode == m_add_ ? sum + x
              : in.mode == m_min_ ? std::min(sum, x)
              : in.mode == m_max_ ? std::max(sum, x)
              : in.mode == m_and_ ? sum & x
              : in.mode == m_or_  ? sum | x
                                  : sum ^ x;
        first = false;
      });
      Bits* to = target(0);
      each([&](int lane) { to[lane] = cut(Bits(sum), b32_); });
      return true;
    }
    default:
      return false;
  }
}

std::string Machine::where() const {
  if (!now) return "before the first instruction";
  std::string text = "program " + std::to_string(program_) + ", warp " + std::to_string(current_->index);
  return lane_ < 0 ? text : text + ", lane " + std::to_string(lane_);
}

}  // namespace ptx

#define PTX_NAME(name) #name ","
extern "C" const char* ptx_names(int which) {
  const char* names[] = {PTX_OPS(PTX_NAME),   PTX_TYPES(PTX_NAME),  PTX_MODES(PTX_NAME),
                         PTX_FLAGS(PTX_NAME), PTX_SPACES(PTX_NAME), ptx::kSpecials};
  return names[which];
}

// The line of the fault, 0 without one; its text goes into `message`.
extern "C" int ptx_run(const ptx::Instruction* code, const int32_t* operands, const uint64_t* constants,
                       const uint8_t* params, const uint64_t* storages, const ptx::Options* options, char* message,
                       int room, uint64_t* executed) {
  try {
    ptx::Machine machine(code, operands, constants, params, storages, *options);
    int line = 0;
    try {
      machine.run();
    } catch (const ptx::Fault& fault) {
      snprintf(message, size_t(room), "%s (%s)", fault.what(), machine.where().c_str());
      line = machine.now ? machine.now->line : -1;
    }
    *executed = machine.executed;
    return line;
  } catch (const std::exception& error) {  // no memory for what the kernel asks for
    snprintf(message, size_t(room), "%s", error.what());
    return -1;
  }
}
