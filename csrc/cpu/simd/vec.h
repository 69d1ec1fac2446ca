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

// Whether loads and stores of a part of a vector are single instructions.
#if CNNOPS_ISA_avx512
#define CNNOPS_ISA_HAS_MASKS 1
#else
#define CNNOPS_ISA_HAS_MASKS 0
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

// Signed integers of the compute type's width, one per lane: what comparing two vec<C> gives.
template <class C>
struct IntOf {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class C>
using int_t = typename IntOf<C>::type;
template <class C>
using ivec = typename VectorOf<int_t<C>, lanes<C>>::type;

template <class V, class C>
[[gnu::always_inline]] inline V broadcast(C value) {
  return V{} + value;
}
// Exactly `value` in every lane: x - 0 is x for -0.0 too, which compilers know, so this is one broadcast.
template <class C>
[[gnu::always_inline]] inline vec<C> set1(C value) {
  return value - vec<C>{};
}

[[gnu::always_inline]] inline vec<float> load(const float* p) { return *reinterpret_cast<const vec<float>*>(p); }
[[gnu::always_inline]] inline vec<double> load(const double* p) { return *reinterpret_cast<const vec<double>*>(p); }
// Bits of bf16 to floats. By intrinsics: g++ 12 widens such vectors by halves, in four shuffles.
[[gnu::always_inline]] inline vec<float> widen(u16v bits) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)), 16));
#elif CNNOPS_ISA_avx2
  return reinterpret_cast<vec<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)), 16));
#else
  return reinterpret_cast<vec<float>>(__builtin_convertvector(bits, u32v) << 16);
#endif
}
// Whether there are instructions that round to bfloat16: one in the place of seven. They flush denormals (below 1.2e-38).
#if CNNOPS_ISA_avx512_bf16 || CNNOPS_ISA_amx
#define CNNOPS_ISA_ROUNDS_BF16 1
#else
#define CNNOPS_ISA_ROUNDS_BF16 0
#endif

#if CNNOPS_ISA_avx512 && !CNNOPS_ISA_ROUNDS_BF16
// Rounded to bfloat16, to nearest even, in the high half of each lane, from where one permutation takes the numbers. NaN
// stays NaN.
[[gnu::always_inline]] inline __m512i rounded_high(vec<float> v) {
  const __m512i bits = reinterpret_cast<__m512i>(v);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  const __mmask16 nan = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(v), _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
#endif
[[gnu::always_inline]] inline u16v narrow(vec<float> v) {
#if CNNOPS_ISA_ROUNDS_BF16
  return reinterpret_cast<u16v>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#elif CNNOPS_ISA_avx512
  return reinterpret_cast<u16v>(_mm512_castsi512_si256(
      _mm512_permutexvar_epi16(_mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21,
                                                19, 17, 15, 13, 11, 9, 7, 5, 3, 1),
                               rounded_high(v))));
#else
  const u32v bits = reinterpret_cast<u32v>(v);
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((v == v) ? rounded : quiet, u16v);
#endif
}
#if CNNOPS_ISA_avx512
template <class T>
[[gnu::always_inline]] inline vec<float> widened(__m256i bits) {
  if constexpr (std::is_same_v<T, bf16>)
    return widen(reinterpret_cast<u16v>(bits));
  else
    return reinterpret_cast<vec<float>>(_mm512_cvtph_ps(bits));
}
[[gnu::always_inline]] inline __m256i f16_bits(vec<float> v) {
  return _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#endif

[[gnu::always_inline]] inline vec<float> load(const bf16* p) { return widen(*reinterpret_cast<const u16v*>(p)); }
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
[[gnu::always_inline]] inline void store(bf16* p, vec<float> v) { *reinterpret_cast<u16v*>(p) = narrow(v); }
[[gnu::always_inline]] inline void store(f16* p, vec<float> v) {
#if CNNOPS_ISA_avx512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), f16_bits(v));
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
    return widened<T>(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
  }
#else
#if CNNOPS_ISA_avx2
  if constexpr (sizeof(T) == 4) {
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    return reinterpret_cast<vec<float>>(_mm256_maskload_ps(p, mask));
  } else if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<vec<double>>(
        _mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_set_epi64x(3, 2, 1, 0))));
  }
#endif
  T buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
#if CNNOPS_ISA_avx2
// An even number of the first bytes. Not by AVX2's masked stores, slow on AMD's cores (Agner Fog, Instruction tables).
[[gnu::always_inline]] inline void store_bytes(void* to, __m256i v, int bytes) {
  char* p = static_cast<char*>(to);
  __m128i part = _mm256_castsi256_si128(v);
  if (bytes & 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), part);
    part = _mm256_extracti128_si256(v, 1);
    p += 16;
  }
  if (bytes & 8) {
    _mm_storeu_si64(p, part);
    part = _mm_srli_si128(part, 8);
    p += 8;
  }
  if (bytes & 4) {
    _mm_storeu_si32(p, part);
    part = _mm_srli_si128(part, 4);
    p += 4;
  }
  if (bytes & 2) _mm_storeu_si16(p, part);
}
#endif
template <class T>
[[gnu::always_inline]] inline void store_n(T* p, vec<compute_t<T>> v, int n) {
  constexpr int kLanes = lanes<compute_t<T>>;
  if (n >= kLanes) return store(p, v);
#if CNNOPS_ISA_avx512
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, (1u << n) - 1, reinterpret_cast<__m512>(v));
  } else if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, (1u << n) - 1, reinterpret_cast<__m512d>(v));
  } else if constexpr (std::is_same_v<T, bf16>) {
    _mm256_mask_storeu_epi16(p, (1u << n) - 1, reinterpret_cast<__m256i>(narrow(v)));
  } else {
    _mm256_mask_storeu_epi16(p, (1u << n) - 1, f16_bits(v));
  }
#elif CNNOPS_ISA_avx2
  if constexpr (sizeof(T) >= 4) {
    store_bytes(p, reinterpret_cast<__m256i>(v), n * static_cast<int>(sizeof(T)));
  } else {
    T buffer[kLanes];
    store(buffer, v);
    store_bytes(p, _mm256_castsi128_si256(*reinterpret_cast<const __m128i_u*>(buffer)), n * 2);
  }
#else
  T buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
#endif
}

#if CNNOPS_ISA_avx512
// first[0], first[1], ..., second[0], ...
[[gnu::always_inline]] inline __m512i narrow_both(vec<float> first, vec<float> second) {
#if CNNOPS_ISA_ROUNDS_BF16
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
#else  // one permutation for both
  const __m512i odds = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                        23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(rounded_high(first), odds, rounded_high(second));
#endif
}
#endif
#if CNNOPS_ISA_avx512 && !CNNOPS_ISA_ROUNDS_BF16
// The first n of even[0], odd[0], even[1], ...
[[gnu::always_inline]] inline void store_zipped_n(bf16* p, vec<float> even, vec<float> odd, int n) {
  const __m512i low = _mm512_srli_epi32(rounded_high(even), 16);
  const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaau, low, rounded_high(odd));
  if (n >= 2 * lanes<float>) {
    _mm512_storeu_si512(p, both);
  } else {
    _mm512_mask_storeu_epi16(p, (1u << n) - 1, both);
  }
}
#endif

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

// Floats in float64. By intrinsics: g++ 12 converts such vectors by halves.
using HalfFloats = VectorOf<float, lanes<double>>::type;
[[gnu::always_inline]] inline vec<double> in_float64(HalfFloats v) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<vec<double>>(_mm512_cvtps_pd(reinterpret_cast<__m256>(v)));
#else
  return __builtin_convertvector(v, vec<double>);
#endif
}
// v in float64, its upper half added to its lower one.
[[gnu::always_inline]] inline vec<double> folded(vec<double> v) { return v; }
[[gnu::always_inline]] inline vec<double> folded(vec<float> v) {
  HalfFloats half[2];
  std::memcpy(half, &v, sizeof half);
  return in_float64(half[0]) + in_float64(half[1]);
}
// The sums of a's and b's lanes, in fewer steps than one by one; the last four lanes of each in float64.
template <class C>
[[gnu::always_inline]] inline void sum_lanes_of_both(vec<C> a, vec<C> b, double* sums) {
  if constexpr (lanes<C> == 2) {
    sums[0] = a[0] + a[1], sums[1] = b[0] + b[1];
  } else {
    using Four = typename VectorOf<C, 4>::type;
    using Doubles = VectorOf<double, 4>::type;
    constexpr int kFours = lanes<C> / 4;
    Four of_a[kFours], of_b[kFours];
    std::memcpy(of_a, &a, sizeof a), std::memcpy(of_b, &b, sizeof b);
    for (int half = kFours / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) of_a[i] += of_a[i + half], of_b[i] += of_b[i + half];
    const Doubles last_a = __builtin_convertvector(of_a[0], Doubles),
                  last_b = __builtin_convertvector(of_b[0], Doubles);
    const Doubles halves =
        __builtin_shufflevector(last_a, last_b, 0, 4, 2, 6) + __builtin_shufflevector(last_a, last_b, 1, 5, 3, 7);
    sums[0] = halves[0] + halves[2], sums[1] = halves[1] + halves[3];
  }
}
// The first n elements in float64, as load_n.
[[gnu::always_inline]] inline vec<double> load_float64_n(const double* p, int n) { return load_n(p, n); }
[[gnu::always_inline]] inline vec<double> load_float64_n(const float* p, int n) {
  if (n >= lanes<double>) return in_float64(*reinterpret_cast<const HalfFloats*>(p));
#if CNNOPS_ISA_avx512
  return reinterpret_cast<vec<double>>(_mm512_cvtps_pd(_mm256_maskz_loadu_ps((1u << n) - 1, p)));
#else
  float buffer[lanes<double>] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return in_float64(*reinterpret_cast<const HalfFloats*>(buffer));
#endif
}

// Lanes of one byte, as ivec<C> and back (cut to 8 bits); the first n, as load_n and store_n. By intrinsics: g++ 12 takes
// such vectors apart byte by byte.
template <class C>
[[gnu::always_inline]] inline ivec<C> load_u8_n(const uint8_t* p, int n) {
#if CNNOPS_ISA_avx512
  const __m128i bytes =
      n >= lanes<C> ? (lanes<C> == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_loadu_si64(p))
                    : _mm_maskz_loadu_epi8((1u << n) - 1, p);
  if constexpr (sizeof(C) == 4) {
    return reinterpret_cast<ivec<C>>(_mm512_cvtepu8_epi32(bytes));
  } else {
    return reinterpret_cast<ivec<C>>(_mm512_cvtepu8_epi64(bytes));
  }
#else
  uint8_t buffer[lanes<C>] = {};
  if (n >= lanes<C>) {
    std::memcpy(buffer, p, lanes<C>);
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = p[i];
  }
#if CNNOPS_ISA_avx2
  if constexpr (sizeof(C) == 4) {
    return reinterpret_cast<ivec<C>>(_mm256_cvtepu8_epi32(_mm_loadu_si64(buffer)));
  } else {
    return reinterpret_cast<ivec<C>>(_mm256_cvtepu8_epi64(_mm_loadu_si32(buffer)));
  }
#else
  ivec<C> out;
  for (int i = 0; i < lanes<C>; ++i) out[i] = buffer[i];
  return out;
#endif
#endif
}
template <class C>
[[gnu::always_inline]] inline void store_u8_n(uint8_t* p, ivec<C> v, int n) {
#if CNNOPS_ISA_avx512
  const unsigned mask = n >= lanes<C> ? (1u << lanes<C>)-1 : (1u << n) - 1;
  if constexpr (sizeof(C) == 4) {
    _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
  } else {
    _mm_mask_storeu_epi8(p, mask, _mm512_cvtepi64_epi8(reinterpret_cast<__m512i>(v)));
  }
#else
  uint8_t buffer[lanes<C>];
#if CNNOPS_ISA_avx2
  // The lowest byte of each lane to the bottom of each half.
  constexpr char kNo = -128;
  const __m256i picks =
      sizeof(C) == 4 ? _mm256_setr_epi8(0, 4, 8, 12, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, 0, 4,
                                        8, 12, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo)
                     : _mm256_setr_epi8(0, 8, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, 0,
                                        8, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo, kNo);
  const __m256i halves = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(v), picks);
  const int low = _mm256_extract_epi32(halves, 0), high = _mm256_extract_epi32(halves, 4);
  std::memcpy(buffer, &low, lanes<C> / 2);
  std::memcpy(buffer + lanes<C> / 2, &high, lanes<C> / 2);
#else
  for (int i = 0; i < lanes<C>; ++i) buffer[i] = static_cast<uint8_t>(v[i]);
#endif
  if (n >= lanes<C>) {
    std::memcpy(p, buffer, lanes<C>);
  } else {
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
#endif
}
// The same for int64 in memory.
template <class C>
[[gnu::always_inline]] inline ivec<C> load_i64_n(const int64_t* p, int n) {
  int_t<C> buffer[lanes<C>] = {};
  if (n >= lanes<C>) {
    for (int i = 0; i < lanes<C>; ++i) buffer[i] = static_cast<int_t<C>>(p[i]);
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = static_cast<int_t<C>>(p[i]);
  }
  return *reinterpret_cast<const ivec<C>*>(buffer);
}
template <class C>
[[gnu::always_inline]] inline void store_i64_n(int64_t* p, ivec<C> v, int n) {
  int_t<C> buffer[lanes<C>];
  *reinterpret_cast<ivec<C>*>(buffer) = v;
  if (n >= lanes<C>) {
    for (int i = 0; i < lanes<C>; ++i) p[i] = buffer[i];
  } else {
    for (int i = 0; i < n; ++i) p[i] = buffer[i];
  }
}
template <class I>
[[gnu::always_inline]] inline I iota() {
  I out;
  for (unsigned i = 0; i < sizeof(I) / sizeof(out[0]); ++i) out[i] = i;
  return out;
}

// The even and the odd elements of the 2 * lanes elements (a, b), and the way back.
template <class V>
[[gnu::always_inline]] inline V evens(V a, V b) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  if constexpr (kCount == 16) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  } else if constexpr (kCount == 8) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else if constexpr (kCount == 4) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
  } else {
    return __builtin_shufflevector(a, b, 0, 2);
  }
}
template <class V>
[[gnu::always_inline]] inline V odds(V a, V b) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  if constexpr (kCount == 16) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (kCount == 8) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else if constexpr (kCount == 4) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7);
  } else {
    return __builtin_shufflevector(a, b, 1, 3);
  }
}
// Elements kFirst to kFirst + lanes - 1 of the 2 * lanes elements (a, b).
template <int kFirst, class V>
[[gnu::always_inline]] inline V window(V a, V b) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]), k = kFirst;
  static_assert(k >= 0 && k <= kCount);
  if constexpr (k == 0) {
    return a;
  } else if constexpr (k == kCount) {
    return b;
#if CNNOPS_ISA_avx512
  } else if constexpr (sizeof(a[0]) == 4) {
    return reinterpret_cast<V>(_mm512_alignr_epi32(reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(a), k));
  } else {
    return reinterpret_cast<V>(_mm512_alignr_epi64(reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(a), k));
#else
  } else if constexpr (kCount == 8) {
    return __builtin_shufflevector(a, b, k, k + 1, k + 2, k + 3, k + 4, k + 5, k + 6, k + 7);
  } else if constexpr (kCount == 4) {
    return __builtin_shufflevector(a, b, k, k + 1, k + 2, k + 3);
  } else {
    return __builtin_shufflevector(a, b, k, k + 1);
#endif
  }
}

template <class V>
[[gnu::always_inline]] inline V zip_low(V a, V b) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  if constexpr (kCount == 16) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else if constexpr (kCount == 8) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else if constexpr (kCount == 4) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  } else {
    return __builtin_shufflevector(a, b, 0, 2);
  }
}
template <class V>
[[gnu::always_inline]] inline V zip_high(V a, V b) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  if constexpr (kCount == 16) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (kCount == 8) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (kCount == 4) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    return __builtin_shufflevector(a, b, 1, 3);
  }
}

// Lane i of the result is lane index[i] of v; or element index[i] of the 2 * lanes elements (a, b).
template <class V, class I>
[[gnu::always_inline]] inline V permute(V v, I index) {
#if CNNOPS_ISA_avx512
  if constexpr (sizeof(v[0]) == 4)
    return reinterpret_cast<V>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), reinterpret_cast<__m512>(v)));
  else
    return reinterpret_cast<V>(_mm512_permutexvar_pd(reinterpret_cast<__m512i>(index), reinterpret_cast<__m512d>(v)));
#elif CNNOPS_ISA_avx2
  if constexpr (sizeof(v[0]) == 8) index = (index * 2 | index << 33) + (int64_t{1} << 32);  // by halves of its lanes
  return reinterpret_cast<V>(_mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), reinterpret_cast<__m256i>(index)));
#else
  V out;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) out[i] = v[index[i]];
  return out;
#endif
}
template <class V, class I>
[[gnu::always_inline]] inline V permute(V a, V b, I index) {
#if CNNOPS_ISA_avx512
  if constexpr (sizeof(a[0]) == 4)
    return reinterpret_cast<V>(_mm512_permutex2var_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512i>(index),
                                                      reinterpret_cast<__m512>(b)));
  else
    return reinterpret_cast<V>(_mm512_permutex2var_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512i>(index),
                                                      reinterpret_cast<__m512d>(b)));
#else
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  const I low = index & (kCount - 1);
  return index < kCount ? permute(a, low) : permute(b, low);
#endif
}

template <class V>
[[gnu::always_inline]] inline V fma(V a, V b, V c) {
  return a * b + c;  // contracted (-ffp-contract=fast) where the instruction set has it
}
// The smaller and the larger; where either is NaN, either may come out.
[[gnu::always_inline]] inline vec<float> min_of(vec<float> a, vec<float> b) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<vec<float>>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif CNNOPS_ISA_avx2
  return reinterpret_cast<vec<float>>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}
[[gnu::always_inline]] inline vec<float> max_of(vec<float> a, vec<float> b) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<vec<float>>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif CNNOPS_ISA_avx2
  return reinterpret_cast<vec<float>>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
[[gnu::always_inline]] inline vec<double> min_of(vec<double> a, vec<double> b) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<vec<double>>(_mm512_min_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif CNNOPS_ISA_avx2
  return reinterpret_cast<vec<double>>(_mm256_min_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#else
  return a < b ? a : b;
#endif
}
[[gnu::always_inline]] inline vec<double> max_of(vec<double> a, vec<double> b) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<vec<double>>(_mm512_max_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b)));
#elif CNNOPS_ISA_avx2
  return reinterpret_cast<vec<double>>(_mm256_max_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b)));
#else
  return a > b ? a : b;
#endif
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
