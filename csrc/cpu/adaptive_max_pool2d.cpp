// Max pooling to a given size. NCHW: the best of each column of a row of windows is found along whole rows of the image, then
// the best of those of each window, where of equal values in two columns the upper is first; windows side by side are one
// vector. NHWC: vectors run along the channels.
#include "ops/adaptive_max_pool2d.h"

#include <omp.h>

#include "cpu/pool_pixels.h"
#include "cpu/pool_rows.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
void forward_nchw(const AdaptiveMaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const int64_t width = round_up(p.w, lanes<C>), windows = round_up(p.q, lanes<C>);
  int64_t most = 0;  // columns of a window
  for (int64_t q = 0; q < p.q; ++q) most = max64(most, adaptive_end(q, p.w, p.q) - adaptive_start(q, p.w, p.q));
  struct Piece {
    C *values, *picked;  // of a row's columns; of the windows' columns, all first ones, then all second ones, ...
    I *rows, *picked_rows;
    I *column, *begin;
  };
  const auto lay_out = [&](Arena arena, int64_t* bytes) {
    Piece s;
    s.values = arena.take<C>(width);
    s.picked = arena.take<C>(most * windows);
    s.rows = arena.take<I>(width);
    s.picked_rows = arena.take<I>(most * windows);
    s.column = arena.take<I>(most * windows);
    s.begin = arena.take<I>(windows);
    *bytes = arena.used;
    return s;
  };
  int64_t bytes;
  lay_out(Arena{nullptr}, &bytes);
  const ScratchPieces scratch(p.threads, bytes);

#pragma omp parallel num_threads(p.threads)
  {
    int64_t ignored;
    const Piece s = lay_out(Arena{static_cast<char*>(scratch.piece(omp_get_thread_num()))}, &ignored);
    // Narrower windows end with their last column several times, which changes nothing.
    for (int64_t q = 0; q < windows; ++q) {
      const int64_t window = min64(q, p.q - 1), w0 = adaptive_start(window, p.w, p.q);
      s.begin[q] = static_cast<I>(w0);
      for (int64_t i = 0; i < most; ++i)
        s.column[i * windows + q] = static_cast<I>(min64(w0 + i, adaptive_end(window, p.w, p.q) - 1));
    }
    for (int64_t i = 0; i < most * windows; ++i) s.picked[i] = 0, s.picked_rows[i] = 0;

#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.n * p.c * p.p; ++row) {
      const T* const x = static_cast<const T*>(p.x) + row / p.p * p.h * p.w;
      const int64_t h0 = adaptive_start(row % p.p, p.h, p.p), h1 = adaptive_end(row % p.p, p.h, p.p);
      const auto columns = [&](int64_t w, int part) __attribute__((always_inline)) {
        const T* at = x + h0 * p.w + w;
        Best<C> best{load_n(at, part), ivec<C>{} + static_cast<I>(h0)};
        for (int64_t h = h0 + 1; h < h1; ++h)
          take<C, true>(best, load_n(at += p.w, part), ivec<C>{} + static_cast<I>(h));
        store(s.values + w, best.value);
        *reinterpret_cast<ivec<C>*>(s.rows + w) = best.choice;
      };
      int64_t w = 0;
      for (; w + lanes<C> <= p.w; w += lanes<C>) columns(w, lanes<C>);
      if (w < p.w) columns(w, static_cast<int>(p.w - w));
      for (int64_t i = 0; i < most; ++i)
        for (int64_t q = 0; q < p.q; ++q) {
          const int64_t column = s.column[i * windows + q];
          s.picked[i * windows + q] = s.values[column];
          s.picked_rows[i * windows + q] = s.rows[column];
        }
      for (int64_t q = 0; q < p.q; q += lanes<C>) {
        vec<C> best = load(s.picked + q);
        ivec<C> best_row = *reinterpret_cast<const ivec<C>*>(s.picked_rows + q);
        ivec<C> column = *reinterpret_cast<const ivec<C>*>(s.begin + q);
        for (int64_t i = 1; i < most; ++i) {
          const vec<C> now = load(s.picked + i * windows + q);
          const ivec<C> now_row = *reinterpret_cast<const ivec<C>*>(s.picked_rows + i * windows + q);
          const ivec<C> is_nan = now != now, was_nan = best != best;
          const ivec<C> wins =
              (now > best) | ((now == best) & (now_row < best_row)) | (is_nan & (~was_nan | (now_row >= best_row)));
          best = wins ? now : best;
          best_row = wins ? now_row : best_row;
          column = wins ? *reinterpret_cast<const ivec<C>*>(s.column + i * windows + q) : column;
        }
        const int part = part_of<C>(q, p.q);
        store_n(static_cast<T*>(p.y) + row * p.q + q, best, part);
        store_i64_n<C>(p.indices + row * p.q + q, best_row * static_cast<I>(p.w) + column, part);
      }
    }
  }
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
