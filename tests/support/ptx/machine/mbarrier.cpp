// Barriers in memory, and waiting for the ends of their phases.
#include <algorithm>
#include <bit>

#include "warp.h"

namespace ptx {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // that an mbarrier counts

void expect(Mbarrier& barrier, int64_t bytes) {
  barrier.bytes += bytes;
  if (bytes < 0 || bytes > kMostBytes || std::abs(barrier.bytes) > kMostBytes)
    throw Fault("an mbarrier counts at most " + std::to_string(kMostBytes) + " bytes");
}

}  // namespace

void Mbarrier::end_phase() {
  if (pending) return;
  if (bytes < 0)
    throw Fault("copies have brought " + std::to_string(-bytes) + " bytes more than their mbarrier expects");
  if (bytes) return;
  ++phase;
  pending = expected;
  complete = told;
}

Mbarrier& Step::mbarrier(uint64_t address, int lane) {
  Region* region;
  uint8_t* at = memory().find(shared_, address, 8, region);
  auto found = machine.mbarriers_.find(uint32_t(address));
  Cell* cell = memory().cells(*region, at);
  if (found == machine.mbarriers_.end() || !std::all_of(cell, cell + 8, [](const Cell& x) { return x.barrier; }))
    throw Fault("no mbarrier has been made here");
  Who user = who(lane);
  user.atomic = true;
  memory().read(*region, at, 8, user);
  return found->second;
}

void Step::make_mbarrier() {  // [address, offset, how many arrive]
  each_in_turn([&](int lane) {
    uint64_t place = uint32_t(address(0, lane));
    Bits expected = in.op == mbarrier_init_ ? uint32_t(source(2)[lane]) : 1;
    if (expected < 1 || expected > Bits(kMostBytes)) throw Fault("an mbarrier expects 1 to 2^20 - 1 arrivals");
    Region* region;
    uint8_t* at = memory().find(shared_, place, 8, region);
    auto before = machine.mbarriers_.find(place);
    if (before != machine.mbarriers_.end() && before->second.copies)
      throw Fault("an mbarrier ends before the copies that it counts");
    uint8_t garbage[8];
    for (int i = 0; i < 8; ++i) garbage[i] = ~at[i];
    memory().write(*region, at, garbage, 8, who(lane));
    machine.mbarriers_.erase(place);
    if (in.op == mbarrier_inval_) return;
    if (!machine.agents_.contains(place)) machine.agents_[place] = order().add_agent();
    machine.mbarriers_[place] = {machine.agents_[place], uint32_t(expected), uint32_t(expected)};
    Cell* cell = memory().cells(*region, at);
    for (int i = 0; i < 8; ++i) cell[i].barrier = true;
  });
}

void Step::arrive() {  // [state or -1, address, offset, how many times, bytes or -1]
  Bits states[kLanes];
  each_in_turn([&](int lane) {
    Mbarrier& barrier = mbarrier(address(1, lane), lane);
    states[lane] = barrier.phase & 1;
    if (number(4) >= 0) expect(barrier, uint32_t(source(4)[lane]));
    if (in.op == mbarrier_expect_) return;
    auto times = uint32_t(source(3)[lane]);
    if (times < 1 || times > barrier.pending) throw Fault("more arrivals at an mbarrier than it expects");
    order().tell(warp.index, lanes, alive(), tick(), barrier.told);
    barrier.pending -= times;
    barrier.end_phase();
  });
  if (number(0) < 0) return;
  Bits* to = target(0);
  each([&](int lane) { to[lane] = states[lane]; });
}

void Step::wait_phase() {  // [whether it has ended, address, offset, parity or state]
  Bits ended[kLanes];
  uint64_t place = 0;
  each_in_turn([&](int lane) {
    place = uint32_t(address(1, lane));
    Mbarrier& barrier = mbarrier(place, lane);
    uint32_t parity = source(3)[lane] & 1;
    // The first look is before the end of a phase, but for one that the warp knows of: nothing says when others arrive.
    bool again = warp.tried == std::pair(place, parity);
    ended[lane] = (barrier.phase & 1) != parity && (again || order().knows(warp.index, barrier.complete));
    if (ended[lane]) return order().meet(warp.index, barrier.complete, tick());
    if (in.op == mbarrier_test_ || !again) return;
    if (warp.mbarrier && (warp.mbarrier != place || warp.parity != parity))
      throw Fault("lanes of a warp wait for different phases, which the emulator does not know");
    warp.mbarrier = place;
    warp.parity = parity;
  });
  if (warp.mbarrier) {  // it looks again when the phase has ended
    --warp.paths.back().next;
    return;
  }
  Bits* to = target(0);
  each([&](int lane) { to[lane] = ended[lane]; });
  int first = std::countr_zero(lanes);
  warp.paused |= in.op == mbarrier_test_ && !ended[first];
  warp.tried = ended[first] ? std::pair(uint64_t(0), 0u) : std::pair(place, uint32_t(source(3)[first] & 1));
}

bool Step::phases() {
  switch (in.op) {
    case mbarrier_init_:
    case mbarrier_inval_:
      make_mbarrier();
      return true;
    case mbarrier_arrive_:
    case mbarrier_expect_:
      arrive();
      return true;
    case mbarrier_try_:
    case mbarrier_test_:
      wait_phase();
      return true;
    default:
      return false;
  }
}

}  // namespace ptx
