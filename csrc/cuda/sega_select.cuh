// Order statistics of keys without a sort: digits are counted, from the highest, among the keys that share those found.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/primitives.cuh"
#include "sega.h"

constexpr int kDigitBits = 11;
constexpr int kBuckets = 1 << kDigitBits;

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
  Key first;  // that has the digits found, without its low bits
  uint32_t* counts;
  Key nan = 0, beyond = 0;

  __device__ __forceinline__ Counter(int round_, Key digits, uint32_t* counts_)
      : round(round_), first(digits << D::width(round_)), counts(counts_) {}

  __device__ __forceinline__ void add(Key key) {
    const Key bucket = (key >> D::shift(round)) - first, end = Key{1} << D::width(round);
    if (bucket >= 0 && bucket < end) atomicAdd(counts + bucket, 1u);
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

// f(bucket) on a lane's own 64 neighbours, each lane at another bank.
template <class F>
__device__ __forceinline__ void for_own_buckets(const F& f) {
  constexpr int kOwn = kBuckets / kWarp;
  const int lane = threadIdx.x % kWarp;
#pragma unroll 16
  for (int i = 0; i < kOwn; ++i) f(lane * kOwn + (i + lane) % kOwn);
}

struct Bucket {
  int index;
  bool alone;  // nothing of the bucket comes after the rank
};

// The bucket that holds a rank, which becomes the rank within it; by one warp.
template <class Count>
__device__ __forceinline__ Bucket find_bucket(const Count* counts, Count& rank) {
  constexpr int kOwn = kBuckets / kWarp;
  static_assert(kOwn == 2 * kWarp);
  Count sum = 0;
  for_own_buckets([&](int bucket) { sum += counts[bucket]; });
  const int pairs = find_lane(sum, rank) * kOwn;
  const int lane = threadIdx.x % kWarp;
  const Count even = counts[pairs + 2 * lane], odd = counts[pairs + 2 * lane + 1];
  const int pair = find_lane(even + odd, rank);
  const Count number = __shfl_sync(~0u, even, pair), other = __shfl_sync(~0u, odd, pair);
  if (rank < number) return {pairs + 2 * pair, rank + 1 == number};
  rank -= number;
  return {pairs + 2 * pair + 1, rank + 1 == other};
}

// The next bucket that holds anything, or kBuckets; by one warp.
template <class Count>
__device__ __forceinline__ int next_bucket(const Count* counts, int bucket) {
  int next = kBuckets;
  for_own_buckets([&](int other) { next = other > bucket && counts[other] != 0 && other < next ? other : next; });
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
    const int next = next_bucket(counts, bucket.index);
    upper = next < kBuckets ? (first + next) << D::shift(kLast) : kNoKey<Acc> - extremes.beyond;
  }
  if (extremes.nan > 0) return __builtin_bit_cast(Acc, extremes.nan);
  return interpolate(__builtin_bit_cast(Acc, lower), __builtin_bit_cast(Acc, upper), fraction);
}
