// Convolution of NCHW images of a few channels, such as the RGB image that a network's first layer sees.
//
// Vectors are neighbouring pixels of a row of y. The rows of x that they see lie in a strip, zero-padded and cut by column
// modulo the stride, so that what one term (channel, tap) of the products takes from x are neighbours too:
//   strip[c, h][phase][j] = x[c, h, j * stride + phase - pad]
// forward      a register tile of filters x vectors of pixels, straight from the strip
// weight_grad  a tile of filters x terms, each a vector of sums that are added up across at the end of a strip
// input_grad   a tile of terms x vectors of pixels, added to the strip's rows, which become rows of dx when no further row of
//              dy reaches them
// The order of all sums depends on shapes alone, so results have the same bits for any number of threads.
#include <omp.h>

#include "cpu/conv2d_blocks.h"
#include "cpu/micro/gemm_tile.h"
#include "cpu/micro/panels.h"
#include "cpu/simd/sums.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kStripBytes = 96 << 10;  // of L2, unless one row of y sees more
constexpr int64_t kMostRows = 8;           // of y in a strip
constexpr int64_t kFlush = 48;             // terms of a running sum
constexpr int64_t kWantedTasks = 16;       // fixed: tasks decide the order of sums
constexpr int64_t kMostStride = 8;         // of columns
constexpr int64_t kLeastRows = 16;         // of dx in a task, which computes what its neighbours need of dy again

template <class C>
struct Plan {
  int64_t vectors;           // of a row of y
  int64_t terms, reach;      // rows of x under a filter
  int64_t pitch, row_pitch;  // of a phase's row, of a row
  int64_t rows, strip_rows;  // of y, of x
  int64_t blocks;            // of rows of an image of y

  explicit Plan(const Conv2dParams& p)
      : vectors(ceil_div(p.q, lanes<C>)),
        terms(p.c * p.r * p.s),
        reach((p.r - 1) * p.dilation_h + 1),
        pitch(round_up(vectors * lanes<C> + (p.s - 1) * p.dilation_w / p.stride_w, lanes<C>)),
        row_pitch(pitch_of_rows(p.stride_w * pitch)) {
    const int64_t row_bytes = p.c * row_pitch * static_cast<int64_t>(sizeof(C));
    rows = min64(min64(kMostRows, p.p), max64(1, (kStripBytes / row_bytes - reach) / p.stride_h + 1));
    strip_rows = (rows - 1) * p.stride_h + reach;
    blocks = ceil_div(p.p, rows);
  }
  // An odd number of cache lines: otherwise rows an even number apart would share few sets of L1.
  static int64_t pitch_of_rows(int64_t elements) { return (elements / lanes<C> | 1) * lanes<C>; }
  int64_t strip_size(const Conv2dParams& p) const { return p.c * strip_rows * row_pitch; }
};

// Where a term's row lies in a strip of so many rows of each channel.
template <class C>
int64_t offset_of(const Conv2dParams& p, const Plan<C>& g, int64_t rows, int64_t c, int64_t r, int64_t s) {
  const int64_t column = s * p.dilation_w;
  return (c * rows + r * p.dilation_h) * g.row_pitch + column % p.stride_w * g.pitch + column / p.stride_w;
}

template <class C>
void find_offsets(const Conv2dParams& p, const Plan<C>& g, int64_t* offset) {
  for (int64_t t = 0; t < g.terms; ++t)
    offset[t] = offset_of(p, g, g.strip_rows, t / (p.r * p.s), t / p.s % p.r, t % p.s);
}

// The rows of image n that rows [y, y + rows) of y see.
template <class T>
void fill_strip(const Conv2dParams& p, const Plan<compute_t<T>>& g, int64_t n, int64_t y, int64_t rows,
                compute_t<T>* strip) {
  for (int64_t c = 0; c < p.c; ++c)
    for (int64_t i = 0; i < (rows - 1) * p.stride_h + g.reach; ++i) {
      const int64_t h = y * p.stride_h - p.pad_h + i;
      compute_t<T>* to = strip + (c * g.strip_rows + i) * g.row_pitch;
      if (h < 0 || h >= p.h) {
        zero_run(to, g.row_pitch);
        continue;
      }
      const T* const from = static_cast<const T*>(p.x) + ((n * p.c + c) * p.h + h) * p.w;
      for (int64_t phase = 0; phase < p.stride_w; ++phase, to += g.pitch) {
        const int64_t w = phase - p.pad_w;
        const Range inside = valid_range(g.pitch, p.stride_w, w, p.w);
        zero_run(to, inside.first);
        copy_run(to + inside.first, from + inside.first * p.stride_w + w, p.stride_w, inside.last - inside.first);
        zero_run(to + inside.last, g.pitch - inside.last);
      }
    }
}

// ---- Forward ---------------------------------------------------------------------------------------------------------

// Filters in panels of kTileRows or one less: the tiles there are.
struct FilterPanels {
  int64_t filters, count;
  explicit FilterPanels(int64_t k) : filters(k), count(ceil_div(k, kTileRows)) {}
  int64_t begin(int64_t panel) const { return filters * panel / count; }
  int64_t size(int64_t panel) const { return begin(panel + 1) - begin(panel); }
};

// sum[i][v] = sum over t of weights[t][i] * at[v][offset[t]...]
template <int kRows, int kVecs, class C>
[[gnu::always_inline]] inline void multiply_terms(const C* const* at, const int64_t* offset, int64_t terms,
                                                  const C* weights, vec<C> (&sum)[kRows][kVecs]) {
  vec<C> aside[kRows][kVecs];
  const C* from[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) from[v] = at[v];
  const auto each = [](const auto& visit) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) visit(i, v);
  };
  each([&](int i, int v) __attribute__((always_inline)) { sum[i][v] = vec<C>{}; });
  const int64_t chunk = ceil_div(terms, ceil_div(terms, kFlush));
  for (int64_t t = 0; t < terms;) {
    for (const int64_t end = min64(t + chunk, terms); t < end; ++t, weights += kTileRows) {
      vec<C> x[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) x[v] = load(from[v] + offset[t]);
      each([&](int i, int v) __attribute__((always_inline)) { sum[i][v] += weights[i] * x[v]; });
    }
    if (terms <= chunk) return;
    const bool first = t <= chunk;
    if (t == terms) break;
    each([&](int i, int v) __attribute__((always_inline)) {
      aside[i][v] = first ? sum[i][v] : aside[i][v] + sum[i][v];
      sum[i][v] = vec<C>{};
    });
  }
  each([&](int i, int v) __attribute__((always_inline)) { sum[i][v] += aside[i][v]; });
}

template <class T>
struct ForwardTile {
  using C = compute_t<T>;
  const Conv2dParams& p;
  const int64_t* offset;
  int64_t terms;
  const C* weights;  // of the panel
  C bias[kTileRows];
  T* y;  // the first filter's plane
  const T* residual;
  int filters;
  bool stream;

  // Pixels to[v], ... of y, whose first terms lie at at[v].
  template <int kRows, int kVecs>
  void run(const C* const* at, const int64_t* to) const {
    vec<C> sum[kRows][kVecs];
    multiply_terms<kRows, kVecs>(at, offset, terms, weights, sum);
    const int64_t plane = p.p * p.q;
    if (!residual && p.activation == Activation::none && filters == kRows) {
      const auto put = [&](bool around) __attribute__((always_inline)) {
        T* out[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) out[v] = y + to[v];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) store_output(out[v] + i * plane, sum[i][v] + bias[i], lanes<C>, around);
      };
      return stream ? put(true) : put(false);
    }
    C sums[kRows][kVecs][lanes<C>];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(sums[i][v], sum[i][v]);
    for (int i = 0; i < filters; ++i)
      for (int v = 0; v < kVecs; ++v) {
        const int64_t pixel = i * plane + to[v];
        finish_row<T>(sums[i][v], lanes<C>, bias[i], nullptr, residual ? residual + pixel : nullptr, p.activation,
                      y + pixel, 1, stream);
      }
  }
  template <int kRows>
  void run(int vecs, const C* const* at, const int64_t* to) const {
    if (vecs == 1) return run<kRows, 1>(at, to);
    if (vecs == 2) return run<kRows, 2>(at, to);
    if constexpr (kTileVecs > 2) return run<kRows, 3>(at, to);
  }
  void run(int vecs, const C* const* at, const int64_t* to) const {
    if (filters == kTileRows) return run<kTileRows>(vecs, at, to);
    run<kTileRows - 1>(vecs, at, to);
  }
};

template <class T>
void forward(const Conv2dParams& p) {
  using C = compute_t<T>;
  const Plan<C> g(p);
  const FilterPanels panels(p.k);
  Scratch<int64_t> offset(g.terms);
  find_offsets(p, g, offset.data);
  Scratch<C> weights(panels.count * g.terms * kTileRows);
  for (int64_t panel = 0; panel < panels.count; ++panel)
    for (int64_t t = 0; t < g.terms; ++t)
      for (int64_t i = 0; i < kTileRows; ++i)
        weights.data[(panel * g.terms + t) * kTileRows + i] =
            i < panels.size(panel)
                ? load_scalar(static_cast<const T*>(
                      p.weight)[(panels.begin(panel) + i) * p.weight_stride[0] + t / (p.r * p.s) * p.weight_stride[1] +
                                t / p.s % p.r * p.weight_stride[2] + t % p.s * p.weight_stride[3]])
                : 0;
  const int64_t plane = p.p * p.q;
  const bool stream = p.n * p.k * plane * static_cast<int64_t>(sizeof(T)) > kLargeProduct && p.q % lanes<C> == 0;
  // Rows whose vectors are cut into tiles together, so that few tiles are not full.
  const int64_t together = min64(g.rows, ceil_div(4 * kTileVecs, g.vectors));
  const ScratchPieces strips(p.threads, g.strip_size(p) * static_cast<int64_t>(sizeof(C)));
#pragma omp parallel num_threads(p.threads)
  {
    C* const strip = static_cast<C*>(strips.piece(omp_get_thread_num()));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < p.n * g.blocks; ++task) {
      const int64_t n = task / g.blocks, first = task % g.blocks * g.rows, last = min64(first + g.rows, p.p);
      fill_strip<T>(p, g, n, first, last - first, strip);
      for (int64_t row = first; row < last; row += together) {
        const int64_t count = min64(together, last - row) * g.vectors;
        for (int64_t panel = 0; panel < panels.count; ++panel) {
          const int64_t k = panels.begin(panel), image = (n * p.k + k) * plane;
          ForwardTile<T> tile{p,
                              offset.data,
                              g.terms,
                              weights.data + panel * g.terms * kTileRows,
                              {},
                              static_cast<T*>(p.y) + image,
                              p.residual ? static_cast<const T*>(p.residual) + image : nullptr,
                              static_cast<int>(panels.size(panel)),
                              stream};
          if (p.bias)
            for (int i = 0; i < tile.filters; ++i) tile.bias[i] = load_scalar(static_cast<const T*>(p.bias)[k + i]);
          const int64_t tiles = ceil_div(count, kTileVecs);
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t begin = count * t / tiles, vecs = count * (t + 1) / tiles - begin;
            const C* at[kTileVecs];
            int64_t to[kTileVecs];
            for (int64_t v = 0; v < vecs; ++v) {
              // The last vector of a row begins where it is whole, and computes some pixels again.
              const int64_t i = row + (begin + v) / g.vectors;
              const int64_t j = min64((begin + v) % g.vectors * lanes<C>, p.q - lanes<C>);
              at[v] = strip + (i - first) * p.stride_h * g.row_pitch + j;
              to[v] = i * p.q + j;
            }
            tile.run(static_cast<int>(vecs), at, to);
          }
        }
      }
    }
    if (stream) end_streaming();
  }
}

// ---- Gradient of the weights -----------------------------------------------------------------------------------------

// A sum for each lane.
template <class C>
constexpr int kTileTerms = lanes<C> < 4 ? lanes<C> : 4;
template <class C>
constexpr int kTileFilters = lanes<C> / kTileTerms<C>;

// The sums of filters dy[0], ... with terms x[0], ..., over `rows` rows.
template <class T>
vec<compute_t<T>> multiply_pixels(const T* const* dy, int64_t dy_step, const compute_t<T>* const* x, int64_t x_step,
                                  int64_t rows, int64_t columns) {
  using C = compute_t<T>;
  constexpr int kFilters = kTileFilters<C>, kTerms = kTileTerms<C>;
  vec<C> sum[lanes<C>] = {};
  const auto add = [&](int64_t row, int64_t j, const auto& load_dy) __attribute__((always_inline)) {
    vec<C> d[kFilters];
#pragma GCC unroll 4
    for (int i = 0; i < kFilters; ++i) d[i] = load_dy(dy[i] + row * dy_step + j);
#pragma GCC unroll 4
    for (int t = 0; t < kTerms; ++t) {
      const vec<C> term = load(x[t] + row * x_step + j);
#pragma GCC unroll 4
      for (int i = 0; i < kFilters; ++i) sum[i * kTerms + t] += d[i] * term;
    }
  };
  const int64_t whole = columns / lanes<C> * lanes<C>;
  const int part = static_cast<int>(columns - whole);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = 0; j < whole; j += lanes<C>) add(row, j, [](const T* from) { return load(from); });
    if (part) add(row, whole, [part](const T* from) { return load_n(from, part); });
  }
  return sum_each<lanes<C>>(sum);
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  using C = compute_t<T>;
  constexpr int kFilters = kTileFilters<C>, kTerms = kTileTerms<C>;
  const Plan<C> g(p);
  Scratch<int64_t> offset(g.terms);
  find_offsets(p, g, offset.data);
  const int64_t units = p.n * g.blocks, slices = min64(units, kWantedTasks);
  const int64_t filter_tiles = ceil_div(p.k, kFilters), term_tiles = ceil_div(g.terms, kTerms);
  const int64_t size = filter_tiles * term_tiles * lanes<C>;
  Scratch<C> sums(slices * size);
  const ScratchPieces strips(p.threads, g.strip_size(p) * static_cast<int64_t>(sizeof(C)));
#pragma omp parallel num_threads(p.threads)
  {
    C* const strip = static_cast<C*>(strips.piece(omp_get_thread_num()));
#pragma omp for schedule(dynamic, 1)
    for (int64_t slice = 0; slice < slices; ++slice) {
      const int64_t begin = units * slice / slices;
      for (int64_t unit = begin; unit < units * (slice + 1) / slices; ++unit) {
        const int64_t n = unit / g.blocks, first = unit % g.blocks * g.rows, rows = min64(g.rows, p.p - first);
        fill_strip<T>(p, g, n, first, rows, strip);
        C* to = sums.data + slice * size;
        for (int64_t k = 0; k < p.k; k += kFilters) {
          const T* dy[kFilters];
          for (int64_t i = 0; i < kFilters; ++i)
            dy[i] = static_cast<const T*>(p.y) + ((n * p.k + min64(k + i, p.k - 1)) * p.p + first) * p.q;
          for (int64_t t = 0; t < g.terms; t += kTerms, to += lanes<C>) {
            const C* x[kTerms];
            for (int64_t i = 0; i < kTerms; ++i) x[i] = strip + offset.data[min64(t + i, g.terms - 1)];
            const vec<C> sum = multiply_pixels<T>(dy, p.q, x, p.stride_h * g.row_pitch, rows, p.q);
            store(to, unit == begin ? sum : load(to) + sum);
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < p.k; ++k)
      for (int64_t t = 0; t < g.terms; ++t) {
        const int64_t at = (k / kFilters * term_tiles + t / kTerms) * lanes<C> + k % kFilters * kTerms + t % kTerms;
        C sum = sums.data[at];
        for (int64_t slice = 1; slice < slices; ++slice) sum += sums.data[slice * size + at];
        store_scalar(static_cast<T*>(p.weight) + k * p.weight_stride[0] + t / (p.r * p.s) * p.weight_stride[1] +
                         t / p.s % p.r * p.weight_stride[2] + t % p.s * p.weight_stride[3],
                     sum);
      }
  }
}

// ---- Gradient of the input -------------------------------------------------------------------------------------------

// Rows [closed, last) of an image of dx. Terms are ordered (r, c, s): those of the filter rows that reach the strip follow
// each other.
template <class T>
struct Strip {
  using C = compute_t<T>;
  static constexpr int64_t kColumns = kTileColumns<C>;
  const Conv2dParams& p;
  const Plan<C>& g;
  const C* weights;  // [panel of terms][filter][kTileRows]
  C *filters, *product, *rows;
  const T* dy;  // of the image
  T* dx;
  int64_t last;
  int64_t opened, closed;  // rows of dx that have been begun and finished

  C* kept(int64_t h, int64_t c) const { return rows + (h % g.reach * p.c + c) * g.row_pitch; }

  void open(int64_t end) {
    for (; opened < min64(end, last); ++opened)
      for (int64_t c = 0; c < p.c; ++c) {
        const C bias = p.bias ? load_scalar(static_cast<const T*>(p.bias)[c]) : 0;
        C* const row = kept(opened, c);
        for (int64_t j = 0; j < g.row_pitch; ++j) row[j] = bias;
      }
  }

  // to[i] = phase[i % stride_w][i / stride_w]
  void interleave(const C* const* phase, T* to) const {
    int64_t j = 0;
    const auto put = [&](int64_t i, vec<C> v) {
      if (i < p.w) store_n(to + i, v, static_cast<int>(min64(p.w - i, lanes<C>)));
    };
    if (p.stride_w == 1) {
      for (; j < p.w; j += lanes<C>) put(j, load(phase[0] + j));
    } else if (p.stride_w == 2) {
      for (; 2 * j < p.w; j += lanes<C>) {
        const vec<C> a = load(phase[0] + j), b = load(phase[1] + j);
        put(2 * j, zip_low(a, b));
        put(2 * j + lanes<C>, zip_high(a, b));
      }
    } else if (p.stride_w == 4) {
      for (; 4 * j < p.w; j += lanes<C>) {
        const vec<C> a = load(phase[0] + j), b = load(phase[1] + j), c = load(phase[2] + j), d = load(phase[3] + j);
        const vec<C> ac = zip_low(a, c), bd = zip_low(b, d), ac2 = zip_high(a, c), bd2 = zip_high(b, d);
        put(4 * j, zip_low(ac, bd));
        put(4 * j + lanes<C>, zip_high(ac, bd));
        put(4 * j + 2 * lanes<C>, zip_low(ac2, bd2));
        put(4 * j + 3 * lanes<C>, zip_high(ac2, bd2));
      }
    } else {
      for (int64_t w = 0; w < p.w; ++w) store_scalar(to + w, phase[w % p.stride_w][w / p.stride_w]);
    }
  }

  void close(int64_t end) {
    for (; closed < min64(end, last); ++closed) {
      open(closed + 1);
      for (int64_t c = 0; c < p.c; ++c) {
        const C* phase[kMostStride];
        for (int64_t i = 0; i < p.stride_w; ++i) {
          const int64_t column = p.pad_w + i;
          phase[i] = kept(closed, c) + column % p.stride_w * g.pitch + column / p.stride_w;
        }
        interleave(phase, dx + (c * p.h + closed) * p.w);
      }
    }
  }

  void add_row(int64_t y) {
    const int64_t top = y * p.stride_h - p.pad_h;
    close(top);
    open(top + g.reach);
    int64_t r0 = 0, r1 = p.r;
    while (r0 < r1 && top + r0 * p.dilation_h < closed) ++r0;
    while (r0 < r1 && top + (r1 - 1) * p.dilation_h >= last) --r1;
    const int64_t first_panel = r0 * p.c * p.s / kTileRows, end_panel = ceil_div(r1 * p.c * p.s, kTileRows);
    for (int64_t q = 0; q < p.q; q += kColumns) {
      const int64_t count = min64(kColumns, p.q - q);
      const int vecs = static_cast<int>(ceil_div(count, lanes<C>));
      for (int64_t k = 0; k < p.k; ++k) {
        copy_run(filters + k * kColumns, dy + (k * p.p + y) * p.q + q, 1, count);
        zero_run(filters + k * kColumns + count, vecs * lanes<C> - count);
      }
      for (int64_t panel = first_panel; panel < end_panel; ++panel)
        gemm_tile<C>(static_cast<int>(min64(kTileRows, g.terms - panel * kTileRows)), vecs,
                     PackedRows<C>{weights + panel * p.k * kTileRows}, filters, kColumns, p.k, 1,
                     product + panel * kTileRows * kColumns, kColumns, false, kFlush);
      for (int64_t s = 0; s < p.s; ++s)  // rows in turn: each sum waits for the one before it in its row
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t c = 0; c < p.c; ++c) {
            const C* const from = product + ((r * p.c + c) * p.s + s) * kColumns;
            C* const to = kept(top + r * p.dilation_h, c) + offset_of(p, g, 0, 0, 0, s) + q;
            for (int64_t v = 0; v < vecs * lanes<C>; v += lanes<C>) store(to + v, load(to + v) + load(from + v));
          }
    }
  }

  void run() {
    const int64_t before = closed + p.pad_h - g.reach + 1;  // rows of dy reach the strip from this distance on
    const int64_t first = before <= 0 ? 0 : ceil_div(before, p.stride_h);
    for (int64_t y = first; y < p.p && y * p.stride_h - p.pad_h < last; ++y) add_row(y);
    close(last);
  }
};

template <class T>
void input_grad(const Conv2dParams& p) {
  using C = compute_t<T>;
  Plan<C> g(p);
  // What follows a row of dx in its image is zero or not looked at, but lies in the row.
  g.pitch = max64(g.pitch, round_up(ceil_div(p.w + p.pad_w, p.stride_w) + lanes<C>, lanes<C>));
  g.row_pitch = g.pitch_of_rows(p.stride_w * g.pitch);
  const int64_t panels = ceil_div(g.terms, kTileRows), columns = kTileColumns<C>;
  Scratch<C> weights(panels * p.k * kTileRows);
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t k = 0; k < p.k; ++k)
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t t = panel * kTileRows + i;
        weights.data[(panel * p.k + k) * kTileRows + i] =
            t < g.terms ? load_scalar(static_cast<const T*>(
                              p.weight)[k * p.weight_stride[0] + t / p.s % p.c * p.weight_stride[1] +
                                        t / (p.c * p.s) * p.weight_stride[2] + t % p.s * p.weight_stride[3]])
                        : 0;
      }
  const int64_t strips = max64(1, min64(ceil_div(kWantedTasks, p.n), p.h / max64(kLeastRows, 2 * g.reach)));
  const int64_t filters_size = p.k * columns, product_size = panels * kTileRows * columns;
  const ScratchPieces scratch(
      p.threads, (filters_size + product_size + g.reach * p.c * g.row_pitch) * static_cast<int64_t>(sizeof(C)));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < p.n * strips; ++task) {
    const int64_t n = task / strips, strip = task % strips, first = p.h * strip / strips;
    C* const filters = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    Strip<T>{p,
             g,
             weights.data,
             filters,
             filters + filters_size,
             filters + filters_size + product_size,
             static_cast<const T*>(p.y) + n * p.k * p.p * p.q,
             static_cast<T*>(p.x) + n * p.c * p.h * p.w,
             p.h * (strip + 1) / strips,
             first,
             first}
        .run();
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_few_planes_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_few_planes_input_grad, Conv2dParams, input_grad)
#if CNNOPS_ISA_avx512
CNNOPS_EXPORT(conv2d_few_planes_weight_grad, Conv2dParams, weight_grad)
#endif
