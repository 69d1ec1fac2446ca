// What kernels on the rows of NCHW planes, of one filter each, have in common: conv2d_wide_planes.cpp, conv2d_narrow_planes.cpp.
#pragma once

#include "cpu/conv2d_channel_vectors.h"
#include "cpu/simd/sums.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
int live_lanes(int64_t left) {
  return static_cast<int>(max64(0, min64(left, lanes<compute_t<T>>)));
}

// What forward (or, transposed, input_grad) reads and writes.
template <class T>
struct Planes {
  const T* in;
  T* out;
  const T *weight, *bias, *residual;
  int64_t in_h, in_w, out_h, out_w, in_size, out_size;  // of a plane

  Planes(const Conv2dParams& p, bool transposed)
      : in(static_cast<const T*>(transposed ? p.y : p.x)),
        out(static_cast<T*>(transposed ? p.x : p.y)),
        weight(static_cast<const T*>(p.weight)),
        bias(static_cast<const T*>(p.bias)),
        residual(static_cast<const T*>(p.residual)),
        in_h(transposed ? p.p : p.h),
        in_w(transposed ? p.q : p.w),
        out_h(transposed ? p.h : p.p),
        out_w(transposed ? p.w : p.q),
        in_size(in_h * in_w),
        out_size(out_h * out_w) {}
};

// Where the weights of a filter lie.
struct TapOffsets {
  int64_t count, of[7 * 7];

  explicit TapOffsets(const Conv2dParams& p) : count(0) {
    for (int64_t r = 0; r < p.r; ++r)
      for (int64_t s = 0; s < p.s; ++s) of[count++] = r * p.weight_stride[2] + s * p.weight_stride[3];
  }
};

// What comes after the sums, for a row of n pixels.
template <class T>
void finish_row(const compute_t<T>* from, int64_t n, T* out, const T* residual, Activation activation) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < n; i += lanes<C>) {
    const int live = live_lanes<T>(n - i);
    vec<C> z = load_n(from + i, live);
    if (residual) z += load_n(residual + i, live);
    if (activation != Activation::none) z = activate<C>(z, activation);
    store_n(out + i, z, live);
  }
}

constexpr int64_t kChannelBytes = 64 << 10;  // of neighbouring planes that are read together
constexpr int64_t kSumBytes = 16 << 10;      // of their taps' sums

// total[i] += the sum of the lanes of from[i], i < count <= lanes.
template <class C>
[[gnu::noinline]] void add_lanes(const C* from, int64_t count, double* total) {
  vec<C> v[lanes<C>];
  for (int64_t i = 0; i < lanes<C>; ++i) v[i] = i < count ? load(from + i * lanes<C>) : vec<C>{};
  const vec<C> sums = sum_each<lanes<C>>(v);
  for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
}

// dw from what correlate(plane, part of its rows, sums[tap][lane] of its channel) adds to sums; `vectors` of products for one
// tap in a part.
template <class T, class Correlate>
void reduce_planes(const Conv2dParams& p, const Cut& rows, int64_t vectors, const Correlate& correlate) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = lanes<C>;
  const int threads = threads_of(p);
  const int64_t all = p.r * p.s, x_plane = p.h * p.w;
  const int64_t flush = max64(1, kFlushPixels / max64(1, vectors));
  const int64_t together = max64(
      1, min64(kSumBytes / (all * kVectorBytes), kChannelBytes / max64(1, x_plane * static_cast<int64_t>(sizeof(T)))));
  const Cut blocks{p.c, ceil_div(p.c, together)};
  const int64_t strips = p.n * rows.parts;
  const Cut slices{strips, max64(1, min64(strips, ceil_div(kWantedTasks, max64(1, blocks.parts))))};
  const TapOffsets offsets(p);
  Scratch<double> totals(slices.parts * p.c * all);
  const ScratchPieces scratch(threads, ceil_div(p.c, max64(1, blocks.parts)) * all * kVectorBytes);
#pragma omp parallel num_threads(threads)
  {
    C* const sums = static_cast<C*>(scratch.piece(omp_get_thread_num()));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < slices.parts * blocks.parts; ++task) {
      const int64_t slice = task / blocks.parts, u0 = blocks.begin(task % blocks.parts);
      const int64_t u1 = blocks.end(task % blocks.parts), last = slices.end(slice);
      double* const total = totals.data + (slice * p.c + u0) * all;
      for (int64_t i = 0; i < (u1 - u0) * all; ++i) total[i] = 0;
      for (int64_t i = 0; i < (u1 - u0) * all; ++i) store(sums + i * kLanes, vec<C>{});
      int64_t pending = 0;
      for (int64_t strip = slices.begin(slice); strip < last; ++strip) {
        const int64_t n = strip / rows.parts, part = strip % rows.parts;
        for (int64_t u = u0; u < u1; ++u) correlate(n * p.c + u, part, sums + (u - u0) * all * kLanes);
        if (++pending == flush || strip + 1 == last) {
          pending = 0;
          const int64_t count = (u1 - u0) * all;
          for (int64_t i = 0; i < count; i += kLanes) {
            const int64_t now = min64(count - i, kLanes);
            add_lanes(sums + i * kLanes, now, total + i);
            if (strip + 1 < last)
              for (int64_t j = i; j < i + now; ++j) store(sums + j * kLanes, vec<C>{});
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t c = 0; c < p.c; ++c) {
      T* const dw = static_cast<T*>(p.weight) + c * p.weight_stride[0];
      for (int64_t t = 0; t < all; ++t) {
        double sum = 0;
        for (int64_t slice = 0; slice < slices.parts; ++slice) sum += totals.data[(slice * p.c + c) * all + t];
        store_scalar(dw + offsets.of[t], static_cast<C>(sum));
      }
    }
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
