// One small vector type per instruction set, on the compilers' vector extensions: vec<float> and vec<double> have
// + - * / and comparisons (a lane mask, used as `mask ? a : b`) from the language; this adds loads and stores that
// convert from and to the storage types, partial ones for tails, and fused multiply-add. Everything has internal
// linkage.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/export.h"

#if CNNOPS_ISA_avx2 || CNNOPS_ISA_avx512
#include <immintrin.h>
#endif

namespace cnnops::CNNOPS_ISA {
namespace {

#if CNNOPS_ISA_avx512
constexpr int kVectorBytes = 64;
#elif CNNOPS_ISA_avx2
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class E, int kLanes>
struct VectorOf {
  typedef E type __attribute__((vector_size(kLanes * sizeof(E)), aligned(sizeof(E)), may_alias));
};
template <class C>
constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(C));
// A full register of the compute type C (float or double).
template <class C>
using vec = typename VectorOf<C, lanes<C>>::type;

using f32v = vec<float>;
using u32v = typename VectorOf<uint32_t, lanes<float>>::type;
using u16v = typename VectorOf<uint16_t, lanes<float>>::type;

template <class V, class C>
[[gnu::always_inline]] inline V broadcast(C value) {
  return V{} + value;
}
// Exactly `value` in every lane, -0.0 included.
template <class C>
[[gnu::always_inline]] inline vec<C> set1(C value) {
  vec<C> out;
  for (int i = 0; i < lanes<C>; ++i) out[i] = value;
  return out;
}

[[gnu::always_inline]] inline vec<float> load(const float* p) { return *reinterpret_cast<const vec<float>*>(p); }
[[gnu::always_inline]] inline vec<double> load(const double* p) { return *reinterpret_cast<const vec<double>*>(p); }
[[gnu::always_inline]] inline vec<float> load(const bf16* p) {
  const u16v bits = *reinterpret_cast<const u16v*>(p);
  return reinterpret_cast<vec<float>>(__builtin_convertvector(bits, u32v) << 16);
}
[[gnu::always_inline]] inline vec<float> load(const f16* p) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif CNNOPS_ISA_avx2
  return reinterpret_cast<vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vec<float> out;
  for (int i = 0; i < lanes<float>; ++i) out[i] = static_cast<float>(p[i]);
  return out;
#endif
}

[[gnu::always_inline]] inline void store(float* p, vec<float> v) { *reinterpret_cast<vec<float>*>(p) = v; }
[[gnu::always_inline]] inline void store(double* p, vec<double> v) { *reinterpret_cast<vec<double>*>(p) = v; }
[[gnu::always_inline]] inline void store(bf16* p, vec<float> v) {
  const u32v bits = reinterpret_cast<u32v>(v);
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v quiet = (bits >> 16) | 0x40u;
  const u32v out = (v == v) ? rounded : quiet;
  *reinterpret_cast<u16v*>(p) = __builtin_convertvector(out, u16v);
}
[[gnu::always_inline]] inline void store(f16* p, vec<float> v) {
#if CNNOPS_ISA_avx512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif CNNOPS_ISA_avx2
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < lanes<float>; ++i) p[i] = static_cast<f16>(v[i]);
#endif
}

// The first n elements (0 <= n <= lanes); the other lanes are zero. Nothing past p + n is touched.
template <class T>
[[gnu::always_inline]] inline vec<compute_t<T>> load_n(const T* p, int n) {
  constexpr int kLanes = lanes<compute_t<T>>;
  if (n >= kLanes) return load(p);
#if CNNOPS_ISA_avx512
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<vec<float>>(_mm512_maskz_loadu_ps((1u << n) - 1, p));
  } else if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<vec<double>>(_mm512_maskz_loadu_pd((1u << n) - 1, p));
  } else {
    T buffer[kLanes];
    const __m256i bits = _mm256_maskz_loadu_epi16((1u << n) - 1, p);
    std::memcpy(buffer, &bits, sizeof buffer);
    return load(buffer);
  }
#else
  T buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
template <class T>
[[gnu::always_inline]] inline void store_n(T* p, vec<compute_t<T>> v, int n) {
  constexpr int kLanes = lanes<compute_t<T>>;
  if (n >= kLanes) return store(p, v);
#if CNNOPS_ISA_avx512
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (1u << n) - 1, reinterpret_cast<__m512>(v));
    return;
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, (1u << n) - 1, reinterpret_cast<__m512d>(v));
    return;
  }
#endif
  T buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}

// The first n lanes as they are, the others zero.
template <class C>
[[gnu::always_inline]] inline vec<C> keep_n(vec<C> v, int n) {
  if (n >= lanes<C>) return v;
  using Index = typename VectorOf<std::conditional_t<sizeof(C) == 4, int32_t, int64_t>, lanes<C>>::type;
  Index index = {};
  for (int i = 0; i < lanes<C>; ++i) index[i] = i;
  return index < n ? v : vec<C>{};
}

// The sum of N lanes, by halves.
template <class C, int N = lanes<C>>
[[gnu::always_inline]] inline C sum_lanes(typename VectorOf<C, N>::type v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename VectorOf<C, N / 2>::type half[2];
    std::memcpy(half, &v, sizeof half);
    return sum_lanes<C, N / 2>(half[0] + half[1]);
  }
}

template <class V>
[[gnu::always_inline]] inline V fma(V a, V b, V c) {
  return a * b + c;  // contracted (-ffp-contract=fast) where the instruction set has it
}
// PyTorch's max: NaN in either operand gives NaN; a wins ties.
template <class V>
[[gnu::always_inline]] inline V max_nan(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
