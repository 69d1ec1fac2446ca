// 1x1 convolution of images of one pixel (squeeze-and-excitation, classifier heads): a matrix of weights [K][C] times a few
// vectors. The weights are read once, in place, as rows along C; nothing is packed.
//
//   forward      y[n][k] = act( x[n] . w[k] + bias[k] + residual[n][k] )    a row is one dot product
//   input_grad   dx[n]   = bias + sum over k of dy[n][k] * w[k]             blocks of C, k inside
//   weight_grad  dw[k]   = sum over n of dy[n][k] * x[n]
//
// Every output is computed by one thread in one order, so the bits do not depend on the number of threads.
#include <omp.h>

#include "common/arith.h"
#include "common/scratch.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/sums.h"
#include "cpu/simd/vec.h"
#include "ops/conv2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kRows = 4;         // rows of weights per visit of x
constexpr int64_t kAlone = 1 << 16;  // weights that one thread reads before another one has begun

int threads_for(const Conv2dParams& p) { return p.n * p.k * p.c < kAlone ? 1 : p.threads; }

template <class T>
void forward(const Conv2dParams& p) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = lanes<C>;
  const T *const x = static_cast<const T*>(p.x), *const w = static_cast<const T*>(p.weight);
  const T *const bias = static_cast<const T*>(p.bias), *const residual = static_cast<const T*>(p.residual);
  T* const y = static_cast<T*>(p.y);
  const int64_t blocks = ceil_div(p.k, kLanes), whole = p.c / (2 * kLanes) * (2 * kLanes);
#pragma omp parallel for num_threads(threads_for(p)) schedule(static)
  for (int64_t task = 0; task < blocks * p.n; ++task) {
    const int64_t block = task / p.n, n = task % p.n, k0 = block * kLanes, count = min64(p.k - k0, kLanes);
    const T* const pixel = x + n * p.c;
    vec<C> sums[kLanes > kRows ? kLanes : kRows] = {};  // those past the last row are thrown away
    for (int64_t k = 0; k < count; k += kRows) {
      const T* row[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) row[i] = w + (k0 + min64(k + i, count - 1)) * p.c;
      vec<C> sum[kRows][2] = {};
      for (int64_t c = 0; c < whole; c += 2 * kLanes) {
        const vec<C> x0 = load(pixel + c), x1 = load(pixel + c + kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          sum[i][0] += x0 * load(row[i] + c);
          sum[i][1] += x1 * load(row[i] + c + kLanes);
        }
      }
      for (int64_t c = whole; c < p.c; c += kLanes) {
        const int part = static_cast<int>(min64(p.c - c, kLanes));
        const vec<C> x0 = load_n(pixel + c, part);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum[i][0] += x0 * load_n(row[i] + c, part);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sums[k + i] = sum[i][0] + sum[i][1];
    }
    const int part = static_cast<int>(count);
    const int64_t at = n * p.k + k0;
    vec<C> z = sum_each<lanes<C>>(sums);
    if (bias) z += load_n(bias + k0, part);
    if (residual) z += load_n(residual + at, part);
    if (p.activation != Activation::none) z = activate<C>(z, p.activation);
    store_n(y + at, z, part);
  }
}

template <class T>
void input_grad(const Conv2dParams& p) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = lanes<C>, kVecs = 2, kPhases = 4;
  const T *const dy = static_cast<const T*>(p.y), *const w = static_cast<const T*>(p.weight);
  const T* const bias = static_cast<const T*>(p.bias);
  T* const dx = static_cast<T*>(p.x);
  const int64_t blocks = ceil_div(p.c, kVecs * kLanes);
#pragma omp parallel for num_threads(threads_for(p)) schedule(static)
  for (int64_t task = 0; task < blocks * p.n; ++task) {
    const int64_t block = task / p.n, n = task % p.n, c = block * kVecs * kLanes;
    const T* const from = dy + n * p.k;
    int part[kVecs];
    for (int v = 0; v < kVecs; ++v) part[v] = static_cast<int>(max64(0, min64(p.c - c - v * kLanes, kLanes)));
    const bool full = part[kVecs - 1] == kLanes;
    vec<C> sum[kPhases][kVecs] = {};  // neighbouring k go to different sums, which do not wait for each other
    int64_t k = 0;
    if (full) {
      for (; k + kPhases <= p.k; k += kPhases)
#pragma GCC unroll 4
        for (int i = 0; i < kPhases; ++i) {
          const C d = load_scalar(from[k + i]);
#pragma GCC unroll 2
          for (int v = 0; v < kVecs; ++v) sum[i][v] += d * load(w + (k + i) * p.c + c + v * kLanes);
        }
    }
    for (; k < p.k; ++k) {
      const C d = load_scalar(from[k]);
      for (int v = 0; v < kVecs; ++v)
        if (part[v]) sum[0][v] += d * load_n(w + k * p.c + c + v * kLanes, part[v]);
    }
    for (int v = 0; v < kVecs; ++v) {
      if (!part[v]) continue;
      vec<C> z = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
      if (bias) z += load_n(bias + c + v * kLanes, part[v]);
      store_n(dx + n * p.c + c + v * kLanes, z, part[v]);
    }
  }
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  using C = compute_t<T>;
  const T *const x = static_cast<const T*>(p.x), *const dy = static_cast<const T*>(p.y);
  T* const dw = static_cast<T*>(p.weight);
  const int64_t whole = p.c / lanes<C> * lanes<C>;
#pragma omp parallel for num_threads(threads_for(p)) schedule(static)
  for (int64_t k = 0; k < p.k; ++k) {
    const auto sum = [&](int64_t c, int part) __attribute__((always_inline)) {
      vec<C> sum = {};
      for (int64_t n = 0; n < p.n; ++n) sum += load_scalar(dy[n * p.k + k]) * load_n(x + n * p.c + c, part);
      return sum;
    };
    for (int64_t c = 0; c < whole; c += lanes<C>) store(dw + k * p.c + c, sum(c, lanes<C>));
    const int part = static_cast<int>(p.c - whole);
    if (part) store_n(dw + k * p.c + whole, sum(whole, part), part);
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_single_pixel_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_single_pixel_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_single_pixel_weight_grad, Conv2dParams, weight_grad)
