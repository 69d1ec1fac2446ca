// Derivatives of poolings that pick: a thread per element of the result (or, of one-byte offsets, per 16 bytes of channels).
// Backward gathers: a thread looks at every window over its cell, so that no two threads add to the same element.
#include "ops/index_pool2d.h"

#include "cuda/device.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(256, 2) backward_kernel(IndexPool2dParams p, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.c, p.h, p.w);
  const int64_t base = offset(in, e.n, e.c, 0, 0);
  const T* const dy = static_cast<const T*>(p.in);
  const Windows& v = p.windows;
  compute_t<T> sum[V] = {};
  const auto add = [&](int64_t at, int64_t wanted) {  // where window `at` chose `wanted`
    bool hit[V];
    bool any_hit = false;
    if (p.mode == Choice::offsets) {
      const Pack<uint8_t, V> chosen =
          *reinterpret_cast<const Pack<uint8_t, V>*>(static_cast<const uint8_t*>(p.choice) + at);
#pragma unroll
      for (int j = 0; j < V; ++j) hit[j] = chosen.v[j] == wanted, any_hit = any_hit || hit[j];
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j)
        hit[j] = static_cast<const int64_t*>(p.choice)[at + j] == wanted, any_hit = any_hit || hit[j];
    }
    if (!any_hit) return;
    compute_t<T> g[V];
    load<T, V>(g, dy + at);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += hit[j] ? g[j] : 0;
  };
  if (p.adaptive) {
    const int64_t p1 = adaptive_last(e.h, p.h, p.p), q1 = adaptive_last(e.w, p.w, p.q);
    for (int64_t pp = adaptive_first(e.h, p.h, p.p); pp < p1; ++pp)
      for (int64_t qq = adaptive_first(e.w, p.w, p.q); qq < q1; ++qq)
        add(base + pp * in.h + qq * in.w, e.h * p.w + e.w);
  } else {
    const int64_t reach_h = v.dilation_h * (v.kernel_h - 1) + 1, reach_w = v.dilation_w * (v.kernel_w - 1) + 1;
    const int64_t p1 = last_window(e.h, v.pad_h, v.stride_h, p.p), q1 = last_window(e.w, v.pad_w, v.stride_w, p.q);
    const int64_t q0 = first_window(e.w, v.pad_w, reach_w, v.stride_w);
    for (int64_t pp = first_window(e.h, v.pad_h, reach_h, v.stride_h); pp < p1; ++pp)
      for (int64_t qq = q0; qq < q1; ++qq) {
        int64_t wanted = e.h * p.w + e.w;
        if (p.mode == Choice::offsets) {
          const int64_t down = e.h - pp * v.stride_h + v.pad_h, right = e.w - qq * v.stride_w + v.pad_w;
          if (remainder_of(down, v.dilation_h) || remainder_of(right, v.dilation_w)) continue;
          wanted = divided(down, v.dilation_h) * v.kernel_w + divided(right, v.dilation_w);
        }
        add(base + pp * in.h + qq * in.w, wanted);
      }
  }
  store<T, V>(static_cast<T*>(p.out) + i * V, sum);
}

template <class T>
__global__ void __launch_bounds__(256, 2) gather_kernel(IndexPool2dParams p, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<1>(i, p.layout, p.c, p.p, p.q);
  const Windows& v = p.windows;
  int64_t h = -1, w = -1;
  if (p.mode == Choice::indices) {
    const int64_t index = static_cast<const int64_t*>(p.choice)[i];
    if (index >= 0 && index < p.h * p.w) h = divided(index, p.w), w = remainder_of(index, p.w);
  } else {
    const int64_t chosen = static_cast<const uint8_t*>(p.choice)[i];
    if (chosen < v.kernel_h * v.kernel_w) {
      h = e.h * v.stride_h - v.pad_h + chosen / v.kernel_w * v.dilation_h;
      w = e.w * v.stride_w - v.pad_w + chosen % v.kernel_w * v.dilation_w;
    }
  }
  const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
  store(static_cast<T*>(p.out) + i,
        inside ? load(static_cast<const T*>(p.in) + offset(in, e.n, e.c, h, w)) : compute_t<T>(0));
}

template <class T>
void backward(const IndexPool2dParams& p) {
  launch_elements<T>("index_pool2d_backward", p, p.n * p.c * p.h * p.w, strides_of(p.layout, p.c, p.p, p.q),
                     packable(p.layout, p.c, kPack<T>, p.in, p.out, p.choice), &backward_kernel<T, kPack<T>>,
                     &backward_kernel<T, 1>);
}

template <class T>
void gather(const IndexPool2dParams& p) {
  const int64_t count = p.n * p.c * p.p * p.q;
  launch("index_pool2d_gather", *p.launch, one_each(count), &gather_kernel<T>, p, strides_of(p.layout, p.c, p.h, p.w),
         count);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(index_pool2d_backward, IndexPool2dParams, backward)
CNNOPS_EXPORT(index_pool2d_gather, IndexPool2dParams, gather)
