// Forward: a strip of rows against all keys. Lanes are query rows, so nothing is ever reduced across a register, and
// keys and values are read where they lie, one broadcast scalar at a time.
#pragma once

#include "cpu/layout_attention_state.h"

namespace DENSE_ATTN_ISA {

constexpr int64_t kKeyBlock = 64;          // keys weighed at once, so that their weights stay in L1
constexpr int64_t kStripKeys = 16384;      // most keys whose scores are held at once: 3 MB, still in a cache
constexpr int64_t kPackedBytes = 8 << 20;  // most of their packed copies
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
  static constexpr bool kConverts = !std::is_same_v<T, Acc>;

  const LayoutAttentionParams& p;
  const int64_t depth;  // Elems per key
  const int64_t row_size;  // Elems of a packed row
  const int64_t chunk;     // keys per pass; one chunk when the strip fits
  const bool pack_keys, pack_values;
  Elem *q_panel, *weights, *k_packed, *v_packed;
  Acc *scores, *acc_in, *acc_out;
  size_t scratch_bytes;
  int64_t packed_head = -1, packed_begin = -1;
  const char *k_data, *v_data;  // key and value of the chunk's first key
  int64_t k_row_bytes, v_row_bytes, v_step_bytes;
  KeyWords<kStep> words;
  RowState<Acc> state;  // its sum that of all keys, or of the matched ones until both are merged
  RowSums<Acc> sum_out;

  Forward(const LayoutAttentionParams& params, void* scratch)
      : p(params),
        depth((p.head_dim + kStep - 1) / kStep),
        row_size(kDot ? depth : p.head_dim),
        chunk(keys_per_chunk()),
        pack_keys(kDot ? p.head_dim % 2 : kConverts || gathers()),
        pack_values(kConverts || pack_keys) {
    Carver carver{static_cast<char*>(scratch)};
    q_panel = carver.take<Elem>(depth * kMaxRows);
    weights = carver.take<Elem>(kKeyBlock / kStep * kMaxRows);
    acc_in = carver.take<Acc>(p.head_dim * kMaxRows);
    acc_out = carver.take<Acc>(chunk < p.seqlen_k ? p.head_dim * kMaxRows : 0);
    scores = carver.take<Acc>(chunk * kMaxRows);
    k_packed = carver.take<Elem>(pack_keys ? chunk * row_size : 0);
    v_packed = carver.take<Elem>(pack_values ? (kDot ? (chunk + 1) / 2 * p.head_dim : chunk * row_size) : 0);
    words.take(carver, p.seqlen_k);
    scratch_bytes = carver.used;
  }

  int64_t keys_per_chunk() const {
    const int64_t packed = kConverts ? p.seqlen_k * 2 * row_size * (int64_t)sizeof(Elem) : 0;
    const bool one_chunk = p.seqlen_k <= kStripKeys && packed <= kPackedBytes;
    return one_chunk || p.seqlen_k < kChunkKeys ? p.seqlen_k : kChunkKeys;
  }

  // Rows that could be read where they lie are copied for a head with many strips: other heads' lie between them, and
  // every page of a long head costs a walk, in every strip.
  bool gathers() const {
    const int64_t bytes = p.seqlen_k * 2 * row_size * (int64_t)sizeof(Elem);
    return chunk == p.seqlen_k && bytes <= kPackedBytes && Strips(p.seqlen_q, kLanes<Acc>).count > 3;
  }

  static int64_t items(const LayoutAttentionParams& p) {
    return p.batch * p.num_heads * Strips(p.seqlen_q, kLanes<Acc>).count;
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
    for (int v = 0; v < kVecs; ++v) state.reset(v), sum_out.reset(v);
    words.fill(p, rows.batch, rows.keys);
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
      const auto from = state.reference(p, rows, v);
      shift.set(v, from.shift);
      exponents.set_tau(v, from.tau);
      exponents.set_in(v, from.add_in, from.shift);
      exponents.set_out(v, from.add_out, from.shift);
    }
    for (KeyRun run = next_run(p, rows, 0, keys); run.begin < keys; run = next_run(p, rows, run.end, keys)) {
      weigh_run<kVecs>(rows, 0, run, exponents, state.sum, acc_in);
    }
    state.template finish<T>(p, rows, shift, acc_in);
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
        const auto from = state.reference(p, rows, v);
        rescale(acc_in, rows.stride, v, state.sum, shift_in, from.top_in);
        rescale(acc_out, rows.stride, v, sum_out, shift_out, from.top_out);
        matched.set_tau(v, from.tau), matched.set_in(v, nothing, shift_in[v]), matched.set_out(v, excluded, Vec{});
        others.set_tau(v, from.tau), others.set_in(v, excluded, Vec{}), others.set_out(v, nothing, shift_out[v]);
      }
      for (KeyRun run = next_run(p, rows, begin, end); run.begin < end; run = next_run(p, rows, run.end, end)) {
        for (int64_t j = run.begin; j < run.end; j += kKeyBlock) {
          const KeyRun block{j, j + kKeyBlock < run.end ? j + kKeyBlock : run.end};
          const Populations present = populations(rows, block);
          if (present.matched) weigh_run<kVecs>(rows, begin, block, matched, state.sum, acc_in);
          if (present.others) weigh_run<kVecs>(rows, begin, block, others, sum_out, acc_out);
        }
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      const auto from = state.reference(p, rows, v);
      shift.set(v, from.shift);
      const Vec weight_in = merge_weight(state.sum[v], shift_in[v], from.add_in, from.shift);
      const Vec weight_out = merge_weight(sum_out[v], shift_out[v], from.add_out, from.shift);
      const Vec sum = state.sum[v] * weight_in + sum_out[v] * weight_out;
      state.sum.reset(v), state.sum.add(v, sum);
      for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc* to = acc_in + d * rows.stride + v * kLanes<Acc>;
        store(to, load<Vec>(to) * weight_in + load<Vec>(acc_out + d * rows.stride + v * kLanes<Acc>) * weight_out);
      }
    }
    state.template finish<T>(p, rows, shift, acc_in);
  }

  // What a state measured from shift counts beside others measured from total; nothing if it holds no key.
  static Vec merge_weight(Vec sum, Vec shift, WideOf<Acc> add, Vec total) {
    const Vec weight = exp2<Acc>(narrow<Acc>(widen<Acc>(shift) + add * kLog2E - widen<Acc>(total)));
    return select(less(Vec{}, sum), weight, sum);
  }

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
      pack_pair_columns(row, rows.count, rows.stride, p.head_dim, q_panel);
    } else {
      pack_columns<T>(row, rows.count, rows.stride, p.head_dim, q_panel);
    }
  }

  // Points at the chunk's keys and values, packing what the products cannot read in place; a head's only chunk stays
  // packed.
  void prepare(const StripRows<Acc>& rows, int64_t begin, int64_t end) {
    const T* k = p.k.at<T>(rows.batch, rows.key_head, begin);
    const T* v = p.v.at<T>(rows.batch, rows.key_head, begin);
    k_data = reinterpret_cast<const char*>(pack_keys ? static_cast<const void*>(k_packed) : k);
    v_data = reinterpret_cast<const char*>(pack_values ? static_cast<const void*>(v_packed) : v);
    k_row_bytes = pack_keys ? row_size * sizeof(Elem) : p.k.strides[2] * sizeof(T);
    v_row_bytes = sizeof(Elem);
    v_step_bytes = !pack_values ? p.v.strides[2] * sizeof(T) : (kDot ? p.head_dim : row_size) * sizeof(Elem);
    const int64_t head = rows.batch * p.num_heads + rows.key_head;
    if (packed_head == head && packed_begin == begin) return;
    packed_head = head, packed_begin = begin;
    if constexpr (kDot) {
      if (pack_keys) pack_odd_keys(k, end - begin);
      pack_value_pairs(v, end - begin);
    } else if (pack_keys) {
      pack_rows<T>(k, p.k.strides[2], end - begin, p.head_dim, k_packed, row_size);
      pack_rows<T>(v, p.v.strides[2], end - begin, p.head_dim, v_packed, row_size);
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
      state.template meet_keys<kVecs>(rows, words, j, j + count, to);
    }
  }

  // The weights of a run of keys, their sum, and their product with the values.
  template <int kVecs>
  void weigh_run(const StripRows<Acc>& rows, int64_t chunk_begin, KeyRun run, const Exponents& exponents,
                 RowSums<Acc>& sum, Acc* acc) {
    for (int64_t begin = run.begin; begin < run.end; begin += kKeyBlock) {
      const int64_t count = run.end - begin < kKeyBlock ? run.end - begin : kKeyBlock;
      const Acc* from = scores + (begin - chunk_begin) * rows.stride;
      for (int v = 0; v < kVecs; ++v) {
        const int64_t lane = v * kLanes<Acc>, end = begin + count;
        const auto weigh = p.modulation == Modulation::kMask ? weigh_keys<true, Exponents, Acc, Elem, kStep>
                                                             : weigh_keys<false, Exponents, Acc, Elem, kStep>;
        sum.add(v, weigh(exponents, rows, words, v, begin, end, from + lane, weights + lane));
      }
      const char* values = v_data + (begin - chunk_begin) / kStep * v_step_bytes;
      accumulate<Elem, kVecs>(values, v_row_bytes, v_step_bytes, weights, rows.stride, (count + kStep - 1) / kStep, acc,
                              rows.stride, p.head_dim);
    }
  }
};

}  // namespace DENSE_ATTN_ISA
