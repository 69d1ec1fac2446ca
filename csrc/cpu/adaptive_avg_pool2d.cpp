// Mean pooling to a given size. NCHW: the rows of a window are summed along vectors, its columns by plain loops, since
// windows differ in width. NHWC: vectors run along the channels. One window for the whole plane streams through the plane
// once, in blocks whose sums go to float64. Every element is summed by one thread in an order given by the shape.
#include "ops/adaptive_avg_pool2d.h"

#include <omp.h>

#include "cpu/pool_rows.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
void forward_nchw(const AdaptiveAvgPool2dParams& p) {
  using C = compute_t<T>;
  const ScratchPieces scratch(p.threads, round_up(p.w, lanes<C>) * static_cast<int64_t>(sizeof(C)));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.c * p.p; ++row) {
    C* const sums = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    const T* const x = static_cast<const T*>(p.in) + row / p.p * p.h * p.w;
    const int64_t h0 = adaptive_start(row % p.p, p.h, p.p), h1 = adaptive_end(row % p.p, p.h, p.p);
    for (int64_t w = 0; w < p.w; w += lanes<C>) {
      const int part = part_of<C>(w, p.w);
      vec<C> sum = {};
      for (int64_t h = h0; h < h1; ++h) sum += load_n(x + h * p.w + w, part);
      store(sums + w, sum);
    }
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t w0 = adaptive_start(q, p.w, p.q), w1 = adaptive_end(q, p.w, p.q);
      C sum = 0;
      for (int64_t w = w0; w < w1; ++w) sum += sums[w];
      store_scalar(static_cast<T*>(p.out) + row * p.q + q, sum / static_cast<C>((h1 - h0) * (w1 - w0)));
    }
  }
}

template <class T>
void forward_nhwc(const AdaptiveAvgPool2dParams& p) {
  using C = compute_t<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    const T* const image = static_cast<const T*>(p.in) + row / p.p * p.h * p.w * p.c;
    const int64_t h0 = adaptive_start(row % p.p, p.h, p.p), h1 = adaptive_end(row % p.p, p.h, p.p);
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t w0 = adaptive_start(q, p.w, p.q), w1 = adaptive_end(q, p.w, p.q);
      T* const y = static_cast<T*>(p.out) + (row * p.q + q) * p.c;
      for (int64_t c = 0; c < p.c; c += lanes<C>) {
        const int part = part_of<C>(c, p.c);
        vec<C> sum = {};
        for (int64_t h = h0; h < h1; ++h)
          for (int64_t w = w0; w < w1; ++w) sum += load_n(image + (h * p.w + w) * p.c + c, part);
        store_n(y + c, sum / static_cast<C>((h1 - h0) * (w1 - w0)), part);
      }
    }
  }
}

template <class T>
void forward(const AdaptiveAvgPool2dParams& p) {
  p.layout == Layout::nchw ? forward_nchw<T>(p) : forward_nhwc<T>(p);
}

template <class T>
void backward_nchw(const AdaptiveAvgPool2dParams& p) {
  using C = compute_t<T>;
  const ScratchPieces scratch(p.threads, round_up(p.q, lanes<C>) * static_cast<int64_t>(sizeof(C)));
  const int64_t unit_rows = rows_per_unit(p.n * p.c, p.h), units_each = ceil_div(p.h, unit_rows);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
    C* const windows = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    const int64_t plane = unit / units_each, from = unit % units_each * unit_rows;
    const T* const dy = static_cast<const T*>(p.in) + plane * p.p * p.q;
    T* const plane_dx = static_cast<T*>(p.out) + plane * p.h * p.w;
    int64_t held_first = -1, held_last = -1;
    for (int64_t h = from; h < min64(from + unit_rows, p.h); ++h) {
      const int64_t p0 = adaptive_first(h, p.h, p.p), p1 = adaptive_last(h, p.h, p.p);
      T* const dx = plane_dx + h * p.w;
      if (p0 == held_first && p1 == held_last) {  // the same windows as the row above
        std::memcpy(dx, dx - p.w, p.w * sizeof(T));
        continue;
      }
      held_first = p0, held_last = p1;
      for (int64_t q = 0; q < p.q; ++q) {
        const int64_t columns = adaptive_end(q, p.w, p.q) - adaptive_start(q, p.w, p.q);
        C sum = 0;
        for (int64_t pp = p0; pp < p1; ++pp) {
          const int64_t rows = adaptive_end(pp, p.h, p.p) - adaptive_start(pp, p.h, p.p);
          sum += load_scalar(dy[pp * p.q + q]) / static_cast<C>(rows * columns);
        }
        windows[q] = sum;
      }
      for (int64_t w = 0; w < p.w; ++w) {
        C sum = 0;
        for (int64_t q = adaptive_first(w, p.w, p.q), q1 = adaptive_last(w, p.w, p.q); q < q1; ++q) sum += windows[q];
        store_scalar(&dx[w], sum);
      }
    }
  }
}

template <class T>
void backward_nhwc(const AdaptiveAvgPool2dParams& p) {
  using C = compute_t<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.h; ++row) {
    const T* const image = static_cast<const T*>(p.in) + row / p.h * p.p * p.q * p.c;
    const int64_t p0 = adaptive_first(row % p.h, p.h, p.p), p1 = adaptive_last(row % p.h, p.h, p.p);
    for (int64_t w = 0; w < p.w; ++w) {
      const int64_t q0 = adaptive_first(w, p.w, p.q), q1 = adaptive_last(w, p.w, p.q);
      T* const dx = static_cast<T*>(p.out) + (row * p.w + w) * p.c;
      for (int64_t c = 0; c < p.c; c += lanes<C>) {
        const int part = part_of<C>(c, p.c);
        vec<C> sum = {};
        for (int64_t pp = p0; pp < p1; ++pp) {
          const int64_t rows = adaptive_end(pp, p.h, p.p) - adaptive_start(pp, p.h, p.p);
          for (int64_t q = q0; q < q1; ++q) {
            const int64_t columns = adaptive_end(q, p.w, p.q) - adaptive_start(q, p.w, p.q);
            sum += load_n(image + (pp * p.q + q) * p.c + c, part) / static_cast<C>(rows * columns);
          }
        }
        store_n(dx + c, sum, part);
      }
    }
  }
}

template <class T>
void backward(const AdaptiveAvgPool2dParams& p) {
  p.layout == Layout::nchw ? backward_nchw<T>(p) : backward_nhwc<T>(p);
}

// Terms that a lane adds up before its sum goes to float64.
constexpr int64_t kBlock = 64;

template <class T>
double sum_of(const T* x, int64_t count) {
  using C = compute_t<T>;
  double total = 0;
  int64_t i = 0;
  while (i + 4 * lanes<C> <= count) {  // four sums, to hide the latency of adding
    vec<C> a = {}, b = {}, c = {}, d = {};
    const int64_t end = i + min64((count - i) / (4 * lanes<C>), kBlock / 4) * 4 * lanes<C>;
    for (; i < end; i += 4 * lanes<C>) {
      a += load(x + i), b += load(x + i + lanes<C>), c += load(x + i + 2 * lanes<C>), d += load(x + i + 3 * lanes<C>);
    }
    const vec<C> sum = (a + b) + (c + d);
    for (int l = 0; l < lanes<C>; ++l) total += sum[l];
  }
  vec<C> rest = {};
  for (; i < count; i += lanes<C>) rest += load_n(x + i, part_of<C>(i, count));
  for (int l = 0; l < lanes<C>; ++l) total += rest[l];
  return total;
}

template <class T>
void global_forward(const AdaptiveAvgPool2dParams& p) {
  using C = compute_t<T>;
  const T* const x = static_cast<const T*>(p.in);
  T* const y = static_cast<T*>(p.out);
  const int64_t cells = p.h * p.w;
  if (p.layout == Layout::nchw) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t plane = 0; plane < p.n * p.c; ++plane)
      store_scalar(&y[plane], static_cast<C>(sum_of(x + plane * cells, cells) / static_cast<double>(cells)));
    return;
  }
  // Channels in groups of a few vectors, whose sums stay in registers while all pixels pass.
  constexpr int kGroup = 4;
  constexpr int64_t kChannels = kGroup * lanes<C>;
  const int64_t groups = ceil_div(p.c, kChannels);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < p.n * groups; ++unit) {
    const int64_t c0 = unit % groups * kChannels, channels = min64(kChannels, p.c - c0);
    const T* const image = x + unit / groups * cells * p.c + c0;
    double total[kChannels] = {};
    for (int64_t from = 0; from < cells; from += kBlock) {
      const int64_t to = min64(from + kBlock, cells);
      vec<C> sums[kGroup] = {};
      if (channels == kChannels) {
        for (int64_t i = from; i < to; ++i)
          for (int g = 0; g < kGroup; ++g) sums[g] += load(image + i * p.c + g * lanes<C>);
      } else {
        for (int64_t i = from; i < to; ++i)
          for (int64_t c = 0; c < channels; c += lanes<C>)
            sums[c / lanes<C>] += load_n(image + i * p.c + c, part_of<C>(c, channels));
      }
      for (int64_t c = 0; c < kChannels; ++c) total[c] += sums[c / lanes<C>][c % lanes<C>];
    }
    T* const out = y + unit / groups * p.c + c0;
    for (int64_t c = 0; c < channels; ++c) store_scalar(&out[c], static_cast<C>(total[c] / static_cast<double>(cells)));
  }
}

template <class T>
void global_backward(const AdaptiveAvgPool2dParams& p) {
  using C = compute_t<T>;
  const T* const dy = static_cast<const T*>(p.in);
  T* const dx = static_cast<T*>(p.out);
  const int64_t cells = p.h * p.w;
  const C count = static_cast<C>(cells);
  if (p.layout == Layout::nchw) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t plane = 0; plane < p.n * p.c; ++plane) {
      const vec<C> value = set1(load_scalar(dy[plane]) / count);
      for (int64_t i = 0; i < cells; i += lanes<C>) store_n(dx + plane * cells + i, value, part_of<C>(i, cells));
    }
    return;
  }
  // A pixel's worth of dx is worked out once per unit of pixels, and copied to the others.
  constexpr int64_t kPixels = 64;
  const int64_t units_each = ceil_div(cells, kPixels);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < p.n * units_each; ++unit) {
    const int64_t n = unit / units_each, from = unit % units_each * kPixels;
    T* const first = dx + (n * cells + from) * p.c;
    for (int64_t c = 0; c < p.c; c += lanes<C>) {
      const int part = part_of<C>(c, p.c);
      store_n(first + c, load_n(dy + n * p.c + c, part) / count, part);
    }
    for (int64_t i = 1; i < min64(kPixels, cells - from); ++i) std::memcpy(first + i * p.c, first, p.c * sizeof(T));
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(adaptive_avg_pool2d_forward, AdaptiveAvgPool2dParams, forward)
CNNOPS_EXPORT(adaptive_avg_pool2d_backward, AdaptiveAvgPool2dParams, backward)
CNNOPS_EXPORT(adaptive_avg_pool2d_global_forward, AdaptiveAvgPool2dParams, global_forward)
CNNOPS_EXPORT(adaptive_avg_pool2d_global_backward, AdaptiveAvgPool2dParams, global_backward)
