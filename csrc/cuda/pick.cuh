// What the kernels of poolings that pick share: windows, and writing choices.
#pragma once

#include "cuda/device.cuh"
#include "ops/pool2d.h"

namespace cnnops {
namespace {

// The cells of window (p, q): its first one, and the taps that lie inside the image.
struct Taps {
  int64_t h0, w0, r0, r1, s0, s1;
};
__device__ __forceinline__ Taps taps_of(const Windows& v, int64_t height, int64_t width, int64_t p, int64_t q) {
  const int64_t h0 = p * v.stride_h - v.pad_h, w0 = q * v.stride_w - v.pad_w;
  return {h0,
          w0,
          first_tap(h0, v.dilation_h),
          last_tap(h0, v.kernel_h, v.dilation_h, height),
          first_tap(w0, v.dilation_w),
          last_tap(w0, v.kernel_w, v.dilation_w, width)};
}

// Writes the choices of V neighbouring channels, each (r, s) in one number, -1 for none.
template <int V>
__device__ __forceinline__ void store_choice(const PickParams& p, int64_t at, const Taps& t, const int (&tap)[V]) {
  const int kernel_w = static_cast<int>(p.windows.kernel_w);
  if (p.mode == Choice::offsets) {
    Pack<uint8_t, V> pack;
#pragma unroll
    for (int j = 0; j < V; ++j) pack.v[j] = tap[j] < 0 ? kNoOffset : static_cast<uint8_t>(tap[j]);
    *reinterpret_cast<Pack<uint8_t, V>*>(static_cast<uint8_t*>(p.choice) + at) = pack;
  } else if (p.mode == Choice::indices) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int64_t h = t.h0 + tap[j] / kernel_w * p.windows.dilation_h;
      const int64_t w = t.w0 + tap[j] % kernel_w * p.windows.dilation_w;
      static_cast<int64_t*>(p.choice)[at + j] = tap[j] < 0 ? kNoIndex : h * p.w + w;
    }
  }
}

}  // namespace
}  // namespace cnnops
