// Packs numbers for dot_tile.h: as rows of terms, or as pairs of terms side by side. float32 is split into bfloat16 parts on the
// way; parts lie `part` numbers apart.
//
// Splitting fails for Inf and NaN and for what rounds to Inf in bfloat16; and where everything is tiny, the parts and their
// products, which the instructions flush to zero below 2^-126, are no small error. A Watch notes the largest magnitude of
// what was split, for the caller to have the call computed without splitting if it is out of range. bfloat16 data needs none.
#pragma once

#include "common/arith.h"
#include "cpu/micro/dot_tile.h"
#include "cpu/simd/transpose.h"

namespace cnnops::CNNOPS_ISA {
namespace {

using i32v = typename VectorOf<int32_t, lanes<float>>::type;
typedef uint16_t Bits16 __attribute__((may_alias));

struct Watch {
  i32v largest = {};  // bits of |x|

  bool fits() const {
    constexpr float kLargest = 1e15f, kSmallest = 1e-15f;  // their products, and sums of those, are far from the ends
    int32_t bits = 0;
    for (int i = 0; i < lanes<float>; ++i) bits = largest[i] > bits ? largest[i] : bits;
    float most;
    std::memcpy(&most, &bits, sizeof most);
    return bits == 0 || (most >= kSmallest && most <= kLargest);
  }
};

// The parts of n numbers (<= lanes), each in the low half of a lane.
template <int kParts>
[[gnu::always_inline]] inline void split_n(const ::cnnops::bf16* p, int n, u32v (&parts)[kParts], Watch&) {
  static_assert(kParts == 1);
#if CNNOPS_ISA_avx512
  const unsigned mask = n >= lanes<float> ? 0xffffu : (1u << n) - 1;
  parts[0] = reinterpret_cast<u32v>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)));
#else
  parts[0] = reinterpret_cast<u32v>(load_n(p, n)) >> 16;
#endif
}
template <int kParts>
[[gnu::always_inline]] inline void split_n(const float* p, int n, u32v (&parts)[kParts], Watch& watch) {
  f32v rest = load_n(p, n);
  const i32v size = reinterpret_cast<i32v>(rest) & 0x7fffffff;
  watch.largest = size > watch.largest ? size : watch.largest;
#pragma GCC unroll 3
  for (int i = 0; i < kParts; ++i) {
    const u32v bits = reinterpret_cast<u32v>(rest);
    parts[i] = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rest -= reinterpret_cast<f32v>(parts[i] << 16);
  }
}

inline void zero_bits(uint16_t* to, int64_t n) {
  auto* const out = reinterpret_cast<Bits16*>(to);
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
}

template <int kParts>
void zero_parts(uint16_t* to, int64_t part, int64_t n) {
  for (int i = 0; i < kParts; ++i) zero_bits(to + i * part, n);
}

// n numbers to neighbours of a row.
template <int kParts, class T>
[[gnu::always_inline]] inline void pack_row(const T* from, int64_t n, uint16_t* to, int64_t part, Watch& watch) {
  typedef u16v Row __attribute__((may_alias));
  int64_t i = 0;
#if CNNOPS_ISA_avx512
  if constexpr (sizeof(T) == 2)
    for (; i + 2 * lanes<float> <= n; i += 2 * lanes<float>) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
#endif
  for (; i < n; i += lanes<float>) {
    const int count = static_cast<int>(min64(n - i, lanes<float>));
    u32v parts[kParts];
    split_n<kParts>(from + i, count, parts, watch);
#pragma GCC unroll 3
    for (int j = 0; j < kParts; ++j) {
      uint16_t* const out = to + j * part + i;
      const u16v bits = __builtin_convertvector(parts[j], u16v);
      if (count == lanes<float>) {
        *reinterpret_cast<Row*>(out) = bits;
      } else {
#if CNNOPS_ISA_avx512
        _mm256_mask_storeu_epi16(out, (1u << count) - 1, reinterpret_cast<__m256i>(bits));
#else
        for (int k = 0; k < count; ++k) reinterpret_cast<Bits16*>(out)[k] = bits[k];
#endif
      }
    }
  }
}

// n numbers `step` apart, as neighbours: where they are, or in `buffer`.
template <class T>
[[gnu::always_inline]] inline const T* gather(const T* from, int64_t step, int64_t n, T* buffer) {
  if (step == 1) return from;
  int64_t i = 0;
#if CNNOPS_ISA_avx512
  if constexpr (sizeof(T) == 2) {
    if (step == 2) {
      for (; i < n; i += lanes<float>) {  // the lower halves of pairs
        const int64_t count = min64(n - i, lanes<float>);
        const __m512i both = _mm512_maskz_loadu_epi16(0x55555555u >> (2 * (lanes<float> - count)), from + 2 * i);
        _mm256_mask_storeu_epi16(buffer + i, (1u << count) - 1, _mm512_cvtepi32_epi16(both));
      }
      return buffer;
    }
  }
#endif
  for (; i < n; ++i) buffer[i] = from[i * step];
  return buffer;
}

// Two rows of n numbers side by side: to[2 * j] = even[j], to[2 * j + 1] = odd[j]. `odd` may be null: zeros.
template <int kParts, class T>
[[gnu::always_inline]] inline void pack_pairs(const T* even, const T* odd, int64_t n, uint16_t* to, int64_t part,
                                              Watch& watch) {
  const auto some = [&](int64_t j, int count) __attribute__((always_inline)) {
    u32v low[kParts], high[kParts] = {};
    split_n<kParts>(even + j, count, low, watch);
    if (odd) split_n<kParts>(odd + j, count, high, watch);
#pragma GCC unroll 3
    for (int i = 0; i < kParts; ++i)
      store_n(reinterpret_cast<float*>(to + i * part + 2 * j), reinterpret_cast<f32v>(low[i] | high[i] << 16), count);
  };
  int64_t j = 0;
  for (; j + lanes<float> <= n; j += lanes<float>) some(j, lanes<float>);
  if (j < n) some(j, static_cast<int>(n - j));
}

// The same of numbers `step` apart in their rows, n <= kMostStrided.
constexpr int64_t kMostStrided = 64;
template <int kParts, class T>
[[gnu::always_inline]] inline void pack_strided_pairs(const T* even, const T* odd, int64_t step, int64_t n,
                                                      uint16_t* to, int64_t part, Watch& watch) {
#if CNNOPS_ISA_avx512
  if constexpr (sizeof(T) == 2) {
    if (step == 2) {
      for (int64_t j = 0; j < n; j += lanes<float>) {
        const int64_t count = min64(n - j, lanes<float>);
        const __mmask32 wanted = 0x55555555u >> (2 * (lanes<float> - count));
        __m512i pairs = _mm512_maskz_loadu_epi16(wanted, even + 2 * j);
        if (odd) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_maskz_loadu_epi16(wanted, odd + 2 * j), 16));
        _mm512_mask_storeu_epi32(to + 2 * j, static_cast<__mmask16>((1u << count) - 1), pairs);
      }
      return;
    }
  }
#endif
  T even_row[kMostStrided], odd_row[kMostStrided];
  pack_pairs<kParts>(gather(even, step, n, even_row), odd ? gather(odd, step, n, odd_row) : nullptr, n, to, part,
                     watch);
}

// to[t][i] = from[i][t] for pairs of numbers, i < rows, t < pairs; pitches in pairs. Turns rows into a panel and back.
inline void transpose_pairs(const uint16_t* from, int64_t from_pitch, int64_t rows, int64_t pairs, uint16_t* to,
                            int64_t to_pitch) {
  const auto* const in = reinterpret_cast<const PairBits*>(from);
  auto* const out = reinterpret_cast<PairBits*>(to);
  for (int64_t t = 0; t < pairs; t += 8)
    for (int64_t i = 0; i < rows; i += 8) {
      const int64_t height = min64(8, rows - i), width = min64(8, pairs - t);
      if (height == 8 && width == 8) {
        transpose_8x8(reinterpret_cast<const float*>(in + i * from_pitch + t), from_pitch,
                      reinterpret_cast<float*>(out + t * to_pitch + i), to_pitch);
        continue;
      }
      for (int64_t k = 0; k < width; ++k)
        for (int64_t l = 0; l < height; ++l) out[(t + k) * to_pitch + i + l] = in[(i + l) * from_pitch + t + k];
    }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
