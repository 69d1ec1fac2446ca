// Integer helpers with internal linkage, for sources that are compiled once per instruction set (std::min is an inline
// template that such sources would share).
#pragma once

#include <cstdint>

#include "common/portable.h"

namespace cnnops {

CNNOPS_HD static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CNNOPS_HD static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
// a / b for a >= 0 and 0 < b, on devices b < 2^31: positions by sizes and steps along an axis. A device's 64-bit division is a
// call around which registers spill; so 32 bits where they do, as nearly always, else bit by bit.
CNNOPS_HD static inline int64_t divided(int64_t a, int64_t b) {
#if defined(__CUDA_ARCH__) || CNNOPS_EMULATED
  const uint32_t high = static_cast<uint32_t>(a >> 32), low = static_cast<uint32_t>(a), by = static_cast<uint32_t>(b);
  if (high == 0) return low / by;
  uint32_t quotient = 0, rest = high % by;  // rest < 2^31, so it can be doubled
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    rest = rest << 1 | (low >> bit & 1);
    quotient <<= 1;
    if (rest >= by) rest -= by, quotient |= 1;
  }
  return static_cast<int64_t>(high / by) << 32 | quotient;
#else
  return a / b;
#endif
}
CNNOPS_HD static inline int64_t ceil_div(int64_t a, int64_t b) { return divided(a + b - 1, b); }
CNNOPS_HD static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Threads worth waking for this many elements of simple work; results never depend on it.
static inline int threads_for(int64_t elements, int threads) {
  return static_cast<int>(min64(threads, max64(elements >> 15, 1)));
}

}  // namespace cnnops
