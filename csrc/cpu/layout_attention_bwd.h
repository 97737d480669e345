// Backward: a strip of rows against blocks of keys, in two sweeps. The first finds the weights P and dP, and from them
// delta to the last digit (<grad_out, out> alone loses what cancels in dP - delta when one key has all the weight); the
// second makes dq, dk and dv. P and dP wait in between where the strip fits, else they are made again. dq belongs to
// the strip; dk and dv to the item, which walks all strips of its part of a head in order: nothing is shared, and every
// sum has one order.
#pragma once

#include "cpu/layout_attention_rows.h"

namespace DENSE_ATTN_ISA {

constexpr int64_t kBwdKeyBlock = 64;
constexpr int64_t kBwdStripBytes = 4 << 20;  // P and dP of a strip that may wait between the sweeps

template <class T>
struct Backward {
  using Acc = typename Dtype<T>::Acc;
  using Vec = VecOf<Acc>;
  using Int = IntOf<Acc>;
  static constexpr int64_t kMaxRows = kRowVecs * kLanes<Acc>;
  static constexpr bool kPack = !std::is_same_v<T, Acc>;

  const LayoutAttentionBwdParams& p;
  const int64_t depth;  // head_dim padded to registers
  const bool waits;     // P and dP of all keys are kept between the sweeps
  Acc *q_panel, *grad_panel, *q_rows, *grad_rows, *dq_panel, *dk_sum, *dv_sum, *k_packed, *v_packed, *weights,
      *dweights;
  size_t scratch_bytes;
  Exponents<Acc, std::is_same_v<T, Acc>> exponents;
  Lanes<Acc> inverse, row_factor, raw_max, raw_min, best_max, best_min, delta, grad_lse, matched_grad, distance_grad;
  // Sums over keys of P and of P * (dP - delta), all, matched, and times (extreme - score).
  RowSums<Acc> weight_in, weight_dot, grad_all, grad_in, grad_dot;
  alignas(kVecBytes) typename Simd<Acc>::IntLane argmax[kMaxRows], argmin[kMaxRows];

  static int64_t padded(int64_t head_dim) { return (head_dim + kLanes<Acc> - 1) / kLanes<Acc> * kLanes<Acc>; }
  static int64_t partial_size(const LayoutAttentionBwdParams& p) { return 2 * p.seqlen_k * padded(p.head_dim); }

  Backward(const LayoutAttentionBwdParams& params, void* scratch)
      : p(params), depth(padded(p.head_dim)), waits(2 * p.seqlen_k * kMaxRows * sizeof(Acc) <= kBwdStripBytes) {
    Carver carver{static_cast<char*>(scratch)};
    q_panel = carver.take<Acc>(p.head_dim * kMaxRows);
    grad_panel = carver.take<Acc>(p.head_dim * kMaxRows);
    dq_panel = carver.take<Acc>(p.head_dim * kMaxRows);
    q_rows = carver.take<Acc>(depth * kMaxRows);
    grad_rows = carver.take<Acc>(depth * kMaxRows);
    weights = carver.take<Acc>((waits ? p.seqlen_k : kBwdKeyBlock) * kMaxRows);
    dweights = carver.take<Acc>((waits ? p.seqlen_k : kBwdKeyBlock) * kMaxRows);
    k_packed = carver.take<Acc>(kPack ? kBwdKeyBlock * p.head_dim : 0);
    v_packed = carver.take<Acc>(kPack ? kBwdKeyBlock * p.head_dim : 0);
    dk_sum = carver.take<Acc>(p.parts == 1 ? p.seqlen_k * depth : 0);
    dv_sum = carver.take<Acc>(p.parts == 1 ? p.seqlen_k * depth : 0);
    scratch_bytes = carver.used;
  }

  void run(int64_t item) {
    const int64_t head = item / p.parts, part = item % p.parts;
    if (p.parts > 1) {
      dk_sum = static_cast<Acc*>(p.partials) + item * partial_size(p);
      dv_sum = dk_sum + p.seqlen_k * depth;
    }
    std::memset(dk_sum, 0, p.seqlen_k * depth * sizeof(Acc));
    std::memset(dv_sum, 0, p.seqlen_k * depth * sizeof(Acc));
    const int64_t strips = Strips(p.seqlen_q, kLanes<Acc>).count * p.group;  // of all heads that meet these keys
    for (int64_t i = strips * part / p.parts; i < strips * (part + 1) / p.parts; ++i) {
      const StripRows<Acc> rows(p, head * strips + i);
      switch (rows.stride / kLanes<Acc>) {
        case 1:
          strip<1>(rows);
          break;
        case 2:
          strip<2>(rows);
          break;
        default:
          strip<3>(rows);
      }
    }
    if (p.parts == 1) write_keys(head, dk_sum, dv_sum);
  }

  // The parts of a head, summed in order.
  void reduce(int64_t head) const {
    Acc* first = static_cast<Acc*>(p.partials) + head * p.parts * partial_size(p);
    for (int64_t part = 1; part < p.parts; ++part) {
      const Acc* other = first + part * partial_size(p);
      for (int64_t i = 0; i < partial_size(p); ++i) first[i] += other[i];
    }
    write_keys(head, first, first + p.seqlen_k * depth);
  }

  void write_keys(int64_t item, const Acc* dk, const Acc* dv) const {
    const int64_t heads = p.num_heads / p.group, batch = item / heads, head = item % heads;
    for (int64_t j = 0; j < p.seqlen_k; ++j) {
      for (int64_t d = 0; d < p.head_dim; d += kLanes<Acc>) {
        store_lanes<T>(p.dk.at<T>(batch, head, j, d), load<Vec>(dk + j * depth + d), p.head_dim - d);
        store_lanes<T>(p.dv.at<T>(batch, head, j, d), load<Vec>(dv + j * depth + d), p.head_dim - d);
      }
    }
  }

  template <int kVecs>
  void strip(const StripRows<Acc>& rows) {
    prepare_rows<kVecs>(rows);
    for_blocks(rows, [&](const Block& block) { weigh<kVecs, true>(rows, block); });
    for (int v = 0; v < kVecs; ++v) settle(v);
    std::memset(dq_panel, 0, p.head_dim * rows.stride * sizeof(Acc));
    for_blocks(rows, [&](const Block& block) {
      if (!waits) weigh<kVecs, false>(rows, block);
      multiply<kVecs>(rows, block);
    });
    write_queries<kVecs>(rows);
  }

  struct Block {
    int64_t begin, count;
    const char *keys, *values;
    int64_t k_bytes, v_bytes;  // from row to row
    Acc *weights, *dweights;   // [count][rows]
  };

  template <class F>
  void for_blocks(const StripRows<Acc>& rows, const F& f) {
    const int64_t keys = rows.keys;
    for (KeyRun run = next_run(p, rows, 0, keys); run.begin < keys; run = next_run(p, rows, run.end, keys)) {
      for (int64_t j = run.begin; j < run.end; j += kBwdKeyBlock) {
        f(block_at(rows, j, run.end - j < kBwdKeyBlock ? run.end - j : kBwdKeyBlock));
      }
    }
  }

  Block block_at(const StripRows<Acc>& rows, int64_t begin, int64_t count) {
    const T* k = p.k.at<T>(rows.batch, rows.key_head, begin);
    const T* v = p.v.at<T>(rows.batch, rows.key_head, begin);
    const int64_t at = waits ? begin * rows.stride : 0;
    Block block{begin,
                count,
                reinterpret_cast<const char*>(k),
                reinterpret_cast<const char*>(v),
                (int64_t)(p.k.strides[2] * sizeof(T)),
                (int64_t)(p.v.strides[2] * sizeof(T)),
                weights + at,
                dweights + at};
    if constexpr (kPack) {
      pack_rows<T>(k, p.k.strides[2], count, p.head_dim, k_packed, p.head_dim);
      pack_rows<T>(v, p.v.strides[2], count, p.head_dim, v_packed, p.head_dim);
      block.keys = reinterpret_cast<const char*>(k_packed), block.values = reinterpret_cast<const char*>(v_packed);
      block.k_bytes = block.v_bytes = p.head_dim * sizeof(Acc);
    }
    return block;
  }

  template <int kVecs>
  void prepare_rows(const StripRows<Acc>& rows) {
    const T* q = p.q.at<T>(rows.batch, rows.head);
    const T* grad = p.grad_out.at<T>(rows.batch, rows.head);
    const auto q_row = [&](int64_t r) { return q + rows.token[r] * p.q.strides[2]; };
    const auto grad_row = [&](int64_t r) { return grad + rows.token[r] * p.grad_out.strides[2]; };
    pack_columns<T>(q_row, rows.count, rows.stride, p.head_dim, q_panel);
    pack_columns<T>(grad_row, rows.count, rows.stride, p.head_dim, grad_panel);
    sum_delta<kVecs>(rows);
    statistics<kVecs>(rows);
    for (int64_t r = 0; r < rows.stride; ++r) {
      const int64_t from = r < rows.count ? r : 0;
      const Acc live = r < rows.count;  // lanes beyond the rows add nothing to dk and dv
      pack_rows<T>(q_row(from), 0, 1, p.head_dim, q_rows + r * depth, depth);
      pack_rows<T>(grad_row(from), 0, 1, p.head_dim, grad_rows + r * depth, depth);
      for (int64_t d = 0; d < depth; ++d) {
        q_rows[r * depth + d] = live ? q_rows[r * depth + d] * row_factor.x[r] : 0;
        grad_rows[r * depth + d] = live ? grad_rows[r * depth + d] : 0;
      }
    }
  }

  // delta = <grad_out, out>, summed in the order of <grad_out, v>, which it cancels.
  template <int kVecs>
  void sum_delta(const StripRows<Acc>& rows) {
    const T* out = p.out.at<T>(rows.batch, rows.head);
    const auto row = [&](int64_t r) { return out + rows.token[r] * p.out.strides[2]; };
    Acc* out_panel = dq_panel;  // free until the first key block
    pack_columns<T>(row, rows.count, rows.stride, p.head_dim, out_panel);
    for (int v = 0; v < kVecs; ++v) {
      Vec sum{};
      for (int64_t begin = 0; begin < p.head_dim; begin += kSumBlock) {
        Vec part{};
        for (int64_t d = begin; d < begin + kSumBlock && d < p.head_dim; ++d) {
          const int64_t at = d * rows.stride + v * kLanes<Acc>;
          part = load<Vec>(grad_panel + at) * load<Vec>(out_panel + at) + part;
        }
        sum += part;
      }
      delta.set(v, sum);
    }
  }

  // What the forward pass left of each row, as factors and offsets of the scores' exponent.
  template <int kVecs>
  void statistics(const StripRows<Acc>& rows) {
    Lanes<Acc> shift;
    for (int64_t r = 0; r < rows.stride; ++r) {
      const int64_t token = rows.token[r];
      const Acc* stats = p.stats.at<Acc>(rows.batch, rows.head, token);
      raw_max.x[r] = stats[kRawMax], raw_min.x[r] = stats[kRawMin], shift.x[r] = stats[kShift];
      inverse.x[r] = stats[kSum] == 0 ? 0 : 1 / stats[kSum];
      grad_lse.x[r] = p.grad_lse.data ? *p.grad_lse.at<Acc>(rows.batch, rows.head, token) : 0;
      argmax[r] = argmin[r] = 0;
    }
    const Acc inf = __builtin_inf();
    for (int v = 0; v < kVecs; ++v) {
      const WideOf<Acc> c = widen<Acc>(rows.strength[v]), factor = temperature<Acc>(p.modulation, c) * p.scale;
      row_factor.set(v, narrow<Acc>(factor)), exponents.set_tau(v, factor);
      const Additions<Acc> add(p, c, raw_max[v], raw_min[v]);
      exponents.set_in(v, add.matched - add.common(p.modulation), shift[v]);
      exponents.set_out(v, add.others - add.common(p.modulation), shift[v]);
      best_max.set(v, set1<Acc>(-inf)), best_min.set(v, set1<Acc>(inf));
      weight_in.reset(v), weight_dot.reset(v), grad_all.reset(v), grad_in.reset(v), grad_dot.reset(v);
    }
  }

  // P and dP of a block and, in the first sweep, what they add to the sums of their rows.
  template <int kVecs, bool kFirst>
  void weigh(const StripRows<Acc>& rows, const Block& block) {
    accumulate<Acc, kVecs>(block.keys, block.k_bytes, sizeof(Acc), q_panel, rows.stride, p.head_dim, block.weights,
                           rows.stride, block.count, true);
    accumulate<Acc, kVecs>(block.values, block.v_bytes, sizeof(Acc), grad_panel, rows.stride, p.head_dim,
                           block.dweights, rows.stride, block.count, true);
    for (int v = 0; v < kVecs; ++v) to_weights<kFirst>(rows, block, v);
  }

  // One register of rows: scores become weights in place.
  template <bool kFirst>
  void to_weights(const StripRows<Acc>& rows, const Block& block, int v) {
    const bool mask = p.modulation == Modulation::kMask;
    const auto row_words = rows.word_lanes(v);
    const Vec top_score = p.scale < 0 ? raw_min[v] : raw_max[v], bottom_score = p.scale < 0 ? raw_max[v] : raw_min[v];
    Vec w_in{}, w_dot{}, all{}, in{}, dot{}, top = best_max[v], bottom = best_min[v];
    Int top_key = load<Int>(argmax + v * kLanes<Acc>), bottom_key = load<Int>(argmin + v * kLanes<Acc>);
    for (int64_t j = 0; j < block.count; ++j) {
      const auto matched = meet(row_words, set1_int<Acc>(*p.k_regions.at<int32_t>(rows.batch, block.begin + j)));
      Acc* at = block.weights + j * rows.stride + v * kLanes<Acc>;
      const Vec raw = load<Vec>(at), s = mask ? select(matched, raw, Vec{}) : raw;
      const Vec weight = exponents.run(v, matched).weight(s) * inverse[v];
      store(at, weight);
      if constexpr (!kFirst) continue;
      const Vec grad = weight * (load<Vec>(block.dweights + j * rows.stride + v * kLanes<Acc>) - delta[v]);
      const Vec distance = select(matched, top_score, bottom_score) - s;
      w_in += select(matched, weight, Vec{}), in += select(matched, grad, Vec{});
      w_dot += weight * distance, dot += grad * distance;
      all += grad;
      const Int key = set1_int<Acc>(block.begin + j);
      const auto higher = less(top, s), lower = less(s, bottom);
      top = select(higher, s, top), top_key = select(higher, key, top_key);
      bottom = select(lower, s, bottom), bottom_key = select(lower, key, bottom_key);
    }
    if constexpr (!kFirst) return;
    weight_in.add(v, w_in), weight_dot.add(v, w_dot);
    grad_all.add(v, all), grad_in.add(v, in), grad_dot.add(v, dot);
    best_max.set(v, top), best_min.set(v, bottom);
    store(argmax + v * kLanes<Acc>, top_key);
    store(argmin + v * kLanes<Acc>, bottom_key);
  }

  // ds' sums to grad_lse over a row; what is left over is what delta missed, and is taken out of the sums.
  void settle(int v) {
    const Vec missed = grad_all[v], excess = missed - grad_lse[v];
    delta.set(v, delta[v] + missed);
    matched_grad.set(v, grad_in[v] - excess * weight_in[v]);
    distance_grad.set(v, grad_dot[v] - excess * weight_dot[v]);
  }

  // ds' = P * (dP - delta + grad_lse) in place of dP, and the three products that it and P feed.
  template <int kVecs>
  void multiply(const StripRows<Acc>& rows, const Block& block) {
    for (int v = 0; v < kVecs; ++v) {
      const int64_t lane = v * kLanes<Acc>;
      for (int64_t at = lane; at < block.count * rows.stride; at += rows.stride) {
        const Vec grad = load<Vec>(block.dweights + at) - delta[v] + grad_lse[v];
        store(block.dweights + at, load<Vec>(block.weights + at) * grad);
      }
    }
    constexpr int64_t kBytes = sizeof(Acc);
    const int64_t row_bytes = rows.stride * kBytes, vecs = depth / kLanes<Acc>;
    accumulate_wide<Acc>(reinterpret_cast<const char*>(block.weights), row_bytes, kBytes, grad_rows, depth, rows.stride,
                         dv_sum + block.begin * depth, depth, block.count, vecs);
    accumulate_wide<Acc>(reinterpret_cast<const char*>(block.dweights), row_bytes, kBytes, q_rows, depth, rows.stride,
                         dk_sum + block.begin * depth, depth, block.count, vecs);
    accumulate<Acc, kVecs>(block.keys, kBytes, block.k_bytes, block.dweights, rows.stride, block.count, dq_panel,
                           rows.stride, p.head_dim);
  }

  // dq and dstrength; what reaches q and k through the row's maximum and minimum is a rank-one term of its two keys.
  template <int kVecs>
  void write_queries(const StripRows<Acc>& rows) {
    Lanes<Acc> one;
    for (int v = 0; v < kVecs; ++v) {
      one.set(v, set1<Acc>(1));
      for (int64_t d = 0; d < p.head_dim; ++d) {
        Acc* at = dq_panel + d * rows.stride + v * kLanes<Acc>;
        store(at, load<Vec>(at) * row_factor[v]);
      }
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      const Acc grad_others = grad_lse.x[r] - matched_grad.x[r], scale = p.scale;
      Acc dstrength = 0;
      if (rows.keys == 0) {  // whose extremes are no numbers
        *p.dstrength.at<Acc>(rows.batch, rows.head, rows.token[r]) = dstrength;
        continue;
      }
      if (p.modulation == Modulation::kBias) dstrength = matched_grad.x[r];
      if (p.modulation == Modulation::kMax || p.modulation == Modulation::kRange) {
        dstrength = scale * (scale < 0 ? raw_min : raw_max).x[r] * matched_grad.x[r];
        through_extreme(rows, r, scale < 0 ? argmin[r] : argmax[r], scale * rows.strength.x[r] * matched_grad.x[r]);
      }
      if (p.modulation == Modulation::kRange) {
        dstrength = scale * distance_grad.x[r];
        through_extreme(rows, r, scale < 0 ? argmax[r] : argmin[r], scale * rows.strength.x[r] * grad_others);
      }
      *p.dstrength.at<Acc>(rows.batch, rows.head, rows.token[r]) = dstrength;
    }
    T* dq = p.dq.at<T>(rows.batch, rows.head);
    const auto row = [&](int64_t r) { return dq + rows.token[r] * p.dq.strides[2]; };
    unpack_columns<T>(dq_panel, one.x, rows.count, rows.stride, p.head_dim, row);
  }

  void through_extreme(const StripRows<Acc>& rows, int64_t r, int64_t key, Acc factor) {
    const T* k = p.k.at<T>(rows.batch, rows.key_head, key);
    const T* q = p.q.at<T>(rows.batch, rows.head, rows.token[r]);
    for (int64_t d = 0; d < p.head_dim; ++d) {
      dq_panel[d * rows.stride + r] += factor * to_float(k[d]);
      dk_sum[key * depth + d] += factor * to_float(q[d]);
    }
  }
};

}  // namespace DENSE_ATTN_ISA
