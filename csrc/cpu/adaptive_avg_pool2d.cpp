// Mean pooling to a given size. NCHW: the rows of a window are summed along vectors, its columns by plain loops, since
// windows differ in width. NHWC: vectors run along the channels. One window for the whole plane streams through the plane
// once, in blocks whose sums go to float64. Every element is summed by one thread in an order given by the shape.
#include "ops/adaptive_avg_pool2d.h"

#include <omp.h>

#include "cpu/pool_pixels.h"
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

// The mean of a window's cells, kVectors vectors of channels.
template <class T, int kVectors>
[[gnu::always_inline]] inline void mean_nhwc(const AdaptiveAvgPool2dParams& p, const T* image, int64_t h0, int64_t h1,
                                             int64_t w0, int64_t w1, T* y, int64_t c, int part) {
  using C = compute_t<T>;
  vec<C> sums[kVectors] = {};
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t w = w0; w < w1; ++w) {
      const T* const x = image + (h * p.w + w) * p.c + c;
#pragma GCC unroll 8
      for (int k = 0; k < kVectors; ++k) sums[k] += load_n(x + k * lanes<C>, part);
    }
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k)
    store_n(y + c + k * lanes<C>, sums[k] / static_cast<C>((h1 - h0) * (w1 - w0)), part);
}

template <class T>
void forward_nhwc(const AdaptiveAvgPool2dParams& p) {
  using C = compute_t<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    const T* const image = static_cast<const T*>(p.in) + row / p.p * p.h * p.w * p.c;
    const int64_t h0 = adaptive_start(row % p.p, p.h, p.p), h1 = adaptive_end(row % p.p, p.h, p.p);
    Ahead ahead = next_adaptive_rows(image, row % p.p, p.p, p.h, p.w * p.c, p.q);
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t w0 = adaptive_start(q, p.w, p.q), w1 = adaptive_end(q, p.w, p.q);
      T* const y = static_cast<T*>(p.out) + (row * p.q + q) * p.c;
      ahead.fetch();
      int64_t c = 0;
      for (; c + 8 * lanes<C> <= p.c; c += 8 * lanes<C>) mean_nhwc<T, 8>(p, image, h0, h1, w0, w1, y, c, lanes<C>);
      for (; c < p.c; c += lanes<C>) mean_nhwc<T, 1>(p, image, h0, h1, w0, w1, y, c, part_of<C>(c, p.c));
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

template <class C>
using Wide = typename VectorOf<double, lanes<C>>::type;

// The sum of the lanes in float64: of float32's in a tree, in as many steps as halves.
template <class C>
[[gnu::always_inline]] inline double wide_sum(vec<C> v) {
  return sum_lanes<double, lanes<C>>(__builtin_convertvector(v, Wide<C>));
}

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
    total += wide_sum<C>((a + b) + (c + d));
  }
  vec<C> rest = {};
  for (; i + lanes<C> <= count; i += lanes<C>) rest += load(x + i);
  if (i < count) rest += load_n(x + i, static_cast<int>(count - i));
  return total + wide_sum<C>(rest);
}

// Adds the pixels from..to of kVectors vectors of channels (`part` lanes of the last) to their float64 sums.
template <int kVectors, class T>
[[gnu::always_inline]] inline void add_pixels(const T* x, int64_t from, int64_t to, int64_t pitch, int part,
                                              double* total) {
  using C = compute_t<T>;
  for (; from < to; from += kBlock) {
    vec<C> sums[kVectors] = {};
    for (int64_t i = from; i < min64(from + kBlock, to); ++i) {
      for (int g = 0; g + 1 < kVectors; ++g) sums[g] += load(x + i * pitch + g * lanes<C>);
      sums[kVectors - 1] += load_n(x + i * pitch + (kVectors - 1) * lanes<C>, part);
    }
    for (int g = 0; g < kVectors; ++g)
      *reinterpret_cast<Wide<C>*>(total + g * lanes<C>) += __builtin_convertvector(sums[g], Wide<C>);
  }
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
  // A unit is a piece of the pixels of an image, so that one image of few channels feeds several threads too. Four vectors
  // of channels at a time stay in registers while a block of pixels passes.
  constexpr int64_t kPieces = 16, kGroup = 4 * lanes<C>;
  const int64_t pieces = p.n >= kPieces ? 1 : max64(min64(kPieces, cells / (4 * kBlock)), 1);
  const int64_t piece = round_up(ceil_div(cells, pieces), kBlock), sums_each = round_up(p.c, kGroup);
  const Scratch<double> sums(p.n * pieces * sums_each);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * pieces; ++unit) {
      const int64_t from = unit % pieces * piece, to = min64(from + piece, cells);
      const T* const image = x + unit / pieces * cells * p.c;
      double* const total = sums.data + unit * sums_each;
      for (int64_t c = 0; c < sums_each; ++c) total[c] = 0;
      // Block by block, since all of its channels together pass the cache once.
      for (int64_t at = from; at < to; at += kBlock) {
        const int64_t end = min64(at + kBlock, to);
        int64_t c = 0;
        for (; c + kGroup <= p.c; c += kGroup) add_pixels<4>(image + c, at, end, p.c, lanes<C>, total + c);
        const int64_t left = p.c - c;
        const int part = static_cast<int>(left - (ceil_div(left, lanes<C>) - 1) * lanes<C>);
        switch (ceil_div(left, lanes<C>)) {
          case 1: add_pixels<1>(image + c, at, end, p.c, part, total + c); break;
          case 2: add_pixels<2>(image + c, at, end, p.c, part, total + c); break;
          case 3: add_pixels<3>(image + c, at, end, p.c, part, total + c); break;
          case 4: add_pixels<4>(image + c, at, end, p.c, part, total + c); break;
          default: break;
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.n; ++n) {
      double* const total = sums.data + n * pieces * sums_each;
      for (int64_t k = 1; k < pieces; ++k)
        for (int64_t c = 0; c < p.c; ++c) total[c] += total[k * sums_each + c];
      for (int64_t c = 0; c < p.c; ++c)
        store_scalar(&y[n * p.c + c], static_cast<C>(total[c] / static_cast<double>(cells)));
    }
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
  const int64_t units_each = ceil_div(cells, kPixels), pixel = p.c * static_cast<int64_t>(sizeof(T));
  const bool stream = p.n * cells * pixel >= kLargeImage && pixel >= 512 && pixel % kCacheLine == 0;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < p.n * units_each; ++unit) {
    const int64_t n = unit / units_each, from = unit % units_each * kPixels;
    T* const first = dx + (n * cells + from) * p.c;
    for (int64_t c = 0; c < p.c; c += lanes<C>) {
      const int part = part_of<C>(c, p.c);
      store_n(first + c, load_n(dy + n * p.c + c, part) / count, part);
    }
    for (int64_t i = 1; i < min64(kPixels, cells - from); ++i) {
      if (stream) {
        stream_copy(first + i * p.c, first, p.c);
      } else {
        std::memcpy(first + i * p.c, first, p.c * sizeof(T));
      }
    }
    if (stream) end_streaming();
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(adaptive_avg_pool2d_forward, AdaptiveAvgPool2dParams, forward)
CNNOPS_EXPORT(adaptive_avg_pool2d_backward, AdaptiveAvgPool2dParams, backward)
CNNOPS_EXPORT(adaptive_avg_pool2d_global_forward, AdaptiveAvgPool2dParams, global_forward)
CNNOPS_EXPORT(adaptive_avg_pool2d_global_backward, AdaptiveAvgPool2dParams, global_backward)
