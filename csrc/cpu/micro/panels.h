// How the output channels of a convolution are cut into panels of packed weights: of kTileRows channels for NCHW, where
// weights are a tile's rows; of up to kTileVecs vectors, as even as possible, for channels_last, where they are its columns.
#pragma once

#include "common/arith.h"
#include "common/tensor.h"
#include "cpu/micro/gemm_tile.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class C>
struct Panels {
  int64_t count;
  int64_t vectors;  // channels_last: of all output channels
  Layout layout;

  Panels(Layout layout, int64_t channels)
      : count(layout == Layout::nchw ? ceil_div(channels, kTileRows)
                                     : ceil_div(ceil_div(channels, lanes<C>), kTileVecs)),
        vectors(ceil_div(channels, lanes<C>)),
        layout(layout) {}
  int64_t begin(int64_t panel) const {
    return layout == Layout::nchw ? panel * kTileRows : panel * vectors / count * lanes<C>;
  }
  int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  int64_t channels() const { return begin(count); }
};

template <class C>
[[gnu::always_inline]] inline void zero_run(C* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = 0;
}

// n elements, `step` apart, to neighbours in the compute type.
template <class T>
[[gnu::always_inline]] inline void copy_run(compute_t<T>* dst, const T* src, int64_t step, int64_t n) {
  using C = compute_t<T>;
  if (step == 1) {
    int64_t i = 0;
    for (; i + lanes<C> <= n; i += lanes<C>) store(dst + i, load(src + i));
    if (i < n) store_n(dst + i, load_n(src + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    return;
  }
  int64_t i = 0;
  if (step == 2) {
    for (; i < n; i += lanes<C>) {
      const int64_t left = 2 * (n - i) - 1;  // elements up to the last one wanted
      if (!CNNOPS_ISA_HAS_MASKS && left < 2 * lanes<C>) break;
      const vec<C> a = load_n(src + 2 * i, static_cast<int>(min64(left, lanes<C>)));
      const vec<C> b = left > lanes<C>
                           ? load_n(src + 2 * i + lanes<C>, static_cast<int>(min64(left - lanes<C>, lanes<C>)))
                           : vec<C>{};
      store_n(dst + i, evens(a, b), static_cast<int>(min64(n - i, lanes<C>)));
    }
  } else if (step == 4) {
    for (; i + lanes<C> < n; i += lanes<C>) {  // the last one wanted is not the last one read
      const T* const from = src + 4 * i;
      const vec<C> a = evens(load(from), load(from + lanes<C>));
      store(dst + i, evens(a, evens(load(from + 2 * lanes<C>), load(from + 3 * lanes<C>))));
    }
  }
  for (; i < n; ++i) dst[i] = load_scalar(src[i * step]);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
