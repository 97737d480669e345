// What the forward pass knows of a strip besides its rows: the extremes that were met, what they make of the softmax,
// and how its rows are written.
#pragma once

#include "cpu/layout_attention_rows.h"

namespace DENSE_ATTN_ISA {

// The words of a sample's keys, and where they change: what depends on a key's word alone is found once a run. A step
// of two keys ends a run where either word is another one.
template <int64_t kStep>
struct KeyWords {
  int32_t *word, *end;  // of each key, one more than there are; of each step, the first key of the next run
  int64_t batch = -1;

  void take(Carver& carver, int64_t keys) {
    word = carver.take<int32_t>(keys + kStep);
    end = carver.take<int32_t>(keys / kStep + 1);
  }

  void fill(const LayoutAttentionParams& p, int64_t of, int64_t keys) {
    if (batch == of) return;
    batch = of;
    for (int64_t j = 0; j < keys; ++j) word[j] = *p.k_regions.at<int32_t>(batch, j);
    for (int64_t j = keys; j > 0 && j < keys + kStep; ++j) word[j] = word[keys - 1];
    for (int64_t j = (keys - 1) / kStep * kStep; j >= 0 && keys > 0; j -= kStep) {
      const bool same = j + kStep < keys && std::memcmp(word + j, word + j + kStep, kStep * sizeof(int32_t)) == 0;
      end[j / kStep] = same ? end[j / kStep + 1] : j + kStep < keys ? j + kStep : keys;
    }
  }

  // The end of the run that key j is in, the first of its step.
  int64_t run_end(int64_t j, int64_t most) const { return end[j / kStep] < most ? end[j / kStep] : most; }
};

// To the nearest bfloat16, the first in the lower half.
inline Simd<float>::Int round_pair(Simd<float>::Vec first, Simd<float>::Vec second) {
  using Int = Simd<float>::Int;
  typedef uint32_t Bits __attribute__((vector_size(kVecBytes)));
  const Bits low = (Bits)((Int)first + 0x8000) >> 16, high = (Bits)((Int)second + 0x8000) & 0xffff0000u;
  return (Int)(low | high);
}

// The weights of keys [begin, end) and one register of rows, and what they add to the rows' sum: scores [key][rows] at
// `from` become values, or pairs, [step][rows] at `to`. With kMask those of the others are 0 whatever their scores.
template <bool kMask, class Exponents, class Acc, class Elem, int64_t kStep>
inline VecOf<Acc> weigh_keys(const Exponents& exponents, const StripRows<Acc>& rows, const KeyWords<kStep>& words,
                             int v, int64_t begin, int64_t end, const Acc* from, Elem* to) {
  using Vec = VecOf<Acc>;
  Vec sum{};
  for (int64_t j = begin; j < end;) {
    const int64_t run_end = words.run_end(j, end);
    const auto matched = meet(rows.word_lanes(v), set1_int<Acc>(words.word[j]));
    const auto run = exponents.run(v, matched);
    const auto weight = [&](const auto& of, auto mask, const Acc* score) {
      const Vec value = of.weight(load<Vec>(score));
      return kMask ? select(mask, value, Vec{}) : value;
    };
    if constexpr (kStep == 2) {
      const auto next_matched = meet(rows.word_lanes(v), set1_int<Acc>(words.word[j + 1]));
      const auto next_run = exponents.run(v, next_matched);
      for (; j + 1 < run_end; j += 2, from += 2 * rows.stride, to += rows.stride) {
        const Vec first = weight(run, matched, from), second = weight(next_run, next_matched, from + rows.stride);
        sum += first + second;
        store(to, round_pair(first, second));
      }
      if (j == run_end) continue;
      const Vec last = weight(run, matched, from);  // of an odd number of keys
      sum += last + Vec{};
      store(to, round_pair(last, Vec{}));
      ++j;
    } else {
      for (; j < run_end; ++j, from += rows.stride, to += rows.stride) {
        const Vec value = weight(run, matched, from);
        sum += value;
        store(to, value);
      }
    }
  }
  return sum;
}

// Where the softmax of a strip's rows stands: raw extremes of the matched keys and of the others, and the weights' sum.
template <class Acc>
struct RowState {
  using Vec = VecOf<Acc>;

  Lanes<Acc> in_max, in_min, out_max, out_min;
  RowSums<Acc> sum;

  void reset(int v) {
    const Acc inf = __builtin_inf();
    in_max.set(v, set1<Acc>(-inf)), out_max.set(v, set1<Acc>(-inf));
    in_min.set(v, set1<Acc>(inf)), out_min.set(v, set1<Acc>(inf));
    sum.reset(v);
  }

  Vec raw_max(int v) const { return select(less(in_max[v], out_max[v]), out_max[v], in_max[v]); }
  Vec raw_min(int v) const { return select(less(in_min[v], out_min[v]), in_min[v], out_min[v]); }

  // The extremes of keys [begin, end) from their scores at `from`: one comparison a key, and one choice of population a
  // run.
  template <int kVecs, int64_t kStep>
  void meet_keys(const StripRows<Acc>& rows, const KeyWords<kStep>& words, int64_t begin, int64_t end,
                 const Acc* from) {
    for (int64_t j = begin; j < end;) {
      const int64_t run_end = words.run_end(j, end);
      Vec max[kStep][kVecs], min[kStep][kVecs];
      for (int s = 0; s < kStep; ++s) {
        for (int v = 0; v < kVecs; ++v) {
          max[s][v] = set1<Acc>(-__builtin_inf()), min[s][v] = set1<Acc>(__builtin_inf());
        }
      }
      const int32_t* word = words.word + j;
      for (; j + kStep <= run_end; j += kStep) {
#pragma GCC unroll 2
        for (int s = 0; s < kStep; ++s, from += rows.stride) {
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) widen_range(max[s][v], min[s][v], load<Vec>(from + v * kLanes<Acc>));
        }
      }
      for (; j < run_end; ++j, from += rows.stride) {
        for (int v = 0; v < kVecs; ++v) widen_range(max[0][v], min[0][v], load<Vec>(from + v * kLanes<Acc>));
      }
      for (int s = 0; s < kStep; ++s) {
        for (int v = 0; v < kVecs; ++v)
          meet_run(v, meet(rows.word_lanes(v), set1_int<Acc>(word[s])), max[s][v], min[s][v]);
      }
    }
  }

  // What the softmax is measured from, by the extremes met so far: those of the row.
  struct Reference {
    WideOf<Acc> tau;              // natural units per raw score
    WideOf<Acc> add_in, add_out;  // what the rule adds to each population, natural units; common terms left out
    Vec top_in, top_out;          // largest tau * s of each population, -inf for one without keys
    Vec shift;                    // largest modulated score, 0 for a row without keys
  };

  Reference reference(const LayoutAttentionParams& p, const StripRows<Acc>& rows, int v) const {
    const Acc inf = __builtin_inf();
    const WideOf<Acc> c = widen<Acc>(rows.strength[v]);
    Reference from;
    from.tau = temperature<Acc>(p.modulation, c) * p.scale;
    const Additions<Acc> add(p, c, raw_max(v), raw_min(v));
    from.add_in = add.matched - add.common(p.modulation);
    from.add_out = add.others - add.common(p.modulation);
    const Vec tau = narrow<Acc>(from.tau * kLog2E);
    const auto top = [&](Vec max, Vec min) {
      const Vec extreme = select(less(tau, Vec{}), min, max) * tau;
      return select(less(max, min), set1<Acc>(-inf), extreme);
    };
    from.top_in = top(in_max[v], in_min[v]);
    from.top_out = top(out_max[v], out_min[v]);
    const Vec top_in = from.top_in + narrow<Acc>(from.add_in * kLog2E),
              top_out = from.top_out + narrow<Acc>(from.add_out * kLog2E);
    const Vec largest = select(less(top_in, top_out), top_out, top_in);
    from.shift = select(less(set1<Acc>(-inf), largest), largest, Vec{});
    return from;
  }

  // The rows of out, lse and statistics from the products acc[d][row] and the shift that they are measured from.
  template <class T>
  void finish(const LayoutAttentionParams& p, const StripRows<Acc>& rows, const Lanes<Acc>& shift, const Acc* acc) {
    Lanes<Acc> sums, inverse;
    double offset[kRowVecs * kLanes<Acc>];
    for (int v = 0; v < rows.stride / kLanes<Acc>; ++v) {
      sums.set(v, sum[v]);
      inverse.set(v, select(less(Vec{}, sum[v]), 1 / sum[v], sum[v]));  // 0 stays 0, NaN stays NaN
      const Additions<Acc> add(p, widen<Acc>(rows.strength[v]), raw_max(v), raw_min(v));
      store(offset + v * kLanes<Acc>, add.common(p.modulation));
    }
    T* out = p.out.at<T>(rows.batch, rows.head);
    const auto row = [&](int64_t r) { return out + rows.token[r] * p.out.strides[2]; };
    unpack_columns<T>(acc, inverse.x, rows.count, rows.stride, p.head_dim, row);
    for (int64_t r = 0; r < rows.count; ++r) {
      const Acc total = sums.x[r], log_sum = sizeof(Acc) == 4 ? __builtin_logf(total) : __builtin_log(total);
      const double lse = shift.x[r] * kLn2 + log_sum + offset[r];
      if (p.lse.data) *p.lse.at<Acc>(rows.batch, rows.head, rows.token[r]) = total == 0 ? log_sum : lse;
      if (!p.stats.data) continue;
      Acc* stats = p.stats.at<Acc>(rows.batch, rows.head, rows.token[r]);
      stats[kRawMax] = raw_max(r / kLanes<Acc>)[r % kLanes<Acc>];
      stats[kRawMin] = raw_min(r / kLanes<Acc>)[r % kLanes<Acc>];
      stats[kShift] = shift.x[r];
      stats[kSum] = total;
    }
  }

 private:
  // A NaN is passed by.
  static void widen_range(Vec& max, Vec& min, Vec s) {
    constexpr MaskOf<Acc> kNone{};
    max_where(max, invert(kNone), s), min_where(min, invert(kNone), s);
  }

  void meet_run(int v, MaskOf<Acc> matched, Vec max, Vec min) {
    Vec bound = in_max[v];
    max_where(bound, matched, max), in_max.set(v, bound);
    bound = in_min[v], min_where(bound, matched, min), in_min.set(v, bound);
    bound = out_max[v], max_where(bound, invert(matched), max), out_max.set(v, bound);
    bound = out_min[v], min_where(bound, invert(matched), min), out_min.set(v, bound);
  }
};

// A strip of rows between the sweeps over its keys: the first finds the extremes, and so what the second weighs by.
template <class Acc, class Elem, bool kExact>
struct Strip {
  StripRows<Acc> rows;
  RowState<Acc> state;
  Exponents<Acc, kExact> exponents;
  Lanes<Acc> shift;
  Elem* q_panel;  // [steps][rows]
  Acc* acc;       // [channels][rows]
  Acc* scores;    // [keys][rows], where they wait between the sweeps

  Strip(const LayoutAttentionParams& p, int64_t item, Elem* q_panel, Acc* acc, Acc* scores)
      : rows(p, item), q_panel(q_panel), acc(acc), scores(scores) {
    for (int v = 0; v < vecs(); ++v) state.reset(v);
  }

  int64_t vecs() const { return rows.stride / kLanes<Acc>; }

  // Once the extremes are those of the rows, one exponent serves a row's whole softmax.
  void settle(const LayoutAttentionParams& p) {
    for (int v = 0; v < vecs(); ++v) {
      const auto from = state.reference(p, rows, v);
      shift.set(v, from.shift);
      exponents.set_tau(v, from.tau);
      exponents.set_in(v, from.add_in, from.shift);
      exponents.set_out(v, from.add_out, from.shift);
    }
  }
};

// f(number of registers), as a constant.
template <class F>
inline void with_vecs(int64_t vecs, const F& f) {
  if (vecs == 1) f(std::integral_constant<int, 1>{});
  if (vecs == 2) f(std::integral_constant<int, 2>{});
  if (vecs == 3) f(std::integral_constant<int, 3>{});
}

}  // namespace DENSE_ATTN_ISA
