// Forward: a strip of rows against all keys. Lanes are query rows, so nothing is ever reduced across a register, and
// keys and values are read where they lie, one broadcast scalar at a time.
#pragma once

#include "cpu/layout_attention_rows.h"

namespace DENSE_ATTN_ISA {

constexpr int64_t kKeyBlock = 64;               // keys weighed at once, so that their weights stay in L1
constexpr int64_t kStripBytes = 4 << 20;        // scores and packed keys of a strip; more keys than fit go in chunks

// kDot: products over bfloat16 pairs by the dot-product instruction.
template <class T, bool kDot>
struct Forward {
  using Acc = typename Dtype<T>::Acc;
  using Elem = std::conditional_t<kDot, Pair, Acc>;
  using Vec = VecOf<Acc>;
  static constexpr int64_t kStep = kDot ? 2 : 1;
  static constexpr int64_t kMaxRows = kRowVecs * kLanes<Acc>;
  static constexpr bool kPackValues = kDot || !std::is_same_v<T, Acc>;

  const LayoutAttentionParams& p;
  const int64_t depth;       // Elems per key
  const bool pack_keys;
  const int64_t chunk;       // keys per pass; one chunk when the strip fits
  Elem *q_panel, *weights, *k_packed, *v_packed;
  Acc *scores, *acc_in, *acc_out;
  size_t scratch_bytes;
  int64_t packed_head = -1, packed_begin = -1;
  const char *k_data, *v_data;  // key and value of the chunk's first key
  int64_t k_row_bytes, v_row_bytes, v_step_bytes;
  Lanes<Acc> in_max, in_min, out_max, out_min, sum_in, sum_out;

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
    const int64_t key_bytes = kMaxRows * sizeof(Acc) + (pack_keys ? depth * sizeof(Elem) : 0) +
                              (kPackValues ? p.head_dim * sizeof(Elem) / kStep : 0);
    const int64_t fitting = kStripBytes / key_bytes / kKeyBlock * kKeyBlock;
    return p.seqlen_k < fitting ? p.seqlen_k : fitting;
  }

  void run(int64_t item) {
    const StripRows<Acc> rows(p, item);
    switch (rows.stride / kLanes<Acc>) {
      case 1: return strip<1>(rows);
      case 2: return strip<2>(rows);
      default: return strip<3>(rows);
    }
  }

  template <int kVecs>
  void strip(const StripRows<Acc>& rows) {
    const Acc inf = __builtin_inf();
    for (int v = 0; v < kVecs; ++v) {
      in_max.set(v, set1<Acc>(-inf)), out_max.set(v, set1<Acc>(-inf));
      in_min.set(v, set1<Acc>(inf)), out_min.set(v, set1<Acc>(inf));
      sum_in.set(v, Vec{}), sum_out.set(v, Vec{});
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
    prepare(rows, 0, chunk);
    for (KeyRun run = next_run(p, rows, 0, chunk); run.begin < chunk; run = next_run(p, rows, run.end, chunk)) {
      score<kVecs>(rows, run.begin, run.begin, run.end);
    }
    Lanes<Acc> tau, offset_in, offset_out, shift;
    for (int v = 0; v < kVecs; ++v) {
      const State state = reference_points(rows, v);
      tau.set(v, state.tau), shift.set(v, state.shift);
      offset_in.set(v, state.gap - state.shift), offset_out.set(v, state.excluded - state.shift);
    }
    for (KeyRun run = next_run(p, rows, 0, chunk); run.begin < chunk; run = next_run(p, rows, run.end, chunk)) {
      weigh_run<kVecs>(rows, 0, run, tau, offset_in, offset_out, sum_in, acc_in);
    }
    finish<kVecs>(rows, shift);
  }

  // Two online states, one a population, over chunks of keys; merged once the extremes of the row are known.
  template <int kVecs>
  void many_chunks(const StripRows<Acc>& rows) {
    const Acc inf = __builtin_inf();
    Lanes<Acc> tau, offset_in, offset_out, excluded, shift_in, shift_out, shift;
    for (int v = 0; v < kVecs; ++v) {
      shift_in.set(v, Vec{}), shift_out.set(v, Vec{}), excluded.set(v, set1<Acc>(-inf));
    }
    for (int64_t begin = 0; begin < p.seqlen_k; begin += chunk) {
      const int64_t end = begin + chunk < p.seqlen_k ? begin + chunk : p.seqlen_k;
      prepare(rows, begin, end);
      for (KeyRun run = next_run(p, rows, begin, end); run.begin < end; run = next_run(p, rows, run.end, end)) {
        score<kVecs>(rows, begin, run.begin, run.end);
      }
      for (int v = 0; v < kVecs; ++v) {
        const State state = reference_points(rows, v);
        tau.set(v, state.tau);
        rescale(acc_in, rows.stride, v, sum_in, shift_in, state.top_in);
        rescale(acc_out, rows.stride, v, sum_out, shift_out, state.top_out);
        offset_in.set(v, -shift_in[v]), offset_out.set(v, -shift_out[v]);
      }
      for (KeyRun run = next_run(p, rows, begin, end); run.begin < end; run = next_run(p, rows, run.end, end)) {
        for (int64_t j = run.begin; j < run.end; j += kKeyBlock) {
          const KeyRun block{j, j + kKeyBlock < run.end ? j + kKeyBlock : run.end};
          const Populations present = populations(rows, block);
          if (present.matched) weigh_run<kVecs>(rows, begin, block, tau, offset_in, excluded, sum_in, acc_in);
          if (present.others) weigh_run<kVecs>(rows, begin, block, tau, excluded, offset_out, sum_out, acc_out);
        }
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      const State state = reference_points(rows, v);
      shift.set(v, state.shift);
      const Vec w_in = exp2(shift_in[v] + state.gap - state.shift);
      const Vec w_out = exp2(shift_out[v] + state.excluded - state.shift);
      const Vec has_in = select(less(Vec{}, sum_in[v]), w_in, select(less(sum_in[v], set1<Acc>(1)), Vec{}, sum_in[v]));
      const Vec has_out = select(less(Vec{}, sum_out[v]), w_out, select(less(sum_out[v], set1<Acc>(1)), Vec{}, sum_out[v]));
      sum_in.set(v, sum_in[v] * has_in + sum_out[v] * has_out);
      for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc* to = acc_in + d * rows.stride + v * kLanes<Acc>;
        store(to, load<Vec>(to) * has_in + load<Vec>(acc_out + d * rows.stride + v * kLanes<Acc>) * has_out);
      }
    }
    finish<kVecs>(rows, shift);
  }

  struct State {
    Vec tau;       // log2 units per raw score
    Vec gap;       // what matched keys have over the others, log2 units
    Vec excluded;  // 0, or -inf where the others have no part
    Vec top_in, top_out;  // largest tau * s of each population
    Vec shift;     // largest modulated score, 0 for a row without keys
  };

  // From the extremes met so far, those of the row: what the softmax is measured from.
  State reference_points(const StripRows<Acc>& rows, int v) const {
    const Acc inf = __builtin_inf();
    const Vec c = rows.strength[v];
    State state;
    state.tau = temperature<Acc>(p.modulation, c) * (Acc)(p.scale * kLog2E);
    Vec matched, others;
    additions<Acc>(p.modulation, c, row_max(v), row_min(v), matched, others);
    const bool mask = p.modulation == Modulation::kMask;
    state.excluded = mask ? others : Vec{};
    state.gap = mask ? Vec{} : (matched - others) * (Acc)kLog2E;
    const auto top = [&](Vec max, Vec min) {
      const Vec extreme = select(less(state.tau, Vec{}), min, max) * state.tau;
      return select(less(max, min), set1<Acc>(-inf), extreme);  // max < min: a population without keys
    };
    state.top_in = top(in_max[v], in_min[v]);
    state.top_out = top(out_max[v], out_min[v]);
    const Vec top_in = state.top_in + state.gap, top_out = state.top_out + state.excluded;
    const Vec largest = select(less(top_in, top_out), top_out, top_in);
    state.shift = select(less(set1<Acc>(-inf), largest), largest, Vec{});
    return state;
  }

  Vec row_max(int v) const {
    const Acc factor = p.scale;
    if (factor < 0) return factor * select(less(in_min[v], out_min[v]), in_min[v], out_min[v]);
    return factor * select(less(in_max[v], out_max[v]), out_max[v], in_max[v]);
  }
  Vec row_min(int v) const {
    const Acc factor = p.scale;
    if (factor < 0) return factor * select(less(in_max[v], out_max[v]), out_max[v], in_max[v]);
    return factor * select(less(in_min[v], out_min[v]), in_min[v], out_min[v]);
  }

  // A state measured from a new maximum.
  void rescale(Acc* acc, int64_t stride, int v, Lanes<Acc>& sum, Lanes<Acc>& shift, Vec top) {
    const Vec next = select(less(set1<Acc>(-__builtin_inf()), top), top, shift[v]);
    const Vec alpha = select(less(Vec{}, sum[v]), exp2(shift[v] - next), set1<Acc>(1));
    shift.set(v, next);
    sum.set(v, sum[v] * alpha);
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
      q_panel[(depth - 1) * rows.stride + r].bits = r < rows.count ? row(r)[p.head_dim - 1].bits : 0;
    }
  }

  // Points at the chunk's keys and values, packing what the products cannot read in place; a head's only chunk stays packed.
  void prepare(const StripRows<Acc>& rows, int64_t begin, int64_t end) {
    const T* k = p.k.at<T>(rows.batch, rows.head, begin);
    const T* v = p.v.at<T>(rows.batch, rows.head, begin);
    k_data = reinterpret_cast<const char*>(pack_keys ? static_cast<const void*>(k_packed) : k);
    v_data = reinterpret_cast<const char*>(kPackValues ? static_cast<const void*>(v_packed) : v);
    k_row_bytes = pack_keys ? depth * sizeof(Elem) : p.k.strides[2] * sizeof(T);
    v_row_bytes = sizeof(Elem);
    v_step_bytes = kPackValues ? p.head_dim * sizeof(Elem) : p.v.strides[2] * sizeof(T);
    const int64_t head = rows.batch * p.num_heads + rows.head;
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
  template <int kVecs, int kRows = kTileRows>
  void score(const StripRows<Acc>& rows, int64_t chunk_begin, int64_t begin, int64_t end) {
    const bool mask = p.modulation == Modulation::kMask;
    for (; begin + kRows <= end; begin += kRows) {
      Vec acc[kRows][kVecs] = {};
      const char* keys = k_data + (begin - chunk_begin) * k_row_bytes;
      tile_product<Elem>(keys, k_row_bytes, sizeof(Elem), q_panel, rows.stride, depth, acc);
      Acc* to = scores + (begin - chunk_begin) * rows.stride;
      const int32_t* words = p.k_regions.at<int32_t>(rows.batch, begin);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const auto row_words = rows.word_lanes(v);
        Vec max_in = in_max[v], min_in = in_min[v], max_out = out_max[v], min_out = out_min[v];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const auto matched = meet(row_words, set1_int<Acc>(words[r * p.k_regions.strides[1]]));
          max_where(max_in, matched, acc[r][v]), min_where(min_in, matched, acc[r][v]);
          max_where(max_out, invert(matched), acc[r][v]), min_where(min_out, invert(matched), acc[r][v]);
          store(to + r * rows.stride + v * kLanes<Acc>, mask ? select(matched, acc[r][v], Vec{}) : acc[r][v]);
        }
        in_max.set(v, max_in), in_min.set(v, min_in), out_max.set(v, max_out), out_min.set(v, min_out);
      }
    }
    if constexpr (kRows > 1) {
      if (begin < end) score<kVecs, kRows / 2>(rows, chunk_begin, begin, end);
    }
  }

  // Weights 2^(tau * s + offset of the key's population), their sum, and their product with the values.
  template <int kVecs>
  void weigh_run(const StripRows<Acc>& rows, int64_t chunk_begin, KeyRun run, const Lanes<Acc>& tau,
                 const Lanes<Acc>& offset_in, const Lanes<Acc>& offset_out, Lanes<Acc>& sum, Acc* acc) {
    for (int64_t begin = run.begin; begin < run.end; begin += kKeyBlock) {
      const int64_t count = run.end - begin < kKeyBlock ? run.end - begin : kKeyBlock;
      const Acc* from = scores + (begin - chunk_begin) * rows.stride;
      for (int v = 0; v < kVecs; ++v) {
        const auto weight = [&](int64_t j) {
          const auto word = *p.k_regions.at<int32_t>(rows.batch, begin + j);
          const auto matched = meet(rows.word_lanes(v), set1_int<Acc>(word));
          const Vec offset = select(matched, offset_in[v], offset_out[v]);
          return exp2(load<Vec>(from + j * rows.stride + v * kLanes<Acc>) * tau[v] + offset);
        };
        Elem* to = weights + v * kLanes<Acc>;
        sum.set(v, sum[v] + weigh(weight, count, to, rows.stride));
      }
      const char* values = v_data + (begin - chunk_begin) / kStep * v_step_bytes;
      accumulate<Elem, kVecs>(values, v_row_bytes, v_step_bytes, weights, rows.stride, (count + kStep - 1) / kStep,
                              acc, rows.stride, p.head_dim);
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
    Lanes<Acc> inverse, max, min, offset;
    for (int v = 0; v < kVecs; ++v) {
      const Vec sum = sum_in[v];
      inverse.set(v, select(less(Vec{}, sum), 1 / sum, sum));  // 0 stays 0, NaN stays NaN
      max.set(v, row_max(v)), min.set(v, row_min(v));
      offset.set(v, p.modulation == Modulation::kRange ? rows.strength[v] * min[v] : Vec{});
    }
    T* out = p.out.at<T>(rows.batch, rows.head);
    const auto row = [&](int64_t r) { return out + rows.token[r] * p.out.strides[2]; };
    unpack_columns<T>(acc_in, inverse.x, rows.count, rows.stride, p.head_dim, row);
    for (int64_t r = 0; r < rows.count; ++r) {
      const Acc log_sum = sizeof(Acc) == 4 ? __builtin_logf(sum_in.x[r]) : __builtin_log(sum_in.x[r]);
      const Acc lse = shift.x[r] * (Acc)kLn2 + log_sum + offset.x[r];
      *p.lse.at<Acc>(rows.batch, rows.head, rows.token[r]) = sum_in.x[r] == 0 ? log_sum : lse;
      *p.row_max.at<Acc>(rows.batch, rows.head, rows.token[r]) = max.x[r];
      *p.row_min.at<Acc>(rows.batch, rows.head, rows.token[r]) = min.x[r];
    }
  }
};

}  // namespace DENSE_ATTN_ISA
