// Mean pooling to a given size. In general a thread per element of the result (or per 16 bytes of channels). The mean of
// whole planes reads far more than it writes: a warp per plane where its pixels are neighbours, else a block of 8 warps per
// 32 channels, whose warps take every eighth pixel.
#include "ops/adaptive_avg_pool2d.h"

#include "cuda/device.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(256, 2) forward_kernel(AdaptiveAvgPool2dParams p, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.c, p.p, p.q);
  const T* const x = static_cast<const T*>(p.in) + offset(in, e.n, e.c, 0, 0);
  const int64_t h0 = adaptive_start(e.h, p.h, p.p), h1 = adaptive_end(e.h, p.h, p.p);
  const int64_t w0 = adaptive_start(e.w, p.w, p.q), w1 = adaptive_end(e.w, p.w, p.q);
  compute_t<T> sum[V] = {};
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t w = w0; w < w1; ++w) {
      compute_t<T> v[V];
      load<T, V>(v, x + h * in.h + w * in.w);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += v[j];
    }
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] /= static_cast<compute_t<T>>((h1 - h0) * (w1 - w0));
  store<T, V>(static_cast<T*>(p.out) + i * V, sum);
}

template <class T, int V>
__global__ void __launch_bounds__(256) backward_kernel(AdaptiveAvgPool2dParams p, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.c, p.h, p.w);
  const T* const dy = static_cast<const T*>(p.in) + offset(in, e.n, e.c, 0, 0);
  const int64_t p1 = adaptive_last(e.h, p.h, p.p), q1 = adaptive_last(e.w, p.w, p.q);
  compute_t<T> sum[V] = {};
  for (int64_t pp = adaptive_first(e.h, p.h, p.p); pp < p1; ++pp)
    for (int64_t qq = adaptive_first(e.w, p.w, p.q); qq < q1; ++qq) {
      const int64_t rows = adaptive_end(pp, p.h, p.p) - adaptive_start(pp, p.h, p.p);
      const int64_t columns = adaptive_end(qq, p.w, p.q) - adaptive_start(qq, p.w, p.q);
      compute_t<T> v[V];
      load<T, V>(v, dy + pp * in.h + qq * in.w);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += v[j] / static_cast<compute_t<T>>(rows * columns);
    }
  store<T, V>(static_cast<T*>(p.out) + i * V, sum);
}

// Adds x[0], x[step], ...: at most 64 terms in the compute type, then float64.
template <class T>
__device__ double sum_of(const T* x, int64_t count, int64_t step) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += 64) {
    const int64_t end = min64(begin + 64, count);
    compute_t<T> part = 0;
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i) part += load(x + i * step);
    total += static_cast<double>(part);
  }
  return total;
}

template <class T>
__global__ void __launch_bounds__(256) plane_kernel(AdaptiveAvgPool2dParams p) {
  const int64_t plane = thread_index() / kWarp, pixels = p.h * p.w;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if (plane >= p.n * p.c) return;  // of a whole warp
  const int64_t mine = (pixels - lane + kWarp - 1) / kWarp;
  const double sum = warp_sum(sum_of(static_cast<const T*>(p.in) + plane * pixels + lane, mine, kWarp));
  if (lane == 0) store(static_cast<T*>(p.out) + plane, static_cast<compute_t<T>>(sum / static_cast<double>(pixels)));
}

template <class T>
__global__ void __launch_bounds__(256) columns_kernel(AdaptiveAvgPool2dParams p) {
  double* const partial = shared<double>();
  const int lane = static_cast<int>(threadIdx.x % kWarp), warp = static_cast<int>(threadIdx.x / kWarp);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarp + lane, n = blockIdx.y, pixels = p.h * p.w;
  double sum = 0;
  if (c < p.c) {
    const T* const x = static_cast<const T*>(p.in) + (n * pixels + warp) * p.c + c;
    sum = sum_of(x, (pixels - warp + 7) / 8, 8 * p.c);
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || c >= p.c) return;
  for (int i = 1; i < 8; ++i) sum += partial[i * kWarp + lane];
  store(static_cast<T*>(p.out) + n * p.c + c, static_cast<compute_t<T>>(sum / static_cast<double>(pixels)));
}

template <class T>
void forward(const AdaptiveAvgPool2dParams& p) {
  static constexpr const char* kName = "adaptive_avg_pool2d_forward";
  const int64_t count = p.n * p.c * p.p * p.q;
  if (p.p == 1 && p.q == 1 && p.layout == Layout::nchw)
    launch(kName, *p.launch, one_each(count * kWarp), &plane_kernel<T>, p);
  else if (p.p == 1 && p.q == 1 && p.n < 65536)
    launch(kName, *p.launch, Grid{ceil_div(p.c, int64_t{kWarp}), p.n, 1, 256, 256 * sizeof(double)}, &columns_kernel<T>,
           p);
  else
    launch_elements<T>(kName, p, count, strides_of(p.layout, p.c, p.h, p.w),
                       packable(p.layout, p.c, kPack<T>, p.in, p.out), &forward_kernel<T, kPack<T>>,
                       &forward_kernel<T, 1>);
}

template <class T>
void backward(const AdaptiveAvgPool2dParams& p) {
  launch_elements<T>("adaptive_avg_pool2d_backward", p, p.n * p.c * p.h * p.w, strides_of(p.layout, p.c, p.p, p.q),
                     packable(p.layout, p.c, kPack<T>, p.in, p.out), &backward_kernel<T, kPack<T>>,
                     &backward_kernel<T, 1>);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(adaptive_avg_pool2d_forward, AdaptiveAvgPool2dParams, forward)
CNNOPS_EXPORT(adaptive_avg_pool2d_backward, AdaptiveAvgPool2dParams, backward)
