// Locally connected layer: the weights, of which every output position has its own, are read in the order of memory.
//   forward       a warp per position and filter; its lanes go along the filter's C R S weights, for 8 images at a time
//   input_grad    first the gradients of all patches, a thread per position and c, r, s, which goes down the filters for 8
//                 images at a time; then a thread per element of dx adds those of the patches it is in. Of so many images
//                 at once that the patches' gradients take at most 64 MiB.
//   weight_grad   a thread per weight, which adds up the images
#include "ops/locally_connected2d.h"

#include "cuda/device.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

using Params = LocallyConnected2dParams;
constexpr int kImages = 8;

struct Tap {
  int64_t c, r, s;
};
__device__ __forceinline__ Tap tap_at(const Params& p, int64_t i) {
  const int64_t rows = divided(i, p.s), c = divided(rows, p.r);
  return {c, rows - c * p.r, i - rows * p.s};
}

template <class T>
__global__ void __launch_bounds__(256) forward_kernel(Params p, Strides in, Strides out) {
  using A = compute_t<T>;
  const int64_t filter = thread_index() / kWarp, taps = p.c * p.r * p.s;
  if (filter >= p.p * p.q * p.k) return;  // of a whole warp
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t k = filter % p.k, pp = filter / p.k / p.q, qq = filter / p.k % p.q;
  const int64_t h0 = pp * p.stride_h - p.pad_h, w0 = qq * p.stride_w - p.pad_w;
  const T* const weight = static_cast<const T*>(p.weight) + filter * taps;
  A bias = 0;
  if (p.bias) bias = load(static_cast<const T*>(p.bias) + (p.bias_per_position ? (k * p.p + pp) * p.q + qq : k));
  for (int64_t first = 0; first < p.n; first += kImages) {
    const int images = static_cast<int>(min64(p.n - first, kImages));
    A sum[kImages] = {};
    for (int64_t i = lane; i < taps; i += kWarp) {
      const Tap t = tap_at(p, i);
      const int64_t h = h0 + t.r * p.dilation_h, w = w0 + t.s * p.dilation_w;
      if (h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
      const A factor = load(weight + i);
      const T* const x = static_cast<const T*>(p.x) + offset(in, first, t.c, h, w);
#pragma unroll
      for (int n = 0; n < kImages; ++n)
        if (n < images) sum[n] += factor * load(x + n * in.n);
    }
#pragma unroll
    for (int n = 0; n < kImages; ++n) {
      const A total = warp_sum(sum[n]);
      if (lane == 0 && n < images) store(static_cast<T*>(p.y) + offset(out, first + n, k, pp, qq), total + bias);
    }
  }
}

// patches[(n * P Q + position) * taps + i], for images first .. first + images - 1, n counted from the first.
template <class T>
__global__ void __launch_bounds__(256)
    patches_kernel(Params p, Strides out, compute_t<T>* patches, int64_t first, int64_t images) {
  using A = compute_t<T>;
  const int64_t i = thread_index(), taps = p.c * p.r * p.s, positions = p.p * p.q;
  if (i >= positions * taps) return;
  const int64_t position = i / taps;
  const T* const weight = static_cast<const T*>(p.weight) + position * p.k * taps + i % taps;
  const T* const dy = static_cast<const T*>(p.dy) + offset(out, first, 0, position / p.q, position % p.q);
  for (int64_t begin = 0; begin < images; begin += kImages) {
    const int count = static_cast<int>(min64(images - begin, kImages));
    A sum[kImages] = {};
    for (int64_t k = 0; k < p.k; ++k) {
      const A factor = load(weight + k * taps);
#pragma unroll
      for (int n = 0; n < kImages; ++n)
        if (n < count) sum[n] += factor * load(dy + (begin + n) * out.n + k * out.c);
    }
#pragma unroll
    for (int n = 0; n < kImages; ++n)
      if (n < count) patches[(begin + n) * positions * taps + i] = sum[n];
  }
}

template <class T>
__global__ void __launch_bounds__(256)
    add_patches_kernel(Params p, const compute_t<T>* patches, int64_t first, int64_t images) {
  const int64_t i = thread_index();
  if (i >= images * p.c * p.h * p.w) return;
  const Element e = element_at<1>(i, p.layout, p.c, p.h, p.w);
  compute_t<T> sum = 0;
  for (int64_t r = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s) {
      const int64_t down = e.h + p.pad_h - r * p.dilation_h, right = e.w + p.pad_w - s * p.dilation_w;
      if (down < 0 || right < 0 || remainder_of(down, p.stride_h) || remainder_of(right, p.stride_w)) continue;
      const int64_t pp = divided(down, p.stride_h), qq = divided(right, p.stride_w);
      if (pp >= p.p || qq >= p.q) continue;
      sum += patches[((((e.n * p.p + pp) * p.q + qq) * p.c + e.c) * p.r + r) * p.s + s];
    }
  store(static_cast<T*>(p.dx) + first * p.c * p.h * p.w + i, sum);
}

template <class T>
__global__ void __launch_bounds__(256) weight_kernel(Params p, Strides in, Strides out) {
  const int64_t i = thread_index(), taps = p.c * p.r * p.s;
  if (i >= p.p * p.q * p.k * taps) return;
  const Tap t = tap_at(p, i % taps);
  const int64_t filter = i / taps, k = filter % p.k, pp = filter / p.k / p.q, qq = filter / p.k % p.q;
  const int64_t h = pp * p.stride_h - p.pad_h + t.r * p.dilation_h, w = qq * p.stride_w - p.pad_w + t.s * p.dilation_w;
  compute_t<T> sum = 0;
  if (h >= 0 && h < p.h && w >= 0 && w < p.w)
    for (int64_t n = 0; n < p.n; ++n)
      sum += load(static_cast<const T*>(p.dy) + offset(out, n, k, pp, qq)) *
             load(static_cast<const T*>(p.x) + offset(in, n, t.c, h, w));
  store(static_cast<T*>(p.dw) + i, sum);
}

template <class T>
void forward(const Params& p) {
  launch("locally_connected2d_forward", *p.launch, one_each(p.p * p.q * p.k * kWarp), &forward_kernel<T>, p,
         strides_of(p.layout, p.c, p.h, p.w), strides_of(p.layout, p.k, p.p, p.q));
}

template <class T>
void input_grad(const Params& p) {
  using A = compute_t<T>;
  const int64_t of_image = p.p * p.q * p.c * p.r * p.s;
  const int64_t at_once =
      min64(p.n, max64((int64_t{64} << 20) / max64(of_image * static_cast<int64_t>(sizeof(A)), 1), 1));
  A* const patches = static_cast<A*>(p.launch->allocate(at_once * of_image * static_cast<int64_t>(sizeof(A))));
  for (int64_t first = 0; first < p.n; first += at_once) {
    const int64_t images = min64(at_once, p.n - first);
    launch("locally_connected2d_input_grad patches", *p.launch, one_each(of_image), &patches_kernel<T>, p,
           strides_of(p.layout, p.k, p.p, p.q), patches, first, images);
    launch("locally_connected2d_input_grad", *p.launch, one_each(images * p.c * p.h * p.w), &add_patches_kernel<T>, p,
           static_cast<const A*>(patches), first, images);
  }
}

template <class T>
void weight_grad(const Params& p) {
  launch("locally_connected2d_weight_grad", *p.launch, one_each(p.p * p.q * p.k * p.c * p.r * p.s), &weight_kernel<T>,
         p, strides_of(p.layout, p.c, p.h, p.w), strides_of(p.layout, p.k, p.p, p.q));
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(locally_connected2d_forward, LocallyConnected2dParams, forward)
CNNOPS_EXPORT(locally_connected2d_input_grad, LocallyConnected2dParams, input_grad)
CNNOPS_EXPORT(locally_connected2d_weight_grad, LocallyConnected2dParams, weight_grad)
