// Rows whose quantiles are searched, as kernels read them four neighbours at a time, and what their thresholds are for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sega.h"

template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kPack = 4;       // neighbours that a thread reads at once
constexpr int kConcepts = 16;  // of one launch: their numbers are its parameters

template <class T>
struct alignas(sizeof(T) < 8 ? kPack * sizeof(T) : 16) Pack {
  T values[kPack];
};

// How many of a pack's values a row has.
__device__ __forceinline__ int values_left(int64_t at, int64_t count) {
  return static_cast<int>(count - at < kPack ? count - at : kPack);
}

template <class T>
__device__ __forceinline__ bool is_whole_pack(const T* first, int64_t stride, int left) {
  return stride == 1 && left == kPack && reinterpret_cast<uintptr_t>(first) % alignof(Pack<T>) == 0;
}

// The values of a row from `at` on, zeros beyond its end.
template <class T>
__device__ __forceinline__ void load_pack(const T* row, int64_t stride, int64_t at, int64_t count,
                                          AccOf<T> (&to)[kPack]) {
  const T* first = row + at * stride;
  const int left = values_left(at, count);
  if (is_whole_pack(first, stride, left)) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(first);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] = static_cast<AccOf<T>>(pack.values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) to[i] = i < left ? static_cast<AccOf<T>>(first[i * stride]) : AccOf<T>{0};
}

template <class T>
__device__ __forceinline__ void store_pack(T* row, int64_t stride, int64_t at, int64_t count,
                                           const AccOf<T> (&from)[kPack]) {
  T* first = row + at * stride;
  const int left = values_left(at, count);
  if (is_whole_pack(first, stride, left)) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) pack.values[i] = static_cast<T>(from[i]);
    *reinterpret_cast<Pack<T>*>(first) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (i < left) first[i * stride] = static_cast<T>(from[i]);
  }
}

__device__ __forceinline__ float magnitude(float x) { return fabsf(x); }
__device__ __forceinline__ double magnitude(double x) { return fabs(x); }

// Rows of one tensor: one concept, R samples of one channel.
template <class T>
struct PercentileRows {
  using Acc = AccOf<T>;
  static constexpr int kLowBit = std::is_same_v<T, __nv_bfloat16> ? 16 : std::is_same_v<T, __half> ? 13 : 0;

  PercentileParams p;
  QuantileRank the_rank;

  HOST_DEVICE int concepts() const { return 1; }
  HOST_DEVICE int64_t batch() const { return p.rows; }
  HOST_DEVICE int64_t channels() const { return 1; }
  HOST_DEVICE int64_t columns() const { return 1; }
  HOST_DEVICE int64_t count() const { return p.count; }
  __device__ QuantileRank rank(int) const { return the_rank; }
  __device__ Acc* threshold(int, int64_t b, int64_t) const { return p.threshold.at<Acc>(b); }

  __device__ __forceinline__ void magnitudes(int, int64_t b, int64_t, int64_t at, Acc (&to)[kPack]) const {
    load_pack(p.x.at<T>(b), p.x.strides[1], at, p.count, to);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] = magnitude(to[i]);
  }

  // Those of magnitude reached by the threshold, 0 for the rest.
  __device__ __forceinline__ void finish(int64_t b, int64_t, int64_t at, const Acc* thresholds) const {
    Acc x[kPack];
    load_pack(p.x.at<T>(b), p.x.strides[1], at, p.count, x);
#pragma unroll
    for (int i = 0; i < kPack; ++i) x[i] = magnitude(x[i]) >= thresholds[0] ? x[i] : Acc{0};
    store_pack(p.masked.at<T>(b), p.masked.strides[1], at, p.count, x);
  }
};

template <class Acc>
struct SegaConcept {
  Acc scale, weight, partial;
  QuantileRank rank;
};

// Differences of up to kConcepts concepts from the unconditional estimate, or their sums over the channels.
template <class T, bool kSums>
struct SegaRows {
  using Acc = AccOf<T>;
  static constexpr int kLowBit = 0;

  SegaParams p;            // without its lists
  int first, num;          // concepts of this launch
  TensorView<3> guided;    // [B, C, N]: eps between launches
  bool is_first, is_last;  // of the launches that share the concepts
  Acc guidance_scale, momentum_scale, beta, rest;
  SegaConcept<Acc> numbers[kConcepts];

  HOST_DEVICE int concepts() const { return num; }
  HOST_DEVICE int64_t batch() const { return p.batch; }
  HOST_DEVICE int64_t channels() const { return p.channels; }
  HOST_DEVICE int64_t columns() const { return kSums ? 1 : p.channels; }
  HOST_DEVICE int64_t count() const { return p.count; }
  __device__ QuantileRank rank(int e) const { return numbers[e].rank; }
  __device__ Acc* threshold(int e, int64_t b, int64_t c) const { return p.thresholds.at<Acc>(first + e, b, c); }

  __device__ __forceinline__ void differences(int e, int64_t b, int64_t c, int64_t at, Acc (&to)[kPack]) const {
    Acc from[kPack];
    load_pack(p.uncond.at<T>(b, c), p.uncond.strides[2], at, p.count, from);
    load_pack(p.edits.at<T>(first + e, b, c), p.edits.strides[3], at, p.count, to);
    const Acc scale = numbers[e].scale;
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] = (to[i] - from[i]) * scale;
  }

  __device__ __forceinline__ void magnitudes(int e, int64_t b, int64_t c, int64_t at, Acc (&to)[kPack]) const {
    if constexpr (!kSums) {
      differences(e, b, c, at, to);
#pragma unroll
      for (int i = 0; i < kPack; ++i) to[i] = magnitude(to[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i) to[i] = 0;
      for (int64_t channel = 0; channel < p.channels; ++channel) {
        Acc difference[kPack];
        differences(e, b, channel, at, difference);
#pragma unroll
        for (int i = 0; i < kPack; ++i) to[i] += magnitude(difference[i]);
      }
    }
  }

  // eps and momentum, or what the next launch goes on with: eps so far, and the steer in the place of the momentum.
  __device__ __forceinline__ void finish(int64_t b, int64_t c, int64_t at, const Acc* thresholds) const {
    const auto load = [&](const auto* row, const TensorView<3>& view, Acc(&to)[kPack]) {
      load_pack(row, view.strides[2], at, p.count, to);
    };
    Acc eps[kPack], steer[kPack], momentum[kPack];
    load(p.momentum.at<Acc>(b, c), p.momentum, momentum);
    if (is_first) {
      Acc uncond[kPack];
      load(p.uncond.at<T>(b, c), p.uncond, uncond);
      load(p.text.at<T>(b, c), p.text, eps);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        eps[i] = uncond[i] + guidance_scale * (eps[i] - uncond[i]);
        steer[i] = momentum_scale * momentum[i];
      }
    } else {
      load(guided.at<Acc>(b, c), guided, eps);
      load(p.momentum_out.at<Acc>(b, c), p.momentum_out, steer);
    }
    for (int e = 0; e < num; ++e) add_concept(e, b, c, at, thresholds[e], eps, steer);
    if (!is_last) {
      store_pack(guided.at<Acc>(b, c), guided.strides[2], at, p.count, eps);
      store_pack(p.momentum_out.at<Acc>(b, c), p.momentum_out.strides[2], at, p.count, steer);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      eps[i] = p.all_warm ? eps[i] + steer[i] : eps[i];
      momentum[i] = beta * momentum[i] + rest * steer[i];
    }
    store_pack(p.eps.at<T>(b, c), p.eps.strides[2], at, p.count, eps);
    store_pack(p.momentum_out.at<Acc>(b, c), p.momentum_out.strides[2], at, p.count, momentum);
  }

  __device__ __forceinline__ void add_concept(int e, int64_t b, int64_t c, int64_t at, Acc threshold, Acc (&eps)[kPack],
                                              Acc (&steer)[kPack]) const {
    const Acc weight = numbers[e].weight, partial = numbers[e].partial;
    if (weight == 0 && partial == 0) return;
    Acc kept[kPack], compared[kPack];
    differences(e, b, c, at, kept);
    if constexpr (kSums) magnitudes(e, b, c, at, compared);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if constexpr (!kSums) compared[i] = magnitude(kept[i]);
      kept[i] = compared[i] >= threshold ? kept[i] : Acc{0};
    }
    if (p.user_mask.data) {
      Acc user[kPack];
      load_pack(p.user_mask.at<Acc>(first + e, b, c), p.user_mask.strides[3], at, p.count, user);
#pragma unroll
      for (int i = 0; i < kPack; ++i) kept[i] *= user[i];
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if (weight != 0) steer[i] += weight * kept[i];
      if (partial != 0) eps[i] += partial * kept[i];
    }
  }
};
