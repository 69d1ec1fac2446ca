// Max pooling to a given size. NCHW: vectors run along a window's rows, every lane keeping the best of its columns, and the
// lanes are settled at the end of the window. NHWC: vectors run along the channels.
#include "ops/adaptive_max_pool2d.h"

#include "cpu/pool_rows.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
void forward_nchw(const AdaptiveMaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.c * p.p; ++row) {
    const T* const x = static_cast<const T*>(p.x) + row / p.p * p.h * p.w;
    const int64_t h0 = adaptive_start(row % p.p, p.h, p.p), h1 = adaptive_end(row % p.p, p.h, p.p);
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t w0 = adaptive_start(q, p.w, p.q), w1 = adaptive_end(q, p.w, p.q);
      const ivec<C> lane = iota<ivec<C>>();
      // A lane that sees nothing above -Inf keeps the window's first cell, which is what a window full of -Inf chooses.
      vec<C> best = set1(kLowest<C>);
      ivec<C> at = ivec<C>{} + static_cast<I>(h0 * p.w + w0);
      for (int64_t h = h0; h < h1; ++h)
        for (int64_t w = w0; w < w1; w += lanes<C>) {
          const int part = part_of<C>(w, w1);
          vec<C> v = load_n(x + h * p.w + w, part);
          if (part < lanes<C>) v = lane < static_cast<I>(part) ? v : set1(kLowest<C>);
          const ivec<C> wins = (v > best) | (v != v);
          best = wins ? v : best;
          at = wins ? lane + static_cast<I>(h * p.w + w) : at;
        }
      C value = best[0];
      I index = at[0];
      for (int l = 1; l < lanes<C>; ++l) {
        const bool later = at[l] > index, nan = best[l] != best[l], had_nan = value != value;
        const bool wins = nan ? !had_nan || later : !had_nan && (best[l] > value || (best[l] == value && !later));
        if (wins) value = best[l], index = at[l];
      }
      store_scalar(static_cast<T*>(p.y) + row * p.q + q, value);
      p.indices[row * p.q + q] = index;
    }
  }
}

template <class T>
void forward_nhwc(const AdaptiveMaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    const T* const image = static_cast<const T*>(p.x) + row / p.p * p.h * p.w * p.c;
    const int64_t h0 = adaptive_start(row % p.p, p.h, p.p), h1 = adaptive_end(row % p.p, p.h, p.p);
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t w0 = adaptive_start(q, p.w, p.q), w1 = adaptive_end(q, p.w, p.q);
      const int64_t out = (row * p.q + q) * p.c;
      for (int64_t c = 0; c < p.c; c += lanes<C>) {
        const int part = part_of<C>(c, p.c);
        vec<C> best = set1(kLowest<C>);
        ivec<C> at = ivec<C>{} + static_cast<I>(h0 * p.w + w0);
        for (int64_t h = h0; h < h1; ++h)
          for (int64_t w = w0; w < w1; ++w) {
            const vec<C> v = load_n(image + (h * p.w + w) * p.c + c, part);
            const ivec<C> wins = (v > best) | (v != v);
            best = wins ? v : best;
            at = wins ? ivec<C>{} + static_cast<I>(h * p.w + w) : at;
          }
        store_n(static_cast<T*>(p.y) + out + c, best, part);
        store_i64_n<C>(p.indices + out + c, at, part);
      }
    }
  }
}

template <class T>
void forward(const AdaptiveMaxPool2dParams& p) {
  p.layout == Layout::nchw ? forward_nchw<T>(p) : forward_nhwc<T>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(adaptive_max_pool2d_forward, AdaptiveMaxPool2dParams, forward)
