// Integer helpers with internal linkage, for sources that are compiled once per instruction set (std::min is an inline
// template that such sources would share).
#pragma once

#include <cstdint>

namespace cnnops {

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Threads worth waking for this many elements of simple work; results never depend on it.
static inline int threads_for(int64_t elements, int threads) {
  return static_cast<int>(min64(threads, max64(elements >> 15, 1)));
}

}  // namespace cnnops
