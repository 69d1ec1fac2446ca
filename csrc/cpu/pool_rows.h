// Rows of NCHW images for pooling: a row is kept in the compute type, padded, and cut into `stride` phases (cell
// stride*i + j of the padded row is element i of phase j), so that one tap of `lanes` neighbouring windows is one
// contiguous load whatever the stride, and border windows need no branches.
#pragma once

#include "common/scratch.h"
#include "cpu/simd/vec.h"
#include "ops/pool2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class C>
struct PhasedRow {
  int64_t w, pad, stride, length;  // `length` elements a phase

  PhasedRow(int64_t w, int64_t q, int64_t pad, int64_t kernel, int64_t stride, int64_t dilation)
      : w(w), pad(pad), stride(q == 1 ? 1 : stride) {  // one window has no neighbours: any stride will do
    const int64_t reach = (kernel - 1) * dilation;
    const int64_t windows = round_up(q, lanes<C>) + reach / this->stride + 1;
    length = round_up(max64(windows, ceil_div(pad + w, this->stride)) + lanes<C>, lanes<C>);
  }
  int64_t size() const { return stride * length; }
  // Where the cell at `distance` from the first cell of window 0 lies; window q's is q elements on.
  int64_t at(int64_t distance) const { return distance % stride * length + distance / stride; }
  // The elements [begin, end) of phase j are cells of the image.
  int64_t begin(int64_t j) const { return ceil_div(max64(pad - j, 0), stride); }
  int64_t end(int64_t j) const { return ceil_div(max64(pad + w - j, 0), stride); }

  void fill(C* to, C value) const {
    const vec<C> v = set1(value);
    for (int64_t i = 0; i < size(); i += lanes<C>) store(to + i, v);
  }

  // Image row -> phases. What is not a cell of the image keeps its value.
  template <class T>
  void split(const T* row, C* to) const {
    if (stride == 1) {
      C* const out = to + pad;
      int64_t i = 0;
      for (; i + lanes<C> <= w; i += lanes<C>) store(out + i, load(row + i));
      if (i < w) store_n(out + i, load_n(row + i, static_cast<int>(w - i)), static_cast<int>(w - i));
    } else if (stride == 2) {
      C* const even = to + at(pad);
      C* const odd = to + at(pad + 1);
      int64_t i = 0;
      for (; i + 2 * lanes<C> <= w; i += 2 * lanes<C>) {
        const vec<C> a = load(row + i), b = load(row + i + lanes<C>);
        store(even + i / 2, evens(a, b));
        store(odd + i / 2, odds(a, b));
      }
      if (i < w) {
        const int left = static_cast<int>(w - i), past = left > lanes<C> ? left - lanes<C> : 0;
        const vec<C> a = load_n(row + i, left), b = load_n(row + i + (past ? lanes<C> : 0), past);
        store_n(even + i / 2, evens(a, b), (left + 1) / 2);
        store_n(odd + i / 2, odds(a, b), left / 2);
      }
    } else {
      for (int64_t j = 0; j < stride; ++j) {
        C* const out = to + j * length;
        for (int64_t i = begin(j), e = end(j); i < e; ++i) out[i] = load_scalar(row[i * stride + j - pad]);
      }
    }
  }
};

// Output rows of a plane that one unit of work covers: whole planes, unless there are few.
static inline int64_t rows_per_unit(int64_t planes, int64_t rows) {
  return planes >= 64 ? rows : ceil_div(rows, ceil_div(64, max64(planes, 1)));
}

template <class C>
constexpr C kLowest = -static_cast<C>(__builtin_inff());

// The best value so far in each lane, and which it was.
template <class C>
struct Best {
  vec<C> value;
  ivec<C> choice;
};

// Takes v where it is larger than the best, or NaN.
template <class C, bool kPick>
[[gnu::always_inline]] inline void take(Best<C>& best, vec<C> v, ivec<C> choice) {
#if CNNOPS_ISA_avx512  // g++ 12 makes vectors of the masks in between
  if constexpr (sizeof(C) == 4) {
    const __m512 now = reinterpret_cast<__m512>(v), then = reinterpret_cast<__m512>(best.value);
    if constexpr (!kPick) {  // the second of equal zeros, or where either is NaN
      const __m512 larger = _mm512_max_ps(now, then);
      best.value =
          reinterpret_cast<vec<C>>(_mm512_mask_mov_ps(larger, _mm512_cmp_ps_mask(now, now, _CMP_UNORD_Q), now));
      return;
    }
    const __mmask16 wins =
        _kor_mask16(_mm512_cmp_ps_mask(now, then, _CMP_GT_OQ), _mm512_cmp_ps_mask(now, now, _CMP_UNORD_Q));
    best.value = reinterpret_cast<vec<C>>(_mm512_mask_mov_ps(then, wins, now));
    if constexpr (kPick)
      best.choice = reinterpret_cast<ivec<C>>(
          _mm512_mask_mov_epi32(reinterpret_cast<__m512i>(best.choice), wins, reinterpret_cast<__m512i>(choice)));
  } else {
    const __m512d now = reinterpret_cast<__m512d>(v), then = reinterpret_cast<__m512d>(best.value);
    if constexpr (!kPick) {
      const __m512d larger = _mm512_max_pd(now, then);
      best.value =
          reinterpret_cast<vec<C>>(_mm512_mask_mov_pd(larger, _mm512_cmp_pd_mask(now, now, _CMP_UNORD_Q), now));
      return;
    }
    const __mmask8 wins =
        _kor_mask8(_mm512_cmp_pd_mask(now, then, _CMP_GT_OQ), _mm512_cmp_pd_mask(now, now, _CMP_UNORD_Q));
    best.value = reinterpret_cast<vec<C>>(_mm512_mask_mov_pd(then, wins, now));
    if constexpr (kPick)
      best.choice = reinterpret_cast<ivec<C>>(
          _mm512_mask_mov_epi64(reinterpret_cast<__m512i>(best.choice), wins, reinterpret_cast<__m512i>(choice)));
  }
#else
  const ivec<C> wins = (v > best.value) | (v != v);
  best.value = wins ? v : best.value;
  if constexpr (kPick) best.choice = wins ? choice : best.choice;
#endif
}

// The last vector of a row of q windows is partial; it is still computed whole.
template <class C>
inline int part_of(int64_t q, int64_t count) {
  return static_cast<int>(min64(count - q, lanes<C>));
}

// Lanes of a choice while it is worked out: offsets r*kernel_w + s, or distances r*dilation_h*w + s*dilation_w in cells
// from the window's first cell, from which indices follow; negative for a window without cells.
struct Steps {
  int64_t row, column;

  Steps(Choice mode, const Windows& v, int64_t w)
      : row(mode == Choice::indices ? v.dilation_h * w : v.kernel_w),
        column(mode == Choice::indices ? v.dilation_w : 1) {}
};

// Stores n lanes of a choice; `base` holds the plane index of each window's first cell.
template <class C>
[[gnu::always_inline]] inline void store_choice(void* to, Choice mode, int64_t at, ivec<C> choice, ivec<C> base,
                                                int n) {
  const ivec<C> none = choice >> (8 * sizeof(C) - 1);  // all ones where it is negative
  if (mode == Choice::offsets) {
    store_u8_n<C>(static_cast<uint8_t*>(to) + at, choice | none, n);
  } else {
    store_i64_n<C>(static_cast<int64_t*>(to) + at, (choice + base) | none, n);
  }
}

// Stays negative with the distance of any row of a window added to it, in 32 bits too.
constexpr int64_t kNoCells = -(int64_t{1} << 31);

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
