// Transposition of matrices of storage elements into matrices of the compute type, in blocks of 8 x 8.
#pragma once

#include "common/arith.h"
#include "cpu/simd/vec.h"

namespace cnnops::CNNOPS_ISA {
namespace {

typedef float Row8 __attribute__((vector_size(32), aligned(4), may_alias));

// The first n floats, the others zero; nothing past them is touched.
inline void load_row(const float* p, int64_t n, Row8& row) {
#if CNNOPS_ISA_avx512
  row = reinterpret_cast<Row8>(_mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << n) - 1), p));
#else
  row = Row8{};
  for (int64_t i = 0; i < n; ++i) row[i] = p[i];
#endif
}

// place(j)[i] = from[i * from_pitch + j] for i < 8, j < columns <= 8: three rounds of exchanges between rows 1, 2 and 4 apart.
template <class Place>
[[gnu::always_inline]] inline void transpose_8x8(const float* from, int64_t from_pitch, int64_t columns,
                                                 const Place& place) {
  Row8 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (columns == 8)
      a[i] = *reinterpret_cast<const Row8*>(from + i * from_pitch);
    else
      load_row(from + i * from_pitch, columns, a[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (i & 2) continue;
    a[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 2] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    if (i == columns) return;
    *reinterpret_cast<Row8*>(place(i)) = b[i];
  }
}
inline void transpose_8x8(const float* from, int64_t from_pitch, float* to, int64_t to_pitch, int64_t columns = 8) {
  transpose_8x8(from, from_pitch, columns, [&](int64_t j) { return to + j * to_pitch; });
}

// to[j * to_pitch + i] = from[i * from_pitch + j] for i < rows, j < columns.
template <class T>
void transpose(const T* from, int64_t from_pitch, int64_t rows, int64_t columns, compute_t<T>* to, int64_t to_pitch) {
  constexpr int64_t kBlock = 8;
  for (int64_t j = 0; j < columns; j += kBlock)
    for (int64_t i = 0; i < rows; i += kBlock) {
      if constexpr (sizeof(compute_t<T>) == 4) {
        if (i + kBlock <= rows) {
          const int64_t width = min64(kBlock, columns - j);
          const T* const block = from + i * from_pitch + j;
          float* const out = to + j * to_pitch + i;
          if constexpr (__is_same(T, float)) {
            transpose_8x8(block, from_pitch, out, to_pitch, width);
          } else {
            float wide[kBlock * kBlock];
            for (int64_t k = 0; k < kBlock; ++k)
              for (int64_t l = 0; l < width; ++l) wide[k * kBlock + l] = load_scalar(block[k * from_pitch + l]);
            transpose_8x8(wide, kBlock, out, to_pitch, width);
          }
          continue;
        }
      }
      for (int64_t l = j; l < min64(j + kBlock, columns); ++l)
        for (int64_t k = i; k < min64(i + kBlock, rows); ++k)
          to[l * to_pitch + k] = load_scalar(from[k * from_pitch + l]);
    }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
