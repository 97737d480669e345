// Exact percentiles and the step of semantic guidance: one launch where shared memory holds a row's keys, several where
// it does not. Compiled without contraction: differences round as in the reference, so thresholds are equal to the bit.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/sega_rows.cuh"
#include "cuda/sega_select.cuh"
#include "sega.h"

namespace {

constexpr int kFewThreads = 256;
template <class Acc>
constexpr int kMostThreads = sizeof(Acc) == 4 ? 1024 : 512;  // of one program, for their registers
constexpr int kShared = 96 << 10;                            // bytes that every GPU since sm_80 gives a program
constexpr int kLongestRow = 64 << 10;                        // bytes of keys
constexpr int64_t kSpan = 8192;                              // values of a longer row that one program counts at least
constexpr int64_t kMostParts = 1024;                         // of one row

template <class Rows>
using DigitsOf = Digits<typename Rows::Acc, Rows::kLowBit>;

// f(at) for the packs of this thread, of those from begin to end.
template <class F>
__device__ __forceinline__ void for_packs(int64_t begin, int64_t end, const F& f) {
  for (int64_t at = begin + threadIdx.x * kPack; at < end; at += blockDim.x * kPack) f(at);
}

template <class Rows, class Key>
__device__ __forceinline__ void load_keys(const Rows& rows, int e, int64_t b, int64_t c, int64_t at, Pack<Key>& keys) {
  typename Rows::Acc values[kPack];
  rows.magnitudes(e, b, c, at, values);
#pragma unroll
  for (int i = 0; i < kPack; ++i) keys.values[i] = __builtin_bit_cast(Key, values[i]) & kNoKey<typename Rows::Acc>;
}

template <class Counter, class Key>
__device__ __forceinline__ void add_keys(Counter& counter, const Pack<Key>& keys, int64_t rest) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (i < rest) counter.add(keys.values[i]);
  }
}

// A whole channel: its thresholds, so many concepts at a time, then what they are for.
template <class Rows>
__global__ void __launch_bounds__(kMostThreads<typename Rows::Acc>)
    whole_rows_kernel(const __grid_constant__ Rows rows, int together, int width) {
  using Acc = typename Rows::Acc;
  using Key = KeyOf<Acc>;
  using D = DigitsOf<Rows>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Found<Acc> found[kConcepts];
  __shared__ Extremes<Acc> extremes[kConcepts];
  __shared__ Acc thresholds[kConcepts];
  Key* const keys = reinterpret_cast<Key*>(memory);                               // [together, width]
  uint32_t* const counts = reinterpret_cast<uint32_t*>(keys + together * width);  // [together, kBuckets]
  const int thread = threadIdx.x, lane = thread % kWarp, concepts = rows.concepts();
  const int64_t b = blockIdx.x / rows.channels(), c = blockIdx.x % rows.channels();

  for (int i = thread; i < together * kBuckets; i += blockDim.x) counts[i] = 0;
  if (thread < concepts) {
    found[thread] = {0, static_cast<uint64_t>(rows.rank(thread).below)};
    extremes[thread] = {0, 0};
  }
  __syncthreads();
  for (int first = 0; first < concepts; first += together) {
    const int num = min(together, concepts - first);
#pragma unroll
    for (int round = 0; round < D::kRounds; ++round) {
      for (int i = 0; i < num; ++i) {
        const int e = first + i;
        Counter<Acc, Rows::kLowBit> counter(round, found[e].digits, counts + i * kBuckets);
        for_packs(0, rows.count(), [&](int64_t at) {
          Pack<Key>& pack = *reinterpret_cast<Pack<Key>*>(keys + i * width + at);
          if (round == 0) load_keys(rows, e, b, c, at, pack);
          add_keys(counter, pack, rows.count() - at);
        });
        counter.note(extremes[e]);
      }
      __syncthreads();
      for (int i = thread / kWarp; i < num; i += blockDim.x / kWarp) {
        const int e = first + i;
        uint32_t* const own = counts + i * kBuckets;
        if (!D::is_last(round)) {
          const Found<Acc> now = narrow<D>(own, round, found[e]);
          __syncwarp();  // all lanes have read
          if (lane == 0) found[e] = now;
        } else {
          const Acc threshold = quantile<D>(own, found[e], extremes[e], rows.rank(e).fraction);
          __syncwarp();
          if (lane == 0) thresholds[e] = threshold;
          if (lane == 0 && c < rows.columns()) *rows.threshold(e, b, c) = threshold;
        }
        for_own_buckets([&](int bucket) { own[bucket] = 0; });
      }
      __syncthreads();
    }
  }
  for_packs(0, rows.count(), [&](int64_t at) { rows.finish(b, c, at, thresholds); });
}

// A longer row's counts, and what was known before each round.
template <class Rows>
struct Notes {
  unsigned long long counts[DigitsOf<Rows>::kRounds][kBuckets];
  Found<typename Rows::Acc> found[DigitsOf<Rows>::kRounds];
  Extremes<typename Rows::Acc> extremes;
};

__global__ void clear_kernel(uint64_t* words, int64_t begin, int64_t end) {
  const int64_t i = begin + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < end) words[i] = 0;
}

// One round of one part of a row; the first part notes what the round before has found.
template <class Rows>
__global__ void __launch_bounds__(kFewThreads)
    digits_kernel(const __grid_constant__ Rows rows, Notes<Rows>* notes, int round, int parts, int64_t span) {
  using Acc = typename Rows::Acc;
  using D = DigitsOf<Rows>;
  __shared__ uint32_t counts[kBuckets];
  __shared__ Found<Acc> found;
  const int64_t row = blockIdx.x / parts, c = row % rows.columns(), b = row / rows.columns() % rows.batch();
  const int e = static_cast<int>(row / rows.columns() / rows.batch());
  const int64_t begin = blockIdx.x % parts * span, end = min(begin + span, rows.count());
  Notes<Rows>& note = notes[row];
  for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) counts[i] = 0;
  if (threadIdx.x < kWarp) {
    Found<Acc> now = {0, static_cast<uint64_t>(rows.rank(e).below)};
    if (round > 0) now = narrow<D>(note.counts[round - 1], round - 1, note.found[round - 1]);
    if (threadIdx.x == 0) found = now;
    if (threadIdx.x == 0 && begin == 0) note.found[round] = now;
  }
  __syncthreads();
  Counter<Acc, Rows::kLowBit> counter(round, found.digits, counts);
  for_packs(begin, end, [&](int64_t at) {
    Pack<KeyOf<Acc>> pack;
    load_keys(rows, e, b, c, at, pack);
    add_keys(counter, pack, end - at);
  });
  counter.note(note.extremes);
  __syncthreads();
  for (int i = threadIdx.x; i < kBuckets; i += blockDim.x) {
    if (counts[i] > 0) atomicAdd(&note.counts[round][i], static_cast<unsigned long long>(counts[i]));
  }
}

template <class Rows>
__global__ void __launch_bounds__(kWarp)
    thresholds_kernel(const __grid_constant__ Rows rows, const Notes<Rows>* notes) {
  using D = DigitsOf<Rows>;
  const int64_t row = blockIdx.x, c = row % rows.columns(), b = row / rows.columns() % rows.batch();
  const int e = static_cast<int>(row / rows.columns() / rows.batch());
  const Notes<Rows>& note = notes[row];
  const int last = D::kRounds - 1;
  const auto threshold = quantile<D>(note.counts[last], note.found[last], note.extremes, rows.rank(e).fraction);
  if (threadIdx.x == 0) *rows.threshold(e, b, c) = threshold;
}

// One tile of a channel whose thresholds are known.
template <class Rows>
__global__ void __launch_bounds__(kFewThreads) finish_kernel(const __grid_constant__ Rows rows, int64_t tiles) {
  __shared__ typename Rows::Acc thresholds[kConcepts];
  const int64_t row = blockIdx.x / tiles, b = row / rows.channels(), c = row % rows.channels();
  if (threadIdx.x < rows.concepts()) {
    thresholds[threadIdx.x] = *rows.threshold(threadIdx.x, b, rows.columns() == 1 ? 0 : c);
  }
  __syncthreads();
  const int64_t at = blockIdx.x % tiles * kFewThreads * kPack + threadIdx.x * kPack;
  if (at < rows.count()) rows.finish(b, c, at, thresholds);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

dim3 programs(int64_t count) { return dim3(static_cast<unsigned>(count)); }

// Sums of no channels have thresholds all the same, and no channel that would find them.
template <class Rows>
bool takes_several(const Rows& rows) {
  return rows.channels() == 0 || rows.count() * sizeof(typename Rows::Acc) > kLongestRow;
}

template <class Rows>
cudaError_t launch_whole(const Rows& rows, cudaStream_t stream) {
  using Acc = typename Rows::Acc;
  const int width = static_cast<int>(divide_up(rows.count(), kPack)) * kPack;
  const int each = width * sizeof(Acc) + kBuckets * sizeof(uint32_t);
  const int together = std::max(1, std::min(rows.concepts(), kShared / each));
  const int threads = std::min(std::max(width / kPack, kFewThreads), kMostThreads<Acc>) / kWarp * kWarp;
  return launch(whole_rows_kernel<Rows>, programs(rows.batch() * rows.channels()), dim3(threads), together * each,
                stream, rows, together, width);
}

// Notes of this many rows, after `offset` bytes of scratch memory; then what the thresholds are for.
template <class Rows>
cudaError_t launch_several(const Rows& rows, void* scratch, size_t offset, cudaStream_t stream) {
  const int64_t num_rows = rows.concepts() * rows.batch() * rows.columns();
  const int64_t tiles = divide_up(rows.count(), kFewThreads * kPack), channels = rows.batch() * rows.channels();
  cudaError_t error = cudaSuccess;
  if (num_rows > 0) {
    auto* const notes = reinterpret_cast<Notes<Rows>*>(static_cast<char*>(scratch) + offset);
    const int64_t begin = offset / sizeof(uint64_t), words = num_rows * sizeof(Notes<Rows>) / sizeof(uint64_t);
    error = launch(clear_kernel, programs(divide_up(words, kFewThreads)), dim3(kFewThreads), 0, stream,
                   static_cast<uint64_t*>(scratch), begin, begin + words);
    const int64_t span = divide_up(std::max(kSpan, divide_up(rows.count(), kMostParts)), kPack) * kPack;
    const int parts = static_cast<int>(divide_up(rows.count(), span));
    for (int round = 0; error == cudaSuccess && round < DigitsOf<Rows>::kRounds; ++round) {
      error = launch(digits_kernel<Rows>, programs(num_rows * parts), dim3(kFewThreads), 0, stream, rows, notes, round,
                     parts, span);
    }
    if (error == cudaSuccess) {
      error = launch(thresholds_kernel<Rows>, programs(num_rows), dim3(kWarp), 0, stream, rows, notes);
    }
  }
  if (error != cudaSuccess || channels == 0) return error;
  return launch(finish_kernel<Rows>, programs(channels * tiles), dim3(kFewThreads), 0, stream, rows, tiles);
}

// Calls f with a value of the kernel's element type.
template <class F>
auto with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

// The concepts of one launch.
template <class T>
SegaRows<T> rows_of(const SegaParams& p, int64_t first, void* scratch) {
  using Acc = AccOf<T>;
  SegaRows<T> rows{};
  rows.p = p, rows.first = static_cast<int>(first);
  rows.num = static_cast<int>(std::min<int64_t>(p.concepts - first, kConcepts));
  rows.guided = p.momentum_out, rows.guided.data = scratch;
  rows.is_first = first == 0, rows.is_last = first + kConcepts >= p.concepts;
  rows.guidance_scale = p.guidance_scale, rows.momentum_scale = p.momentum_scale;
  rows.beta = p.momentum_beta, rows.rest = 1 - p.momentum_beta;
  for (int e = 0; e < rows.num; ++e) {
    rows.numbers[e] = {static_cast<Acc>(p.scales[first + e]), static_cast<Acc>(p.weights[first + e]),
                       static_cast<Acc>(p.partials[first + e]), quantile_rank(p.levels[first + e], p.count)};
  }
  return rows;
}

// Bytes of what launches hand on, which the scratch memory begins with.
template <class T>
size_t guided_bytes(const SegaParams& p) {
  const int64_t values = p.concepts > kConcepts ? p.batch * p.channels * p.count : 0;
  return divide_up(values * sizeof(AccOf<T>), 16) * 16;
}

}  // namespace

size_t percentile_mask_scratch_bytes(const PercentileParams& p) {
  return with_dtype(p.dtype, [&](auto x) -> size_t {
    using Rows = PercentileRows<decltype(x)>;
    return takes_several(Rows{p}) ? p.rows * sizeof(Notes<Rows>) : 0;
  });
}

cudaError_t percentile_mask_cuda(const PercentileParams& p, void* scratch, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto x) {
    const PercentileRows<decltype(x)> rows{p, quantile_rank(p.level, p.count)};
    return takes_several(rows) ? launch_several(rows, scratch, 0, stream) : launch_whole(rows, stream);
  });
}

size_t sega_guidance_scratch_bytes(const SegaParams& p) {
  return with_dtype(p.dtype, [&](auto x) -> size_t {
    using Rows = SegaRows<decltype(x)>;
    const Rows rows{p};
    const int64_t num_rows = std::min<int64_t>(p.concepts, kConcepts) * rows.batch() * rows.columns();
    return guided_bytes<decltype(x)>(p) + (takes_several(rows) ? num_rows * sizeof(Notes<Rows>) : 0);
  });
}

cudaError_t sega_guidance_cuda(const SegaParams& p, void* scratch, cudaStream_t stream) {
  if (p.batch * p.count == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto x) {
    using T = decltype(x);
    cudaError_t error = cudaSuccess;
    for (int64_t first = 0; error == cudaSuccess && (first == 0 || first < p.concepts); first += kConcepts) {
      const SegaRows<T> rows = rows_of<T>(p, first, scratch);
      error =
          takes_several(rows) ? launch_several(rows, scratch, guided_bytes<T>(p), stream) : launch_whole(rows, stream);
    }
    return error;
  });
}
