// The machine's fused multiply-add rate, for the benchmark to hold kernels against. Every element goes through
//
//   x <- x * a + b,   `iterations` times
//
// x: [T, 192] contiguous, one row for each of T threads; y: the same shape, the result. 2 * T * 192 * iterations floating
// point operations, whatever the instruction set. Computed in the compute type: bfloat16 and float16 show the rate that
// float32 arithmetic on them can reach.
#pragma once

#include "common/tensor.h"

namespace cnnops {

struct PeakParams {
  static constexpr int64_t kWidth = 192;
  const void* x;
  void* y;
  double a, b;
  int64_t iterations;
  int threads;  // T
  Launch* launch = nullptr;
};

}  // namespace cnnops
