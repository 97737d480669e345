// Order statistics of keys without a sort: digits are counted, from the highest, among the keys that share those found.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/primitives.cuh"
#include "sega.h"

constexpr int kDigitBits = 11;
constexpr int kBuckets = 1 << kDigitBits;
constexpr int kCounts = kBuckets + 4;  // and one of what lies outside, which takes less than a branch around it

// The rounds in which all bits of a key are found, but for the low ones that are 0 in every key.
template <class Acc, int kLowBit>
struct Digits {
  using Key = KeyOf<Acc>;
  static constexpr int kBits = 8 * sizeof(Acc) - 1 - kLowBit, kRounds = (kBits + kDigitBits - 1) / kDigitBits;

  static constexpr HOST_DEVICE int shift(int round) {
    const int rest = kBits - kDigitBits * (round + 1);
    return kLowBit + (rest > 0 ? rest : 0);
  }
  static constexpr HOST_DEVICE int width(int round) { return kLowBit + kBits - kDigitBits * round - shift(round); }
  static constexpr HOST_DEVICE bool is_last(int round) { return round + 1 == kRounds; }
};

// What is known of a quantile's key before a round.
template <class Acc>
struct Found {
  KeyOf<Acc> digits;
  uint64_t rank;  // among the keys that begin with them
};

// Keys that no count tells of, each 0 until there is one.
template <class Acc>
struct Extremes {
  KeyOf<Acc> nan;     // the largest of all, if it is beyond infinity
  KeyOf<Acc> beyond;  // kNoKey minus the smallest one whose digits before the last are larger than those found
};

__device__ __forceinline__ void atomic_max(int32_t* at, int32_t value) { atomicMax(at, value); }
__device__ __forceinline__ void atomic_max(int64_t* at, int64_t value) {
  atomicMax(reinterpret_cast<long long*>(at), static_cast<long long>(value));
}

__device__ __forceinline__ int32_t warp_max(int32_t x) { return __reduce_max_sync(~0u, x); }
__device__ __forceinline__ int64_t warp_max(int64_t x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const int64_t other = __shfl_xor_sync(~0u, x, mask);
    x = other > x ? other : x;
  }
  return x;
}

// One thread's part in a round.
template <class Acc, int kLowBit>
struct Counter {
  using D = Digits<Acc, kLowBit>;
  using Key = KeyOf<Acc>;

  int round;
  Key first;         // that has the digits found, without its low bits
  uint32_t* counts;  // [kCounts], shared
  Key nan = 0, beyond = 0;

  __device__ __forceinline__ Counter(int round_, Key digits, uint32_t* counts_)
      : round(round_), first(digits << D::width(round_)), counts(counts_) {}

  // A negative key is none.
  __device__ __forceinline__ void add(Key key) {
    const Key bucket = (key >> D::shift(round)) - first, end = Key{1} << D::width(round);
    atomicAdd(counts + (bucket >= 0 && bucket < end ? static_cast<int>(bucket) : kBuckets), 1u);
    if (round == 0) nan = key > nan ? key : nan;
    if (D::is_last(round) && bucket >= end) beyond = kNoKey<Acc> - key > beyond ? kNoKey<Acc> - key : beyond;
  }

  // By all threads of the warp.
  __device__ __forceinline__ void note(Extremes<Acc>& extremes) {
    const bool leads = threadIdx.x % kWarp == 0;
    if (round == 0) {
      nan = warp_max(nan);
      if (leads && nan > kInfinity<Acc>) atomic_max(&extremes.nan, nan);
    }
    if (D::is_last(round)) {
      beyond = warp_max(beyond);
      if (leads && beyond > 0) atomic_max(&extremes.beyond, beyond);
    }
  }
};

// The lane among whose values a rank lies; it becomes the rank among them.
template <class Count>
__device__ __forceinline__ int find_lane(Count own, Count& rank) {
  const int lane = threadIdx.x % kWarp;
  Count up_to = own;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const Count before = __shfl_up_sync(~0u, up_to, offset);
    if (lane >= offset) up_to += before;
  }
  const int found = __popc(__ballot_sync(~0u, up_to <= rank));
  rank -= __shfl_sync(~0u, up_to - own, found);
  return found;
}

constexpr int kOwn = kBuckets / kWarp;  // buckets of a lane, side by side

// The sum of a lane's own buckets, each lane's four at other banks.
__device__ __forceinline__ uint32_t own_sum(const uint32_t* counts) {
  constexpr int kVecs = kOwn / 4;
  const int lane = threadIdx.x % kWarp;
  const uint4* own = reinterpret_cast<const uint4*>(counts) + lane * kVecs;
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const uint4 four = own[(i + lane) % kVecs];
    sum += four.x + four.y + four.z + four.w;
  }
  return sum;
}
__device__ __forceinline__ unsigned long long own_sum(const unsigned long long* counts) {
  unsigned long long sum = 0;
#pragma unroll 16
  for (int i = 0; i < kOwn; ++i) sum += counts[threadIdx.x % kWarp * kOwn + i];
  return sum;
}

// By one warp.
__device__ __forceinline__ void clear_counts(uint32_t* counts) {
#pragma unroll
  for (int i = 0; i < kOwn / 4; ++i) reinterpret_cast<uint4*>(counts)[i * kWarp + threadIdx.x % kWarp] = uint4{};
}

struct Bucket {
  int index;
  bool alone;  // nothing of the bucket comes after the rank
};

// The bucket that holds a rank, which becomes the rank within it; by one warp.
template <class Count>
__device__ __forceinline__ Bucket find_bucket(const Count* counts, Count& rank) {
  static_assert(kOwn == 2 * kWarp);
  const int pairs = find_lane(own_sum(counts), rank) * kOwn;
  const int lane = threadIdx.x % kWarp;
  const Count even = counts[pairs + 2 * lane], odd = counts[pairs + 2 * lane + 1];
  const int pair = find_lane(even + odd, rank);
  const Count number = __shfl_sync(~0u, even, pair), other = __shfl_sync(~0u, odd, pair);
  if (rank < number) return {pairs + 2 * pair, rank + 1 == number};
  rank -= number;
  return {pairs + 2 * pair + 1, rank + 1 == other};
}

// The next of `end` buckets that holds anything, or kBuckets; by one warp.
template <class Count>
__device__ __forceinline__ int next_bucket(const Count* counts, int bucket, int end) {
  int next = kBuckets;
  for (int other = threadIdx.x % kWarp; other < end; other += kWarp) {
    const bool filled = counts[other] != 0;
    next = filled && other > bucket && other < next ? other : next;
  }
  return __reduce_min_sync(~0u, next);
}

// What is known after a round; by one warp.
template <class D, class Acc, class Count>
__device__ __forceinline__ Found<Acc> narrow(const Count* counts, int round, Found<Acc> found) {
  Count rank = static_cast<Count>(found.rank);
  const Bucket bucket = find_bucket(counts, rank);
  return {(found.digits << D::width(round)) + bucket.index, rank};
}

// The quantile after the last round; by one warp.
template <class D, class Acc, class Count>
__device__ __forceinline__ Acc quantile(const Count* counts, Found<Acc> found, Extremes<Acc> extremes,
                                        double fraction) {
  using Key = KeyOf<Acc>;
  constexpr int kLast = D::kRounds - 1;
  Count rank = static_cast<Count>(found.rank);
  const Bucket bucket = find_bucket(counts, rank);
  const Key first = found.digits << D::width(kLast), lower = (first + bucket.index) << D::shift(kLast);
  Key upper = lower;
  if (fraction != 0 && bucket.alone) {
    const int next = next_bucket(counts, bucket.index, 1 << D::width(kLast));
    upper = next < kBuckets ? (first + next) << D::shift(kLast) : kNoKey<Acc> - extremes.beyond;
  }
  if (extremes.nan > 0) return __builtin_bit_cast(Acc, extremes.nan);
  return interpolate(__builtin_bit_cast(Acc, lower), __builtin_bit_cast(Acc, upper), fraction);
}
