// What blocked convolutions share: rows and runs of pixels, and the last step, from a block of sums to the output, with bias,
// residual and activation.
#pragma once

#include "common/arith.h"
#include "cpu/conv2d_lattice.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/stream.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// A run of pixels of one lattice row within a block: pixels dst .. dst + length - 1 of the block.
struct Run {
  int64_t n, i, j, length, dst;
};

// Cuts pixels [begin, begin + count) into runs; also at multiples of `cut` from the block's begin. Returns their number.
int64_t find_runs(int64_t rows, int64_t columns, int64_t begin, int64_t count, int64_t cut, Run* runs) {
  int64_t found = 0;
  for (int64_t at = 0; at < count;) {
    const int64_t pixel = begin + at, line = pixel / columns, j = pixel % columns;
    const int64_t length = min64(min64(columns - j, count - at), cut - at % cut);
    runs[found++] = {line / rows, line % rows, j, length, at};
    at += length;
  }
  return found;
}

// Makes rows that follow each other without a gap in both images one row.
template <class Problem>
void join_rows(Problem& g, const Strides& out) {
  Lattice& l = g.lattice;
  if (l.count != 1 || l.ish != 1 || l.isw != 1 || l.osh != 1 || l.osw != 1 || g.taps[0].dh != 0 || g.taps[0].dw != 0 ||
      l.rows != g.in_h || l.columns != g.in_w || g.in_h * g.in_w * out.w != (g.layout == Layout::nchw ? out.c : out.n))
    return;
  l.columns *= l.rows, l.rows = 1;
  g.in_w *= g.in_h, g.in_h = 1;
}

// One group's output on one lattice.
template <class T>
struct Output {
  Layout layout;
  Lattice lattice;
  Strides strides;
  T* data;
  const T* bias;
  const T* residual;
  Activation activation;
  bool stream;  // around the caches
};

// n sums + bias + residual, through the activation, to out[0], out[step], ... `bias_vector` has one per element.
template <class T>
void finish_row(const compute_t<T>* sums, int64_t n, compute_t<T> bias, const T* bias_vector, const T* residual,
                Activation activation, T* out, int64_t step, bool stream = false) {
  using C = compute_t<T>;
  int64_t i = 0;
  if (!bias_vector && !residual && activation == Activation::none && step == 1) {
    for (; i + lanes<C> <= n; i += lanes<C>) store_output(out + i, load(sums + i) + bias, lanes<C>, stream);
  }
  for (; i < n; i += lanes<C>) {
    const int part = static_cast<int>(min64(n - i, lanes<C>));
    vec<C> z = load_n(sums + i, part) + bias;
    if (bias_vector) z += load_n(bias_vector + i, part);
    if (step == 1) {
      if (residual) z += load_n(residual + i, part);
      if (activation != Activation::none) z = activate<C>(z, activation);
      store_output(out + i, z, part, stream);
    } else {
      if (residual)
        for (int j = 0; j < part; ++j) z[j] += load_scalar(residual[(i + j) * step]);
      if (activation != Activation::none) z = activate<C>(z, activation);
      T buffer[lanes<C>];
      store(buffer, z);
      for (int j = 0; j < part; ++j) out[(i + j) * step] = buffer[j];
    }
  }
}

// The runs of pixels [begin, begin + pixels) in the output; a plane without gaps counts as one row. Returns their number.
template <class T>
int64_t find_output_runs(const Output<T>& g, int64_t begin, int64_t pixels, Run* runs) {
  const Lattice& l = g.lattice;
  const bool whole_planes = l.osh == 1 && l.osw == 1 && l.columns * l.rows * g.strides.w == g.strides.c;
  return find_runs(whole_planes ? 1 : l.rows, whole_planes ? l.rows * l.columns : l.columns, begin, pixels, pixels,
                   runs);
}

// Where the pixels of these runs go: to[i] is the offset of the block's pixel i.
template <class T>
void find_targets(const Output<T>& g, const Run* runs, int64_t run_count, int64_t* to) {
  const Lattice& l = g.lattice;
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    const int64_t at =
        run.n * g.strides.n + (l.oh0 + run.i * l.osh) * g.strides.h + (l.ow0 + run.j * l.osw) * g.strides.w;
    for (int64_t j = 0; j < run.length; ++j) to[run.dst + j] = at + j * l.osw * g.strides.w;
  }
}

// NCHW: channels [m, m + channels) of the pixels of these runs; sums: [channel][pitch].
template <class T>
void finish_channels(const Output<T>& g, const Run* runs, int64_t run_count, const int64_t* to, int64_t m,
                     int64_t channels, const compute_t<T>* sums, int64_t pitch) {
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t at = to[run.dst] + (m + i) * g.strides.c;
      finish_row<T>(sums + i * pitch + run.dst, run.length, g.bias ? load_scalar(g.bias[m + i]) : 0, nullptr,
                    g.residual ? g.residual + at : nullptr, g.activation, g.data + at, g.lattice.osw, g.stream);
    }
  }
}

// channels_last: channels [m, m + channels) of `pixels` pixels; sums: [pixel][pitch].
template <class T>
void finish_pixels(const Output<T>& g, const int64_t* to, int64_t pixels, int64_t m, int64_t channels,
                   const compute_t<T>* sums, int64_t pitch) {
  if (!g.bias && !g.residual && g.activation == Activation::none && channels % lanes<compute_t<T>> == 0) {
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t j = 0; j < channels; j += lanes<compute_t<T>>)
        store_output(g.data + to[i] + m + j, load(sums + i * pitch + j), lanes<compute_t<T>>, g.stream);
    return;
  }
  for (int64_t i = 0; i < pixels; ++i)
    finish_row<T>(sums + i * pitch, channels, 0, g.bias ? g.bias + m : nullptr,
                  g.residual ? g.residual + to[i] + m : nullptr, g.activation, g.data + to[i] + m, 1, g.stream);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
