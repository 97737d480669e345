// Layout attention forward where a warp holds whole rows of scores: up to 128 keys. Compiled once a class of head dims.
#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout_attention_rows.cuh"
#include "cuda/shared_rows.cuh"

namespace {

constexpr int kHeadDim = DENSE_ATTN_HEAD_DIM, kStride = kRowStride<kHeadDim>;
constexpr int kRows = 16;                       // of a warp at a time
constexpr int kWarps = kHeadDim > 160 ? 2 : 4;  // of a block
constexpr bool kAhead = kHeadDim <= 96;         // the next rows are fetched while these are worked on
constexpr int kColumns = kHeadDim % 64 ? (kHeadDim > 96   ? kHeadDim / 4
                                          : kHeadDim > 40 ? kHeadDim / 2
                                                          : kHeadDim)
                                       : 64;  // of out at a time
static_assert(kHeadDim % kColumns == 0 && kColumns % 8 == 0);

// What a lane of a warp has of an mma's tile: rows `group` and `group` + 8. Numbers of a row are worked out by the
// lanes whose own it is: two of its quad for each of the two.
struct Lane {
  int index = threadIdx.x % kWarp, group = index / 4, column = index % 4 * 2, quad = index & ~3;
  int own = group + index % 2 * 8, half = index / 2 % 2;

  __device__ float of_own(float first, float second) const { return index % 2 ? second : first; }
  template <class Number>
  __device__ void to_both(Number own_number, Number (&both)[2]) const {
    both[0] = __shfl_sync(~0u, own_number, quad);
    both[1] = __shfl_sync(~0u, own_number, quad + 1);
  }
};

template <class T, int kKeys>
struct Shared {
  alignas(16) T k[kKeys][kStride];
  alignas(16) T v[kKeys][kStride];
  alignas(16) T rows[kWarps][kAhead ? 2 : 1][kRows][kStride];  // queries, and out: behind them, or in their place
  alignas(16) T exists[(kKeys + 31) / 32 * 32][8];  // 1 for keys that are there: their product is a row's sum
  alignas(16) int32_t words[kKeys];
};

// As mma leaves them: of 8 keys a time, two of each row.
template <int kKeys>
struct Scores {
  float of_keys[kKeys / 8][4];
  __device__ __forceinline__ float (&operator[](int n))[4] { return of_keys[n]; }
  __device__ __forceinline__ const float (&operator[](int n) const)[4] { return of_keys[n]; }
};

// In 16 bits, as mma takes them: of 16 keys a time.
template <int kKeys>
struct Weights {
  uint32_t of_keys[kKeys / 16][4];
};

// Keys, values and words of a head. Behind the last key it comes again, which changes no extreme; its weight is not
// counted then.
template <class T, int kKeys>
__device__ __forceinline__ void fetch_keys(Shared<T, kKeys>& shared, const LayoutAttentionParams& p, int batch,
                                           int head) {
  const int seqlen_k = p.seqlen_k, head_dim = p.head_dim, half = threadIdx.x % 2;
  const bool k_pieces = in_pieces(p.k, head_dim), v_pieces = in_pieces(p.v, head_dim);
  for (int key = threadIdx.x / 2; key < kKeys; key += kWarps * kWarp / 2) {
    const int from = max(min(key, seqlen_k - 1), 0);
    fetch_row<kHeadDim>(shared.k[key], p.k.at<T>(batch, head, from), half, head_dim, seqlen_k > 0, k_pieces);
    fetch_row<kHeadDim>(shared.v[key], p.v.at<T>(batch, head, from), half, head_dim, key < seqlen_k, v_pieces);
  }
  for (int key = threadIdx.x; key < kKeys; key += kWarps * kWarp) {
    shared.words[key] = seqlen_k > 0 ? *p.k_regions.at<int32_t>(batch, min(key, seqlen_k - 1)) : 0;
  }
  for (int i = threadIdx.x; i < int(sizeof(shared.exists) / sizeof(T)); i += kWarps * kWarp) {
    shared.exists[i / 8][i % 8] = T(i / 8 < seqlen_k ? 1.f : 0.f);
  }
}

template <class T, int kKeys>
__device__ __forceinline__ void multiply_keys(Scores<kKeys>& s, const Shared<T, kKeys>& shared,
                                              const T (*rows)[kStride], const Lane& lane, bool negate) {
  const uint32_t sign = negate ? 0x80008000u : 0u;
  const int i = lane.index;
  const uint32_t q_at = shared_address(&rows[i % 16][i / 16 * 8]);
  const uint32_t k_at = shared_address(&shared.k[i / 16 * 8 + i % 8][i / 8 % 2 * 8]);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
#pragma unroll
  for (int d = 0; d < kHeadDim / 16; ++d) {
    uint32_t a[4];
    load_matrix_x4(a, q_at + d * 32);
    if (negate) a[0] ^= sign, a[1] ^= sign, a[2] ^= sign, a[3] ^= sign;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t b[4];
      load_matrix_x4(b, k_at + (n * 8 * kStride + d * 16) * sizeof(T));
      mma_k16<T>(s[n], a, b[0], b[1]);
      mma_k16<T>(s[n + 1], a, b[2], b[3]);
    }
  }
  if constexpr (kHeadDim % 16 == 8) {
    uint32_t a0, a1;
    load_matrix_x2(a0, a1, shared_address(&rows[i % 16][kHeadDim - 8]));
    if (negate) a0 ^= sign, a1 ^= sign;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      uint32_t b0, b1;
      load_matrix_x2(b0, b1, shared_address(&shared.k[n * 8 + i % 16][kHeadDim - 8]));
      mma_k8<T>(s[n], a0, a1, b0);
      mma_k8<T>(s[n + 1], a0, a1, b1);
    }
  }
}

// The larger number, or the smaller, of all that the lanes of a quad have of their own row.
template <bool kLargest>
__device__ __forceinline__ float choose(float a, float b) {
  return kLargest ? fmaxf(a, b) : fminf(a, b);
}

template <bool kLargest>
__device__ __forceinline__ float reduce_own(const Lane& lane, float first, float second) {
  const float mine = lane.of_own(first, second), others = lane.of_own(second, first);
  const float pair = choose<kLargest>(mine, __shfl_xor_sync(~0u, others, 1));
  return choose<kLargest>(pair, __shfl_xor_sync(~0u, pair, 2));
}

template <bool kLargest, int kKeys>
__device__ __forceinline__ float extreme(const Scores<kKeys>& s, const Lane& lane) {
  float first = choose<kLargest>(s[0][0], s[0][1]), second = choose<kLargest>(s[0][2], s[0][3]);
#pragma unroll
  for (int n = 1; n < kKeys / 8; ++n) {
    first = choose<kLargest>(first, choose<kLargest>(s[n][0], s[n][1]));
    second = choose<kLargest>(second, choose<kLargest>(s[n][2], s[n][3]));
  }
  return reduce_own<kLargest>(lane, first, second);
}

template <int kKeys>
struct KeyWords {
  int2 at[kKeys / 8];

  __device__ __forceinline__ KeyWords(const int32_t* words, const Lane& lane) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) at[n] = *reinterpret_cast<const int2*>(words + n * 8 + lane.column);
  }
  __device__ __forceinline__ bool meet(int32_t word, int n, int i) const {
    return (word & (i % 2 ? at[n].y : at[n].x)) != 0;
  }
};

// "mask" leaves matched scores alone.
template <int kKeys>
__device__ __forceinline__ void exclude(Scores<kKeys>& s, const KeyWords<kKeys>& words, const int32_t (&row_words)[2]) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[n][i] = words.meet(row_words[i / 2], n, i) ? s[n][i] : -INFINITY;
  }
}

// Exponents of both rows: raw * factor + in, or + out.
struct Exponents {
  float factor[2], in[2], out[2];

  __device__ __forceinline__ float of(float raw, int i, bool matched) const {
    return fmaf(raw, factor[i / 2], matched ? in[i / 2] : out[i / 2]);
  }
};

// Weights of a row lie below 2^kMost, the largest of them above 1, as long as exponents are off by no more than kSteep.
template <class T>
constexpr float kMost = 0;
template <>
constexpr float kMost<__half> = 14;
template <class T>
constexpr float kSteep = 60;
template <>
constexpr float kSteep<__half> = 14;
constexpr float kRounded = 4096;  // larger products lose digits that weights need

// Whether weights cannot be measured from the larger offset, or not by one fused multiply-add.
template <class T, Modulation kModulation>
__device__ __forceinline__ bool is_steep(const RowRule& rule) {
  const bool far = kModulation != Modulation::kMask && !(fabsf(rule.offset_in - rule.offset_out) <= kSteep<T>);
  return far || !(fabsf(rule.anchor * rule.factor) <= kRounded);
}

// Scores as they are from the anchor on, and the largest exponent of the own row.
template <int kKeys>
__device__ __forceinline__ float search_top(Scores<kKeys>& s, const KeyWords<kKeys>& words,
                                            const int32_t (&row_words)[2], const RowRule& rule, const Lane& lane) {
  Exponents exponents;
  float anchor[2], first = -INFINITY, second = -INFINITY;
  lane.to_both(rule.anchor, anchor);
  lane.to_both(rule.factor, exponents.factor);
  lane.to_both(rule.offset_in, exponents.in);
  lane.to_both(rule.offset_out, exponents.out);
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[n][i] -= anchor[i / 2];
      const float exponent = exponents.of(s[n][i], i, words.meet(row_words[i / 2], n, i));
      (i < 2 ? first : second) = fmaxf(i < 2 ? first : second, exponent);
    }
  }
  const float top = reduce_own<true>(lane, first, second);
  return is_finite(top) ? top : 0;
}

// Weights of both rows' keys in 16 bits, as mma's first operand has them.
template <class T, Modulation kModulation, int kKeys>
__device__ __forceinline__ void weigh(Weights<kKeys>& weights, const Scores<kKeys>& s, const KeyWords<kKeys>& words,
                                      const int32_t (&row_words)[2], const Exponents& exponents) {
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
    float weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool matched = kModulation == Modulation::kMask || words.meet(row_words[i / 2], n, i);
      weight[i] = exp2_approx(exponents.of(s[n][i], i, matched));
    }
    weights.of_keys[n / 2][n % 2 * 2] = pack<T>(weight[0], weight[1]);
    weights.of_keys[n / 2][n % 2 * 2 + 1] = pack<T>(weight[2], weight[3]);
  }
}

// The sums of both rows' weights as they are multiplied with values.
template <class T, int kKeys>
__device__ __forceinline__ void sum_weights(float (&sums)[2], const Weights<kKeys>& weights,
                                            const Shared<T, kKeys>& shared, const Lane& lane) {
  float acc[4] = {};
  const uint32_t at = shared_address(shared.exists[lane.index]);
#pragma unroll
  for (int n = 0; n < kKeys / 16; n += 2) {
    uint32_t b[4];
    load_matrix_x4_trans(b, at + n * 16 * sizeof(shared.exists[0]));
    mma_k16<T>(acc, weights.of_keys[n], b[0], b[1]);
    if (n + 1 < kKeys / 16) mma_k16<T>(acc, weights.of_keys[n + 1], b[2], b[3]);
  }
  sums[0] = acc[0], sums[1] = acc[2];
}

// kColumns columns of out from `column` on, into shared memory.
template <class T, int kKeys>
__device__ __forceinline__ void multiply_values(T (*out)[kStride], const Weights<kKeys>& weights,
                                                const float (&inverse)[2], const Shared<T, kKeys>& shared, int column,
                                                const Lane& lane) {
  float acc[kColumns / 8][4] = {};
  const int i = lane.index;
#pragma unroll
  for (int n = 0; n < kKeys / 16; ++n) {
#pragma unroll
    for (int d = 0; d < kColumns / 8; d += 2) {
      uint32_t b[4];
      if (d + 1 < kColumns / 8) {
        load_matrix_x4_trans(b, shared_address(&shared.v[n * 16 + i % 16][column + d * 8 + i / 16 * 8]));
        mma_k16<T>(acc[d + 1], weights.of_keys[n], b[2], b[3]);
      } else {
        load_matrix_x2_trans(b[0], b[1], shared_address(&shared.v[n * 16 + i % 16][column + d * 8]));
      }
      mma_k16<T>(acc[d], weights.of_keys[n], b[0], b[1]);
    }
  }
#pragma unroll
  for (int d = 0; d < kColumns / 8; ++d) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      *reinterpret_cast<uint32_t*>(&out[lane.group + r * 8][column + d * 8 + lane.column]) =
          pack<T>(acc[d][2 * r] * inverse[r], acc[d][2 * r + 1] * inverse[r]);
    }
  }
}

// What is read of a query row beside itself.
struct Row {
  int token;
  int32_t words;
  float strength;

  __device__ __forceinline__ Row(const LayoutAttentionParams& p, int batch, int head, int place)
      : token(row_at(p, batch, place)),
        words(row_words(p, batch, token)),
        strength(row_strength(p, batch, head, token)) {}
};

template <class T, Modulation kModulation, int kKeys>
__global__ void __launch_bounds__(kWarps* kWarp)
    layout_attention_row_fwd_kernel(const __grid_constant__ LayoutAttentionParams p) {
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<Shared<T, kKeys>*>(memory);
  const Lane lane;
  const int num_heads = p.num_heads, seqlen_q = p.seqlen_q, head_dim = p.head_dim, warp = threadIdx.x / kWarp;
  const int batch = blockIdx.x / num_heads, head = blockIdx.x % num_heads;
  auto& queries = shared.rows[warp][0];
  auto& out = shared.rows[warp][kAhead ? 1 : 0];
  const bool q_pieces = in_pieces(p.q, head_dim), out_pieces = in_pieces(p.out, head_dim);
  const auto fetch = [&](const Row& row) {
    fetch_row<kHeadDim>(queries[lane.own], p.q.at<T>(batch, head, row.token), lane.half, head_dim, true, q_pieces);
    commit_copies();
  };
  int place = (blockIdx.y * kWarps + warp) * kRows;
  Row row(p, batch, head, place + lane.own);
  fetch_keys(shared, p, batch, head);
  fetch(row);
  wait_for_copies<0>();
  __syncthreads();
  const KeyWords<kKeys> words(shared.words, lane);
  const float signed_scale = p.scale, scale = fabsf(signed_scale);
  for (const int step = gridDim.y * kWarps * kRows; place < seqlen_q; place += step) {
    const bool more = place + step < seqlen_q;
    Row next = row;
    if (more) next = Row(p, batch, head, place + step + lane.own);
    wait_for_copies<0>();
    __syncwarp();
    Scores<kKeys> s;
    multiply_keys(s, shared, queries, lane, signed_scale < 0);
    __syncwarp();
    if (kAhead && more) fetch(next);

    int32_t both_words[2];
    lane.to_both(row.words, both_words);
    if constexpr (kModulation == Modulation::kMask) exclude(s, words, both_words);
    const float high = extreme<true>(s, lane);
    const float low = kModulation == Modulation::kRange ? extreme<false>(s, lane) : high;
    const RowRule rule = row_rule<kModulation>(row.strength, scale, high, low);
    float largest = fmaxf(rule.offset_in, rule.offset_out) - kMost<T>, anchored = rule.anchor * rule.factor;
    if (__any_sync(~0u, is_steep<T, kModulation>(rule))) {
      largest = search_top(s, words, both_words, rule, lane);
      anchored = 0;
    }
    Exponents exponents;
    lane.to_both(rule.factor, exponents.factor);
    lane.to_both(rule.offset_in - largest - anchored, exponents.in);
    lane.to_both(rule.offset_out - largest - anchored, exponents.out);
    Weights<kKeys> weights;
    weigh<T, kModulation>(weights, s, words, both_words, exponents);
    float sums[2], inverse[2];
    sum_weights(sums, weights, shared, lane);
    for (int r = 0; r < 2; ++r) inverse[r] = sums[r] == 0 ? 0 : reciprocal_approx(sums[r]);
#pragma unroll 1
    for (int column = 0; column < kHeadDim; column += kColumns) {
      multiply_values(out, weights, inverse, shared, column, lane);
    }
    __syncwarp();
    if (place + lane.own < seqlen_q) {
      store_row<kHeadDim>(p.out.at<T>(batch, head, row.token), out[lane.own], lane.half, head_dim, out_pieces);
      if (lane.half == 0) {
        const float sum = lane.of_own(sums[0], sums[1]);
        store_row_numbers<kModulation>(p, batch, head, row.token, rule, high, low, largest, sum);
      }
    }
    if (!kAhead && more) {
      __syncwarp();
      fetch(next);
    }
    row = next;
  }
}

template <class T, Modulation kModulation, int kKeys>
cudaError_t launch_row(const LayoutAttentionParams& p, cudaStream_t stream) {
  constexpr int64_t kEnough = 384, kMostSteps = 4;  // blocks that fill a GPU; more rows than they need share keys
  const int64_t heads = p.batch * p.num_heads, tiles = (p.seqlen_q + kWarps * kRows - 1) / (kWarps * kRows);
  int64_t steps = 1;
  while (steps < kMostSteps && heads * tiles >= 2 * steps * kEnough) steps *= 2;
  const dim3 grid(heads, std::min<int64_t>((tiles + steps - 1) / steps, 65535));
  return launch(layout_attention_row_fwd_kernel<T, kModulation, kKeys>, grid, dim3(kWarps * kWarp),
                sizeof(Shared<T, kKeys>), stream, p);
}

template <class T, Modulation kModulation>
cudaError_t launch_keys(const LayoutAttentionParams& p, cudaStream_t stream) {
  return p.seqlen_k <= 80 ? launch_row<T, kModulation, 80>(p, stream) : launch_row<T, kModulation, 128>(p, stream);
}

template <class T>
cudaError_t launch_modulation(const LayoutAttentionParams& p, cudaStream_t stream) {
  switch (p.modulation) {
    case Modulation::kRange:
      return launch_keys<T, Modulation::kRange>(p, stream);
    case Modulation::kMax:
      return launch_keys<T, Modulation::kMax>(p, stream);
    case Modulation::kBias:
      return launch_keys<T, Modulation::kBias>(p, stream);
    default:
      return launch_keys<T, Modulation::kMask>(p, stream);
  }
}

}  // namespace

namespace DENSE_ATTN_CLASS {

cudaError_t layout_attention_row_fwd_cuda(const LayoutAttentionParams& p, cudaStream_t stream) {
  return p.dtype == DType::kFloat16 ? launch_modulation<__half>(p, stream)
                                    : launch_modulation<__nv_bfloat16>(p, stream);
}

}  // namespace DENSE_ATTN_CLASS
