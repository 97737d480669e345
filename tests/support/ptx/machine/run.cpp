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

constexpr int kMostIdle = 1000;  // rounds in which warps but look whether a phase has ended

int warps_of(const Options& options) {
  return (options.block[0] * options.block[1] * options.block[2] + kLanes - 1) / kLanes;
}

}  // namespace

Machine::Machine(const Instruction* code, const int32_t* operands, const Bits* constants, const uint8_t* params,
                 const uint64_t* storages, const Options& options)
    : code_(code),
      operands_(operands),
      constants_(constants),
      params_(params),
      options_(options),
      memory_(storages, options.num_storages, size_t(options.shared_bytes), warps_of(options)),
      warps_(size_t(warps_of(options))),
      random_(options.seed) {}

void Machine::run() {
  const int32_t* grid = options_.grid;
  uint32_t count = uint32_t(grid[0]) * grid[1] * grid[2];
  std::vector<uint32_t> programs(count);
  for (uint32_t i = 0; i < count; ++i) programs[i] = i;
  if (options_.order == 1) std::reverse(programs.begin(), programs.end());
  if (options_.order == 2)
    for (uint32_t i = count; i > 1; --i) std::swap(programs[i - 1], programs[next_random() % i]);
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
  for (Bits& bits : warp.registers) bits = 0xffc00000u | ptx::next_random(garbage);  // NaN, a far address
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
  warp.quota = options_.max_registers;
  warp.paths = {{0, -1, kAll & ~warp.exited}};
}

std::vector<Warp*> Machine::in_order() {
  std::vector<Warp*> found;
  for (Warp& warp : warps_) found.push_back(&warp);
  if (options_.order == 1) std::reverse(found.begin(), found.end());
  if (options_.order == 2)
    for (size_t i = found.size(); i > 1; --i) std::swap(found[i - 1], found[next_random() % i]);
  return found;
}

void Machine::run_program(uint32_t program) {
  program_ = program;
  memory_.start_program(0xffc00000u | (options_.seed & 0xffff));
  arrivals_.fill({});
  mbarriers_.clear();
  agents_.clear();
  map_fences_.clear();
  for (Warp& warp : warps_) start(warp, program);
  for (int idle = 0;;) {
    bool all_done = true, ran = false, looks = false;
    for (Warp* warp : in_order()) {
      if (!warp->done && !waits(*warp)) {
        run_warp(*warp);
        (warp->paused ? looks : ran) = true;
      }
      all_done &= warp->done;
    }
    if (all_done) return end_program();
    ran |= release();
    // Copies come as late as they may, but for random order.
    bool early = options_.order == 2 && !coming_.empty() && next_random() % 4 == 0;
    if (early || (!ran && !coming_.empty())) {
      land_box();
      ran = true;
    }
    idle = ran ? 0 : idle + 1;
    if (idle > (looks ? kMostIdle : 0)) report_deadlock();
  }
}

bool Machine::waits(Warp& warp) {
  if (warp.barrier >= 0) return true;
  if (warp.asked) {
    int free = options_.max_registers * int(warps_.size());
    for (const Warp& other : warps_) free -= other.quota;
    if (warp.asked - warp.quota > free) return true;
    warp.quota = warp.asked;
  }
  auto found = mbarriers_.find(warp.mbarrier);
  return found != mbarriers_.end() && (found->second.phase & 1) == warp.parity;
}

void Machine::report_deadlock() {
  std::string text = "deadlock: warps wait at barriers that others never reach";
  const Warp* before = nullptr;
  for (Warp& warp : warps_) {
    if (warp.done) continue;
    if (!before) current_ = &warp, now = warp.at;
    bool again = before && before->at == warp.at && before->mbarrier == warp.mbarrier;
    before = &warp;
    if (again) continue;
    text += ", warp " + std::to_string(warp.index) + " at line " + std::to_string(warp.at->line);
    if (auto found = mbarriers_.find(warp.mbarrier); found != mbarriers_.end())
      text += " (" + std::to_string(found->second.pending) + " arrivals and " + std::to_string(found->second.bytes) +
              " bytes missing)";
  }
  throw Fault(text);
}

bool Machine::release() {
  bool released = false;
  for (int barrier = 0; barrier < int(arrivals_.size()); ++barrier) released |= meet(barrier);
  return released;
}

bool Machine::meet(int barrier) {
  Arrivals& arrivals = arrivals_[size_t(barrier)];
  std::vector<Warp*> met;
  int left = 0;
  for (Warp& warp : warps_) {
    left += !warp.done;
    if (!warp.done && warp.barrier == barrier) met.push_back(&warp);
  }
  if (met.empty()) return false;
  int expected = met[0]->expected;
  for (Warp* warp : met)
    if (warp->expected != expected || (arrivals.warps && arrivals.expected != expected)) {
      current_ = warp, now = warp->at;
      throw Fault("warps at a barrier do not agree how many threads meet there");
    }
  if (int(met.size()) + arrivals.warps != (expected ? expected : left)) return false;
  ++tick_;
  Clock known = std::move(arrivals.told);
  arrivals = {};
  for (Warp* warp : met) join(known, memory_.order.seen[size_t(warp->index)]);
  for (Warp* warp : met) known[size_t(warp->index)] = tick_;
  for (Warp* warp : met) {
    memory_.order.meet(warp->index, known, tick_);
    warp->barrier = -1;
  }
  return true;
}

void Machine::run_warp(Warp& warp) {
  current_ = &warp;
  warp.mbarrier = 0;
  warp.asked = 0;
  warp.paused = false;
  while (warp.barrier < 0 && !warp.mbarrier && !warp.asked && !warp.paused) {
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
      for (const auto& [lane, stores] : warp.stores) refuse_unread(lane, stores);
      warp.done = true;
      return;
    }
    Path& path = warp.paths.back();
    now = warp.at = &code_[path.next++];
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
    if (!step.arithmetic() && !step.access() && !step.exchange() && !step.tensor() && !step.phases() && !step.bulk())
      throw Fault("no such instruction");
  }
}

std::string Machine::where() const {
  if (!now) return "before the first instruction";
  std::string text = "program " + std::to_string(program_) + ", warp " + std::to_string(current_->index);
  return lane_ < 0 ? text : text + ", lane " + std::to_string(lane_);
}

}  // namespace ptx

#define PTX_DOOR extern "C" __attribute__((visibility("default")))
#define PTX_NAME(name) #name ","
PTX_DOOR const char* ptx_names(int which) {
  const char* names[] = {PTX_OPS(PTX_NAME),   PTX_TYPES(PTX_NAME),  PTX_MODES(PTX_NAME),
                         PTX_FLAGS(PTX_NAME), PTX_SPACES(PTX_NAME), ptx::kSpecials};
  return names[which];
}

// The line of the fault, 0 without one; its text goes into `message`.
PTX_DOOR int ptx_run(const ptx::Instruction* code, const int32_t* operands, const uint64_t* constants,
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
