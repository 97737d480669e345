// Matrix products: mma at once, wgmma when it is waited for.
#include <algorithm>
#include <bit>
#include <cstring>

#include "warp.h"

namespace ptx {
namespace {

constexpr int kRows = 16;       // of a warp's part of a product
constexpr int kDepth = 16;      // the most columns of a that one instruction takes
constexpr int kGuardBits = 24;  // below the largest addend, where a tensor core cuts

// c + a . b, rounded once; harsh: every addend cut below the largest, as tensor cores do.
float dot(const float* a, const float* b, int depth, float c, bool harsh) {
  double sum = c;
  int highest = c == 0 || !std::isfinite(c) ? -200 : std::ilogb(c);
  for (int k = 0; k < depth; ++k) {
    double product = double(a[k]) * b[k];
    sum += product;
    if (harsh && product != 0 && std::isfinite(product)) highest = std::max(highest, std::ilogb(product));
  }
  if (!harsh || !std::isfinite(sum)) return float(sum);
  double unit = std::ldexp(1.0, highest - kGuardBits), steps = std::trunc(c / unit);
  for (int k = 0; k < depth; ++k) steps += std::trunc(double(a[k]) * b[k] / unit);
  return to_f32(steps * unit, rz_);
}

float element(Bits word, int place, int type) {
  if (type == tf32_) return tf32(word);
  return float(narrow(word >> 16 * place, type));
}

// Where a lane's registers lie in a [16, depth] and b [depth, 8].
struct Fragment {
  int lane, type;
  int per_register() const { return type == tf32_ ? 1 : 2; }
  int column(int place, int group) const {
    return type == tf32_ ? lane % 4 + 4 * group : 2 * (lane % 4) + place + 8 * group;
  }
  int row(int reg) const { return lane / 4 + 8 * (reg & 1); }
};

using Rows = std::array<std::array<float, kDepth>, kRows>;

template <class Source>
Rows rows_of(Source&& source, int registers, int type) {
  Rows a{};
  for (int reg = 0; reg < registers; ++reg) {
    const Bits* words = source(reg);
    for (int lane = 0; lane < kLanes; ++lane) {
      Fragment at{lane, type};
      for (int place = 0; place < at.per_register(); ++place)
        a[at.row(reg)][at.column(place, reg >> 1)] = element(words[lane], place, type);
    }
  }
  return a;
}

void multiply(Step& step) {  // [depth, d 4, a ..., b ..., c 4]
  step.need_all("a matrix product");
  int depth = step.number(0), type = step.in.from;
  int in_b = depth / (type == tf32_ ? 4 : 8), in_a = 2 * in_b;
  Rows a = rows_of([&](int reg) { return step.source(5 + reg); }, in_a, type);
  float b[8][kDepth];
  for (int reg = 0; reg < in_b; ++reg) {
    const Bits* words = step.source(5 + in_a + reg);
    for (int lane = 0; lane < kLanes; ++lane) {
      Fragment at{lane, type};
      for (int place = 0; place < at.per_register(); ++place)
        b[lane / 4][at.column(place, reg)] = element(words[lane], place, type);
    }
  }
  std::array<std::array<Bits, kLanes>, 4> d;
  for (int reg = 0; reg < 4; ++reg) {
    const Bits* c = step.source(5 + in_a + in_b + reg);
    for (int lane = 0; lane < kLanes; ++lane) {
      const float *row = a[lane / 4 + 8 * (reg >> 1)].data(), *column = b[2 * (lane % 4) + (reg & 1)];
      d[reg][lane] = result(dot(row, column, depth, f32(c[lane]), step.options().harsh), false);
    }
  }
  for (int reg = 0; reg < 4; ++reg) std::copy(d[reg].begin(), d[reg].end(), step.target(1 + reg));
}

// A matrix in shared memory as a wgmma descriptor has it: `across` its rows or columns, `along` the
// depth.
class Tile {
 public:
  Tile(uint64_t descriptor, bool trans, int type)
      : start_((descriptor & 0x3fff) << 4),
        lead_((descriptor >> 16 & 0x3fff) << 4),
        stride_((descriptor >> 32 & 0x3fff) << 4),
        trans_(trans),
        type_(type) {
    int kind = descriptor >> 62;
    row_ = kind == 0 ? 16 : 256 >> kind;  // bytes: 128, 64, 32
    swizzle_ = kind == 0 ? 0 : 4 - kind;  // bits
    if (descriptor >> 49 & 7) throw Fault("descriptor must have no base offset");
  }

  // The elements [first, first + rows) x [0, depth) of an operand, each 16 bytes of them at once.
  template <class Row>
  void read(Step& step, int first, int rows, int depth, uint32_t issued, Row* to) const {
    int size = type_ == tf32_ ? 4 : 2, many = 16 / size;
    for (int across = 0; across < rows; across += trans_ ? many : 1)
      for (int along = 0; along < depth; along += trans_ ? 1 : many) {
        uint64_t place = address(first + across, along);
        Region* region;
        const uint8_t* at = step.memory().find(shared_, place, 16, region);
        step.memory().read_async(*region, place, 16, step.who(0), issued);
        for (int i = 0; i < many; ++i) {
          Bits word = 0;
          std::memcpy(&word, at + i * size, size_t(size));
          to[across + (trans_ ? i : 0)][along + (trans_ ? 0 : i)] = element(word, 0, type_);
        }
      }
  }

 private:
  uint64_t address(int across, int along) const {
    int size = type_ == tf32_ ? 4 : 2, bytes;
    if (!trans_) {
      bytes = across / 8 * stride_ + across % 8 * row_;
      bytes += swizzle_ ? along * size : along * size / 16 * lead_ + along * size % 16;
    } else {
      int group = across * size / row_ * (swizzle_ ? lead_ : stride_);
      bytes = group + across * size % row_ + along % 8 * row_ + along / 8 * (swizzle_ ? stride_ : lead_);
    }
    uint64_t place = start_ + bytes;
    return place ^ (place >> 7 & ((1 << swizzle_) - 1)) << 4;
  }

  uint64_t start_;
  int lead_, stride_;
  bool trans_;
  int type_, row_, swizzle_;
};

// The numbers of a wgmma: [columns, depth, a in registers, keep d, -a, -b, a trans, b trans,
// a or 4 registers, b, d ...]
constexpr int kA = 8;
int first_d(const Step& step) { return kA + (step.number(2) ? 4 : 1) + 1; }

void issue(Step& step) {
  step.need_all("a matrix product");
  Warp& warp = step.warp;
  Product product{&step.in, {}, step.source(3)[0] != 0, step.tick()};
  bool registers = step.number(2);
  auto fenced = [&](int index) {
    if (std::max(warp.written[index], warp.read[index]) >= warp.register_fence)
      throw Fault("a product uses a register that others used since the last wgmma.fence");
  };
  if (warp.register_fence == 0) throw Fault("a product must have a wgmma.fence before the first one");
  for (int i = 0; registers && i < 4; ++i) fenced(step.number(kA + i));
  if (!registers) product.descriptors[0] = step.source(kA)[0];
  product.descriptors[1] = step.source(first_d(step) - 1)[0];
  for (int i = first_d(step); i < step.in.count; ++i) {
    int index = step.number(i);
    fenced(index);
    Bits* at = &warp.registers[size_t(index) * kLanes];
    if (!warp.accumulators.contains(index)) {
      auto& kept = warp.accumulators[index];
      for (int lane = 0; lane < kLanes; ++lane) kept[lane] = f32(at[lane]);
    }
    std::fill(at, at + kLanes, Bits(0x7fc0dead));  // until it is waited for
  }
  warp.open_products.push_back(product);
}

void finish(Step& step, const Product& product) {
  Warp& warp = step.warp;
  int columns = step.number(0), depth = step.number(1), type = step.in.from;
  int first_row = kRows * (warp.index % 4);
  Rows a;
  auto unchanged = [&](int index) {
    if (warp.written[index] > product.issued) throw Fault("a register of a product changes before its wait");
  };
  for (int i = first_d(step); i < step.in.count; ++i) unchanged(step.number(i));
  if (step.number(2)) {
    for (int i = 0; i < 4; ++i) unchanged(step.number(kA + i));
    a = rows_of([&](int reg) { return step.value(step.number(kA + reg)); }, 4, type);
  } else {
    Tile tile(product.descriptors[0], step.number(6), type);
    tile.read(step, first_row, kRows, depth, product.issued, a.data());
  }
  static float b[256][kDepth];
  Tile tile(product.descriptors[1], step.number(7), type);
  tile.read(step, 0, columns, depth, product.issued, b);
  if (step.number(4) != 1)
    for (auto& row : a)
      for (float& x : row) x = -x;
  if (step.number(5) != 1) throw Fault("no such product: b negated");
  for (int i = 0; i < columns / 2; ++i) {
    auto& d = warp.accumulators[step.number(first_d(step) + i)];
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* row = a[lane / 4 + 8 * (i >> 1 & 1)].data();
      const float* column = b[8 * (i >> 2) + 2 * (lane % 4) + (i & 1)];
      float c = product.accumulate ? d[lane] : 0;
      d[lane] = f32(result(dot(row, column, depth, c, step.options().harsh), false));
    }
  }
}

}  // namespace

void Step::wait_products(size_t pending) {
  for (; warp.products.size() > pending; warp.products.pop_front())
    for (const Product& product : warp.products.front()) {
      Step then{machine, warp, *product.at, kAll};
      finish(then, product);
    }
  std::map<int, bool> still;  // registers of products that are on their way
  auto keep = [&](const Product& product) {
    Step other{machine, warp, *product.at, kAll};
    for (int i = first_d(other); i < product.at->count; ++i) still[other.number(i)] = true;
  };
  for (const auto& group : warp.products) std::for_each(group.begin(), group.end(), keep);
  std::for_each(warp.open_products.begin(), warp.open_products.end(), keep);
  for (auto one = warp.accumulators.begin(); one != warp.accumulators.end();) {
    if (still.contains(one->first)) {
      ++one;
      continue;
    }
    Bits* to = &warp.registers[size_t(one->first) * kLanes];
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = bits(one->second[lane]);
    one = warp.accumulators.erase(one);
  }
}

bool Step::tensor() {
  switch (in.op) {
    case mma_:
      multiply(*this);
      return true;
    case wgmma_:
      issue(*this);
      return true;
    case wgmma_fence_:
      warp.register_fence = tick();
      return true;
    case wgmma_commit_group_:
      warp.products.push_back(std::move(warp.open_products));
      warp.open_products.clear();
      return true;
    case wgmma_wait_group_:
      wait_products(size_t(number(0)));
      return true;
    default:
      return false;
  }
}

}  // namespace ptx
