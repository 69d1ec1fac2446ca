// Mean pooling: a thread per element of the result (or per 16 bytes of channels), which gathers its window's cells, or, in
// backward, the windows that hold its cell.
#include "ops/avg_pool2d.h"

#include "cuda/device.cuh"
#include "ops/pool2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// 1 / D of the window whose first cell is (h0, w0).
template <class A>
__device__ A factor(const AvgPool2dParams& p, int64_t h0, int64_t w0) {
  if (p.divisor != 0) return A(1) / static_cast<A>(p.divisor);
  const int64_t margin_h = p.count_include_pad ? p.pad_h : 0, margin_w = p.count_include_pad ? p.pad_w : 0;
  const int64_t rows = min64(h0 + p.kernel_h, p.h + margin_h) - max64(h0, -margin_h);
  const int64_t columns = min64(w0 + p.kernel_w, p.w + margin_w) - max64(w0, -margin_w);
  return A(1) / static_cast<A>(rows * columns);
}

template <class T, int V>
__global__ void __launch_bounds__(256) forward_kernel(AvgPool2dParams p, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.c, p.p, p.q);
  const int64_t h0 = e.h * p.stride_h - p.pad_h, w0 = e.w * p.stride_w - p.pad_w;
  const int64_t h1 = min64(h0 + p.kernel_h, p.h), w1 = min64(w0 + p.kernel_w, p.w);
  const T* const x = static_cast<const T*>(p.in) + offset(in, e.n, e.c, 0, 0);
  compute_t<T> sum[V] = {};
  for (int64_t h = max64(h0, 0); h < h1; ++h)
    for (int64_t w = max64(w0, 0); w < w1; ++w) {
      compute_t<T> v[V];
      load<T, V>(v, x + h * in.h + w * in.w);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += v[j];
    }
  const compute_t<T> scale = factor<compute_t<T>>(p, h0, w0);
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] *= scale;
  store<T, V>(static_cast<T*>(p.out) + i * V, sum);
}

template <class T, int V>
__global__ void __launch_bounds__(256) backward_kernel(AvgPool2dParams p, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.c, p.h, p.w);
  const T* const dy = static_cast<const T*>(p.in) + offset(in, e.n, e.c, 0, 0);
  const int64_t p1 = last_window(e.h, p.pad_h, p.stride_h, p.p), q1 = last_window(e.w, p.pad_w, p.stride_w, p.q);
  compute_t<T> sum[V] = {};
  for (int64_t pp = first_window(e.h, p.pad_h, p.kernel_h, p.stride_h); pp < p1; ++pp)
    for (int64_t qq = first_window(e.w, p.pad_w, p.kernel_w, p.stride_w); qq < q1; ++qq) {
      compute_t<T> v[V];
      load<T, V>(v, dy + pp * in.h + qq * in.w);
      const compute_t<T> scale = factor<compute_t<T>>(p, pp * p.stride_h - p.pad_h, qq * p.stride_w - p.pad_w);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += v[j] * scale;
    }
  store<T, V>(static_cast<T*>(p.out) + i * V, sum);
}

template <class T>
void forward(const AvgPool2dParams& p) {
  launch_elements<T>("avg_pool2d_forward", p, p.n * p.c * p.p * p.q, strides_of(p.layout, p.c, p.h, p.w),
                     packable(p.layout, p.c, kPack<T>, p.in, p.out), &forward_kernel<T, kPack<T>>,
                     &forward_kernel<T, 1>);
}

template <class T>
void backward(const AvgPool2dParams& p) {
  launch_elements<T>("avg_pool2d_backward", p, p.n * p.c * p.h * p.w, strides_of(p.layout, p.c, p.p, p.q),
                     packable(p.layout, p.c, kPack<T>, p.in, p.out), &backward_kernel<T, kPack<T>>,
                     &backward_kernel<T, 1>);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(avg_pool2d_forward, AvgPool2dParams, forward)
CNNOPS_EXPORT(avg_pool2d_backward, AvgPool2dParams, backward)
