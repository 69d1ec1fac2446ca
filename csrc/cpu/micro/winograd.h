// Winograd's minimal filtering F(2x2, 3x3): 16 products instead of 36 for the 2 x 2 outputs that a 3 x 3 filter g makes of a
// 4 x 4 tile d of the image (Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, arXiv 1509.09308):
//
//   y = A' [ (G g G') . (B' d B) ] A          G (4x3)          B' (4x4)          A' (2x4)
//                                             1    0    0      1  0 -1  0        1  1  1  0
//   and by the same products, for gradients   1/2  1/2  1/2    0  1  1  0        0  1 -1 -1
//   of the weights:                           1/2 -1/2  1/2    0 -1  1  0
//   dg = G' [ (A dy A') . (B' d B) ] G        0    0    1      0  1  0 -1
//
// The functions work on any type with + - and * (a vector of tiles, or of channels). Matrices are row after row.
#pragma once

#include "common/export.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int kFrequencies = 16;

// B' d B, in place.
template <class V>
[[gnu::always_inline]] inline void transform_image(V (&d)[16]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V a = d[j] - d[8 + j], b = d[4 + j] + d[8 + j], c = d[8 + j] - d[4 + j], e = d[4 + j] - d[12 + j];
    d[j] = a, d[4 + j] = b, d[8 + j] = c, d[12 + j] = e;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const V a = d[i] - d[i + 2], b = d[i + 1] + d[i + 2], c = d[i + 2] - d[i + 1], e = d[i + 1] - d[i + 3];
    d[i] = a, d[i + 1] = b, d[i + 2] = c, d[i + 3] = e;
  }
}

// G g G'
template <class V>
[[gnu::always_inline]] inline void transform_filter(const V (&g)[9], V (&u)[16]) {
  V rows[12];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const V ends = (g[j] + g[6 + j]) * 0.5f, middle = g[3 + j] * 0.5f;
    rows[j] = g[j], rows[3 + j] = ends + middle, rows[6 + j] = ends - middle, rows[9 + j] = g[6 + j];
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V ends = (rows[3 * i] + rows[3 * i + 2]) * 0.5f, middle = rows[3 * i + 1] * 0.5f;
    u[4 * i] = rows[3 * i], u[4 * i + 1] = ends + middle, u[4 * i + 2] = ends - middle, u[4 * i + 3] = rows[3 * i + 2];
  }
}

// A' m A
template <class V>
[[gnu::always_inline]] inline void inverse_image(const V (&m)[16], V (&y)[4]) {
  V rows[8];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V sum = m[4 + j] + m[8 + j], difference = m[4 + j] - m[8 + j];
    rows[j] = m[j] + sum, rows[4 + j] = difference - m[12 + j];
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const V sum = rows[4 * i + 1] + rows[4 * i + 2], difference = rows[4 * i + 1] - rows[4 * i + 2];
    y[2 * i] = rows[4 * i] + sum, y[2 * i + 1] = difference - rows[4 * i + 3];
  }
}

// A dy A'
template <class V>
[[gnu::always_inline]] inline void transform_grad(const V (&dy)[4], V (&w)[16]) {
  V rows[8];  // 4 x 2
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j)
    rows[j] = dy[j], rows[2 + j] = dy[j] + dy[2 + j], rows[4 + j] = dy[j] - dy[2 + j], rows[6 + j] = -dy[2 + j];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const V a = rows[2 * i], b = rows[2 * i + 1];
    w[4 * i] = a, w[4 * i + 1] = a + b, w[4 * i + 2] = a - b, w[4 * i + 3] = -b;
  }
}

// G' z G
template <class V>
[[gnu::always_inline]] inline void inverse_filter(const V (&z)[16], V (&dg)[9]) {
  V rows[12];  // 3 x 4
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V sum = (z[4 + j] + z[8 + j]) * 0.5f, difference = (z[4 + j] - z[8 + j]) * 0.5f;
    rows[j] = z[j] + sum, rows[4 + j] = difference, rows[8 + j] = sum + z[12 + j];
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const V sum = (rows[4 * i + 1] + rows[4 * i + 2]) * 0.5f;
    const V difference = (rows[4 * i + 1] - rows[4 * i + 2]) * 0.5f;
    dg[3 * i] = rows[4 * i] + sum, dg[3 * i + 1] = difference, dg[3 * i + 2] = sum + rows[4 * i + 3];
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
