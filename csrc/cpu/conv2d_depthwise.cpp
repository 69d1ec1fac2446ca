// Depthwise convolution (groups = channels, one filter each): a few products per pixel, so the speed of memory is the bound.
//
// channels_last: vectors of channels; one output row of one lattice (conv2d_lattice.h) at a time, four pixels together where
// all taps lie inside the image, so that a weight is loaded once for four products.
// NCHW: vectors of pixels; one plane (n, c) at a time, copied into scratch where every tap is one contiguous stretch.
//
// Tasks are output rows, planes, channels (weight_grad, NCHW) or slices of rows (weight_grad, channels_last, whose partial
// sums are added in order): cut by shape alone.
#include <omp.h>

#include "cpu/conv2d_lattice.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/vec.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
[[gnu::always_inline]] inline void finish(vec<compute_t<T>> z, const T* residual, Activation activation, T* out,
                                          int part) {
  if (residual) z += load_n(residual, part);
  if (activation != Activation::none) z = activate<compute_t<T>>(z, activation);
  store_n(out, z, part);
}

// The filters as [tap][channel].
template <class T>
void pack_filters(const Conv2dParams& p, const Tap* taps, int64_t count, compute_t<T>* packed) {
  const T* const weight = static_cast<const T*>(p.weight);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < p.c; ++c)
      packed[t * p.c + c] = load_scalar(weight[c * p.weight_stride[0] + taps[t].weight]);
}

// ---- channels_last ---------------------------------------------------------------------------------------------------

constexpr int kPixels = 4;

template <class T>
struct RowNhwc {
  using C = compute_t<T>;
  const T* in;  // image n
  int64_t in_h, in_w, channels;
  const C* filters;  // [tap][channel]
  const Tap* taps;
  Lattice lattice;
  const T* bias;
  const T* residual;  // of the row; null: none
  Activation activation;
  T* out;                           // of the row
  int64_t inner_first, inner_last;  // the j for which all taps lie inside, by column

  // Pixels j .. j + kCount - 1 of row i. kInside: no tap leaves the image by column.
  template <int kCount, bool kInside>
  void pixels(int64_t i, int64_t j) const {
    const int64_t step = lattice.isw * channels;
    for (int64_t c = 0; c < channels; c += lanes<C>) {
      const int part = static_cast<int>(min64(channels - c, lanes<C>));
      vec<C> sum[kCount] = {};
      for (int64_t t = 0; t < lattice.count; ++t) {
        const int64_t h = i * lattice.ish + taps[t].dh, w = j * lattice.isw + taps[t].dw;
        if (h < 0 || h >= in_h || (!kInside && (w < 0 || w >= in_w))) continue;
        const vec<C> f = load_n(filters + t * channels + c, part);
        const T* const x = in + (h * in_w + w) * channels + c;
        if (part == lanes<C>) {
#pragma GCC unroll 4
          for (int k = 0; k < kCount; ++k) sum[k] += f * load(x + k * step);
        } else {
#pragma GCC unroll 4
          for (int k = 0; k < kCount; ++k) sum[k] += f * load_n(x + k * step, part);
        }
      }
      const vec<C> b = bias ? load_n(bias + c, part) : vec<C>{};
      for (int k = 0; k < kCount; ++k) {
        const int64_t at = (j + k) * lattice.osw * channels + c;
        finish(sum[k] + b, residual ? residual + at : nullptr, activation, out + at, part);
      }
    }
  }
  void run(int64_t i) const {
    int64_t j = 0;
    for (; j < inner_first; ++j) pixels<1, false>(i, j);
    for (; j + kPixels <= inner_last; j += kPixels) pixels<kPixels, true>(i, j);
    for (; j < lattice.columns; ++j) pixels<1, false>(i, j);
  }
};

template <class T>
void run_lattice_nhwc(const Conv2dParams& p, const Lattice& lattice, const Tap* taps, bool transposed) {
  using C = compute_t<T>;
  Scratch<C> filters(max64(lattice.count * p.c, 1));
  pack_filters<T>(p, taps, lattice.count, filters.data);
  RowNhwc<T> all{};
  all.in_h = transposed ? p.p : p.h, all.in_w = transposed ? p.q : p.w;
  all.channels = p.c;
  all.filters = filters.data;
  all.taps = taps;
  all.lattice = lattice;
  all.bias = static_cast<const T*>(p.bias);
  all.activation = p.activation;
  all.inner_last = lattice.columns;
  for (int64_t t = 0; t < lattice.count; ++t) {
    const Range valid = valid_range(lattice.columns, lattice.isw, taps[t].dw, all.in_w);
    all.inner_first = max64(all.inner_first, valid.first);
    all.inner_last = min64(all.inner_last, valid.last);
  }
  all.inner_first = min64(all.inner_first, lattice.columns);
  const int64_t out_h = transposed ? p.h : p.p, out_w = transposed ? p.w : p.q;
  const int64_t tasks = p.n * lattice.rows;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t n = task / lattice.rows, i = task % lattice.rows;
    RowNhwc<T> row = all;
    row.in = static_cast<const T*>(transposed ? p.y : p.x) + n * all.in_h * all.in_w * p.c;
    const int64_t at = ((n * out_h + lattice.oh0 + i * lattice.osh) * out_w + lattice.ow0) * p.c;
    row.out = static_cast<T*>(transposed ? p.x : p.y) + at;
    row.residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
    row.run(i);
  }
}

constexpr int64_t kSlices = 64, kSlicePixels = 256;  // at most, at least
constexpr int64_t kGradChannels = 256;               // of a task

// dw of kTaps neighbouring taps of one filter row, over one row of dy; sums is [tap][channel].
template <int kTaps, class T>
void weight_grad_row_nhwc(const Conv2dParams& p, const T* dy, const T* x, int64_t s0, int64_t c0, int64_t c1,
                          compute_t<T>* sums) {
  using C = compute_t<T>;
  int64_t first = 0, last = p.q;  // the q for which all these taps lie inside
  for (int64_t s = s0; s < s0 + kTaps; ++s) {
    const Range valid = valid_range(p.q, p.stride_w, s * p.dilation_w - p.pad_w, p.w);
    first = max64(first, valid.first);
    last = min64(last, valid.last);
  }
  last = max64(first, last);
  for (int64_t c = c0; c < c1; c += lanes<C>) {
    const int part = static_cast<int>(min64(c1 - c, lanes<C>));
    vec<C> sum[kTaps];
#pragma GCC unroll 8
    for (int k = 0; k < kTaps; ++k) sum[k] = load_n(sums + k * p.c + c, part);
    const auto edge = [&](int64_t q) {
      const vec<C> d = load_n(dy + q * p.c + c, part);
      for (int k = 0; k < kTaps; ++k) {
        const int64_t w = q * p.stride_w - p.pad_w + (s0 + k) * p.dilation_w;
        if (w >= 0 && w < p.w) sum[k] += d * load_n(x + w * p.c + c, part);
      }
    };
    for (int64_t q = 0; q < first; ++q) edge(q);
    const T* source = x + (first * p.stride_w - p.pad_w + s0 * p.dilation_w) * p.c + c;
    if (part == lanes<C>) {
      for (int64_t q = first; q < last; ++q, source += p.stride_w * p.c) {
        const vec<C> d = load(dy + q * p.c + c);
#pragma GCC unroll 8
        for (int k = 0; k < kTaps; ++k) sum[k] += d * load(source + k * p.dilation_w * p.c);
      }
    } else {
      for (int64_t q = first; q < last; ++q, source += p.stride_w * p.c) {
        const vec<C> d = load_n(dy + q * p.c + c, part);
#pragma GCC unroll 8
        for (int k = 0; k < kTaps; ++k) sum[k] += d * load_n(source + k * p.dilation_w * p.c, part);
      }
    }
    for (int64_t q = last; q < p.q; ++q) edge(q);
#pragma GCC unroll 8
    for (int k = 0; k < kTaps; ++k) store_n(sums + k * p.c + c, sum[k], part);
  }
}

template <class T>
void weight_grad_nhwc(const Conv2dParams& p) {
  using C = compute_t<T>;
  const int64_t taps = p.r * p.s, rows = p.n * p.p;
  const int64_t slices = max64(1, min64(min64(kSlices, rows), rows * p.q / kSlicePixels));
  const int64_t blocks = ceil_div(p.c, kGradChannels);
  const int64_t size = round_up(taps * p.c, 64);
  Scratch<C> partial(slices * size);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < slices * blocks; ++task) {
      const int64_t slice = task / blocks, c0 = task % blocks * kGradChannels, c1 = min64(c0 + kGradChannels, p.c);
      C* const sums = partial.data + slice * size;
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t c = c0; c < c1; ++c) sums[t * p.c + c] = 0;
      for (int64_t row = rows * slice / slices; row < rows * (slice + 1) / slices; ++row) {
        const int64_t n = row / p.p, pp = row % p.p;
        const T* const dy = static_cast<const T*>(p.y) + row * p.q * p.c;
        for (int64_t r = 0; r < p.r; ++r) {
          const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h;
          if (h < 0 || h >= p.h) continue;
          const T* const x = static_cast<const T*>(p.x) + (n * p.h + h) * p.w * p.c;
          for (int64_t s = 0; s < p.s;) {
            C* const to = sums + (r * p.s + s) * p.c;
            const int64_t left = p.s - s;
            if (left >= 7)
              weight_grad_row_nhwc<7>(p, dy, x, s, c0, c1, to), s += 7;
            else if (left >= 5)
              weight_grad_row_nhwc<5>(p, dy, x, s, c0, c1, to), s += 5;
            else if (left >= 3)
              weight_grad_row_nhwc<3>(p, dy, x, s, c0, c1, to), s += 3;
            else
              weight_grad_row_nhwc<1>(p, dy, x, s, c0, c1, to), s += 1;
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < taps * p.c; ++i) {
      double sum = 0;
      for (int64_t slice = 0; slice < slices; ++slice) sum += partial.data[slice * size + i];
      const int64_t t = i / p.c, c = i % p.c;
      store_scalar(static_cast<T*>(p.weight) + c * p.weight_stride[0] + t / p.s * p.weight_stride[2] +
                       t % p.s * p.weight_stride[3],
                   static_cast<C>(sum));
    }
  }
}

// ---- NCHW ------------------------------------------------------------------------------------------------------------

// A plane of the input as the taps of one lattice want it. Rows and columns are split by their phase modulo the lattice's
// input step, and zero-padded, so that the pixels i*ish + dh[t], j*isw + dw[t] of tap t for all (i, j) of the lattice lie at
//   base(t) + i * pitch + j,
// one contiguous stretch per tap: small images fill vectors across their rows. Columns from the lattice's width up to the
// pitch are computed and thrown away.
template <class C>
struct Plane {
  int64_t top, left;  // image pixel (h, w) is row h + top, column w + left of the padded plane
  int64_t step_h, step_w;
  int64_t pitch, phase_h, phase_w;  // elements from row to row of a phase, and from phase to phase
  int64_t pixels;                   // of the lattice, flattened: rows * pitch
  int64_t size;

  Plane(const Lattice& l, const Tap* taps, int64_t in_h, int64_t in_w) : step_h(l.ish), step_w(l.isw) {
    int64_t h0 = 0, h1 = 0, w0 = 0, w1 = 0;
    for (int64_t t = 0; t < l.count; ++t) {
      h0 = min64(h0, taps[t].dh), h1 = max64(h1, taps[t].dh);
      w0 = min64(w0, taps[t].dw), w1 = max64(w1, taps[t].dw);
    }
    top = -h0, left = -w0;
    const int64_t rows = max64((l.rows - 1) * l.ish + h1, in_h - 1) + top + 1;
    const int64_t columns = max64((l.columns - 1) * l.isw + w1, in_w - 1) + left + 1;
    pitch = ceil_div(columns, l.isw);
    phase_w = ceil_div(rows, l.ish) * pitch + kPixels * lanes<C>;
    phase_h = phase_w * l.isw;
    pixels = l.rows * pitch;
    size = round_up(phase_h * l.ish, 64);
  }
  int64_t at(int64_t row, int64_t column) const {
    return row % step_h * phase_h + column % step_w * phase_w + row / step_h * pitch + column / step_w;
  }
  int64_t base(const Tap& tap) const { return at(tap.dh + top, tap.dw + left); }
};

// Copies an image into its plane, whose padding is zero already.
template <class T>
void copy_plane(const T* image, int64_t h, int64_t w, const Plane<compute_t<T>>& plane, compute_t<T>* to) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < h; ++i, image += w) {
    for (int64_t f = 0; f < min64(plane.step_w, w); ++f) {
      C* const row = to + plane.at(i + plane.top, f + plane.left);
      if (plane.step_w == 1) {
        for (int64_t j = 0; j < w; j += lanes<C>) {
          const int part = static_cast<int>(min64(w - j, lanes<C>));
          store_n(row + j, load_n(image + j, part), part);
        }
      } else {
        for (int64_t j = f, k = 0; j < w; j += plane.step_w, ++k) row[k] = load_scalar(image[j]);
      }
    }
  }
}

template <class C>
void zero(C* to, int64_t n) {
  for (int64_t i = 0; i < n; i += lanes<C>) store_n(to + i, vec<C>{}, static_cast<int>(min64(n - i, lanes<C>)));
}

// out[i] = sum over taps of f[t] * plane[base[t] + i], for i < n rounded up to whole vectors.
template <class C>
void filter_plane(const C* plane, const int64_t* base, const C* f, int64_t taps, int64_t n, C* out) {
  int64_t i = 0;
  for (; i + (kPixels - 1) * lanes<C> < n; i += kPixels * lanes<C>) {
    vec<C> sum[kPixels] = {};
    for (int64_t t = 0; t < taps; ++t) {
      const C* const at = plane + base[t] + i;
#pragma GCC unroll 4
      for (int k = 0; k < kPixels; ++k) sum[k] += load(at + k * lanes<C>) * f[t];
    }
#pragma GCC unroll 4
    for (int k = 0; k < kPixels; ++k) store(out + i + k * lanes<C>, sum[k]);
  }
  for (; i < n; i += lanes<C>) {
    vec<C> sum = {};
    for (int64_t t = 0; t < taps; ++t) sum += load(plane + base[t] + i) * f[t];
    store(out + i, sum);
  }
}

// Images that are copied before any is computed: a vector load right after the narrower stores of short rows would wait for
// them.
int64_t images_together(int64_t pixels) { return max64(1, min64(32, 1024 / max64(pixels, 1))); }

template <class T>
void run_lattice_nchw(const Conv2dParams& p, const Lattice& l, const Tap* taps, bool transposed) {
  using C = compute_t<T>;
  const int64_t in_h = transposed ? p.p : p.h, in_w = transposed ? p.q : p.w;
  const int64_t out_h = transposed ? p.h : p.p, out_w = transposed ? p.w : p.q;
  const Plane<C> plane(l, taps, in_h, in_w);
  const int64_t sums_size = round_up(plane.pixels + kPixels * lanes<C>, 64), size = plane.size + sums_size;
  const int64_t batch = images_together(plane.pixels), tasks = ceil_div(p.n * p.c, batch);
  Scratch<C> buffers(p.threads * size * batch), filters(l.count * p.c);
  Scratch<int64_t> bases(l.count);
  for (int64_t t = 0; t < l.count; ++t) bases.data[t] = plane.base(taps[t]);
  const T* const weight = static_cast<const T*>(p.weight);
  for (int64_t c = 0; c < p.c; ++c)
    for (int64_t t = 0; t < l.count; ++t)
      filters.data[c * l.count + t] = load_scalar(weight[c * p.weight_stride[0] + taps[t].weight]);
  const T* const in = static_cast<const T*>(transposed ? p.y : p.x);
  T* const out = static_cast<T*>(transposed ? p.x : p.y);
  const T* const residual = static_cast<const T*>(p.residual);
#pragma omp parallel num_threads(p.threads)
  {
    C* const buffer = buffers.data + omp_get_thread_num() * size * batch;
    zero(buffer, size * batch);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t first = task * batch, count = min64(batch, p.n * p.c - first);
      for (int64_t i = 0; i < count; ++i)
        copy_plane(in + (first + i) * in_h * in_w, in_h, in_w, plane, buffer + i * size);
      for (int64_t i = 0; i < count; ++i)
        filter_plane(buffer + i * size, bases.data, filters.data + (first + i) % p.c * l.count, l.count, plane.pixels,
                     buffer + i * size + plane.size);
      for (int64_t image = first; image < first + count; ++image) {
        const C bias = p.bias ? load_scalar(static_cast<const T*>(p.bias)[image % p.c]) : 0;
        const C* row = buffer + (image - first) * size + plane.size;
        for (int64_t i = 0; i < l.rows; ++i, row += plane.pitch) {
          const int64_t to = (image * out_h + l.oh0 + i * l.osh) * out_w + l.ow0;
          if (l.osw != 1) {  // a phase of input_grad: no residual, no activation
            for (int64_t j = 0; j < l.columns; ++j) store_scalar(out + to + j * l.osw, row[j] + bias);
            continue;
          }
          for (int64_t j = 0; j < l.columns; j += lanes<C>)
            finish(load(row + j) + bias, residual ? residual + to + j : nullptr, p.activation, out + to + j,
                   static_cast<int>(min64(l.columns - j, lanes<C>)));
        }
      }
    }
  }
}

// sums[k] += sum over i < n of dy[i] * x[base[k] + i], a vector per tap; n is a whole number of vectors.
template <int kTaps, class C>
void correlate(const C* dy, int64_t n, const C* x, const int64_t* base, C* sums) {
  vec<C> sum[kTaps];
  const C* at[kTaps];
#pragma GCC unroll 9
  for (int k = 0; k < kTaps; ++k) sum[k] = load(sums + k * lanes<C>), at[k] = x + base[k];
  for (int64_t i = 0; i < n; i += lanes<C>) {
    const vec<C> d = load(dy + i);
#pragma GCC unroll 9
    for (int k = 0; k < kTaps; ++k) sum[k] += d * load(at[k] + i);
  }
#pragma GCC unroll 9
  for (int k = 0; k < kTaps; ++k) store(sums + k * lanes<C>, sum[k]);
}

template <class T>
void weight_grad_nchw(const Conv2dParams& p) {
  using C = compute_t<T>;
  const int64_t count = p.r * p.s;
  Scratch<Tap> taps(count);
  forward_lattice(p, taps.data, [&](const Lattice& l, const Tap*) {
    const Plane<C> plane(l, taps.data, p.h, p.w);
    const int64_t batch = images_together(plane.pixels);
    const int64_t length = round_up(plane.pixels, lanes<C>), size = plane.size + round_up(length, 64);
    Scratch<C> buffers(p.threads * size * batch), vectors(p.threads * count * lanes<C>);
    Scratch<double> totals(p.threads * count);
    Scratch<int64_t> bases(count);
    for (int64_t t = 0; t < count; ++t) bases.data[t] = plane.base(taps.data[t]);
#pragma omp parallel num_threads(p.threads)
    {
      C* const buffer = buffers.data + omp_get_thread_num() * size * batch;
      C* const sums = vectors.data + omp_get_thread_num() * count * lanes<C>;
      double* const total = totals.data + omp_get_thread_num() * count;
      zero(buffer, size * batch);
#pragma omp for schedule(dynamic, 1)
      for (int64_t c = 0; c < p.c; ++c) {
        for (int64_t t = 0; t < count; ++t) total[t] = 0;
        for (int64_t n = 0; n < p.n; n += batch) {
          const int64_t images = min64(batch, p.n - n);
          for (int64_t i = 0; i < images; ++i) {
            const int64_t image = (n + i) * p.c + c;
            C* const x = buffer + i * size;
            copy_plane(static_cast<const T*>(p.x) + image * p.h * p.w, p.h, p.w, plane, x);
            // dy in the same rows, with zeros between them.
            const T* source = static_cast<const T*>(p.y) + image * p.p * p.q;
            for (C* dy = x + plane.size; dy < x + plane.size + plane.pixels; dy += plane.pitch, source += p.q)
              for (int64_t j = 0; j < p.q; j += lanes<C>) {
                const int part = static_cast<int>(min64(p.q - j, lanes<C>));
                store_n(dy + j, load_n(source + j, part), part);
              }
          }
          zero(sums, count * lanes<C>);
          for (int64_t i = 0; i < images; ++i) {
            const C* const x = buffer + i * size;
            const C* const dy = x + plane.size;
            for (int64_t t = 0; t < count;) {
              const int64_t left = count - t;
              const int64_t* const base = bases.data + t;
              C* const to = sums + t * lanes<C>;
              if (left >= 9)
                correlate<9>(dy, length, x, base, to), t += 9;
              else if (left >= 5)
                correlate<5>(dy, length, x, base, to), t += 5;
              else if (left >= 3)
                correlate<3>(dy, length, x, base, to), t += 3;
              else
                correlate<1>(dy, length, x, base, to), t += 1;
            }
          }
          for (int64_t i = 0; i < count * lanes<C>; ++i) total[i / lanes<C>] += sums[i];
        }
        for (int64_t t = 0; t < count; ++t)
          store_scalar(static_cast<T*>(p.weight) + c * p.weight_stride[0] + taps.data[t].weight,
                       static_cast<C>(total[t]));
      }
    }
  });
}

// ---- Passes ----------------------------------------------------------------------------------------------------------

template <class T>
void run_lattice(const Conv2dParams& p, const Lattice& l, const Tap* taps, bool transposed) {
  if (p.layout == Layout::nchw) return run_lattice_nchw<T>(p, l, taps, transposed);
  run_lattice_nhwc<T>(p, l, taps, transposed);
}

template <class T>
void forward(const Conv2dParams& p) {
  Scratch<Tap> taps(p.r * p.s);
  forward_lattice(p, taps.data, [&](const Lattice& l, const Tap* t) { run_lattice<T>(p, l, t, false); });
}

template <class T>
void input_grad(const Conv2dParams& p) {
  Scratch<Tap> taps(p.r * p.s);
  input_grad_lattices(p, taps.data, [&](const Lattice& l, const Tap* t) { run_lattice<T>(p, l, t, true); });
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  if (p.layout == Layout::nchw) return weight_grad_nchw<T>(p);
  weight_grad_nhwc<T>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_depthwise_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_depthwise_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_depthwise_weight_grad, Conv2dParams, weight_grad)
