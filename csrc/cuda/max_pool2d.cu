// Max pooling: a thread per element of the result, or per 16 bytes of channels.
#include "ops/max_pool2d.h"

#include "cuda/pick.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(256) forward_kernel(MaxPool2dParams p, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.c, p.p, p.q);
  const Taps t = taps_of(p.windows, p.h, p.w, e.h, e.w);
  const T* const x = static_cast<const T*>(p.x) + offset(in, e.n, e.c, 0, 0);
  compute_t<T> best[V];
  int tap[V];
#pragma unroll
  for (int j = 0; j < V; ++j) best[j] = -INFINITY, tap[j] = -1;
  for (int64_t r = t.r0; r < t.r1; ++r)
    for (int64_t s = t.s0; s < t.s1; ++s) {
      compute_t<T> v[V];
      load<T, V>(v, x + (t.h0 + r * p.windows.dilation_h) * in.h + (t.w0 + s * p.windows.dilation_w) * in.w);
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (tap[j] < 0 || v[j] > best[j] || v[j] != v[j])
          best[j] = v[j], tap[j] = static_cast<int>(r * p.windows.kernel_w + s);
    }
  store<T, V>(static_cast<T*>(p.y) + i * V, best);
  store_choice<V>(p, i * V, t, tap);
}

template <class T>
void forward(const MaxPool2dParams& p) {
  launch_elements<T>("max_pool2d_forward", p, p.n * p.c * p.p * p.q, strides_of(p.layout, p.c, p.h, p.w),
                     packable(p.layout, p.c, kPack<T>, p.x, p.y, p.choice), &forward_kernel<T, kPack<T>>,
                     &forward_kernel<T, 1>);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(max_pool2d_forward, MaxPool2dParams, forward)
