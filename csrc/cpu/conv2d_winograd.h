// What Winograd's kernels of convolution have in common: reading tiles of channels-innermost pixels, and the test whether
// data is fit for them.
//
// Rounding: their sums are shorter than a direct kernel's, and the transforms cost about as many roundings, so the error is
// that of a direct kernel as long as what is added in a tile is of one size. Where it is not, the error of a small result
// would be that of its large neighbours. So sums of magnitudes are taken on the way, by position in the tile: where two differ
// by more than kMostRatio, or one is not finite, or so large or small that a product might leave the range, the direct kernel
// computes the call again.
#pragma once

#include "common/arith.h"
#include "cpu/micro/winograd.h"
#include "cpu/simd/vec.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kPad = 16;  // elements between matrices: powers of two apart, they would share cache sets

// What the sums of magnitudes must keep for the result to be as good as a direct kernel's.
constexpr float kMostRatio = 64, kLargest = 1e15f, kSmallest = 1e-15f;

template <class C>
[[gnu::always_inline]] inline vec<C> abs_of(vec<C> v) {
  constexpr int_t<C> kMask = static_cast<int_t<C>>(~int_t<C>{0} & ~(int_t<C>{1} << (8 * sizeof(C) - 1)));
  return reinterpret_cast<vec<C>>(reinterpret_cast<ivec<C>>(v) & kMask);
}

bool one_size(float smallest, float largest) {
  return largest == 0 || (largest <= kLargest && smallest >= kSmallest && smallest * kMostRatio >= largest);
}

// The 16 pixels of a tile in an image of channels-innermost pixels; what is outside reads `zeros`.
template <class E>
void tile_pixels(const E* image, int64_t row_step, int64_t pixel_step, int64_t first_row, int64_t row, int64_t column,
                 int64_t h, int64_t w, const E* zeros, const E* (&pixel)[16]) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) {
      const int64_t y = 2 * row - 1 + i, x = 2 * column - 1 + j;
      pixel[4 * i + j] =
          y < 0 || y >= h || x < 0 || x >= w ? zeros : image + (y - first_row) * row_step + x * pixel_step;
    }
}

// V of one tile: `channels` from c on, to v[f * step + channel], whole vectors. `sums`: of |x| at the four inner pixels.
template <class E, class C>
[[gnu::always_inline]] inline void tile_to_v(const E* const (&pixel)[16], int64_t c, int64_t channels, C* v,
                                             int64_t step, vec<C> (&sums)[4]) {
  for (int64_t i = 0; i < channels; i += lanes<C>) {
    vec<C> d[16];
    if (i + lanes<C> <= channels) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) d[j] = load(pixel[j] + c + i);
    } else {
      for (int j = 0; j < 16; ++j) d[j] = load_n(pixel[j] + c + i, static_cast<int>(channels - i));
    }
    sums[0] += abs_of<C>(d[5]), sums[1] += abs_of<C>(d[6]);
    sums[2] += abs_of<C>(d[9]), sums[3] += abs_of<C>(d[10]);
    transform_image(d);
#pragma GCC unroll 16
    for (int f = 0; f < kFrequencies; ++f) store(v + f * step + i, d[f]);
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
