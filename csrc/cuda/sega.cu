// Exact percentiles and the step of semantic guidance: one launch where shared memory holds a row's keys, several where
// it does not. Compiled without contraction: differences round as in the reference, so thresholds are equal to the bit.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/sega/rows.cuh"
#include "cuda/sega/select.cuh"
#include "sega.h"

namespace {

constexpr int kFewThreads = 256, kMostThreads = 512;  // of one program: more of them would spill
constexpr int kShared = 96 << 10;                     // bytes that every GPU since sm_80 gives a program
constexpr int kLongestRow = 64 << 10;                 // bytes of keys
constexpr int64_t kSpan = 8192;                       // values of a longer row that one program counts at least
constexpr int64_t kMostParts = 1024;                  // of one row

template <class Rows>
using DigitsOf = Digits<typename Rows::Acc, Rows::kLowBit>;

// f(at) for the packs of this thread, of those from begin to end.
template <class Index, class F>
__device__ __forceinline__ void for_packs(Index begin, Index end, const F& f) {
  for (Index at = begin + threadIdx.x * kPack; at < end; at += blockDim.x * kPack) f(at);
}

// The keys of a pack, negative beyond the row's end.
template <class Rows, class Key = KeyOf<typename Rows::Acc>>
__device__ __forceinline__ Pack<Key> load_keys(const Rows& rows, int e, int64_t b, int64_t c, int64_t at) {
  typename Rows::Acc values[kPack];
  rows.magnitudes(e, b, c, at, values);
  const int left = values_left(at, rows.count());
  Pack<Key> keys;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const Key key = __builtin_bit_cast(Key, values[i]) & kNoKey<typename Rows::Acc>;
    keys.values[i] = i < left ? key : -1;
  }
  return keys;
}

template <class Counter, class Key>
__device__ __forceinline__ void add_keys(Counter& counter, const Pack<Key>& keys) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) counter.add(keys.values[i]);
}

// A whole channel: its thresholds, so many concepts at a time, then what they are for.
template <class Rows>
__global__ void __launch_bounds__(kMostThreads, 1)
    whole_rows_kernel(const __grid_constant__ Rows rows, int together, int width) {
  using Acc = typename Rows::Acc;
  using Key = KeyOf<Acc>;
  using D = DigitsOf<Rows>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Found<Acc> found[kConcepts];
  __shared__ Extremes<Acc> extremes[kConcepts];
  __shared__ Acc thresholds[kConcepts];
  Key* const keys = reinterpret_cast<Key*>(memory);                               // [together, width]
  uint32_t* const counts = reinterpret_cast<uint32_t*>(keys + together * width);  // [together, kCounts]
  const int thread = threadIdx.x, lane = thread % kWarp, concepts = rows.concepts();
  const int count = static_cast<int>(rows.count());
  const int64_t b = blockIdx.x / rows.channels(), c = blockIdx.x % rows.channels();

  for (int i = thread; i < together * kCounts; i += blockDim.x) counts[i] = 0;
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
        Counter<Acc, Rows::kLowBit> counter(round, found[e].digits, counts + i * kCounts);
        for_packs(0, count, [&](int at) {
          Pack<Key>& held = *reinterpret_cast<Pack<Key>*>(keys + i * width + at);
          const Pack<Key> pack = round == 0 ? load_keys(rows, e, b, c, at) : held;
          if (round == 0) held = pack;
          add_keys(counter, pack);
        });
        counter.note(extremes[e]);
      }
      __syncthreads();
      for (int i = thread / kWarp; i < num; i += blockDim.x / kWarp) {
        const int e = first + i;
        uint32_t* const own = counts + i * kCounts;
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
        clear_counts(own);
      }
      __syncthreads();
    }
  }
  for_packs(0, count, [&](int at) { rows.finish(b, c, at, thresholds); });
}

// A longer row's counts, and what was known before each round.
template <class Rows>
struct Notes {
  unsigned long long counts[DigitsOf<Rows>::kRounds][kBuckets];
  Found<typename Rows::Acc> found[DigitsOf<Rows>::kRounds];
  Extremes<typename Rows::Acc> extremes;
};

__global__ void clear_kernel(uint64_t* words, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) words[i] = 0;
}

// One round of one part of a row; the first part notes what the round before has found.
template <class Rows>
__global__ void __launch_bounds__(kFewThreads)
    digits_kernel(const __grid_constant__ Rows rows, Notes<Rows>* notes, int round, int parts, int64_t span) {
  using Acc = typename Rows::Acc;
  using D = DigitsOf<Rows>;
  __shared__ uint32_t counts[kCounts];
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
  for_packs(begin, end, [&](int64_t at) { add_keys(counter, load_keys(rows, e, b, c, at)); });
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
template <class Acc>
bool takes_several(int64_t channels, int64_t count) {
  return channels == 0 || count * sizeof(Acc) > kLongestRow;
}

template <class Rows>
constexpr int64_t kWords = sizeof(Notes<Rows>) / sizeof(uint64_t);

// Values of a longer row that one program counts.
int64_t span_of(int64_t count) { return divide_up(std::max(kSpan, divide_up(count, kMostParts)), kPack) * kPack; }

// Programs that finish a longer row.
int64_t tiles_of(int64_t count) { return divide_up(count, kFewThreads * kPack); }

// How many rows, each so often, the blocks of every launch reach.
template <class Rows>
int64_t most_rows(int64_t concepts, int64_t channels, int64_t count) {
  if (!takes_several<typename Rows::Acc>(channels, count)) return kMaxBlocks;
  const int64_t parts = divide_up(count, span_of(count)), words = divide_up(kWords<Rows>, kFewThreads);
  return kMaxBlocks / std::max(concepts * std::max(parts, words), tiles_of(count));
}

template <class Rows>
cudaError_t launch_whole(const Rows& rows, cudaStream_t stream) {
  using Acc = typename Rows::Acc;
  const int width = static_cast<int>(divide_up(rows.count(), kPack)) * kPack;
  const int each = width * sizeof(Acc) + kCounts * sizeof(uint32_t);
  const int together = std::max(1, std::min(rows.concepts(), kShared / each));
  const int64_t packs = width / kPack, turns = divide_up(packs, kMostThreads);  // of equal length
  const int threads = std::max(static_cast<int>(divide_up(divide_up(packs, turns), kWarp)) * kWarp, kFewThreads);
  return launch(whole_rows_kernel<Rows>, programs(rows.batch() * rows.channels()), dim3(threads), together * each,
                stream, rows, together, width);
}

template <class Rows>
cudaError_t launch_several(const Rows& rows, void* scratch, cudaStream_t stream) {
  const int64_t num_rows = rows.concepts() * rows.batch() * rows.columns();
  const int64_t tiles = tiles_of(rows.count()), channels = rows.batch() * rows.channels();
  cudaError_t error = cudaSuccess;
  if (num_rows > 0) {
    auto* const notes = static_cast<Notes<Rows>*>(scratch);
    const int64_t words = num_rows * kWords<Rows>;
    error = launch(clear_kernel, programs(divide_up(words, kFewThreads)), dim3(kFewThreads), 0, stream,
                   static_cast<uint64_t*>(scratch), words);
    const int64_t span = span_of(rows.count());
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

// The concepts of one launch.
template <class T, bool kSums>
SegaRows<T, kSums> rows_of(const SegaParams& p, int64_t first, void* guided) {
  using Acc = AccOf<T>;
  SegaRows<T, kSums> rows{};
  rows.p = p, rows.first = static_cast<int>(first);
  rows.p.scales = rows.p.levels = rows.p.weights = rows.p.partials = nullptr;  // the host's
  rows.num = static_cast<int>(std::min<int64_t>(p.concepts - first, kConcepts));
  rows.guided = p.momentum_out, rows.guided.data = guided;
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

template <class T, bool kSums>
cudaError_t guidance(const SegaParams& p, void* scratch, cudaStream_t stream) {
  const bool several = takes_several<AccOf<T>>(p.channels, p.count);
  void* const notes = static_cast<char*>(scratch) + guided_bytes<T>(p);
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; error == cudaSuccess && (first == 0 || first < p.concepts); first += kConcepts) {
    const SegaRows<T, kSums> rows = rows_of<T, kSums>(p, first, scratch);
    error = several ? launch_several(rows, notes, stream) : launch_whole(rows, stream);
  }
  return error;
}

}  // namespace

int64_t percentile_mask_most_rows(const PercentileParams& p) {
  return with_dtype(p.dtype, [&](auto x) { return most_rows<PercentileRows<decltype(x)>>(1, 1, p.count); });
}

size_t percentile_mask_scratch_bytes(const PercentileParams& p) {
  return with_dtype(p.dtype, [&](auto x) -> size_t {
    using Rows = PercentileRows<decltype(x)>;
    return takes_several<typename Rows::Acc>(1, p.count) ? p.rows * sizeof(Notes<Rows>) : 0;
  });
}

cudaError_t percentile_mask_cuda(const PercentileParams& p, void* scratch, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto x) {
    using Rows = PercentileRows<decltype(x)>;
    const Rows rows{p, quantile_rank(p.level, p.count)};
    const bool several = takes_several<typename Rows::Acc>(1, p.count);
    return several ? launch_several(rows, scratch, stream) : launch_whole(rows, stream);
  });
}

int64_t sega_guidance_most_channels(const SegaParams& p) {
  const int64_t concepts = std::clamp<int64_t>(p.concepts, 1, kConcepts);
  return with_dtype(p.dtype,
                    [&](auto x) { return most_rows<SegaRows<decltype(x), false>>(concepts, p.channels, p.count); });
}

size_t sega_guidance_scratch_bytes(const SegaParams& p) {
  return with_dtype(p.dtype, [&](auto x) -> size_t {
    using T = decltype(x);
    if (!takes_several<AccOf<T>>(p.channels, p.count)) return guided_bytes<T>(p);
    const int64_t num_rows = std::min<int64_t>(p.concepts, kConcepts) * p.batch * (p.sum_channels ? 1 : p.channels);
    return guided_bytes<T>(p) + num_rows * sizeof(Notes<SegaRows<T, false>>);
  });
}

cudaError_t sega_guidance_cuda(const SegaParams& p, void* scratch, cudaStream_t stream) {
  if (p.batch * p.count == 0) return cudaSuccess;
  return with_dtype(p.dtype, [&](auto x) {
    using T = decltype(x);
    return p.sum_channels ? guidance<T, true>(p, scratch, stream) : guidance<T, false>(p, scratch, stream);
  });
}
