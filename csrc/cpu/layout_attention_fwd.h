// Forward: a strip of rows against all keys. Lanes are query rows, so nothing is ever reduced across a register, and
// keys and values are read where they lie, one broadcast scalar at a time.
#pragma once

#include "cpu/layout_attention_rows.h"

namespace DENSE_ATTN_ISA {

constexpr int64_t kKeyBlock = 64;          // keys weighed at once, so that their weights stay in L1
constexpr int64_t kStripKeys = 16384;      // most keys whose scores are held at once: 3 MB, still in a cache
constexpr int64_t kPackedBytes = 4 << 20;  // most of their packed copies
constexpr int64_t kChunkKeys = 4096;       // keys of a chunk where there are more, whose scores stay in L2

// kDot: products over bfloat16 pairs by the dot-product instruction.
template <class T, bool kDot>
struct Forward {
  using Acc = typename Dtype<T>::Acc;
  using Elem = std::conditional_t<kDot, Pair, Acc>;
  using Vec = VecOf<Acc>;
  static constexpr int64_t kStep = kDot ? 2 : 1;
  static constexpr int64_t kMaxRows = kRowVecs * kLanes<Acc>;
  using Exponents = DENSE_ATTN_ISA::Exponents<Acc, std::is_same_v<T, Acc>>;
  static constexpr bool kPackValues = kDot || !std::is_same_v<T, Acc>;

  const LayoutAttentionParams& p;
  const int64_t depth;  // Elems per key
  const bool pack_keys;
  const int64_t chunk;  // keys per pass; one chunk when the strip fits
  Elem *q_panel, *weights, *k_packed, *v_packed;
  Acc *scores, *acc_in, *acc_out;
  size_t scratch_bytes;
  int64_t packed_head = -1, packed_begin = -1;
  const char *k_data, *v_data;  // key and value of the chunk's first key
  int64_t k_row_bytes, v_row_bytes, v_step_bytes;
  Lanes<Acc> in_max, in_min, out_max, out_min;
  RowSums<Acc> sum_in, sum_out;

  Forward(const LayoutAttentionParams& params, void* scratch)
      : p(params),
        depth((p.head_dim + kStep - 1) / kStep),
        pack_keys(!std::is_same_v<T, Acc> && (!kDot || p.head_dim % 2)),
        chunk(keys_per_chunk()) {
    Carver carver{static_cast<char*>(scratch)};
    q_panel = carver.take<Elem>(depth * kMaxRows);
    weights = carver.take<Elem>(kKeyBlock / kStep * kMaxRows);
    acc_in = carver.take<Acc>(p.head_dim * kMaxRows);
    acc_out = carver.take<Acc>(chunk < p.seqlen_k ? p.head_dim * kMaxRows : 0);
    scores = carver.take<Acc>(chunk * kMaxRows);
    k_packed = carver.take<Elem>(pack_keys ? chunk * depth : 0);
    v_packed = carver.take<Elem>(kPackValues ? (chunk + kStep - 1) / kStep * p.head_dim : 0);
    scratch_bytes = carver.used;
  }

  int64_t keys_per_chunk() const {
    const int64_t packed_bytes = ((pack_keys ? depth : 0) + (kPackValues ? p.head_dim / kStep : 0)) * sizeof(Elem);
    const bool one_chunk = p.seqlen_k <= kStripKeys && p.seqlen_k * packed_bytes <= kPackedBytes;
    return one_chunk || p.seqlen_k < kChunkKeys ? p.seqlen_k : kChunkKeys;
  }

  void run(int64_t item) {
    const StripRows<Acc> rows(p, item);
    switch (rows.stride / kLanes<Acc>) {
      case 1:
        return strip<1>(rows);
      case 2:
        return strip<2>(rows);
      default:
        return strip<3>(rows);
    }
  }

  template <int kVecs>
  void strip(const StripRows<Acc>& rows) {
    const Acc inf = __builtin_inf();
    for (int v = 0; v < kVecs; ++v) {
      in_max.set(v, set1<Acc>(-inf)), out_max.set(v, set1<Acc>(-inf));
      in_min.set(v, set1<Acc>(inf)), out_min.set(v, set1<Acc>(inf));
      sum_in.reset(v), sum_out.reset(v);
    }
    std::memset(acc_in, 0, p.head_dim * rows.stride * sizeof(Acc));
    pack_queries(rows);
    if (chunk == p.seqlen_k) {
      one_chunk<kVecs>(rows);
    } else {
      std::memset(acc_out, 0, p.head_dim * rows.stride * sizeof(Acc));
      many_chunks<kVecs>(rows);
    }
  }

  // The whole row is at hand: the extremes are known before anything is weighed, so one state serves both populations.
  template <int kVecs>
  void one_chunk(const StripRows<Acc>& rows) {
    const int64_t keys = rows.keys;
    prepare(rows, 0, keys);
    for (KeyRun run = next_run(p, rows, 0, keys); run.begin < keys; run = next_run(p, rows, run.end, keys)) {
      score<kVecs>(rows, 0, run.begin, run.end);
    }
    Exponents exponents;
    Lanes<Acc> shift;
    for (int v = 0; v < kVecs; ++v) {
      const State state = reference_points(rows, v);
      shift.set(v, state.shift);
      exponents.set_tau(v, state.tau);
      exponents.set_in(v, state.add_in, state.shift);
      exponents.set_out(v, state.add_out, state.shift);
    }
    for (KeyRun run = next_run(p, rows, 0, keys); run.begin < keys; run = next_run(p, rows, run.end, keys)) {
      weigh_run<kVecs>(rows, 0, run, exponents, sum_in, acc_in);
    }
    finish<kVecs>(rows, shift);
  }

  // Two online states, one a population, over chunks of keys; merged once the extremes of the row are known.
  template <int kVecs>
  void many_chunks(const StripRows<Acc>& rows) {
    const WideOf<Acc> nothing{}, excluded = nothing - __builtin_inf();
    Exponents matched, others;  // those of one population, the other excluded
    Lanes<Acc> shift_in, shift_out, shift;
    for (int v = 0; v < kVecs; ++v) shift_in.set(v, Vec{}), shift_out.set(v, Vec{});
    for (int64_t begin = 0; begin < rows.keys; begin += chunk) {
      const int64_t end = begin + chunk < rows.keys ? begin + chunk : rows.keys;
      prepare(rows, begin, end);
      for (KeyRun run = next_run(p, rows, begin, end); run.begin < end; run = next_run(p, rows, run.end, end)) {
        score<kVecs>(rows, begin, run.begin, run.end);
      }
      for (int v = 0; v < kVecs; ++v) {
        const State state = reference_points(rows, v);
        rescale(acc_in, rows.stride, v, sum_in, shift_in, state.top_in);
        rescale(acc_out, rows.stride, v, sum_out, shift_out, state.top_out);
        matched.set_tau(v, state.tau), matched.set_in(v, nothing, shift_in[v]), matched.set_out(v, excluded, Vec{});
        others.set_tau(v, state.tau), others.set_in(v, excluded, Vec{}), others.set_out(v, nothing, shift_out[v]);
      }
      for (KeyRun run = next_run(p, rows, begin, end); run.begin < end; run = next_run(p, rows, run.end, end)) {
        for (int64_t j = run.begin; j < run.end; j += kKeyBlock) {
          const KeyRun block{j, j + kKeyBlock < run.end ? j + kKeyBlock : run.end};
          const Populations present = populations(rows, block);
          if (present.matched) weigh_run<kVecs>(rows, begin, block, matched, sum_in, acc_in);
          if (present.others) weigh_run<kVecs>(rows, begin, block, others, sum_out, acc_out);
        }
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      const State state = reference_points(rows, v);
      shift.set(v, state.shift);
      const Vec weight_in = merge_weight(sum_in[v], shift_in[v], state.add_in, state.shift);
      const Vec weight_out = merge_weight(sum_out[v], shift_out[v], state.add_out, state.shift);
      const Vec sum = sum_in[v] * weight_in + sum_out[v] * weight_out;
      sum_in.reset(v), sum_in.add(v, sum);
      for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc* to = acc_in + d * rows.stride + v * kLanes<Acc>;
        store(to, load<Vec>(to) * weight_in + load<Vec>(acc_out + d * rows.stride + v * kLanes<Acc>) * weight_out);
      }
    }
    finish<kVecs>(rows, shift);
  }

  // What a state measured from shift counts beside others measured from total; nothing if it holds no key.
  static Vec merge_weight(Vec sum, Vec shift, WideOf<Acc> add, Vec total) {
    const Vec weight = exp2<Acc>(narrow<Acc>(widen<Acc>(shift) + add * kLog2E - widen<Acc>(total)));
    return select(less(Vec{}, sum), weight, sum);
  }

  struct State {
    WideOf<Acc> tau;              // natural units per raw score
    WideOf<Acc> add_in, add_out;  // what the rule adds to each population, natural units; common terms left out
    Vec top_in, top_out;          // largest tau * s of each population, -inf for one without keys
    Vec shift;                    // largest modulated score, 0 for a row without keys
  };

  // From the extremes met so far, those of the row: what the softmax is measured from.
  State reference_points(const StripRows<Acc>& rows, int v) const {
    const Acc inf = __builtin_inf();
    const WideOf<Acc> c = widen<Acc>(rows.strength[v]);
    State state;
    state.tau = temperature<Acc>(p.modulation, c) * p.scale;
    const Additions<Acc> add(p, c, raw_max(v), raw_min(v));
    state.add_in = add.matched - add.common(p.modulation);
    state.add_out = add.others - add.common(p.modulation);
    const Vec tau = narrow<Acc>(state.tau * kLog2E);
    const auto top = [&](Vec max, Vec min) {
      const Vec extreme = select(less(tau, Vec{}), min, max) * tau;
      return select(less(max, min), set1<Acc>(-inf), extreme);
    };
    state.top_in = top(in_max[v], in_min[v]);
    state.top_out = top(out_max[v], out_min[v]);
    const Vec top_in = state.top_in + narrow<Acc>(state.add_in * kLog2E),
              top_out = state.top_out + narrow<Acc>(state.add_out * kLog2E);
    const Vec largest = select(less(top_in, top_out), top_out, top_in);
    state.shift = select(less(set1<Acc>(-inf), largest), largest, Vec{});
    return state;
  }

  Vec raw_max(int v) const { return select(less(in_max[v], out_max[v]), out_max[v], in_max[v]); }
  Vec raw_min(int v) const { return select(less(in_min[v], out_min[v]), in_min[v], out_min[v]); }

  // A state measured from a new maximum.
  void rescale(Acc* acc, int64_t stride, int v, RowSums<Acc>& sum, Lanes<Acc>& shift, Vec top) {
    const Vec next = select(less(set1<Acc>(-__builtin_inf()), top), top, shift[v]);
    const Vec alpha = select(less(Vec{}, sum[v]), exp2<Acc>(shift[v] - next), set1<Acc>(1));
    shift.set(v, next);
    sum.value.set(v, sum.value[v] * alpha), sum.rounded_off.set(v, sum.rounded_off[v] * alpha);
    for (int64_t d = 0; d < p.head_dim; ++d) {
      Acc* to = acc + d * stride + v * kLanes<Acc>;
      store(to, load<Vec>(to) * alpha);
    }
  }

  struct Populations {
    bool matched, others;
  };

  // Which populations a block of keys may hold for the strip; both when in doubt.
  Populations populations(const StripRows<Acc>& rows, KeyRun block) const {
    int32_t any = 0, all = -1;
    for (int64_t j = block.begin; j < block.end; ++j) {
      const int32_t word = *p.k_regions.at<int32_t>(rows.batch, j);
      any |= word, all &= word;
    }
    return {(any & rows.any_word) != 0, (all & rows.all_words) == 0 && p.modulation != Modulation::kMask};
  }

  void pack_queries(const StripRows<Acc>& rows) {
    const T* head = p.q.at<T>(rows.batch, rows.head);
    const auto row = [&](int64_t r) { return head + rows.token[r] * p.q.strides[2]; };
    if constexpr (kDot) {
      pack_pair_columns(row, rows);
    } else {
      pack_columns<T>(row, rows.count, rows.stride, p.head_dim, q_panel);
    }
  }

  // A row of bfloat16 pairs is a row of 32-bit words; an odd last value gets a zero beside it.
  template <class Row>
  void pack_pair_columns(const Row& row, const StripRows<Acc>& rows) {
    const auto words = [&](int64_t r) { return reinterpret_cast<const float*>(row(r)); };
    float* panel = reinterpret_cast<float*>(q_panel);
    pack_columns<float>(words, rows.count, rows.stride, p.head_dim / 2, panel);
    if (p.head_dim % 2 == 0) return;
    for (int64_t r = 0; r < rows.stride; ++r) {
      q_panel[(depth - 1) * rows.stride + r].bits = row(r < rows.count ? r : 0)[p.head_dim - 1].bits;
    }
  }

  // Points at the chunk's keys and values, packing what the products cannot read in place; a head's only chunk stays
  // packed.
  void prepare(const StripRows<Acc>& rows, int64_t begin, int64_t end) {
    const T* k = p.k.at<T>(rows.batch, rows.key_head, begin);
    const T* v = p.v.at<T>(rows.batch, rows.key_head, begin);
    k_data = reinterpret_cast<const char*>(pack_keys ? static_cast<const void*>(k_packed) : k);
    v_data = reinterpret_cast<const char*>(kPackValues ? static_cast<const void*>(v_packed) : v);
    k_row_bytes = pack_keys ? depth * sizeof(Elem) : p.k.strides[2] * sizeof(T);
    v_row_bytes = sizeof(Elem);
    v_step_bytes = kPackValues ? p.head_dim * sizeof(Elem) : p.v.strides[2] * sizeof(T);
    const int64_t head = rows.batch * p.num_heads + rows.key_head;
    if (packed_head == head && packed_begin == begin) return;
    packed_head = head, packed_begin = begin;
    if constexpr (kDot) {
      if (pack_keys) pack_odd_keys(k, end - begin);
      pack_value_pairs(v, end - begin);
    } else if constexpr (kPackValues) {
      pack_rows<T>(k, p.k.strides[2], end - begin, p.head_dim, k_packed, p.head_dim);
      pack_rows<T>(v, p.v.strides[2], end - begin, p.head_dim, v_packed, p.head_dim);
    }
  }

  void pack_odd_keys(const T* k, int64_t count) {
    for (int64_t j = 0; j < count; ++j, k += p.k.strides[2]) {
      k_packed[j * depth + depth - 1].bits = k[p.head_dim - 1].bits;
      std::memcpy(k_packed + j * depth, k, (p.head_dim - 1) * sizeof(T));
    }
  }

  void pack_value_pairs(const T* v, int64_t count) {
    for (int64_t j = 0; j < count; j += 2, v += 2 * p.v.strides[2]) {
      Pair* to = v_packed + j / 2 * p.head_dim;
      const T* next = v + p.v.strides[2];
      if (j + 1 < count) {
        for (int64_t d = 0; d < p.head_dim; ++d) to[d].bits = v[d].bits | (uint32_t)next[d].bits << 16;
      } else {
        for (int64_t d = 0; d < p.head_dim; ++d) to[d].bits = v[d].bits;
      }
    }
  }

  // Raw scores of keys [begin, end), stored by their place in the chunk, and the extremes of both populations.
  template <int kVecs>
  void score(const StripRows<Acc>& rows, int64_t chunk_begin, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j += kTileRows) {
      const int64_t count = end - j < kTileRows ? end - j : kTileRows;
      Acc* to = scores + (j - chunk_begin) * rows.stride;
      accumulate<Elem, kVecs>(k_data + (j - chunk_begin) * k_row_bytes, k_row_bytes, sizeof(Elem), q_panel, rows.stride,
                              depth, to, rows.stride, count, true);
      for (int v = 0; v < kVecs; ++v) meet_extremes(rows, j, count, v, to + v * kLanes<Acc>);
    }
  }

  // With `mask`, also clears what the others hold, so that no value of theirs matters.
  void meet_extremes(const StripRows<Acc>& rows, int64_t begin, int64_t count, int v, Acc* at) {
    const bool mask = p.modulation == Modulation::kMask;
    const auto row_words = rows.word_lanes(v);
    const int32_t* words = p.k_regions.at<int32_t>(rows.batch, begin);
    Vec max_in = in_max[v], min_in = in_min[v], max_out = out_max[v], min_out = out_min[v];
    for (int64_t j = 0; j < count; ++j, at += rows.stride) {
      const Vec s = load<Vec>(at);
      const auto matched = meet(row_words, set1_int<Acc>(words[j * p.k_regions.strides[1]]));
      max_where(max_in, matched, s), min_where(min_in, matched, s);
      max_where(max_out, invert(matched), s), min_where(min_out, invert(matched), s);
      if (mask) store(at, select(matched, s, Vec{}));
    }
    in_max.set(v, max_in), in_min.set(v, min_in), out_max.set(v, max_out), out_min.set(v, min_out);
  }

  // The weights of a run of keys, their sum, and their product with the values.
  template <int kVecs>
  void weigh_run(const StripRows<Acc>& rows, int64_t chunk_begin, KeyRun run, const Exponents& exponents,
                 RowSums<Acc>& sum, Acc* acc) {
    for (int64_t begin = run.begin; begin < run.end; begin += kKeyBlock) {
      const int64_t count = run.end - begin < kKeyBlock ? run.end - begin : kKeyBlock;
      const Acc* from = scores + (begin - chunk_begin) * rows.stride;
      for (int v = 0; v < kVecs; ++v) {
        const auto weight = [&](int64_t j) {
          const auto word = *p.k_regions.at<int32_t>(rows.batch, begin + j);
          const auto matched = meet(rows.word_lanes(v), set1_int<Acc>(word));
          return exponents.weight(v, load<Vec>(from + j * rows.stride + v * kLanes<Acc>), matched);
        };
        Elem* to = weights + v * kLanes<Acc>;
        sum.add(v, weigh(weight, count, to, rows.stride));
      }
      const char* values = v_data + (begin - chunk_begin) / kStep * v_step_bytes;
      accumulate<Elem, kVecs>(values, v_row_bytes, v_step_bytes, weights, rows.stride, (count + kStep - 1) / kStep, acc,
                              rows.stride, p.head_dim);
    }
  }

  // One register column of weights; returns its sum.
  template <class Weight>
  static Vec weigh(const Weight& weight, int64_t count, Elem* to, int64_t stride) {
    Vec sum{};
    if constexpr (kDot) {
      using Int = IntOf<Acc>;
      for (int64_t j = 0; j < count; j += 2, to += stride) {
        const Vec first = weight(j), second = j + 1 < count ? weight(j + 1) : Vec{};
        sum += first + second;
        const Int low = (Int)first + 0x8000, high = (Int)second + 0x8000;  // to the nearest bfloat16
        store(to, (Int)((Simd<float>::Int)high & (int32_t)0xffff0000) | ((low >> 16) & 0xffff));
      }
    } else {
      for (int64_t j = 0; j < count; ++j, to += stride) {
        const Vec value = weight(j);
        sum += value;
        store(to, value);
      }
    }
    return sum;
  }

  template <int kVecs>
  void finish(const StripRows<Acc>& rows, const Lanes<Acc>& shift) {
    Lanes<Acc> sums, inverse;
    double offset[kMaxRows];
    for (int v = 0; v < kVecs; ++v) {
      const Vec sum = sum_in[v];
      sums.set(v, sum);
      inverse.set(v, select(less(Vec{}, sum), 1 / sum, sum));  // 0 stays 0, NaN stays NaN
      const Additions<Acc> add(p, widen<Acc>(rows.strength[v]), raw_max(v), raw_min(v));
      store(offset + v * kLanes<Acc>, add.common(p.modulation));
    }
    T* out = p.out.at<T>(rows.batch, rows.head);
    const auto row = [&](int64_t r) { return out + rows.token[r] * p.out.strides[2]; };
    unpack_columns<T>(acc_in, inverse.x, rows.count, rows.stride, p.head_dim, row);
    for (int64_t r = 0; r < rows.count; ++r) {
      const Acc sum = sums.x[r], log_sum = sizeof(Acc) == 4 ? __builtin_logf(sum) : __builtin_log(sum);
      const double lse = shift.x[r] * kLn2 + log_sum + offset[r];
      if (p.lse.data) *p.lse.at<Acc>(rows.batch, rows.head, rows.token[r]) = sum == 0 ? log_sum : lse;
      if (!p.stats.data) continue;
      Acc* stats = p.stats.at<Acc>(rows.batch, rows.head, rows.token[r]);
      stats[kRawMax] = raw_max(r / kLanes<Acc>)[r % kLanes<Acc>];
      stats[kRawMin] = raw_min(r / kLanes<Acc>)[r % kLanes<Acc>];
      stats[kShift] = shift.x[r];
      stats[kSum] = sum;
    }
  }
};

}  // namespace DENSE_ATTN_ISA
