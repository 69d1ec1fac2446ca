// What the convolution kernels share: the last step, splits of the weight gradient, and their sum in a fixed order.
#pragma once

#include "cuda/activation.cuh"
#include "ops/conv2d.h"

namespace cnnops {

// What a kernel that splits float32 numbers saw: any that has no parts, and of either factor any that is large enough for its
// smallest part to count, and any but zero.
struct SplitFlags {
  int bad, large[2], some[2];
};

namespace {

__device__ __forceinline__ bool is_right(const SplitFlags& seen) {
  return !seen.bad && (seen.large[0] || !seen.some[0]) && (seen.large[1] || !seen.some[1]);
}

struct ConvGroups {
  int64_t c, k;  // channels and filters of one group
};
static inline ConvGroups group_sizes(const Conv2dParams& p) { return {p.c / p.groups, p.k / p.groups}; }

// Parts of a reduction over `terms`, of about `least` each at least and of a multiple of `multiple`, so that `blocks` blocks
// a part fill a large device; of no terms, one part of none. From the shape alone, so that results do not depend on the
// device.
struct Splits {
  int64_t count, each;
};
static inline Splits splits_for(int64_t terms, int64_t blocks, int64_t least, int64_t multiple = 1) {
  constexpr int64_t kWanted = 528;  // 4 blocks on each of 132 multiprocessors
  const int64_t wanted = max64(min64(min64(ceil_div(kWanted, max64(blocks, 1)), terms / least), 65535), 1);
  const int64_t each = max64(round_up(ceil_div(terms, wanted), multiple), multiple);
  return {max64(ceil_div(terms, each), 1), each};
}

// dw or db from partial sums [split, count], added in the order of the splits; element i of dw counts k, c, r, s.
template <class T>
__global__ void __launch_bounds__(256)
    add_splits_kernel(Conv2dParams p, const compute_t<T>* partial, int64_t splits, int64_t count, bool is_bias) {
  const int64_t i = thread_index();
  if (i >= count) return;
  compute_t<T> sum = 0;
  for (int64_t j = 0; j < splits; ++j) sum += partial[j * count + i];
  if (is_bias) {
    store(static_cast<T*>(p.bias) + i, sum);
    return;
  }
  const int64_t s = i % p.s, r = i / p.s % p.r, group_c = p.c / p.groups, c = i / (p.s * p.r) % group_c,
                k = i / (p.s * p.r * group_c);
  store(static_cast<T*>(p.weight) + k * p.weight_stride[0] + c * p.weight_stride[1] + r * p.weight_stride[2] +
            s * p.weight_stride[3],
        sum);
}

template <class T>
__device__ __forceinline__ compute_t<T> weight_at(const Conv2dParams& p, int64_t k, int64_t c, int64_t r, int64_t s) {
  return load(static_cast<const T*>(p.weight) + k * p.weight_stride[0] + c * p.weight_stride[1] +
              r * p.weight_stride[2] + s * p.weight_stride[3]);
}

// Forward's result from a sum of products.
template <class T>
__device__ __forceinline__ void finish(const Conv2dParams& p, compute_t<T> sum, int64_t k, int64_t at) {
  if (p.bias) sum += load(static_cast<const T*>(p.bias) + k);
  if (p.residual) sum += load(static_cast<const T*>(p.residual) + at);
  store(static_cast<T*>(p.y) + at, activate(sum, p.activation));
}

}  // namespace
}  // namespace cnnops
