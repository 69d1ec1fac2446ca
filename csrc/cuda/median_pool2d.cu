// Median pooling: a thread per element of the result. Elements are compared as integers in the same order. Of at most 9 cells
// the window stays in registers, and each cell's rank is counted; of more, the median's bits are found from the highest down,
// each by counting the cells below, so that any window takes as many passes over its cells as an element has bits.
#include "ops/median_pool2d.h"

#include "cuda/pick.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
struct Key {
  using type = uint32_t;
};
template <>
struct Key<double> {
  using type = uint64_t;
};

// Ascending as the values are (-0 as 0); NaN is the highest of all.
__device__ __forceinline__ uint32_t key_of(float v) {
  if (v != v) return 0xffffffffu;
  const uint32_t bits = bits_as<uint32_t>(v + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t key_of(double v) {
  if (v != v) return ~uint64_t{0};
  const uint64_t bits = bits_as<uint64_t>(v + 0.0);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

constexpr int kFew = 9;

template <class T, bool few>
__global__ void __launch_bounds__(256) forward_kernel(MedianPool2dParams p, Strides in, int64_t count) {
  using K = typename Key<T>::type;
  constexpr K kNan = static_cast<K>(~K{0});
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<1>(i, p.layout, p.c, p.p, p.q);
  const Taps t = taps_of(p.windows, p.h, p.w, e.h, e.w);
  const T* const x = static_cast<const T*>(p.x) + offset(in, e.n, e.c, 0, 0);
  const auto at = [&](int64_t r, int64_t s) {
    return x + (t.h0 + r * p.windows.dilation_h) * in.h + (t.w0 + s * p.windows.dilation_w) * in.w;
  };
  const int rows = static_cast<int>(max64(t.r1 - t.r0, 0)), columns = static_cast<int>(max64(t.s1 - t.s0, 0));
  const int cells = rows * columns, rank = (cells - 1) / 2;
  K median = kNan;
  bool any_nan = false;
  if constexpr (few) {
    K keys[kFew];
#pragma unroll
    for (int j = 0; j < kFew; ++j) {
      keys[j] = j < cells ? key_of(load(at(t.r0 + j / columns, t.s0 + j % columns))) : kNan;
      any_nan = any_nan || (j < cells && keys[j] == kNan);
    }
#pragma unroll
    for (int j = 0; j < kFew; ++j) {
      int below = 0, equal = 0;
#pragma unroll
      for (int k = 0; k < kFew; ++k) below += keys[k] < keys[j], equal += k < cells && keys[k] == keys[j];
      if (j < cells && rank >= below && rank < below + equal) median = keys[j];
    }
  } else {
    K low = 0;  // the median is at least this; its bits are settled from the highest
    for (int bit = static_cast<int>(sizeof(K)) * 8 - 1; bit >= 0; --bit) {
      const K candidate = low | K{1} << bit;
      int below = 0;
      for (int64_t r = t.r0; r < t.r1; ++r)
        for (int64_t s = t.s0; s < t.s1; ++s) {
          const K key = key_of(load(at(r, s)));
          below += key < candidate, any_nan = any_nan || key == kNan;
        }
      if (below <= rank) low = candidate;
    }
    median = low;
  }
  if (any_nan) median = kNan;
  // The first cell with this value; of a window without cells, none.
  int tap = -1;
  compute_t<T> value = NAN;
  for (int64_t r = t.r0; r < t.r1 && tap < 0; ++r)
    for (int64_t s = t.s0; s < t.s1 && tap < 0; ++s) {
      const compute_t<T> v = load(at(r, s));
      if (key_of(v) == median) tap = static_cast<int>(r * p.windows.kernel_w + s), value = v;
    }
  store(static_cast<T*>(p.y) + i, value);
  const int taps[1] = {tap};
  store_choice<1>(p, i, t, taps);
}

template <class T>
void forward(const MedianPool2dParams& p) {
  const Strides in = strides_of(p.layout, p.c, p.h, p.w);
  const int64_t count = p.n * p.c * p.p * p.q;
  const bool few = p.windows.kernel_h * p.windows.kernel_w <= kFew;
  launch("median_pool2d_forward", *p.launch, one_each(count),
         few ? &forward_kernel<T, true> : &forward_kernel<T, false>, p, in, count);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(median_pool2d_forward, MedianPool2dParams, forward)
