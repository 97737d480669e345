// Products of 16 x 16 tiles by AMX, of bfloat16 pairs summed in float32, and the packing that feeds them. Every tile is
// 16 rows of 64 bytes, packed with zeros where the tensor ends: no tile reaches past memory that was packed for it.
#pragma once

#include <immintrin.h>

#include <atomic>

#include "cpu/tile.h"

namespace DENSE_ATTN_ISA {

constexpr int64_t kTile = 16;                // rows of a tile, lanes of a row, and pairs
constexpr int64_t kTileRowBytes = 64;        // of one row
constexpr int64_t kTileBytes = kTile * kTileRowBytes;
constexpr int64_t kTileKeys = 2 * kTile;     // keys of a step of the product with values
constexpr int64_t kTileDepth = 2 * kTile;    // channels of a step of the scores

inline int64_t tiles(int64_t count, int64_t each) { return (count + each - 1) / each; }

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
    std::atomic_signal_fence(std::memory_order_seq_cst);
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};

// c[16][kVecs * 16] += the sum over steps of a tile of a, at a + step * a_step_bytes, times 16 pair rows of b; or =
// where fresh. b and c have rows of `stride` lanes. An instruction sums its 32 products before they meet the running
// sum, so the error grows with the number of steps and not with that of terms.
template <int kVecs>
inline void tile_accumulate(const char* a, int64_t a_step_bytes, const Pair* b, int64_t stride, int64_t steps, float* c,
                            bool fresh) {
  static_assert(kVecs <= 3);
  const int64_t bytes = stride * sizeof(float);
  std::atomic_signal_fence(std::memory_order_seq_cst);  // tile loads do not tell the compiler what they read
  if (fresh) {
    _tile_zero(0);
    if constexpr (kVecs > 1) _tile_zero(1);
    if constexpr (kVecs > 2) _tile_zero(2);
  } else {
    _tile_loadd(0, c, bytes);
    if constexpr (kVecs > 1) _tile_loadd(1, c + kTile, bytes);
    if constexpr (kVecs > 2) _tile_loadd(2, c + 2 * kTile, bytes);
  }
  for (int64_t step = 0; step < steps; ++step, a += a_step_bytes, b += kTile * stride) {
    _tile_loadd(3, a, kTileRowBytes);
    _tile_loadd(4, b, bytes);
    _tile_dpbf16ps(0, 3, 4);
    if constexpr (kVecs > 1) {
      _tile_loadd(5, b + kTile, bytes);
      _tile_dpbf16ps(1, 3, 5);
    }
    if constexpr (kVecs > 2) {
      _tile_loadd(6, b + 2 * kTile, bytes);
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  _tile_stored(0, c, bytes);
  if constexpr (kVecs > 1) _tile_stored(1, c + kTile, bytes);
  if constexpr (kVecs > 2) _tile_stored(2, c + 2 * kTile, bytes);
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
