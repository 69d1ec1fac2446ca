// Max pooling to a given size: a thread per element of the result, or per 16 bytes of channels.
#include "ops/adaptive_max_pool2d.h"

#include "cuda/device.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(256) forward_kernel(AdaptiveMaxPool2dParams p, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.c, p.p, p.q);
  const T* const x = static_cast<const T*>(p.x) + offset(in, e.n, e.c, 0, 0);
  const int64_t h0 = adaptive_start(e.h, p.h, p.p), h1 = adaptive_end(e.h, p.h, p.p);
  const int64_t w0 = adaptive_start(e.w, p.w, p.q), w1 = adaptive_end(e.w, p.w, p.q);
  compute_t<T> best[V];
  int64_t index[V];
#pragma unroll
  for (int j = 0; j < V; ++j) best[j] = -INFINITY, index[j] = -1;
  for (int64_t h = h0; h < h1; ++h)
    for (int64_t w = w0; w < w1; ++w) {
      compute_t<T> v[V];
      load<T, V>(v, x + h * in.h + w * in.w);
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (index[j] < 0 || v[j] > best[j] || v[j] != v[j]) best[j] = v[j], index[j] = h * p.w + w;
    }
  store<T, V>(static_cast<T*>(p.y) + i * V, best);
#pragma unroll
  for (int j = 0; j < V; ++j) p.indices[i * V + j] = index[j];
}

template <class T>
void forward(const AdaptiveMaxPool2dParams& p) {
  launch_elements<T>("adaptive_max_pool2d_forward", p, p.n * p.c * p.p * p.q, strides_of(p.layout, p.c, p.h, p.w),
                     packable(p.layout, p.c, kPack<T>, p.x, p.y), &forward_kernel<T, kPack<T>>, &forward_kernel<T, 1>);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(adaptive_max_pool2d_forward, AdaptiveMaxPool2dParams, forward)
