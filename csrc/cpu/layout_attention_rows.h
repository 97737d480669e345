// What both passes know of a strip of query rows: which tokens they are, their words, and the rule of modulation.
#pragma once

#include "cpu/tile.h"
#include "layout_attention.h"

namespace DENSE_ATTN_ISA {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Query rows are cut into strips of up to kRowVecs registers, as even as they come.
struct Strips {
  int64_t vecs, count;

  Strips(int64_t seqlen_q, int64_t lanes)
      : vecs((seqlen_q + lanes - 1) / lanes), count((vecs + kRowVecs - 1) / kRowVecs) {}
  int64_t first_vec(int64_t strip) const { return strip * vecs / count; }
};

// Strips of a head that meet its keys together: as many as pay, while many threads still have an item each.
inline int64_t strips_together(int64_t most, int64_t heads, int64_t strips_per_head) {
  constexpr int64_t kItems = 64;
  while (most > 1 && heads * ((strips_per_head + most - 1) / most) < kItems) most /= 2;
  return most;
}

template <class Acc>
struct alignas(kVecBytes) Lanes {
  Acc x[kRowVecs * kLanes<Acc>];

  VecOf<Acc> operator[](int v) const { return load<VecOf<Acc>>(x + v * kLanes<Acc>); }
  void set(int v, VecOf<Acc> value) { store(x + v * kLanes<Acc>, value); }
};

// A running sum over key blocks that keeps what each addition rounds off.
template <class Acc>
struct RowSums {
  Lanes<Acc> value, rounded_off;

  void reset(int v) { value.set(v, VecOf<Acc>{}), rounded_off.set(v, VecOf<Acc>{}); }
  void add(int v, VecOf<Acc> x) {
    const VecOf<Acc> before = value[v], after = before + x, added = after - before;
    rounded_off.set(v, rounded_off[v] + ((before - (after - added)) + (x - added)));
    value.set(v, after);
  }
  VecOf<Acc> operator[](int v) const { return value[v] + rounded_off[v]; }
};

template <class Acc>
struct StripRows {
  using Vec = VecOf<Acc>;
  using Int = IntOf<Acc>;
  using IntLane = typename Simd<Acc>::IntLane;

  int64_t batch, head, count, stride;  // stride = lanes of the strip, count of them are rows
  int64_t key_head, keys;              // the head of k and v, and its keys that are there
  int32_t any_word, all_words;         // or and and of the rows' words
  int64_t token[kRowVecs * kLanes<Acc>];
  alignas(kVecBytes) IntLane words[kRowVecs * kLanes<Acc>];
  Lanes<Acc> strength;

  StripRows(const LayoutAttentionParams& p, int64_t item) {
    const Strips strips(p.seqlen_q, kLanes<Acc>);
    const int64_t strip = item % strips.count;
    batch = item / strips.count / p.num_heads;
    head = item / strips.count % p.num_heads;
    key_head = head / p.group, keys = keys_of(p, batch);
    const int64_t first = strips.first_vec(strip) * kLanes<Acc>;
    stride = strips.first_vec(strip + 1) * kLanes<Acc> - first;
    count = p.seqlen_q - first < stride ? p.seqlen_q - first : stride;
    any_word = 0;
    all_words = -1;
    for (int64_t r = 0; r < stride; ++r) {
      const int64_t visit = first + (r < count ? r : 0);  // lanes beyond the rows repeat the first
      token[r] = p.q_order.data ? *p.q_order.at<int32_t>(batch, visit) : visit;
      const int32_t word = *p.q_regions.at<int32_t>(batch, token[r]);
      words[r] = word;
      any_word |= word;
      all_words &= word;
      strength.x[r] = *p.strength.at<Acc>(batch, head, token[r]);
    }
  }

  Int word_lanes(int v) const { return load<Int>(words + v * kLanes<Acc>); }
};

// Factor of the scores: s' = temperature * s + (terms constant over the keys of one population).
template <class Acc>
inline WideOf<Acc> temperature(Modulation modulation, WideOf<Acc> c) {
  return modulation == Modulation::kRange ? 1 - c : 1 - WideOf<Acc>{};
}

// What the rule adds to the scores of each population, in natural units; -inf excludes it.
template <class Acc>
struct Additions {
  WideOf<Acc> matched{}, others{};

  Additions(const LayoutAttentionParams& p, WideOf<Acc> c, VecOf<Acc> raw_max, VecOf<Acc> raw_min) {
    const WideOf<Acc> max = widen<Acc>(p.scale < 0 ? raw_min : raw_max) * p.scale;
    const WideOf<Acc> min = widen<Acc>(p.scale < 0 ? raw_max : raw_min) * p.scale;
    if (p.modulation == Modulation::kRange) matched = c * max, others = c * min;
    if (p.modulation == Modulation::kMax) matched = c * max;
    if (p.modulation == Modulation::kBias) matched = c;
    if (p.modulation == Modulation::kMask) others -= __builtin_inf();
  }

  // What softmax does not see because both populations get it; a minimum of -inf leaves the matched keys alone.
  WideOf<Acc> common(Modulation modulation) const {
    if (modulation != Modulation::kRange) return WideOf<Acc>{};
    return others < -__DBL_MAX__ ? matched : others;
  }
};

// The next run of keys [begin, end) that has work for the strip: with `mask`, key groups that no row meets are passed
// by.
struct KeyRun {
  int64_t begin, end;
};

template <class Acc>
inline KeyRun next_run(const LayoutAttentionParams& p, const StripRows<Acc>& rows, int64_t from, int64_t to,
                       int64_t group = kTileRows) {
  if (p.modulation != Modulation::kMask) return {from, to};
  const auto meets = [&](int64_t j) {
    int32_t word = 0;
    for (int64_t i = j; i < j + group && i < to; ++i) word |= *p.k_regions.at<int32_t>(rows.batch, i);
    return (word & rows.any_word) != 0;
  };
  while (from < to && !meets(from)) from += group;
  int64_t end = from;
  while (end < to && meets(end)) end += group;
  return {from < to ? from : to, end < to ? end : to};
}

// The exponents of a strip's weights: 2^(tau * score + the offset of the key's population), where kExact in two parts.
template <class Acc, bool kExact>
struct Exponents {
  Lanes<Acc> tau, in, out, tau_low, in_low, out_low;

  // Factors and terms come in natural units, the shift that is taken off the terms in log2 units.
  void set_tau(int v, WideOf<Acc> factor) { set(v, factor, VecOf<Acc>{}, tau, tau_low); }
  void set_in(int v, WideOf<Acc> term, VecOf<Acc> shift) { set(v, term, shift, in, in_low); }
  void set_out(int v, WideOf<Acc> term, VecOf<Acc> shift) { set(v, term, shift, out, out_low); }

  // Those of one register of rows for a key, or a run of keys with equal words.
  struct Run {
    VecOf<Acc> tau, tau_low, offset, offset_low;

    VecOf<Acc> weight(VecOf<Acc> s) const {
      if constexpr (kExact) {
        return exp2<Acc>(s, tau, tau_low, offset, offset_low);
      } else {
        return exp2_coarse(s * tau + offset);
      }
    }
  };

  Run run(int v, MaskOf<Acc> matched) const {
    return {tau[v], tau_low[v], select(matched, in[v], out[v]), select(matched, in_low[v], out_low[v])};
  }

 private:
  // high + low = x * log2(e) - shift to twice the digits: what each product and difference rounds off is kept.
  static void set(int v, WideOf<Acc> x, VecOf<Acc> shift, Lanes<Acc>& high, Lanes<Acc>& low) {
    constexpr double kLog2ERest = 2.0355273740931033e-17;
    for (int i = 0; i < kLanes<Acc>; ++i) {
      const double product = x[i] * kLog2E, product_rest = __builtin_fma(x[i], kLog2E, -product) + x[i] * kLog2ERest;
      const double minus = -shift[i], sum = product + minus, added = sum - product;
      const double sum_rest = (product - (sum - added)) + (minus - added);
      const Acc rounded = sum;
      const Acc rest = (sum - rounded) + (product_rest + sum_rest);
      high.x[v * kLanes<Acc> + i] = rounded;
      low.x[v * kLanes<Acc> + i] = rest - rest == 0 ? rest : 0;  // an infinity has no rest
    }
  }
};

// Hands out aligned pieces of a thread's scratch; with a null base it only counts.
struct Carver {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);
    used += (count * sizeof(T) + kVecBytes - 1) / kVecBytes * kVecBytes;
    return piece;
  }
};

}  // namespace DENSE_ATTN_ISA
