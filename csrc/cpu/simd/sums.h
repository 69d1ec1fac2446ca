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
#if CNNOPS_ISA_avx2  // shuffles within 16 bytes are one instruction, others two or three
    constexpr size_t kBytes = kCount / 2 * sizeof(v[0][0]);  // that stay together
    const __m256 first = reinterpret_cast<__m256>(a), second = reinterpret_cast<__m256>(b);
    const __m256d first2 = reinterpret_cast<__m256d>(a), second2 = reinterpret_cast<__m256d>(b);
    if constexpr (kBytes == 4) {
      return reinterpret_cast<V>(_mm256_unpacklo_ps(first, second)) +
             reinterpret_cast<V>(_mm256_unpackhi_ps(first, second));
    } else if constexpr (kBytes == 8) {
      return reinterpret_cast<V>(_mm256_unpacklo_pd(first2, second2)) +
             reinterpret_cast<V>(_mm256_unpackhi_pd(first2, second2));
    } else {
      return reinterpret_cast<V>(_mm256_permute2f128_ps(first, second, 0x20)) +
             reinterpret_cast<V>(_mm256_permute2f128_ps(first, second, 0x31));
    }
#else
    return evens(a, b) + odds(a, b);
#endif
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
