// Forward of bfloat16 by AMX. Scores cost less than keeping them does: one sweep over the keys finds the extremes of
// the rows, a second makes the scores again, weighs them and multiplies the values, and both stay in L1.
#pragma once

#include <new>

#include "cpu/layout_attention_state.h"
#include "cpu/tile_amx.h"

namespace DENSE_ATTN_ISA {

struct ForwardAmx {
  using Exponents = DENSE_ATTN_ISA::Exponents<float, false>;
  static constexpr int64_t kMaxRows = kRowVecs * kLanes<float>;
  static constexpr int64_t kBlock = 64;               // keys at once, whose scores and weights are in L1
  static constexpr int64_t kResidentBytes = 1 << 20;  // packed keys and values that strips meet in turn: half an L2
  static constexpr int64_t kPackedBytes = 4 << 20;    // most of them that are kept; of more, every item packs its own

  using Strip = DENSE_ATTN_ISA::Strip<float, Pair, false>;

  const LayoutAttentionParams& p;
  const int64_t depth_steps, channel_tiles, key_bytes, chunk, held, strips_per_item;
  Strip* strips;
  Pair *q_panels, *weights;
  float *accs, *scores;
  char *k_tiles, *v_tiles;
  KeyWords<2> words;
  size_t scratch_bytes;
  int64_t packed_head = -1;

  ForwardAmx(const LayoutAttentionParams& params, void* scratch)
      : p(params),
        depth_steps(tiles(p.head_dim, kTileDepth)),
        channel_tiles(tiles(p.head_dim, kTile)),
        key_bytes(depth_steps * kTileRowBytes + channel_tiles * kTileRowBytes / 2),
        chunk(p.seqlen_k * key_bytes <= kResidentBytes ? p.seqlen_k : kResidentBytes / key_bytes / kBlock * kBlock),
        held(p.seqlen_k * key_bytes <= kPackedBytes ? p.seqlen_k : chunk),
        strips_per_item(strips_of(p)) {
    Carver carver{static_cast<char*>(scratch)};
    strips = carver.take<Strip>(strips_per_item);
    q_panels = carver.take<Pair>(strips_per_item * q_size());
    accs = carver.take<float>(strips_per_item * acc_size());
    weights = carver.take<Pair>(kBlock / 2 * kMaxRows);
    scores = carver.take<float>(kBlock * kMaxRows);
    k_tiles = carver.take<char>(key_tile_bytes(held, p.head_dim));
    v_tiles = carver.take<char>(value_tile_bytes(held, p.head_dim));
    words.take(carver, p.seqlen_k);
    scratch_bytes = carver.used;
  }

  // The longer a head's keys, the more strips of rows meet them while they are near.
  static int64_t strips_of(const LayoutAttentionParams& p) {
    const int64_t bytes = key_tile_bytes(p.seqlen_k, p.head_dim) + value_tile_bytes(p.seqlen_k, p.head_dim);
    const int64_t most = bytes <= kResidentBytes ? 1 : bytes <= kPackedBytes ? 4 : 16;
    return strips_together(most, p.batch * p.num_heads, strips_per_head(p));
  }
  static int64_t strips_per_head(const LayoutAttentionParams& p) { return Strips(p.seqlen_q, kLanes<float>).count; }
  static int64_t items(const LayoutAttentionParams& p) {
    return p.batch * p.num_heads * tiles(strips_per_head(p), strips_of(p));
  }

  int64_t q_size() const { return depth_steps * kTile * kMaxRows; }
  int64_t acc_size() const { return channel_tiles * kTile * kMaxRows; }

  void run(int64_t item) {
    const TileRegisters registers;
    const int64_t all = strips_per_head(p), items_per_head = tiles(all, strips_per_item);
    const int64_t head = item / items_per_head, first = item % items_per_head * strips_per_item;
    const int64_t count = all - first < strips_per_item ? all - first : strips_per_item;
    for (int64_t i = 0; i < count; ++i) start(i, head * all + first + i);
    const StripRows<float>& rows = strips[0].rows;
    words.fill(p, rows.batch, rows.keys);
    const auto sweep = [&](bool with_values, const auto& f) {
      for (int64_t begin = 0; begin < rows.keys; begin += chunk) {
        const KeyRun keys{begin, begin + chunk < rows.keys ? begin + chunk : rows.keys};
        pack(rows, keys, with_values);
        for (int64_t i = 0; i < count; ++i) for_blocks(strips[i], keys, f);
      }
    };
    sweep(false, [&](auto vecs, Strip& strip, KeyRun block) { meet<vecs>(strip, block); });
    for (int64_t i = 0; i < count; ++i) strips[i].settle(p);
    sweep(true, [&](auto vecs, Strip& strip, KeyRun block) { weigh<vecs>(strip, block); });
    for (int64_t i = 0; i < count; ++i) {
      strips[i].state.template finish<BFloat16>(p, strips[i].rows, strips[i].shift, strips[i].acc);
    }
  }

  void start(int64_t i, int64_t row_strip) {
    Strip& strip = *new (strips + i) Strip(p, row_strip, q_panels + i * q_size(), accs + i * acc_size(), nullptr);
    const StripRows<float>& rows = strip.rows;
    const BFloat16* head = p.q.at<BFloat16>(rows.batch, rows.head);
    const auto row = [&](int64_t r) { return head + rows.token[r] * p.q.strides[2]; };
    const int64_t pairs = (p.head_dim + 1) / 2;
    pack_pair_columns(row, rows.count, rows.stride, p.head_dim, strip.q_panel);
    std::memset(strip.q_panel + pairs * rows.stride, 0, (depth_steps * kTile - pairs) * rows.stride * sizeof(Pair));
    std::memset(strip.acc, 0, channel_tiles * kTile * rows.stride * sizeof(float));
  }

  // A head that fits stays packed for the items to come.
  void pack(const StripRows<float>& rows, KeyRun keys, bool with_values) {
    const bool whole = held == p.seqlen_k;
    const int64_t head = rows.batch * p.num_heads + rows.key_head;
    if (whole && packed_head == head) return;
    if (whole) keys = {0, rows.keys}, packed_head = head;
    const BFloat16* k = p.k.at<BFloat16>(rows.batch, rows.key_head, keys.begin);
    const BFloat16* v = p.v.at<BFloat16>(rows.batch, rows.key_head, keys.begin);
    pack_key_tiles(k, p.k.strides[2], keys.end - keys.begin, p.head_dim, k_tiles);
    if (whole || with_values) pack_value_tiles(v, p.v.strides[2], keys.end - keys.begin, p.head_dim, v_tiles);
  }

  // f(number of registers, strip, block of keys), for the keys that have work for the strip.
  template <class F>
  void for_blocks(Strip& strip, KeyRun keys, const F& f) {
    for (KeyRun run = next_run(p, strip.rows, keys.begin, keys.end, kTileKeys); run.begin < keys.end;
         run = next_run(p, strip.rows, run.end, keys.end, kTileKeys)) {
      for (int64_t j = run.begin; j < run.end; j += kBlock) {
        const KeyRun block{j, j + kBlock < run.end ? j + kBlock : run.end};
        with_vecs(strip.vecs(), [&](auto vecs) { f(vecs, strip, block); });
      }
    }
  }

  int64_t packed_at(int64_t key) const { return held == p.seqlen_k ? key : key % chunk; }

  template <int kVecs>
  void score(const Strip& strip, KeyRun block) {
    const char* keys = k_tiles + packed_at(block.begin) / kTile * depth_steps * kTileBytes;
    const int64_t row_tiles = tiles(block.end - block.begin, kTile);
    tile_accumulate<kVecs>(keys, depth_steps * kTileBytes, kTileBytes, strip.q_panel, strip.rows.stride, depth_steps,
                           scores, row_tiles, true);
  }

  template <int kVecs>
  void meet(Strip& strip, KeyRun block) {
    score<kVecs>(strip, block);
    strip.state.template meet_keys<kVecs>(strip.rows, words, block.begin, block.end, scores);
  }

  template <int kVecs>
  void weigh(Strip& strip, KeyRun block) {
    score<kVecs>(strip, block);
    const int64_t stride = strip.rows.stride, count = block.end - block.begin, steps = tiles(count, kTileKeys);
    const auto weigh_one = p.modulation == Modulation::kMask ? weigh_keys<true, Exponents, float, Pair, 2>
                                                             : weigh_keys<false, Exponents, float, Pair, 2>;
    for (int v = 0; v < kVecs; ++v) {
      const int64_t lane = v * kLanes<float>;
      strip.state.sum.add(
          v, weigh_one(strip.exponents, strip.rows, words, v, block.begin, block.end, scores + lane, weights + lane));
    }
    const int64_t pairs = (count + 1) / 2;
    std::memset(weights + pairs * stride, 0, (steps * kTile - pairs) * stride * sizeof(Pair));
    const char* values = v_tiles + packed_at(block.begin) / kTileKeys * channel_tiles * kTileBytes;
    tile_accumulate<kVecs>(values, kTileBytes, channel_tiles * kTileBytes, weights, stride, steps, strip.acc,
                           channel_tiles, false);
  }
};

}  // namespace DENSE_ATTN_ISA
