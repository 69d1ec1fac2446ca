// Max pooling to a given size. NCHW: cpu/pool_tall.h. NHWC: vectors run along the channels.
#include "ops/adaptive_max_pool2d.h"

#include <omp.h>

#include "cpu/pool_pixels.h"
#include "cpu/pool_tall.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
void forward_nchw(const AdaptiveMaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  int64_t most = 0;
  for (int64_t q = 0; q < p.q; ++q) most = max64(most, adaptive_end(q, p.w, p.q) - adaptive_start(q, p.w, p.q));
  for_tall_rows<C>(
      p.threads, p.n * p.c, p.p, p.w, p.q, most,
      [&](auto& windows) {
        for (int64_t q = 0; q < p.q; ++q) {
          const int64_t w0 = adaptive_start(q, p.w, p.q);
          windows.set(q, adaptive_end(q, p.w, p.q) - w0, w0, 1, w0);
        }
      },
      [&](auto& windows, int64_t plane, int64_t i) {
        const int64_t h0 = adaptive_start(i, p.h, p.p);
        const T* const x = static_cast<const T*>(p.x) + (plane * p.h + h0) * p.w;
        windows.read(i % 2, x, p.w, h0, adaptive_end(i, p.h, p.p));
      },
      [&](const auto& windows, int64_t plane, int64_t i) {
        const int64_t out = (plane * p.p + i) * p.q;
        for (int64_t q = 0; q < p.q; q += lanes<C>) {
          const auto best = windows.at(i % 2, q);
          const int part = part_of<C>(q, p.q);
          store_n(static_cast<T*>(p.y) + out + q, best.value, part);
          store_i64_n<C>(p.indices + out + q, best.row * static_cast<I>(p.w) + best.tap, part);
        }
      });
}

// The best of a window's cells, kVectors vectors of channels.
template <class T, int kVectors>
[[gnu::always_inline]] inline void best_nhwc(const AdaptiveMaxPool2dParams& p, const T* image, int64_t h0, int64_t h1,
                                             int64_t w0, int64_t w1, int64_t out, int64_t c, int part) {
  using C = compute_t<T>;
  using I = int_t<C>;
  Best<C> best[kVectors];
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) best[k] = {set1(kLowest<C>), ivec<C>{} + static_cast<I>(h0 * p.w + w0)};
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t w = w0; w < w1; ++w) {
      const T* const x = image + (h * p.w + w) * p.c + c;
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k)
        take<C, true>(best[k], load_n(x + k * lanes<C>, part), ivec<C>{} + static_cast<I>(h * p.w + w));
    }
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    store_n(static_cast<T*>(p.y) + out + c + k * lanes<C>, best[k].value, part);
    store_i64_n<C>(p.indices + out + c + k * lanes<C>, best[k].choice, part);
  }
}

template <class T>
void forward_nhwc(const AdaptiveMaxPool2dParams& p) {
  using C = compute_t<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    const T* const image = static_cast<const T*>(p.x) + row / p.p * p.h * p.w * p.c;
    const int64_t h0 = adaptive_start(row % p.p, p.h, p.p), h1 = adaptive_end(row % p.p, p.h, p.p);
    Ahead ahead = next_adaptive_rows(image, row % p.p, p.p, p.h, p.w * p.c, p.q);
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t w0 = adaptive_start(q, p.w, p.q), w1 = adaptive_end(q, p.w, p.q);
      const int64_t out = (row * p.q + q) * p.c;
      ahead.fetch();
      int64_t c = 0;
      for (; c + 4 * lanes<C> <= p.c; c += 4 * lanes<C>) best_nhwc<T, 4>(p, image, h0, h1, w0, w1, out, c, lanes<C>);
      for (; c < p.c; c += lanes<C>) best_nhwc<T, 1>(p, image, h0, h1, w0, w1, out, c, part_of<C>(c, p.c));
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
