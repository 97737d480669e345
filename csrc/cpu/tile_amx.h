// Products of 16 x 16 tiles by AMX, of bfloat16 pairs summed in float32, and the packing that feeds them. Every tile is
// 16 rows of 64 bytes, packed with zeros where the tensor ends: no tile reaches past memory that was packed for it.
#pragma once

#include <immintrin.h>

#include "cpu/tile.h"

namespace DENSE_ATTN_ISA {

constexpr int64_t kTile = 16;          // rows of a tile, lanes of a row, and pairs
constexpr int64_t kTileRowBytes = 64;  // of one row
constexpr int64_t kTileBytes = kTile * kTileRowBytes;
constexpr int64_t kTileKeys = 2 * kTile;   // keys of a step of the product with values
constexpr int64_t kTileDepth = 2 * kTile;  // channels of a step of the scores

inline int64_t tiles(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Instructions on the tile registers that are named in the template's arguments; the compiler's own words for them take
// no such names, and do not say that memory is read.
template <int tile>
inline void tile_load(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int c, int a, int b>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// The calling thread's tiles, configured for as long as this lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = kTileRowBytes, config.rows[tile] = kTile;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileRegisters() { __asm__ volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
};

// A row of kVecs tiles of c, accumulated in registers from kFirst on, beside tile 6 of b and tile 7 of a.
template <int kFirst, int kVecs>
struct TileRow {
  static_assert(kFirst + kVecs <= 6);

  static void start(const float* c, int64_t bytes, bool fresh) {
    if (fresh) {
      tile_zero<kFirst>();
      if constexpr (kVecs > 1) tile_zero<kFirst + 1>();
      if constexpr (kVecs > 2) tile_zero<kFirst + 2>();
    } else {
      tile_load<kFirst>(c, bytes);
      if constexpr (kVecs > 1) tile_load<kFirst + 1>(c + kTile, bytes);
      if constexpr (kVecs > 2) tile_load<kFirst + 2>(c + 2 * kTile, bytes);
    }
  }

  static void add(const char* a, const Pair* b, int64_t bytes) {
    tile_load<7>(a, kTileRowBytes);
    tile_load<6>(b, bytes), tile_multiply<kFirst, 7, 6>();
    if constexpr (kVecs > 1) tile_load<6>(b + kTile, bytes), tile_multiply<kFirst + 1, 7, 6>();
    if constexpr (kVecs > 2) tile_load<6>(b + 2 * kTile, bytes), tile_multiply<kFirst + 2, 7, 6>();
  }

  static void finish(float* c, int64_t bytes) {
    tile_store<kFirst>(c, bytes);
    if constexpr (kVecs > 1) tile_store<kFirst + 1>(c + kTile, bytes);
    if constexpr (kVecs > 2) tile_store<kFirst + 2>(c + 2 * kTile, bytes);
  }
};

// c[16 * row_tiles][kVecs * 16] += a times b, or = where fresh: a in tiles, a_tile_bytes from one row to the next and
// a_step_bytes from step to step; b in 16 pair rows a step; b and c with rows of `stride` lanes. An instruction sums
// its 32 products before they meet the running sum, so the error grows with the number of steps and not with that of
// terms.
template <int kVecs>
inline void tile_accumulate(const char* a, int64_t a_tile_bytes, int64_t a_step_bytes, const Pair* b, int64_t stride,
                            int64_t steps, float* c, int64_t row_tiles, bool fresh) {
  const int64_t bytes = stride * sizeof(float);
  // A row of tiles is stored while the next one is multiplied: a store waits for its products, and those behind it.
  const auto row = [&](auto mine, auto before, int64_t tile) {
    float* at = c + tile * kTile * stride;
    mine.start(at, bytes, fresh);
    mine.add(a + tile * a_tile_bytes, b, bytes);
    if (tile > 0) before.finish(at - kTile * stride, bytes);
    for (int64_t step = 1; step < steps; ++step) {
      mine.add(a + tile * a_tile_bytes + step * a_step_bytes, b + step * kTile * stride, bytes);
    }
  };
  const TileRow<0, kVecs> even;
  const TileRow<3, kVecs> odd;
  for (int64_t tile = 0; tile < row_tiles; ++tile) tile % 2 ? row(odd, even, tile) : row(even, odd, tile);
  float* last = c + (row_tiles - 1) * kTile * stride;
  row_tiles % 2 ? even.finish(last, bytes) : odd.finish(last, bytes);
}

// Keys as tiles [key tile][depth step][16 keys][16 pairs], an even number of key tiles.
inline int64_t key_tile_bytes(int64_t keys, int64_t width) {
  return tiles(keys, kTileKeys) * tiles(width, kTileDepth) * 2 * kTileBytes;
}
inline void pack_key_tiles(const BFloat16* k, int64_t stride, int64_t keys, int64_t width, char* to) {
  const int64_t steps = tiles(width, kTileDepth);
  for (int64_t j = 0; j < tiles(keys, kTileKeys) * kTileKeys; ++j, k += stride) {
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t left = j < keys ? width - step * kTileDepth : 0, count = left < kTileDepth ? left : kTileDepth;
      char* row = to + (j / kTile * steps + step) * kTileBytes + j % kTile * kTileRowBytes;
      if (count < kTileDepth) std::memset(row, 0, kTileRowBytes);
      if (count) std::memcpy(row, k + step * kTileDepth, count * sizeof(BFloat16));
    }
  }
}

// Values as tiles [32 keys][channel tile][16 channels][16 pairs of keys].
inline int64_t value_tile_bytes(int64_t keys, int64_t width) {
  return tiles(keys, kTileKeys) * tiles(width, kTile) * kTileBytes;
}
inline void pack_value_tiles(const BFloat16* v, int64_t stride, int64_t keys, int64_t width, char* to) {
  typedef uint32_t Bits __attribute__((vector_size(kVecBytes)));
  for (int64_t j = 0; j < keys; j += kTileKeys) {
    for (int64_t d = 0; d < width; d += kTile, to += kTileBytes) {
      const auto lanes = [&](int64_t key) {
        return key < keys ? (Bits)load_lanes(v + key * stride + d, width - d) : Bits{};
      };
      Simd<float>::Vec square[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        square[i] = (Simd<float>::Vec)(lanes(j + 2 * i) >> 16 | lanes(j + 2 * i + 1));
      }
      transpose(square);
      for (int64_t i = 0; i < kTile; ++i) store(to + i * kTileRowBytes, square[i]);
    }
  }
}

}  // namespace DENSE_ATTN_ISA
