// Mean pooling. NCHW: vectors run along a row; the window's rows are summed first, then its columns, from a padded row
// cut into the stride's phases (cpu/pool_rows.h). Backward works from the windows to the cells in the same two steps, and
// rows of dx that the same windows cover are computed once. NHWC: vectors run along the channels.
// Every element is summed by one thread, in an order given by the shape alone.
#include "ops/avg_pool2d.h"

#include <omp.h>

#include "cpu/pool_pixels.h"
#include "cpu/pool_rows.h"
#include "cpu/simd/stream.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// Cells that D counts along one axis for the window that begins at `begin`.
int64_t counted(int64_t begin, int64_t kernel, int64_t size, int64_t margin) {
  return min64(begin + kernel, size + margin) - max64(begin, -margin);
}
// D = rows_counted(p) * columns_counted(q); a given divisor counts as rows.
int64_t rows_counted(const AvgPool2dParams& p, int64_t pp) {
  if (p.divisor) return p.divisor;
  return counted(pp * p.stride_h - p.pad_h, p.kernel_h, p.h, p.count_include_pad ? p.pad_h : 0);
}
int64_t columns_counted(const AvgPool2dParams& p, int64_t q) {
  if (p.divisor) return 1;
  return counted(q * p.stride_w - p.pad_w, p.kernel_w, p.w, p.count_include_pad ? p.pad_w : 0);
}

template <class T>
void forward_nchw(const AvgPool2dParams& p) {
  using C = compute_t<T>;
  const PhasedRow<C> phases(p.w, p.q, p.pad_w, p.kernel_w, p.stride_w, 1);
  const int64_t width = round_up(p.q, lanes<C>);
  const int64_t unit_rows = rows_per_unit(p.n * p.c, p.p), units_each = ceil_div(p.p, unit_rows);

  struct Piece {
    C *sums, *columns, *counts;
    int64_t* tap_at;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.sums = arena.take<C>(round_up(p.w, lanes<C>));
    s.columns = arena.take<C>(phases.size());
    s.counts = arena.take<C>(width);
    s.tap_at = arena.take<int64_t>(p.kernel_w);
    return s;
  });

#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    phases.fill(s.columns, 0);
    for (int64_t t = 0; t < p.kernel_w; ++t) s.tap_at[t] = phases.at(t);
    for (int64_t q = 0; q < width; ++q) s.counts[q] = static_cast<C>(q < p.q ? columns_counted(p, q) : 1);

#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
      const int64_t plane = unit / units_each, from = unit % units_each * unit_rows;
      const T* const x = static_cast<const T*>(p.in) + plane * p.h * p.w;
      for (int64_t pp = from; pp < min64(from + unit_rows, p.p); ++pp) {
        const int64_t top = pp * p.stride_h - p.pad_h;
        const int64_t h0 = max64(top, 0), h1 = min64(top + p.kernel_h, p.h);
        for (int64_t w = 0; w < p.w; w += lanes<C>) {
          const int part = part_of<C>(w, p.w);
          vec<C> sum = {};
          for (int64_t h = h0; h < h1; ++h) sum += load_n(x + h * p.w + w, part);
          store(s.sums + w, sum);
        }
        phases.split(s.sums, s.columns);
        const C rows = static_cast<C>(rows_counted(p, pp));
        T* const y = static_cast<T*>(p.out) + (plane * p.p + pp) * p.q;
        for (int64_t q = 0; q < p.q; q += lanes<C>) {
          vec<C> sum = {};
          for (int64_t t = 0; t < p.kernel_w; ++t) sum += load(s.columns + s.tap_at[t] + q);
          store_n(y + q, sum / (load(s.counts + q) * rows), part_of<C>(q, p.q));
        }
      }
    }
  }
}

// A row of dx is the sum of the windows' rows over it, spread over the windows' columns: cell c of the padded row sums the
// windows c / stride, and those before it that reach it. So a vector of cells is, per such window, the vector of windows from
// the first cell's on, permuted; `lane` and `reached` say how for each vector of a row.
template <class T>
void backward_nchw(const AvgPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const int64_t terms = ceil_div(p.kernel_w, p.stride_w), ring = min64(ceil_div(p.kernel_h, p.stride_h), p.p);
  const int64_t width = round_up(p.w, lanes<C>), columns = round_up(p.q, lanes<C>);
  // Zeros before the first window and after the last.
  const int64_t lead = round_up(terms, lanes<C>);
  const int64_t length = lead + round_up(max64(p.q, (width + p.pad_w) / p.stride_w + 1), lanes<C>) + lanes<C>;
  const int64_t unit_rows = rows_per_unit(p.n * p.c, p.h), units_each = ceil_div(p.h, unit_rows);
  const bool stream = p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) >= kLargeImage &&
                      p.w * static_cast<int64_t>(sizeof(T)) % 64 == 0;

  struct Piece {
    C *windows, *sums, *scale;  // windows: a ring of rows of dy over D
    I *lane, *reached;
    int64_t *held, *base, *p0, *p1;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.windows = arena.take<C>(ring * length);
    s.sums = arena.take<C>(length);
    s.scale = arena.take<C>(columns);
    s.lane = arena.take<I>(width);
    s.reached = arena.take<I>(terms * width);
    s.held = arena.take<int64_t>(ring);
    s.base = arena.take<int64_t>(width / lanes<C>);
    s.p0 = arena.take<int64_t>(p.h);
    s.p1 = arena.take<int64_t>(p.h);
    return s;
  });

#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    for (int64_t i = 0; i < ring * length; ++i) s.windows[i] = 0;
    for (int64_t i = 0; i < length; ++i) s.sums[i] = 0;
    for (int64_t h = 0; h < p.h; ++h) {
      s.p0[h] = first_window(h, p.pad_h, p.kernel_h, p.stride_h);
      s.p1[h] = last_window(h, p.pad_h, p.stride_h, p.p);
    }
    for (int64_t w = 0; w < width; ++w) {
      const int64_t cell = w + p.pad_w, window = cell / p.stride_w;
      if (w % lanes<C> == 0) s.base[w / lanes<C>] = window;
      s.lane[w] = static_cast<I>(window - s.base[w / lanes<C>]);
      for (int64_t k = 0; k < terms; ++k)
        s.reached[k * width + w] = cell % p.stride_w + k * p.stride_w < p.kernel_w ? -1 : 0;
    }
    int64_t scaled = 0;  // the rows counted that `scale` is for

#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
      const int64_t plane = unit / units_each, from = unit % units_each * unit_rows, to = min64(from + unit_rows, p.h);
      const T* const dy = static_cast<const T*>(p.in) + plane * p.p * p.q;
      for (int64_t i = 0; i < ring; ++i) s.held[i] = -1;
      for (int64_t h = from, end; h < to; h = end) {  // rows of dx under the same windows
        const int64_t p0 = s.p0[h], p1 = s.p1[h];
        for (end = h + 1; end < to && s.p0[end] == p0 && s.p1[end] == p1;) ++end;
        for (int64_t pp = p0; pp < p1; ++pp) {
          const int64_t slot = pp % ring;
          if (s.held[slot] == pp) continue;
          s.held[slot] = pp;
          const int64_t rows = rows_counted(p, pp);
          if (rows != scaled) {
            scaled = rows;
            for (int64_t q = 0; q < columns; ++q)
              s.scale[q] = 1 / static_cast<C>(rows * (q < p.q ? columns_counted(p, q) : 1));
          }
          C* const to_windows = s.windows + slot * length + lead;
          for (int64_t q = 0; q < p.q; q += lanes<C>)
            store(to_windows + q, load_n(dy + pp * p.q + q, part_of<C>(q, p.q)) * load(s.scale + q));
        }
        const C* sums = s.sums + lead;
        if (p1 - p0 == 1) {
          sums = s.windows + p0 % ring * length + lead;
        } else {
          for (int64_t q = 0; q < p.q; q += lanes<C>) {
            vec<C> sum = {};
            for (int64_t pp = p0; pp < p1; ++pp) sum += load(s.windows + pp % ring * length + lead + q);
            store(s.sums + lead + q, sum);
          }
        }
        T* const dx = static_cast<T*>(p.out) + (plane * p.h + h) * p.w;
        for (int64_t w = 0; w < p.w; w += lanes<C>) {
          const C* const at = sums + s.base[w / lanes<C>];
          vec<C> sum = {};
          if (p.stride_w == 1) {
            for (int64_t k = terms - 1; k >= 0; --k) sum += load(at - k);
          } else {
            const ivec<C> lane = *reinterpret_cast<const ivec<C>*>(s.lane + w);
            for (int64_t k = terms - 1; k >= 0; --k) {
              const ivec<C> reached = *reinterpret_cast<const ivec<C>*>(s.reached + k * width + w);
              sum += reached ? __builtin_shuffle(load(at - k), lane) : vec<C>{};
            }
          }
          const int part = part_of<C>(w, p.w);
          for (int64_t row = 0; row < end - h; ++row) store_output(dx + row * p.w + w, sum, part, stream);
        }
      }
      if (stream) end_streaming();
    }
  }
}

// to[c] = sum over k of from[at[k] + c] * scale[k] (scale null: all 1), over D.  kCount: the number of terms where it is
// worth unrolling, else 0: then several vectors are summed at once, since each sum waits for the one before it.
template <class T, int kCount, bool kScale>
void sum_nhwc(T* to, const T* from, const int64_t* at, const compute_t<T>* scale, int64_t count, compute_t<T> divisor,
              int64_t channels, bool stream) {
  using C = compute_t<T>;
  constexpr int kVectors = kCount ? 1 : 4;
  const int64_t total = kCount ? kCount : count;
  const auto vectors = [&]<int kSums>(int64_t c, int part) __attribute__((always_inline)) {
    vec<C> sums[kSums] = {};
#pragma GCC unroll 9
    for (int64_t k = 0; k < total; ++k) {
      const T* const x = from + at[k] + c;
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const vec<C> term = load_n(x + i * lanes<C>, part);
        if constexpr (kScale) {
          sums[i] += term * scale[k];
        } else {
          sums[i] += term;
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      if constexpr (!kScale) sums[i] /= divisor;
      store_output(to + c + i * lanes<C>, sums[i], part, stream);
    }
  };
  int64_t c = 0;
  if constexpr (kVectors > 1)
    for (; c + kVectors * lanes<C> <= channels; c += kVectors * lanes<C>)
      vectors.template operator()<kVectors>(c, lanes<C>);
  for (; c + lanes<C> <= channels; c += lanes<C>) vectors.template operator()<1>(c, lanes<C>);
  if (c < channels) vectors.template operator()<1>(c, static_cast<int>(channels - c));
}
template <class T, bool kScale>
void sum_pixels(T* to, const T* from, const int64_t* at, const compute_t<T>* scale, int64_t count, compute_t<T> divisor,
                int64_t channels, bool stream) {
  switch (count) {
    case 1: return sum_nhwc<T, 1, kScale>(to, from, at, scale, count, divisor, channels, stream);
    case 2: return sum_nhwc<T, 2, kScale>(to, from, at, scale, count, divisor, channels, stream);
    case 4: return sum_nhwc<T, 4, kScale>(to, from, at, scale, count, divisor, channels, stream);
    case 9: return sum_nhwc<T, 9, kScale>(to, from, at, scale, count, divisor, channels, stream);
    default: return sum_nhwc<T, 0, kScale>(to, from, at, scale, count, divisor, channels, stream);
  }
}

template <class T>
void forward_nhwc(const AvgPool2dParams& p) {
  using C = compute_t<T>;
  const int64_t cells = min64(p.kernel_h, p.h) * min64(p.kernel_w, p.w);
  const bool stream = large_output<T>(p.n * p.c * p.h * p.w, p.n * p.c * p.p * p.q);
  const ScratchPieces scratch(p.threads, cells * static_cast<int64_t>(sizeof(int64_t)));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    int64_t* const at = static_cast<int64_t*>(scratch.piece(omp_get_thread_num()));
    const int64_t top = row % p.p * p.stride_h - p.pad_h, rows = rows_counted(p, row % p.p);
    const int64_t h0 = max64(top, 0), h1 = min64(top + p.kernel_h, p.h);
    const T* const image = static_cast<const T*>(p.in) + row / p.p * p.h * p.w * p.c;
    Ahead ahead = rows_of_next_windows(image, row % p.p + 1, p.p, p.stride_h, p.pad_h, p.kernel_h, p.h, p.w * p.c, p.q);
    for (int64_t q = 0; q < p.q; ++q) {
      ahead.fetch();
      const int64_t left = q * p.stride_w - p.pad_w;
      const int64_t w0 = max64(left, 0), w1 = min64(left + p.kernel_w, p.w);
      int64_t count = 0;
      for (int64_t h = h0; h < h1; ++h)
        for (int64_t w = w0; w < w1; ++w) at[count++] = (h * p.w + w) * p.c;
      sum_pixels<T, false>(static_cast<T*>(p.out) + (row * p.q + q) * p.c, image, at, nullptr, count,
                           static_cast<C>(rows * columns_counted(p, q)), p.c, stream);
    }
    if (stream) end_streaming();
  }
}

template <class T>
void backward_nhwc(const AvgPool2dParams& p) {
  using C = compute_t<T>;
  const bool stream = p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
  const int64_t windows = min64(ceil_div(p.kernel_h, p.stride_h), p.p) * min64(ceil_div(p.kernel_w, p.stride_w), p.q);
  struct Piece {
    int64_t* at;
    C* scale;
    double* per_column;  // 1 / columns_counted
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.at = arena.take<int64_t>(windows);
    s.scale = arena.take<C>(windows);
    s.per_column = arena.take<double>(p.q);
    return s;
  });
#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    for (int64_t q = 0; q < p.q; ++q) s.per_column[q] = 1.0 / static_cast<double>(columns_counted(p, q));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.n * p.h; ++row) {
      const int64_t h = row % p.h;
      const T* const image = static_cast<const T*>(p.in) + row / p.h * p.p * p.q * p.c;
      const int64_t p0 = first_window(h, p.pad_h, p.kernel_h, p.stride_h);
      const int64_t p1 = last_window(h, p.pad_h, p.stride_h, p.p);
      double per_row = 0;
      int64_t rows = 0;  // what per_row is the reciprocal of
      for (int64_t w = 0; w < p.w; ++w) {
        const int64_t q0 = first_window(w, p.pad_w, p.kernel_w, p.stride_w);
        const int64_t q1 = last_window(w, p.pad_w, p.stride_w, p.q);
        int64_t count = 0;
        for (int64_t pp = p0; pp < p1; ++pp) {
          const int64_t here = rows_counted(p, pp);
          if (here != rows) rows = here, per_row = 1.0 / static_cast<double>(here);
          for (int64_t q = q0; q < q1; ++q) {
            s.at[count] = (pp * p.q + q) * p.c;
            s.scale[count++] = static_cast<C>(per_row * s.per_column[q]);
          }
        }
        sum_pixels<T, true>(static_cast<T*>(p.out) + (row * p.w + w) * p.c, image, s.at, s.scale, count, 1, p.c,
                            stream);
      }
      if (stream) end_streaming();
    }
  }
}

template <class T>
void forward(const AvgPool2dParams& p) {
  p.layout == Layout::nchw ? forward_nchw<T>(p) : forward_nhwc<T>(p);
}
template <class T>
void backward(const AvgPool2dParams& p) {
  p.layout == Layout::nchw ? backward_nchw<T>(p) : backward_nhwc<T>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

#if !CNNOPS_ISA_avx512_bf16  // it rounds few numbers
CNNOPS_EXPORT(avg_pool2d_forward, AvgPool2dParams, forward)
#endif
CNNOPS_EXPORT(avg_pool2d_backward, AvgPool2dParams, backward)
