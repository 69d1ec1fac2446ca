// Sums over the lanes of many vectors at once.
#pragma once

#include "cpu/simd/vec.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// Lane i of the result is the sum of the lanes of v[i]; kCount: as many as lanes.
template <int kCount, class V>
[[gnu::always_inline]] inline V sum_each(const V* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    const V a = sum_each<kCount / 2>(v), b = sum_each<kCount / 2>(v + kCount / 2);
    return evens(a, b) + odds(a, b);
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
