// Order statistics of magnitudes, without a sort: floats that are not negative order like their bit patterns, so digits
// of the patterns are counted until few candidates are left.
#pragma once

#include "common/dtypes.h"
#include "sega.h"

namespace DENSE_ATTN_ISA {

constexpr int kDigitBits = 10;
constexpr int64_t kBuckets = 1 << kDigitBits;
constexpr int64_t kFew = 32;            // candidates that are compared with each other outright
constexpr int64_t kGathered = 1 << 16;  // candidates kept in a buffer; more of them are read again where they lie
constexpr int64_t kKeyBlock = 512;

template <class X>
inline X smaller(X a, X b) {
  return b < a ? b : a;
}
template <class X>
inline X larger(X a, X b) {
  return b > a ? b : a;
}
#if defined(__AVX512F__)  // one instruction, where the compiler takes two
using Int32s = Simd<float>::Int;
using Int64s = Simd<double>::Int;
inline Int32s smaller(Int32s a, Int32s b) { return (Int32s)_mm512_min_epi32((__m512i)a, (__m512i)b); }
inline Int32s larger(Int32s a, Int32s b) { return (Int32s)_mm512_max_epi32((__m512i)a, (__m512i)b); }
inline Int64s smaller(Int64s a, Int64s b) { return (Int64s)_mm512_min_epi64((__m512i)a, (__m512i)b); }
inline Int64s larger(Int64s a, Int64s b) { return (Int64s)_mm512_max_epi64((__m512i)a, (__m512i)b); }
inline int32_t least(Int32s x) { return _mm512_reduce_min_epi32((__m512i)x); }
inline int64_t least(Int64s x) { return _mm512_reduce_min_epi64((__m512i)x); }
inline int32_t most(Int32s x) { return _mm512_reduce_max_epi32((__m512i)x); }
inline int64_t most(Int64s x) { return _mm512_reduce_max_epi64((__m512i)x); }
#else
template <class Int>
inline auto least(Int x) {
  auto bound = x[0];
  for (int lane = 1; lane < kVecBytes / static_cast<int>(sizeof(bound)); ++lane) bound = smaller(bound, x[lane]);
  return bound;
}
template <class Int>
inline auto most(Int x) {
  auto bound = x[0];
  for (int lane = 1; lane < kVecBytes / static_cast<int>(sizeof(bound)); ++lane) bound = larger(bound, x[lane]);
  return bound;
}
#endif

inline float magnitude(float x) { return __builtin_fabsf(x); }
inline double magnitude(double x) { return __builtin_fabs(x); }

// f(begin, lanes) on a row's values, register by register, zeros beyond the last.
template <class T, class F>
inline void for_lanes(const T* row, int64_t stride, int64_t count, const F& f) {
  constexpr int64_t kStep = kLanes<typename Dtype<T>::Acc>;
  int64_t begin = 0;
  if (stride == 1) {
    for (; begin < count / kStep * kStep; begin += kStep) f(begin, load_lanes<T>(row + begin));
    if (begin < count) f(begin, load_lanes<T>(row + begin, count - begin));
    return;
  }
  for (; begin < count; begin += kStep) {
    T lanes[kStep] = {};
    const int64_t now = count - begin < kStep ? count - begin : kStep;
    for (int64_t i = 0; i < now; ++i) lanes[i] = row[(begin + i) * stride];
    f(begin, load_lanes<T>(lanes));
  }
}

// A row's values, converted; writes whole registers.
template <class T>
inline void load_row(const T* row, int64_t stride, int64_t count, typename Dtype<T>::Acc* to) {
  for_lanes(row, stride, count, [&](int64_t i, VecOf<typename Dtype<T>::Acc> lanes) { store(to + i, lanes); });
}

// The keys of a row's values; writes whole registers.
template <class T, class Acc = typename Dtype<T>::Acc>
inline void load_keys(const T* row, int64_t stride, int64_t count, KeyOf<Acc>* to) {
  for_lanes(row, stride, count, [&](int64_t i, VecOf<Acc> lanes) { store(to + i, (IntOf<Acc>)lanes & kNoKey<Acc>); });
}

// Counts of a digit's values, twice: equal neighbours would wait for each other's sum.
struct Digits {
  int64_t counts[2][kBuckets + 8];  // apart by no multiple of a page, for which neighbours would wait too

  void clear() { std::memset(counts, 0, sizeof(counts)); }
  int64_t of(int64_t bucket) const { return counts[0][bucket] + counts[1][bucket]; }

  template <class Key>
  void add(const Key* keys, int64_t count, Key lowest, int shift) {
    const auto bucket = [&](int64_t i) { return static_cast<std::make_unsigned_t<Key>>(keys[i] - lowest) >> shift; };
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half; ++i) ++counts[0][bucket(i)], ++counts[1][bucket(half + i)];
    if (count % 2) ++counts[0][bucket(count - 1)];
  }

  void add(const Digits& other) {
    for (int64_t i = 0; i < kBuckets; ++i) counts[0][i] += other.of(i);
  }

  // The bucket that holds a rank, which becomes the rank within the bucket.
  int64_t find(int64_t& rank) const {
    constexpr int64_t kStep = 64;
    int64_t bucket = 0;
    for (;; bucket += kStep) {
      int64_t sum = 0;
      for (int64_t i = bucket; i < bucket + kStep; ++i) sum += of(i);
      if (rank < sum) break;
      rank -= sum;
    }
    for (; rank >= of(bucket); ++bucket) rank -= of(bucket);
    return bucket;
  }
};

// Keys from lowest to highest, and the digit that tells them apart.
template <class Acc>
struct KeyRange {
  using Key = KeyOf<Acc>;

  Key lowest, highest;

  bool single() const { return lowest == highest; }
  int shift(int digit = kDigitBits) const {
    const Key width = highest - lowest;
    const int bits = width == 0 ? 0 : 64 - __builtin_clzll(width);
    return bits > digit ? bits - digit : 0;
  }
  KeyRange bucket(int64_t index, int digit = kDigitBits) const {
    const Key first = lowest + (static_cast<Key>(index) << shift(digit)), rest = (Key{1} << shift(digit)) - 1;
    return {first, highest - first < rest ? highest : first + rest};
  }
  static KeyRange of(const Key* keys, int64_t count) {
    using Int = IntOf<Acc>;
    Int low = set1_int<Acc>(keys[0]), high = low;
    const int64_t whole = count / kLanes<Acc> * kLanes<Acc>;
    for (int64_t i = 0; i < whole; i += kLanes<Acc>) {
      const Int key = load<Int>(keys + i);
      low = smaller(low, key), high = larger(high, key);
    }
    KeyRange range{least(low), most(high)};
    for (int64_t i = whole; i < count; ++i) {
      range = {smaller(range.lowest, keys[i]), larger(range.highest, keys[i])};
    }
    return range;
  }
};

#if defined(__AVX512F__)
// Stores the lanes from lowest to highest side by side (and a whole register), returns their number.
inline int keep_lanes(int32_t* to, Simd<float>::Int key, int32_t lowest, int32_t highest) {
  const __mmask16 kept = _mm512_cmpge_epi32_mask((__m512i)key, _mm512_set1_epi32(lowest)) &
                         _mm512_cmple_epi32_mask((__m512i)key, _mm512_set1_epi32(highest));
  store(to, _mm512_maskz_compress_epi32(kept, (__m512i)key));
  return __builtin_popcount(kept);
}
inline int keep_lanes(int64_t* to, Simd<double>::Int key, int64_t lowest, int64_t highest) {
  const __mmask8 kept = _mm512_cmpge_epi64_mask((__m512i)key, _mm512_set1_epi64(lowest)) &
                        _mm512_cmple_epi64_mask((__m512i)key, _mm512_set1_epi64(highest));
  store(to, _mm512_maskz_compress_epi64(kept, (__m512i)key));
  return __builtin_popcount(kept);
}
#else
// The same, for a processor that finds most registers empty faster than it moves lanes.
template <class Key, class Int>
inline int keep_lanes(Key* to, Int key, Key lowest, Key highest) {
  const Int within = (Int)((key >= lowest) & (key <= highest));
  uint64_t words[kVecBytes / 8], any = 0;
  store(words, within);
  for (const uint64_t word : words) any |= word;
  int kept = 0;
  for (int i = 0; any && i < kVecBytes / static_cast<int>(sizeof(Key)); ++i) {
    to[kept] = key[i];
    kept -= static_cast<int>(within[i]);
  }
  return kept;
}
#endif

// Moves the keys within a range to the front, returns their number and lowers next to the smallest key beyond it.
template <class Acc>
inline int64_t gather(KeyOf<Acc>* keys, int64_t count, KeyRange<Acc> range, KeyOf<Acc>& next) {
  using Int = IntOf<Acc>;
  const KeyOf<Acc> lowest = range.lowest, highest = range.highest;
  const Int none = set1_int<Acc>(kNoKey<Acc>);
  Int beyond = none;
  const int64_t whole = count / kLanes<Acc> * kLanes<Acc>;
  int64_t kept = 0;
  for (int64_t i = 0; i < whole; i += kLanes<Acc>) {
    const Int key = load<Int>(keys + i);
    beyond = smaller(beyond, key > highest ? key : none);
    kept += keep_lanes(keys + kept, key, lowest, highest);
  }
  for (int64_t i = whole; i < count; ++i) {
    const KeyOf<Acc> key = keys[i];
    keys[kept] = key;
    kept += (key >= lowest) & (key <= highest);
    next = key > highest ? smaller(next, key) : next;
  }
  next = smaller<KeyOf<Acc>>(next, least(beyond));
  return kept;
}

// Two neighbouring order statistics; the second is the largest key where there is none.
template <class Acc>
struct Neighbours {
  KeyOf<Acc> at_rank, after;
};

// Those of a few keys, with room for a register behind them: what stands at a rank is the largest key that has no more
// than so many below it. No branch depends on a key.
template <class Acc>
Neighbours<Acc> select_few(KeyOf<Acc>* keys, int64_t count, int64_t rank, KeyOf<Acc> next) {
  using Int = IntOf<Acc>;
  const Int at_most = set1_int<Acc>(rank);
  Int at_rank{}, after{};
  store(keys + count, set1_int<Acc>(kNoKey<Acc>));
  for (int64_t i = 0; i < count; i += kLanes<Acc>) {
    const Int key = load<Int>(keys + i);
    Int below{};
    for (int64_t j = 0; j < count; ++j) below -= (Int)(set1_int<Acc>(keys[j]) < key);
    at_rank = larger(at_rank, below <= at_most ? key : Int{});
    after = larger(after, below <= at_most + 1 ? key : Int{});
  }
  return {most(at_rank), rank + 1 < count ? most(after) : next};
}

template <class Acc>
constexpr int64_t kShort = 16 * kLanes<Acc>;  // most keys of a row that meets every lane's bucket

// Of as many buckets as there are lanes, the one that holds a rank, which becomes the rank within it. A lane counts the
// keys below its bucket: to increment a count in memory takes longer, where neighbours have the same.
template <class Acc>
KeyRange<Acc> bucket_of_short(const KeyOf<Acc>* keys, int64_t count, KeyRange<Acc> range, int64_t& rank) {
  using Int = IntOf<Acc>;
  constexpr int kBits = __builtin_ctz(kLanes<Acc>);
  Int lane, below{};
  for (int i = 0; i < kLanes<Acc>; ++i) lane[i] = i;
  const Int offset = lane << range.shift(kBits), none = set1_int<Acc>(kNoKey<Acc>);
  const Int width = set1_int<Acc>(range.highest - range.lowest);
  const Int first = offset > width ? none : smaller(offset, width) + set1_int<Acc>(range.lowest);  // no lane overflows
  for (int64_t j = 0; j < count; ++j) below -= (Int)(set1_int<Acc>(keys[j]) < first);
  const Int at_most = set1_int<Acc>(rank);
  rank -= most(below <= at_most ? below : Int{});
  return range.bucket(most(below <= at_most ? lane : Int{}), kBits);
}

// Those of keys that are rearranged on the way; next is the smallest key beyond them.
template <class Acc>
Neighbours<Acc> select(KeyOf<Acc>* keys, int64_t count, int64_t rank, KeyRange<Acc> range, KeyOf<Acc> next,
                       Digits& digits) {
  while (count > kFew) {
    if (range.single()) return {range.lowest, rank + 1 < count ? range.lowest : next};
    if (count > kShort<Acc>) {
      digits.clear();
      digits.add(keys, count, range.lowest, range.shift());
      range = range.bucket(digits.find(rank));
    } else {
      range = bucket_of_short(keys, count, range, rank);
    }
    count = gather<Acc>(keys, count, range, next);
    if (count > kFew) range = KeyRange<Acc>::of(keys, count);
  }
  return select_few<Acc>(keys, count, rank, next);
}

// The search for one row's quantile: passes over its parts, each followed by one narrowing, until that finds it. A row
// with few candidates is gathered in one pass; of a longer one, digits are counted first. Lives in scratch memory.
template <class Acc>
class Search {
 public:
  using Key = KeyOf<Acc>;

  static size_t bytes(int64_t count, int64_t parts) {
    return kHeader + parts * sizeof(Part) + ((count < kGathered ? count : kGathered) + kKeyBlock) * sizeof(Key);
  }

  static Search& at(void* memory) {
    static_assert(sizeof(Search) <= kHeader);
    return *static_cast<Search*>(memory);
  }

  void start(double level, int64_t count, int64_t parts) {
    rank_ = quantile_rank(level, count);
    rank_within_ = rank_.below, count_ = population_ = count, parts_ = parts;
    range_ = {0, kNoKey<Acc>}, next_ = kNoKey<Acc>, first_ = true;
    part(0).offset = 0;
  }

  template <class T>
  void pass(const T* row, int64_t stride, int64_t index) {
    Part& mine = part(index);
    mine.next = next_, mine.highest = 0;
    if (!gathers()) mine.digits.clear();
    Key* gathered = keys() + mine.offset;
    const int64_t begin = count_ * index / parts_, end = count_ * (index + 1) / parts_;
    if (first_ && gathers()) return load_keys(row + begin * stride, stride, end - begin, gathered);
    alignas(kVecBytes) Key block[kKeyBlock];
    for (int64_t at = begin; at < end; at += kKeyBlock) {
      int64_t count = end - at < kKeyBlock ? end - at : kKeyBlock;
      load_keys(row + at * stride, stride, count, block);
      if (first_) {
        mine.highest = larger(mine.highest, KeyRange<Acc>::of(block, count).highest);
      } else {
        count = gather<Acc>(block, count, range_, mine.next);
      }
      if (gathers()) {
        std::memcpy(gathered, block, count * sizeof(Key));
        gathered += count;
      } else {
        mine.digits.add(block, count, range_.lowest, range_.shift());
      }
    }
  }

  // After a pass over every part: whether another one is needed.
  bool narrow() {
    Key highest = 0;
    for (int64_t i = 0; i < parts_; ++i) {
      highest = larger(highest, part(i).highest);
      next_ = smaller(next_, part(i).next);
    }
    const auto range = gathers() ? KeyRange<Acc>::of(keys(), population_) : KeyRange<Acc>{0, highest};
    if (range.highest > kInfinity<Acc>) return found({range.highest, range.highest});  // a NaN makes all of it NaN
    if (gathers()) return found(select<Acc>(keys(), population_, rank_within_, range, next_, part(0).digits));
    const bool next_is_known = !first_ && range_.single();
    narrow_to_bucket();
    const bool repeated = rank_within_ + 1 < population_;
    if (range_.single() && (repeated || next_is_known)) {
      return found({range_.lowest, repeated ? range_.lowest : next_});
    }
    return true;
  }

  Acc quantile() const { return quantile_; }

 private:
  struct alignas(64) Part {
    Key next, highest;
    int64_t offset;  // of what the part gathers
    Digits digits;
  };
  static constexpr size_t kHeader = 128;

  Part& part(int64_t index) { return reinterpret_cast<Part*>(reinterpret_cast<char*>(this) + kHeader)[index]; }
  Key* keys() { return reinterpret_cast<Key*>(&part(parts_)); }
  bool gathers() const { return population_ <= kGathered; }

  bool found(Neighbours<Acc> neighbours) {
    const Acc lower = __builtin_bit_cast(Acc, neighbours.at_rank), upper = __builtin_bit_cast(Acc, neighbours.after);
    quantile_ = interpolate(lower, upper, rank_.fraction);
    return false;
  }

  void narrow_to_bucket() {
    Digits total;
    total.clear();
    for (int64_t i = 0; i < parts_; ++i) total.add(part(i).digits);
    const int64_t bucket = total.find(rank_within_);
    int64_t offset = 0;
    for (int64_t i = 0; i < parts_; ++i) {
      part(i).offset = offset;
      offset += part(i).digits.of(bucket);
    }
    range_ = range_.bucket(bucket), population_ = offset, first_ = false;
  }

  QuantileRank rank_;
  int64_t rank_within_, count_, population_, parts_;  // population_: how many keys lie within range_
  KeyRange<Acc> range_;
  Key next_;
  Acc quantile_;
  bool first_;
};

}  // namespace DENSE_ATTN_ISA
