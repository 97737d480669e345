// Forward: a strip of rows against all keys. Lanes are query rows, so nothing is ever reduced across a register, and
// keys and values are read where they lie, one broadcast scalar at a time.
#pragma once

#include <new>

#include "cpu/layout_attention_state.h"

namespace DENSE_ATTN_ISA {

constexpr int64_t kKeyBlock = 64;          // keys weighed at once, so that their weights stay in L1
constexpr int64_t kStripKeys = 16384;      // most keys whose scores are held at once: 3 MB, still in a cache
constexpr int64_t kPackedBytes = 8 << 20;  // most of their packed copies
constexpr int64_t kNearBytes = 1 << 19;    // keys, or values, that stay near while the strips of an item meet them
constexpr int64_t kScoreBytes = 4 << 20;   // most scores of an item's strips where it has more than one
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
  using Strip = DENSE_ATTN_ISA::Strip<Acc, Elem, std::is_same_v<T, Acc>>;
  static constexpr bool kConverts = !std::is_same_v<T, Acc>;

  const LayoutAttentionParams& p;
  const int64_t depth;  // Elems per key
  const int64_t chunk;  // keys per pass; one chunk when the strip fits
  const int64_t near;   // keys that an item's strips meet in turn
  const int64_t strips_per_item;
  const bool pack_keys, pack_values;
  Strip* strips;
  Elem *q_panels, *weights, *k_packed, *v_packed;
  Acc *scores, *accs, *acc_out;
  size_t scratch_bytes;
  int64_t packed_head = -1, packed_begin = -1;
  const char *k_data, *v_data;  // key and value of the chunk's first key
  int64_t k_row_bytes, v_row_bytes, v_step_bytes;
  KeyWords<kStep> words;

  Forward(const LayoutAttentionParams& params, void* scratch)
      : p(params),
        depth((p.head_dim + kStep - 1) / kStep),
        chunk(keys_per_chunk()),
        near(near_keys(p)),
        strips_per_item(strips_of(p)),
        pack_keys(kDot ? p.head_dim % 2 : kConverts || gathers()),
        pack_values(kConverts || pack_keys) {
    Carver carver{static_cast<char*>(scratch)};
    strips = carver.take<Strip>(strips_per_item);
    q_panels = carver.take<Elem>(strips_per_item * depth * kMaxRows);
    weights = carver.take<Elem>(kKeyBlock / kStep * kMaxRows);
    accs = carver.take<Acc>(strips_per_item * p.head_dim * kMaxRows);
    acc_out = carver.take<Acc>(chunk < p.seqlen_k ? p.head_dim * kMaxRows : 0);
    scores = carver.take<Acc>(strips_per_item * chunk * kMaxRows);
    k_packed = carver.take<Elem>(pack_keys ? chunk * depth : 0);
    v_packed = carver.take<Elem>(pack_values ? (kDot ? (chunk + 1) / 2 * p.head_dim : chunk * depth) : 0);
    words.take(carver, p.seqlen_k);
    scratch_bytes = carver.used;
  }

  int64_t keys_per_chunk() const {
    const int64_t packed = kConverts ? p.seqlen_k * 2 * depth * (int64_t)sizeof(Elem) : 0;
    const bool one_chunk = p.seqlen_k <= kStripKeys && packed <= kPackedBytes;
    return one_chunk || p.seqlen_k < kChunkKeys ? p.seqlen_k : kChunkKeys;
  }

  // Rows that could be read where they lie are copied for a head with many strips: other heads' lie between them, and
  // every page of a long head costs a walk, in every strip.
  bool gathers() const {
    const int64_t bytes = p.seqlen_k * 2 * depth * (int64_t)sizeof(Elem);
    const bool apart = p.k.strides[2] > p.head_dim || p.v.strides[2] > p.head_dim;
    return apart && chunk == p.seqlen_k && bytes <= kPackedBytes && strips_per_head(p) > 3;
  }

  // Keys of a row as the products read it, converted where it is.
  static int64_t near_keys(const LayoutAttentionParams& p) {
    return kNearBytes / (p.head_dim * (int64_t)sizeof(Acc)) / kKeyBlock * kKeyBlock;
  }

  // Where a head's keys are not all near, more than one strip, as far as their scores can be kept.
  static int64_t strips_of(const LayoutAttentionParams& p) {
    const int64_t most = kScoreBytes / ((p.seqlen_k + 1) * kMaxRows * (int64_t)sizeof(Acc));
    if (p.seqlen_k <= near_keys(p) || most < 1) return 1;
    return strips_together(most < 4 ? most : 4, p.batch * p.num_heads, strips_per_head(p));
  }

  static int64_t strips_per_head(const LayoutAttentionParams& p) { return Strips(p.seqlen_q, kLanes<Acc>).count; }

  static int64_t items(const LayoutAttentionParams& p) {
    return p.batch * p.num_heads * ((strips_per_head(p) + strips_of(p) - 1) / strips_of(p));
  }

  void run(int64_t item) {
    const int64_t all = strips_per_head(p), items_per_head = (all + strips_per_item - 1) / strips_per_item;
    const int64_t head = item / items_per_head, first = item % items_per_head * strips_per_item;
    const int64_t count = all - first < strips_per_item ? all - first : strips_per_item;
    for (int64_t i = 0; i < count; ++i) start(i, head * all + first + i);
    words.fill(p, strips[0].rows.batch, strips[0].rows.keys);
    if (chunk == p.seqlen_k) one_chunk(count);
    for (int64_t i = 0; i < count; ++i) {
      if (chunk < p.seqlen_k) with_vecs(strips[i].vecs(), [&](auto vecs) { many_chunks<vecs>(strips[i]); });
      strips[i].state.template finish<T>(p, strips[i].rows, strips[i].shift, strips[i].acc);
    }
  }

  void start(int64_t i, int64_t row_strip) {
    const int64_t size = p.head_dim * kMaxRows;
    Strip& strip = *new (strips + i) Strip(p, row_strip, q_panels + i * depth * kMaxRows, accs + i * size,
                                           scores + i * chunk * kMaxRows);
    std::memset(strip.acc, 0, p.head_dim * strip.rows.stride * sizeof(Acc));
    pack_queries(strip);
  }

  // The whole row is at hand: the extremes are known before anything is weighed, so one state serves both populations.
  // The item's strips meet keys in turn while they are near.
  void one_chunk(int64_t count) {
    const int64_t keys = strips[0].rows.keys;
    prepare(strips[0].rows, 0, keys);
    const auto sweep = [&](const auto& f) {
      for (int64_t begin = 0; begin < keys; begin += near) {
        const int64_t end = begin + near < keys ? begin + near : keys;
        for (int64_t i = 0; i < count; ++i) {
          const StripRows<Acc>& rows = strips[i].rows;
          for (KeyRun run = next_run(p, rows, begin, end); run.begin < end; run = next_run(p, rows, run.end, end)) {
            with_vecs(strips[i].vecs(), [&](auto vecs) { f(vecs, strips[i], run); });
          }
        }
      }
    };
    sweep([&](auto vecs, Strip& strip, KeyRun run) { score<vecs>(strip, 0, run); });
    for (int64_t i = 0; i < count; ++i) strips[i].settle(p);
    sweep([&](auto vecs, Strip& strip, KeyRun run) {
      weigh_run<vecs>(strip, 0, run, strip.exponents, strip.state.sum, strip.acc);
    });
  }

  // Two online states, one a population, over chunks of keys; merged once the extremes of the row are known.
  template <int kVecs>
  void many_chunks(Strip& strip) {
    const StripRows<Acc>& rows = strip.rows;
    RowState<Acc>& state = strip.state;
    RowSums<Acc> sum_out;
    const WideOf<Acc> nothing{}, excluded = nothing - __builtin_inf();
    Exponents matched, others;  // those of one population, the other excluded
    Lanes<Acc> shift_in, shift_out;
    for (int v = 0; v < kVecs; ++v) sum_out.reset(v), shift_in.set(v, Vec{}), shift_out.set(v, Vec{});
    std::memset(acc_out, 0, p.head_dim * rows.stride * sizeof(Acc));
    for (int64_t begin = 0; begin < rows.keys; begin += chunk) {
      const int64_t end = begin + chunk < rows.keys ? begin + chunk : rows.keys;
      prepare(rows, begin, end);
      for (KeyRun run = next_run(p, rows, begin, end); run.begin < end; run = next_run(p, rows, run.end, end)) {
        score<kVecs>(strip, begin, run);
      }
      for (int v = 0; v < kVecs; ++v) {
        const auto from = state.reference(p, rows, v);
        rescale(strip.acc, rows.stride, v, state.sum, shift_in, from.top_in);
        rescale(acc_out, rows.stride, v, sum_out, shift_out, from.top_out);
        matched.set_tau(v, from.tau), matched.set_in(v, nothing, shift_in[v]), matched.set_out(v, excluded, Vec{});
        others.set_tau(v, from.tau), others.set_in(v, excluded, Vec{}), others.set_out(v, nothing, shift_out[v]);
      }
      for (KeyRun run = next_run(p, rows, begin, end); run.begin < end; run = next_run(p, rows, run.end, end)) {
        for (int64_t j = run.begin; j < run.end; j += kKeyBlock) {
          const KeyRun block{j, j + kKeyBlock < run.end ? j + kKeyBlock : run.end};
          const Populations present = populations(rows, block);
          if (present.matched) weigh_run<kVecs>(strip, begin, block, matched, state.sum, strip.acc);
          if (present.others) weigh_run<kVecs>(strip, begin, block, others, sum_out, acc_out);
        }
      }
    }
    for (int v = 0; v < kVecs; ++v) {
      const auto from = state.reference(p, rows, v);
      strip.shift.set(v, from.shift);
      const Vec weight_in = merge_weight(state.sum[v], shift_in[v], from.add_in, from.shift);
      const Vec weight_out = merge_weight(sum_out[v], shift_out[v], from.add_out, from.shift);
      const Vec sum = state.sum[v] * weight_in + sum_out[v] * weight_out;
      state.sum.reset(v), state.sum.add(v, sum);
      for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc* to = strip.acc + d * rows.stride + v * kLanes<Acc>;
        store(to, load<Vec>(to) * weight_in + load<Vec>(acc_out + d * rows.stride + v * kLanes<Acc>) * weight_out);
      }
    }
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

  void pack_queries(Strip& strip) {
    const StripRows<Acc>& rows = strip.rows;
    const T* head = p.q.at<T>(rows.batch, rows.head);
    const auto row = [&](int64_t r) { return head + rows.token[r] * p.q.strides[2]; };
    if constexpr (kDot) {
      pack_pair_columns(row, rows.count, rows.stride, p.head_dim, strip.q_panel);
    } else {
      pack_columns<T>(row, rows.count, rows.stride, p.head_dim, strip.q_panel);
    }
  }

  // Points at the chunk's keys and values, packing what the products cannot read in place; a head's only chunk stays
  // packed.
  void prepare(const StripRows<Acc>& rows, int64_t begin, int64_t end) {
    const T* k = p.k.at<T>(rows.batch, rows.key_head, begin);
    const T* v = p.v.at<T>(rows.batch, rows.key_head, begin);
    k_data = reinterpret_cast<const char*>(pack_keys ? static_cast<const void*>(k_packed) : k);
    v_data = reinterpret_cast<const char*>(pack_values ? static_cast<const void*>(v_packed) : v);
    k_row_bytes = pack_keys ? depth * sizeof(Elem) : p.k.strides[2] * sizeof(T);
    v_row_bytes = sizeof(Elem);
    v_step_bytes = !pack_values ? p.v.strides[2] * sizeof(T) : (kDot ? p.head_dim : depth) * sizeof(Elem);
    const int64_t head = rows.batch * p.num_heads + rows.key_head;
    if (packed_head == head && packed_begin == begin) return;
    packed_head = head, packed_begin = begin;
    if constexpr (kDot) {
      if (pack_keys) pack_odd_keys(k, end - begin);
      pack_value_pairs(v, end - begin);
    } else if (pack_keys) {
      pack_rows<T>(k, p.k.strides[2], end - begin, p.head_dim, k_packed, depth);
      pack_rows<T>(v, p.v.strides[2], end - begin, p.head_dim, v_packed, depth);
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

  // Raw scores of a run of keys, stored by their place in the chunk, and the extremes of both populations.
  template <int kVecs>
  void score(Strip& strip, int64_t chunk_begin, KeyRun run) {
    const int64_t stride = strip.rows.stride;
    for (int64_t j = run.begin; j < run.end; j += kTileRows) {
      const int64_t count = run.end - j < kTileRows ? run.end - j : kTileRows;
      Acc* to = strip.scores + (j - chunk_begin) * stride;
      accumulate<Elem, kVecs>(k_data + (j - chunk_begin) * k_row_bytes, k_row_bytes, sizeof(Elem), strip.q_panel,
                              stride, depth, to, stride, count, true);
      strip.state.template meet_keys<kVecs>(strip.rows, words, j, j + count, to);
    }
  }

  // The weights of a run of keys, their sum, and their product with the values.
  template <int kVecs>
  void weigh_run(const Strip& strip, int64_t chunk_begin, KeyRun run, const Exponents& exponents, RowSums<Acc>& sum,
                 Acc* acc) {
    const StripRows<Acc>& rows = strip.rows;
    const auto weigh = p.modulation == Modulation::kMask ? weigh_keys<true, Exponents, Acc, Elem, kStep>
                                                         : weigh_keys<false, Exponents, Acc, Elem, kStep>;
    for (int64_t begin = run.begin; begin < run.end; begin += kKeyBlock) {
      const int64_t end = begin + kKeyBlock < run.end ? begin + kKeyBlock : run.end;
      const Acc* from = strip.scores + (begin - chunk_begin) * rows.stride;
      for (int v = 0; v < kVecs; ++v) {
        const int64_t lane = v * kLanes<Acc>;
        sum.add(v, weigh(exponents, rows, words, v, begin, end, from + lane, weights + lane));
      }
      const char* values = v_data + (begin - chunk_begin) / kStep * v_step_bytes;
      accumulate<Elem, kVecs>(values, v_row_bytes, v_step_bytes, weights, rows.stride,
                              (end - begin + kStep - 1) / kStep, acc, rows.stride, p.head_dim);
    }
  }
};

}  // namespace DENSE_ATTN_ISA
