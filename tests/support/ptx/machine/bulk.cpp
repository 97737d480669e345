// Barriers in memory, tensor maps, and the boxes of tensors that are copied in bulk.
#include <algorithm>
#include <bit>
#include <cstring>

#include "warp.h"

namespace ptx {
namespace {

constexpr int kSizes[] = {1, 2, 4, 4, 8, 8, 2, 4};  // of a map's types: u8 u16 u32 s32 u64 s64 f16 f32
constexpr int kBf16 = 10;

enum Field { kAddress, kRank, kBox, kSize, kStride, kStep, kType, kInterleave, kSwizzle, kFill };
constexpr int kFirstBit[] = {0, 1, 2, 7, 12, 16, 21, 22, 23, 24};  // in a map's `set`

int bytes_of_type(const TensorMap& map) { return map.type == kBf16 ? 2 : kSizes[map.type]; }

// Of a map: whether its fields are there and keep the rules of the hardware.
void check(const TensorMap& map, int dimensions) {
  auto need = [](bool holds, const char* what) {
    if (!holds) throw Fault(std::string("tensor map: ") + what);
  };
  for (uint8_t byte : map.unused) need(byte == 0, "its memory was not cleared first");
  uint32_t needed = 1 << kFirstBit[kAddress] | 1 << kFirstBit[kRank] | 1 << kFirstBit[kType];
  for (int i = 0; i < dimensions; ++i) {
    for (Field field : {kBox, kSize, kStep}) needed |= 1 << (kFirstBit[field] + i);
    if (i) needed |= 1 << (kFirstBit[kStride] + i - 1);
  }
  need((map.set & needed) == needed, "a field has not been set");
  need(map.last + 1 == dimensions, "it has another number of dimensions than the copy");
  need(map.type < std::size(kSizes) || map.type == kBf16, "a type that the emulator does not know");
  need(map.interleave == 0, "an interleaved layout, which the emulator does not know");
  need(map.address % 16 == 0, "its address must be a multiple of 16");
  need(map.swizzle <= 3 && map.fill <= 1, "no such swizzle or fill");
  for (int i = 0; i < dimensions; ++i) {
    need(map.box[i] >= 1 && map.box[i] <= 256, "a box must have 1 to 256 elements a dimension");
    need(map.steps[i] == 1, "an element stride, which the emulator does not know");
    need(map.sizes[i] >= 1, "a dimension must have an element");
    if (i) need(map.strides[i - 1] % 16 == 0, "a stride must be a multiple of 16 bytes");
  }
  int row = int(map.box[0]) * bytes_of_type(map);
  need(row % 16 == 0, "a row of a box must be a multiple of 16 bytes");
  need(!map.swizzle || row <= 16 << map.swizzle, "a row of a box is longer than its swizzle");
}

int64_t box_bytes(const Box& box) {
  int64_t bytes = bytes_of_type(box.map);
  for (int i = 0; i <= box.map.last; ++i) bytes *= box.map.box[i];
  return bytes;
}

// Each 16 bytes of a box in turn: where they lie in shared memory, and which of them, from `first` to `end`, lie at
// `global` and behind it; none outside of the tensor.
template <class F>
void each_piece(const Box& box, F&& act) {
  const TensorMap& map = box.map;
  int size = bytes_of_type(map), row = int(map.box[0]) * size;
  int64_t rows = box_bytes(box) / row, from = int64_t(box.at[0]) * size, length = int64_t(map.sizes[0]) * size;
  for (int64_t i = 0; i < rows; ++i) {
    bool inside = true;
    uint64_t global = map.address;
    int64_t left = i;
    for (int dimension = 1; dimension <= map.last; ++dimension) {
      int64_t at = box.at[dimension] + left % map.box[dimension];
      left /= map.box[dimension];
      inside &= at >= 0 && at < int64_t(map.sizes[dimension]);
      global += uint64_t(at) * map.strides[dimension - 1];
    }
    for (int piece = 0; piece < row; piece += 16) {
      uint64_t place = box.shared + uint64_t(i * row + piece);
      place ^= (place >> 7 & ((1u << map.swizzle) - 1)) << 4;
      int64_t begin = from + piece;
      int first = int(std::clamp<int64_t>(-begin, 0, 16)), end = int(std::clamp<int64_t>(length - begin, first, 16));
      if (!inside) end = first;
      act(place, global + uint64_t(begin + first), first, end);
    }
  }
}

void fill_outside(const TensorMap& map, uint8_t* value) {
  static constexpr uint32_t nans[] = {0x7fff7fff, 0x7fffffff};  // of all narrow types, and of float32
  bool numbers = map.fill && map.type >= 6;
  uint32_t word = numbers ? nans[map.type == 7] : 0;
  for (int i = 0; i < 16; i += 4) std::memcpy(value + i, &word, 4);
}

TensorMap map_at(Step& step, uint64_t address, const Who& who) {
  TensorMap map;
  if (address & kParamWindow) {
    address &= ~kParamWindow;
    if (address + sizeof map > uint64_t(step.options().num_params)) throw Fault("parameter out of range");
    std::memcpy(&map, step.params() + address, sizeof map);
    return map;
  }
  Region* region;
  uint8_t* at = step.memory().find(generic_, address, sizeof map, region);
  step.memory().read(*region, at, sizeof map, who);
  const Cell& cell = *step.memory().cells(*region, at);
  if (cell.written && cell.write_program == who.program) {
    auto fence = step.machine.map_fence(address);
    bool known = fence.second == who.warp || fence.first < step.order().seen[who.warp][fence.second];
    if (fence.first <= cell.write_tick || !known) throw Fault("a tensor map is used without fence.proxy.tensormap");
  }
  std::memcpy(&map, at, sizeof map);
  return map;
}

// Numbers of a copy: [shared, offset, map, offset, barrier or -1, offset, coordinates ...]
constexpr int kCoordinates = 6;

Box box_of(Step& step, int lane) {
  int dimensions = step.in.count - kCoordinates;
  Box box{map_at(step, step.address(2, lane), step.who(lane)), {}, 0, 0, step.warp.index, uint8_t(lane), &step.in};
  check(box.map, dimensions);
  for (int i = 0; i < dimensions; ++i) box.at[i] = int32_t(step.source(kCoordinates + i)[lane]);
  box.shared = uint32_t(step.address(0, lane));
  if (box.shared % 128) throw Fault("a bulk copy's shared memory must be aligned to 128 bytes");
  return box;
}

}  // namespace

void refuse_unread(int lane, const Stores& stores) {
  bool unread = !stores.open.empty();
  for (const auto& group : stores.groups)
    for (const Box& box : group) unread |= box.bytes.empty();
  if (unread)
    throw Fault("a warp ends before bulk copies of its lane " + std::to_string(lane) + " have read shared memory");
}

std::pair<uint32_t, int> Machine::map_fence(uint64_t address) const {
  auto found = map_fences_.find(address);
  return found == map_fences_.end() ? std::pair{0u, 0} : found->second;
}

void Step::load_box() {
  each_in_turn([&](int lane) {
    Box box = box_of(*this, lane);
    box.barrier = uint32_t(address(4, lane));
    Mbarrier& barrier = mbarrier(box.barrier, lane);
    Region* region;
    each_piece(box, [&](uint64_t place, uint64_t, int, int) {
      uint8_t* to = memory().find(shared_, place, 16, region);
      memory().announce(*region, to, 16, who(lane));
      std::memset(to, 0xa5, 16);
    });
    ++barrier.copies;
    machine.coming_.push_back(std::move(box));
  });
}

void Step::store_box() {
  each_in_turn([&](int lane) {
    Box box = box_of(*this, lane);
    Region* region;
    each_piece(box, [&](uint64_t place, uint64_t global, int first, int end) {
      memory().find(shared_, place, 16, region);
      memory().lend(*region, place, 16, who(lane));
      if (first == end) return;
      uint8_t* to = memory().find(global_, global, end - first, region, 1);
      Cell* cell = memory().cells(*region, to);  // others may bring the same values
      for (int i = first; i < end; ++i) cell++->coming = true;
    });
    warp.stores[lane].open.push_back(std::move(box));
  });
}

// What a store brings, read when it is waited for.
void Step::read_box(Box& box) {
  each_piece(box, [&](uint64_t place, uint64_t, int, int) {
    Region* region;
    const uint8_t* from = memory().find(shared_, place, 16, region);
    memory().leave(*region, place, 16, who(box.lane));
    box.bytes.insert(box.bytes.end(), from, from + 16);
  });
}

void Machine::write_box(const Box& box) {
  const uint8_t* from = box.bytes.data();
  each_piece(box, [&](uint64_t, uint64_t global, int first, int end) {
    if (first < end) {
      Region* region;
      uint8_t* to = memory_.find(global_, global, end - first, region, 1);
      Cell* cell = memory_.cells(*region, to);
      for (int i = first; i < end; ++i) cell++->coming = false;
      memory_.write(*region, to, from + first, end - first, {program_, tick_, uint16_t(box.warp), box.lane});
    }
    from += 16;
  });
}

void Step::wait_stores() {  // [how many groups may be left]
  each_in_turn([&](int lane) {
    auto& groups = warp.stores[lane].groups;
    auto ended = std::max<int>(0, int(groups.size()) - number(0));
    for (int i = 0; i < ended; ++i)
      for (Box& box : groups[size_t(i)])
        if (box.bytes.empty()) read_box(box);
    if (in.mode == reads_) return;
    for (; ended; --ended, groups.pop_front())
      for (const Box& box : groups.front()) machine.write_box(box);
  });
}

void Machine::land_box() {
  auto one = coming_.begin();  // mostly the first one that was asked for, but nothing says so
  if (options_.order == 1) one = coming_.end() - 1;
  if (options_.order == 2) one += next_random() % uint32_t(coming_.size());
  Box box = std::move(*one);
  coming_.erase(one);
  ++tick_;
  current_ = &warps_[size_t(box.warp)];
  now = box.by;
  Mbarrier& barrier = mbarriers_.at(box.barrier);
  each_piece(box, [&](uint64_t place, uint64_t global, int first, int end) {
    uint8_t value[16];
    fill_outside(box.map, value);
    Region* region;
    if (first < end) {
      const uint8_t* from = memory_.find(global_, global, end - first, region, 1);
      memory_.read(*region, from, end - first, {program_, tick_, uint16_t(box.warp), box.lane});
      std::memcpy(value + first, from, size_t(end - first));
    }
    uint8_t* to = memory_.find(shared_, place, 16, region);
    memory_.land(*region, to, value, 16, {program_, tick_, uint16_t(barrier.agent), kManyLanes});
  });
  barrier.told.resize(memory_.order.seen[0].size());
  barrier.told[size_t(barrier.agent)] = tick_ + 1;
  --barrier.copies;
  barrier.bytes -= box_bytes(box);
  barrier.end_phase();
}

void Machine::end_program() {
  if (!coming_.empty()) {
    current_ = &warps_[size_t(coming_[0].warp)];
    now = coming_[0].by;
    throw Fault("a program ends before a bulk copy into its memory has been waited for");
  }
  for (const Warp& warp : warps_)
    for (const auto& [lane, stores] : warp.stores)
      for (const auto& group : stores.groups)
        for (const Box& box : group) write_box(box);
}

void Step::replace() {  // [map, offset, field, dimension, value]
  each_in_turn([&](int lane) {
    Region* region;
    uint8_t* at = memory().find(in.space, address(0, lane), sizeof(TensorMap), region);
    TensorMap map;
    memory().read(*region, at, sizeof map, who(lane));
    std::memcpy(&map, at, sizeof map);
    int field = number(2), dimension = number(3);
    Bits value = source(4)[lane];
    if (dimension < 0 || dimension > (field == kStride ? 3 : 4)) throw Fault("tensor map: no such dimension");
    uint32_t* vectors[] = {map.box, map.sizes, nullptr, map.steps};
    uint8_t* bytes[] = {&map.type, &map.interleave, &map.swizzle, &map.fill};
    if (field == kAddress)
      map.address = value;
    else if (field == kRank)
      map.last = uint8_t(value);
    else if (field == kStride)
      map.strides[dimension] = value;
    else if (field <= kStep)
      vectors[field - kBox][dimension] = uint32_t(value);
    else
      *bytes[field - kType] = uint8_t(value);
    map.set |= 1u << (kFirstBit[field] + dimension);
    memory().write(*region, at, reinterpret_cast<uint8_t*>(&map), sizeof map, who(lane));
  });
}

void Step::copy_map() {  // [to, offset, from, offset]
  need_all("a copy of a tensor map");
  order().own[size_t(warp.index)] = tick();  // as .sync says, it waits for what the lanes of its warp have set
  Who all = who(0);
  all.lane = kManyLanes;
  Region* region;
  const uint8_t* from = memory().find(shared_, address(2, 0), sizeof(TensorMap), region);
  memory().read(*region, from, sizeof(TensorMap), all);
  uint8_t* to = memory().find(global_, address(0, 0), sizeof(TensorMap), region);
  memory().write(*region, to, from, sizeof(TensorMap), all);
}

bool Step::bulk() {
  switch (in.op) {
    case bulk_load_:
      load_box();
      return true;
    case bulk_store_:
      store_box();
      return true;
    case bulk_commit_:
      each([&](int lane) {
        Stores& stores = warp.stores[lane];
        stores.groups.push_back(std::move(stores.open));
        stores.open.clear();
      });
      return true;
    case bulk_wait_:
      wait_stores();
      return true;
    case map_replace_:
      replace();
      return true;
    case map_copy_:
      copy_map();
      return true;
    case map_fence_:  // [map, offset]
      each([&](int lane) { machine.map_fences_[address(0, lane)] = {tick(), warp.index}; });
      return true;
    default:
      return false;
  }
}

}  // namespace ptx
