// What the lanes of a warp do together: branches, barriers, exchanges.
#include <algorithm>
#include <bit>

#include "warp.h"

namespace ptx {

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
      if (source(0)[0] > 15 || source(1)[0] % kLanes) throw Fault("no such barrier");
      warp.barrier = int(source(0)[0]);
      warp.expected = int(source(1)[0]) / kLanes;
      return true;
    case bar_arrive_: {  // [number, threads]
      together("a barrier");
      int expected = int(source(1)[0]) / kLanes;
      if (source(0)[0] > 15 || source(1)[0] % kLanes || !expected) throw Fault("no such barrier");
      auto& arrivals = machine.arrivals_[source(0)[0]];
      if (arrivals.warps && arrivals.expected != expected)
        throw Fault("warps at a barrier do not agree how many threads meet there");
      arrivals.expected = expected;
      if (++arrivals.warps >= expected) throw Fault("more warps arrive at a barrier than it expects");
      order().tell(warp.index, alive(), alive(), tick(), arrivals.told);
      return true;
    }
    case elect_: {  // [lane or -1, whether it is that one, members]
      all_named_here(2);
      int leader = options().order == 1 ? 31 - std::countl_zero(lanes) : std::countr_zero(lanes);
      if (number(0) >= 0) {
        Bits* to = target(0);
        each([&](int lane) { to[lane] = Bits(leader); });
      }
      Bits* p = target(1);
      each([&](int lane) { p[lane] = lane == leader; });
      return true;
    }
    case pause_:
      warp.paused = true;
      return true;
    case setmaxnreg_: {  // [registers of a thread, whether more]
      together("setmaxnreg");
      int wanted = number(0);
      if (!warp.quota) throw Fault("setmaxnreg needs a kernel with .maxnreg");
      if (number(1) ? wanted < warp.quota : wanted > warp.quota)
        throw Fault("setmaxnreg goes the wrong way from " + std::to_string(warp.quota) + " registers");
      (number(1) ? warp.asked : warp.quota) = wanted;
      return true;
    }
    case bar_warp_:
      order().own[size_t(warp.index)] = tick();
      return true;
    case fence_:
      return true;
    case fence_proxy_:
      order().proxy_fence[size_t(warp.index)] = tick();
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

}  // namespace ptx
