// Depthwise convolution (groups = channels, one filter each): a few products per pixel, so the speed of memory is the bound.
//
// channels_last: vectors of channels; one output row of one lattice (conv2d_lattice.h) at a time, four pixels together where
// all taps lie inside the image, so that a weight is loaded once for four products.
// NCHW: vectors of pixels; one plane (n, c) at a time, whose rows are first copied into a zero-padded buffer split by the
// column's phase modulo the stride, which makes every tap a contiguous load. input_grad spreads dy's columns by the stride
// instead (zeros between them) and skips the rows that no window reaches.
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
[[gnu::always_inline]] inline void finish(vec<compute_t<T>> z, const T* residual, Activation activation, T* out, int part) {
  if (residual) z += load_n(residual, part);
  if (activation != Activation::none) z = activate<compute_t<T>>(z, activation);
  store_n(out, z, part);
}

// The filters as [tap][channel].
template <class T>
void pack_filters(const Conv2dParams& p, const Tap* taps, int64_t count, compute_t<T>* packed) {
  const T* const weight = static_cast<const T*>(p.weight);
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < p.c; ++c) packed[t * p.c + c] = load_scalar(weight[c * p.weight_stride[0] + taps[t].weight]);
}

// ---- channels_last ---------------------------------------------------------------------------------------------------

constexpr int kPixels = 4;

template <class T>
struct RowNhwc {
  using C = compute_t<T>;
  const T* in;         // image n
  int64_t in_h, in_w, channels;
  const C* filters;    // [tap][channel]
  const Tap* taps;
  Lattice lattice;
  const T* bias;
  const T* residual;   // of the row; null: none
  Activation activation;
  T* out;              // of the row
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

constexpr int64_t kSlices = 64;

// dw of kTaps neighbouring taps of one filter row, over one row of dy; sums is [tap][channel].
template <int kTaps, class T>
void weight_grad_row_nhwc(const Conv2dParams& p, const T* dy, const T* x, int64_t s0, compute_t<T>* sums) {
  using C = compute_t<T>;
  int64_t first = 0, last = p.q;  // the q for which all these taps lie inside
  for (int64_t s = s0; s < s0 + kTaps; ++s) {
    const Range valid = valid_range(p.q, p.stride_w, s * p.dilation_w - p.pad_w, p.w);
    first = max64(first, valid.first);
    last = min64(last, valid.last);
  }
  last = max64(first, last);
  for (int64_t c = 0; c < p.c; c += lanes<C>) {
    const int part = static_cast<int>(min64(p.c - c, lanes<C>));
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
  const int64_t taps = p.r * p.s, rows = p.n * p.p, slices = max64(1, min64(kSlices, rows));
  const int64_t size = round_up(taps * p.c, 64);
  Scratch<C> partial(slices * size);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t slice = 0; slice < slices; ++slice) {
      C* const sums = partial.data + slice * size;
      for (int64_t i = 0; i < taps * p.c; ++i) sums[i] = 0;
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
            if (left >= 7) weight_grad_row_nhwc<7>(p, dy, x, s, to), s += 7;
            else if (left >= 5) weight_grad_row_nhwc<5>(p, dy, x, s, to), s += 5;
            else if (left >= 3) weight_grad_row_nhwc<3>(p, dy, x, s, to), s += 3;
            else weight_grad_row_nhwc<1>(p, dy, x, s, to), s += 1;
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

// A plane's rows, zero-padded and split by column phase: column w of a row lies at (w + pad) % step * phase + (w + pad) / step.
struct PlaneLayout {
  int64_t pad, step, phase, pitch;
};

template <class C>
PlaneLayout plane_layout(const Conv2dParams& p) {
  const int64_t columns = max64((p.q - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1, p.w + p.pad_w);
  // A vector load that begins at the last output column stays inside its phase.
  const int64_t phase = round_up(ceil_div(columns, p.stride_w) + kPixels * lanes<C>, lanes<C>);
  return {p.pad_w, p.stride_w, phase, phase * p.stride_w};
}

template <class T>
void copy_plane(const T* plane, int64_t rows, int64_t columns, const PlaneLayout& l, compute_t<T>* to) {
  using C = compute_t<T>;
  for (int64_t h = 0; h < rows; ++h, to += l.pitch, plane += columns) {
    for (int64_t i = 0; i < l.pitch; i += lanes<C>) store(to + i, vec<C>{});
    if (l.step == 1) {
      for (int64_t w = 0; w < columns; w += lanes<C>)
        store_n(to + l.pad + w, load_n(plane + w, static_cast<int>(min64(columns - w, lanes<C>))),
                static_cast<int>(min64(columns - w, lanes<C>)));
      continue;
    }
    for (int64_t f = 0; f < l.step; ++f) {  // the columns of phase f begin at w with (w + pad) % step == f
      const int64_t first = ((f - l.pad) % l.step + l.step) % l.step;
      C* at = to + f * l.phase + (first + l.pad) / l.step;
      for (int64_t w = first; w < columns; w += l.step) *at++ = load_scalar(plane[w]);
    }
  }
}

// sum over taps of f[t] * at[offset[t]] for kCount vectors of pixels.
template <int kCount, class C>
[[gnu::always_inline]] inline void row_sums(const C* at, const int64_t* offset, const C* f, int64_t taps, vec<C>* sum) {
  for (int64_t t = 0; t < taps; ++t) {
    const C* const source = at + offset[t];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) sum[k] += load(source + k * lanes<C>) * f[t];
  }
}

// One output row of `columns` pixels.
template <class T>
void filter_row(const compute_t<T>* buffer, const int64_t* offset, const compute_t<T>* f, int64_t taps, int64_t columns,
                compute_t<T> bias, const T* residual, Activation activation, T* out) {
  using C = compute_t<T>;
  int64_t q = 0;
  for (; q + kPixels * lanes<C> <= columns; q += kPixels * lanes<C>) {
    vec<C> sum[kPixels] = {};
    row_sums<kPixels>(buffer + q, offset, f, taps, sum);
    for (int k = 0; k < kPixels; ++k) {
      const int64_t at = q + k * lanes<C>;
      finish(sum[k] + bias, residual ? residual + at : nullptr, activation, out + at, lanes<C>);
    }
  }
  for (; q < columns; q += lanes<C>) {
    vec<C> sum = {};
    row_sums<1>(buffer + q, offset, f, taps, &sum);
    finish(sum + bias, residual ? residual + q : nullptr, activation, out + q,
           static_cast<int>(min64(columns - q, lanes<C>)));
  }
}

template <class T>
void forward_nchw(const Conv2dParams& p) {
  using C = compute_t<T>;
  const PlaneLayout l = plane_layout<C>(p);
  const int64_t taps = p.r * p.s, size = round_up(p.h * l.pitch + kPixels * lanes<C>, 64);
  Scratch<C> buffers(p.threads * size), filters(p.threads * taps);
  Scratch<int64_t> offsets(p.threads * taps);
#pragma omp parallel num_threads(p.threads)
  {
    C* const buffer = buffers.data + omp_get_thread_num() * size;
    C* const f = filters.data + omp_get_thread_num() * taps;
    int64_t* const offset = offsets.data + omp_get_thread_num() * taps;
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < p.n * p.c; ++plane) {
      const int64_t c = plane % p.c;
      copy_plane(static_cast<const T*>(p.x) + plane * p.h * p.w, p.h, p.w, l, buffer);
      const T* const weight = static_cast<const T*>(p.weight) + c * p.weight_stride[0];
      const C bias = p.bias ? load_scalar(static_cast<const T*>(p.bias)[c]) : 0;
      for (int64_t pp = 0; pp < p.p; ++pp) {
        int64_t count = 0;
        for (int64_t r = 0; r < p.r; ++r) {
          const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h;
          if (h < 0 || h >= p.h) continue;
          for (int64_t s = 0; s < p.s; ++s, ++count) {
            const int64_t w = s * p.dilation_w;
            offset[count] = h * l.pitch + w % l.step * l.phase + w / l.step;
            f[count] = load_scalar(weight[r * p.weight_stride[2] + s * p.weight_stride[3]]);
          }
        }
        const int64_t at = (plane * p.p + pp) * p.q;
        filter_row<T>(buffer, offset, f, count, p.q, bias,
                      p.residual ? static_cast<const T*>(p.residual) + at : nullptr, p.activation,
                      static_cast<T*>(p.y) + at);
      }
    }
  }
}

template <class T>
void input_grad_nchw(const Conv2dParams& p) {
  using C = compute_t<T>;
  // Column q of dy lies at base + q * stride of its row; dx[w] takes tap s from there at w + pad + base - s * dilation.
  const int64_t base = max64(0, (p.s - 1) * p.dilation_w - p.pad_w);
  const int64_t pitch = round_up(max64(p.w + p.pad_w, (p.q - 1) * p.stride_w + 1) + base + kPixels * lanes<C>, lanes<C>);
  const int64_t taps = p.r * p.s, size = round_up(p.p * pitch + kPixels * lanes<C>, 64);
  Scratch<C> buffers(p.threads * size), filters(p.threads * taps);
  Scratch<int64_t> offsets(p.threads * taps);
#pragma omp parallel num_threads(p.threads)
  {
    C* const buffer = buffers.data + omp_get_thread_num() * size;
    C* const f = filters.data + omp_get_thread_num() * taps;
    int64_t* const offset = offsets.data + omp_get_thread_num() * taps;
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < p.n * p.c; ++plane) {
      const int64_t c = plane % p.c;
      const T* dy = static_cast<const T*>(p.y) + plane * p.p * p.q;
      for (int64_t pp = 0; pp < p.p; ++pp, dy += p.q) {
        C* const row = buffer + pp * pitch;
        for (int64_t i = 0; i < pitch; i += lanes<C>) store(row + i, vec<C>{});
        for (int64_t q = 0; q < p.q; ++q) row[base + q * p.stride_w] = load_scalar(dy[q]);
      }
      const T* const weight = static_cast<const T*>(p.weight) + c * p.weight_stride[0];
      const C bias = p.bias ? load_scalar(static_cast<const T*>(p.bias)[c]) : 0;
      for (int64_t h = 0; h < p.h; ++h) {
        int64_t count = 0;
        for (int64_t r = 0; r < p.r; ++r) {
          const int64_t row = h + p.pad_h - r * p.dilation_h;
          if (row < 0 || row % p.stride_h || row / p.stride_h >= p.p) continue;
          for (int64_t s = 0; s < p.s; ++s, ++count) {
            offset[count] = row / p.stride_h * pitch + p.pad_w + base - s * p.dilation_w;
            f[count] = load_scalar(weight[r * p.weight_stride[2] + s * p.weight_stride[3]]);
          }
        }
        filter_row<T>(buffer, offset, f, count, p.w, bias, nullptr, Activation::none,
                      static_cast<T*>(p.x) + (plane * p.h + h) * p.w);
      }
    }
  }
}

// sums[k] += over the row of dy[q] * x[q + offset of tap k].
template <int kTaps, class T>
[[gnu::always_inline]] inline void weight_grad_row_nchw(const T* dy, int64_t columns, const compute_t<T>* x,
                                                        const int64_t* offset, compute_t<T>* sums) {
  using C = compute_t<T>;
  vec<C> sum[kTaps];
#pragma GCC unroll 8
  for (int k = 0; k < kTaps; ++k) sum[k] = load(sums + k * lanes<C>);
  int64_t q = 0;
  for (; q + lanes<C> <= columns; q += lanes<C>) {
    const vec<C> d = load(dy + q);
#pragma GCC unroll 8
    for (int k = 0; k < kTaps; ++k) sum[k] += d * load(x + offset[k] + q);
  }
  if (q < columns) {
    const int part = static_cast<int>(columns - q);  // of x too: an Inf past the row's end must not meet a zero of dy
    const vec<C> d = load_n(dy + q, part);
#pragma GCC unroll 8
    for (int k = 0; k < kTaps; ++k) sum[k] += d * load_n(x + offset[k] + q, part);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kTaps; ++k) store(sums + k * lanes<C>, sum[k]);
}

template <class T>
void weight_grad_nchw(const Conv2dParams& p) {
  using C = compute_t<T>;
  const PlaneLayout l = plane_layout<C>(p);
  const int64_t taps = p.r * p.s, size = round_up(p.h * l.pitch + kPixels * lanes<C>, 64);
  Scratch<C> buffers(p.threads * size);
  Scratch<double> totals(p.threads * taps);
  Scratch<C> vectors(p.threads * taps * lanes<C>);
  Scratch<int64_t> offsets(p.s);
  for (int64_t s = 0; s < p.s; ++s) {
    const int64_t w = s * p.dilation_w;
    offsets.data[s] = w % l.step * l.phase + w / l.step;
  }
#pragma omp parallel num_threads(p.threads)
  {
    C* const buffer = buffers.data + omp_get_thread_num() * size;
    double* const total = totals.data + omp_get_thread_num() * taps;
    C* const sums = vectors.data + omp_get_thread_num() * taps * lanes<C>;  // a vector per tap
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < p.c; ++c) {
      for (int64_t t = 0; t < taps; ++t) total[t] = 0;
      for (int64_t n = 0; n < p.n; ++n) {
        const int64_t plane = n * p.c + c;
        copy_plane(static_cast<const T*>(p.x) + plane * p.h * p.w, p.h, p.w, l, buffer);
        for (int64_t i = 0; i < taps * lanes<C>; ++i) sums[i] = 0;
        for (int64_t pp = 0; pp < p.p; ++pp) {
          const T* const dy = static_cast<const T*>(p.y) + (plane * p.p + pp) * p.q;
          for (int64_t r = 0; r < p.r; ++r) {
            const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h;
            if (h < 0 || h >= p.h) continue;
            const C* const x = buffer + h * l.pitch;
            for (int64_t s = 0; s < p.s;) {
              const int64_t left = p.s - s;
              C* const to = sums + (r * p.s + s) * lanes<C>;
              const int64_t* const offset = offsets.data + s;
              if (left >= 7) weight_grad_row_nchw<7>(dy, p.q, x, offset, to), s += 7;
              else if (left >= 5) weight_grad_row_nchw<5>(dy, p.q, x, offset, to), s += 5;
              else if (left >= 3) weight_grad_row_nchw<3>(dy, p.q, x, offset, to), s += 3;
              else weight_grad_row_nchw<1>(dy, p.q, x, offset, to), s += 1;
            }
          }
        }
        for (int64_t i = 0; i < taps * lanes<C>; ++i) total[i / lanes<C>] += sums[i];
      }
      for (int64_t t = 0; t < taps; ++t)
        store_scalar(static_cast<T*>(p.weight) + c * p.weight_stride[0] + t / p.s * p.weight_stride[2] +
                         t % p.s * p.weight_stride[3],
                     static_cast<C>(total[t]));
    }
  }
}

// ---- Passes ----------------------------------------------------------------------------------------------------------

template <class T>
void forward(const Conv2dParams& p) {
  if (p.layout == Layout::nchw) return forward_nchw<T>(p);
  Scratch<Tap> taps(p.r * p.s);
  forward_lattice(p, taps.data, [&](const Lattice& l, const Tap* t) { run_lattice_nhwc<T>(p, l, t, false); });
}

template <class T>
void input_grad(const Conv2dParams& p) {
  if (p.layout == Layout::nchw) return input_grad_nchw<T>(p);
  Scratch<Tap> taps(p.r * p.s);
  input_grad_lattices(p, taps.data, [&](const Lattice& l, const Tap* t) { run_lattice_nhwc<T>(p, l, t, true); });
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
