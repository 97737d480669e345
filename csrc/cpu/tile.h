// The register tile that every product is made of, and the packing that feeds it.
#pragma once

#include <type_traits>

#include "common/dtypes.h"

namespace DENSE_ATTN_ISA {

constexpr int64_t kSumBlock = 64;  // products summed in one go
constexpr int kRowVecs = 3;        // registers of query rows in a strip

// acc[r][v] += sum over steps of a(r, step) * b[step][v]: scalars of a are broadcast, registers of b are read in order.
template <class Elem, int kRows, int kVecs, class Vec>
inline __attribute__((always_inline)) void tile_product(const char* a, int64_t a_row_bytes, int64_t a_step_bytes,
                                                        const Elem* b, int64_t b_stride, int64_t steps,
                                                        Vec (&acc)[kRows][kVecs]) {
  using B = typename Operand<Elem>::Vec;
  constexpr int kWidth = sizeof(B) / sizeof(Elem);
  // Every third row has a pointer, from which an address reaches two more. The compiler is not told that they belong
  // together: it would keep the distance of each row, more than there are registers for.
  constexpr int kPointers = (kRows + 2) / 3;
  const char* row[kPointers];
#pragma GCC unroll 4
  for (int i = 0; i < kPointers; ++i) {
    row[i] = a + 3 * i * a_row_bytes;
    __asm__("" : "+r"(row[i]));
  }
  for (int64_t step = 0; step < steps; ++step) {
    B b_vec[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) b_vec[v] = load<B>(b + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Elem x;
      std::memcpy(&x, row[r / 3] + r % 3 * a_row_bytes, sizeof(Elem));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) acc[r][v] = madd(acc[r][v], b_vec[v], x);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) row[i] += a_step_bytes;
    b += b_stride;
  }
}

// c[r] += the same, or = where fresh; rows of any number, c in memory. Steps are summed in blocks before they meet the
// running sum, so the error grows with the number of blocks and not with that of terms.
template <class Elem, int kVecs, class Acc, int kRows = kTileRows>
inline void accumulate(const char* a, int64_t a_row_bytes, int64_t a_step_bytes, const Elem* b, int64_t b_stride,
                       int64_t steps, Acc* c, int64_t c_stride, int64_t rows, bool fresh = false) {
  for (; rows >= kRows; rows -= kRows) {
    for (int64_t step = 0; step < steps; step += kSumBlock) {
      VecOf<Acc> acc[kRows][kVecs] = {};
      const int64_t now = steps - step < kSumBlock ? steps - step : kSumBlock;
      tile_product<Elem>(a + step * a_step_bytes, a_row_bytes, a_step_bytes, b + step * b_stride, b_stride, now, acc);
      const bool store_only = fresh && step == 0;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          Acc* to = c + r * c_stride + v * kLanes<Acc>;
          store(to, store_only ? acc[r][v] : load<VecOf<Acc>>(to) + acc[r][v]);
        }
      }
    }
    a += kRows * a_row_bytes;
    c += kRows * c_stride;
  }
  if constexpr (kRows > 1) {
    if (rows) {
      accumulate<Elem, kVecs, Acc, kRows / 2>(a, a_row_bytes, a_step_bytes, b, b_stride, steps, c, c_stride, rows,
                                              fresh);
    }
  }
}

// accumulate over any number of registers of columns.
template <class Elem, class Acc>
inline void accumulate_wide(const char* a, int64_t a_row_bytes, int64_t a_step_bytes, const Elem* b, int64_t b_stride,
                            int64_t steps, Acc* c, int64_t c_stride, int64_t rows, int64_t vecs) {
  constexpr int kWidth = kLanes<Acc>;
  while (vecs > 0) {
    const int64_t now = vecs == 4 ? 2 : vecs < 3 ? vecs : 3;  // 4 is 2 + 2: a single register wastes the broadcasts
    if (now == 3) accumulate<Elem, 3>(a, a_row_bytes, a_step_bytes, b, b_stride, steps, c, c_stride, rows);
    if (now == 2) accumulate<Elem, 2>(a, a_row_bytes, a_step_bytes, b, b_stride, steps, c, c_stride, rows);
    if (now == 1) accumulate<Elem, 1>(a, a_row_bytes, a_step_bytes, b, b_stride, steps, c, c_stride, rows);
    b += now * kWidth;
    c += now * kWidth;
    vecs -= now;
  }
}

// Transposes rows of T into columns of lanes: panel[d][r] = row(r)[d]; lanes beyond count repeat row 0, so that nothing
// in them is stranger than in a row.
template <class T, class Row>
inline void pack_columns(const Row& row, int64_t count, int64_t rows, int64_t width, typename Dtype<T>::Acc* panel) {
  using Acc = typename Dtype<T>::Acc;
  constexpr int n = kLanes<Acc>;
  for (int64_t r0 = 0; r0 < rows; r0 += n) {
    for (int64_t d0 = 0; d0 < width; d0 += n) {
      VecOf<Acc> square[n];
      for (int i = 0; i < n; ++i) {
        square[i] = load_lanes<T>(row(r0 + i < count ? r0 + i : 0) + d0, width - d0);
      }
      transpose(square);
      const int64_t end = width - d0 < n ? width - d0 : n;
      for (int64_t i = 0; i < end; ++i) store(panel + (d0 + i) * rows + r0, square[i]);
    }
  }
}

// A row of bfloat16 pairs is a row of 32-bit words; an odd last value gets a zero beside it.
template <class Row>
inline void pack_pair_columns(const Row& row, int64_t count, int64_t rows, int64_t width, Pair* panel) {
  const auto words = [&](int64_t r) { return reinterpret_cast<const float*>(row(r)); };
  pack_columns<float>(words, count, rows, width / 2, reinterpret_cast<float*>(panel));
  for (int64_t r = 0; width % 2 && r < rows; ++r)
    panel[width / 2 * rows + r].bits = row(r < count ? r : 0)[width - 1].bits;
}

// The way back: row(r)[d] = panel[d][r] * factor[r].
template <class T, class Row>
inline void unpack_columns(const typename Dtype<T>::Acc* panel, const typename Dtype<T>::Acc* factor, int64_t count,
                           int64_t rows, int64_t width, const Row& row) {
  using Acc = typename Dtype<T>::Acc;
  constexpr int n = kLanes<Acc>;
  for (int64_t r0 = 0; r0 < count; r0 += n) {
    const VecOf<Acc> lane_factor = load<VecOf<Acc>>(factor + r0);
    for (int64_t d0 = 0; d0 < width; d0 += n) {
      const int64_t end = width - d0 < n ? width - d0 : n;
      VecOf<Acc> square[n];
      for (int i = 0; i < n; ++i) {
        square[i] = i < end ? load<VecOf<Acc>>(panel + (d0 + i) * rows + r0) * lane_factor : VecOf<Acc>{};
      }
      transpose(square);
      for (int64_t i = 0; i < n && r0 + i < count; ++i) store_lanes<T>(row(r0 + i) + d0, square[i], width - d0);
    }
  }
}

// Rows converted to Acc and padded with zeros to a stride.
template <class T>
inline void pack_rows(const T* source, int64_t source_stride, int64_t count, int64_t width,
                      typename Dtype<T>::Acc* packed, int64_t stride) {
  constexpr int n = kLanes<typename Dtype<T>::Acc>;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t d = 0; d < width; d += n) {
      const auto lanes = load_lanes<T>(source + r * source_stride + d, width - d);
      store_lanes(packed + r * stride + d, lanes, stride - d);
    }
  }
}

}  // namespace DENSE_ATTN_ISA
