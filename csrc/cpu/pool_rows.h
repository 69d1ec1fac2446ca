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

  // Phases -> image row.
  template <class T>
  void merge(const C* from, T* row) const {
    if (stride == 1) {
      const C* const in = from + pad;
      int64_t i = 0;
      for (; i + lanes<C> <= w; i += lanes<C>) store(row + i, load(in + i));
      if (i < w) store_n(row + i, load(in + i), static_cast<int>(w - i));
    } else if (stride == 2) {
      const C* const even = from + at(pad);
      const C* const odd = from + at(pad + 1);
      for (int64_t i = 0; i < w; i += 2 * lanes<C>) {
        const vec<C> a = load(even + i / 2), b = load(odd + i / 2);
        const int64_t left = w - i;
        store_n(row + i, zip_low(a, b), static_cast<int>(min64(left, lanes<C>)));
        if (left > lanes<C>)
          store_n(row + i + lanes<C>, zip_high(a, b), static_cast<int>(min64(left - lanes<C>, lanes<C>)));
      }
    } else {
      for (int64_t j = 0; j < stride; ++j) {
        const C* const in = from + j * length;
        for (int64_t i = begin(j), e = end(j); i < e; ++i) store_scalar(&row[i * stride + j - pad], in[i]);
      }
    }
  }
};

// The taps of a window along the row, by the phase of the cells they see, for working from cells back to windows: element i
// of phase j is seen by tap `index` of window i - distance. The farthest tap, whose window comes first, is listed first.
struct Tap {
  int64_t distance, index;
};
template <class C>
inline void list_taps(const PhasedRow<C>& phases, int64_t kernel, int64_t dilation, int64_t* phase_begin, Tap* taps) {
  int64_t count = 0;
  for (int64_t j = 0; j < phases.stride; ++j) {
    phase_begin[j] = count;
    for (int64_t t = kernel - 1; t >= 0; --t)
      if (t * dilation % phases.stride == j) taps[count++] = {t * dilation / phases.stride, t};
  }
  phase_begin[phases.stride] = count;
}
// Of a phase's taps [first, past), those whose windows begin within [0, q) for some of the elements [i, i + lanes): a range
// that moves towards the front as i grows.
template <class C>
struct TapRange {
  int64_t lo, hi;

  explicit TapRange(int64_t past) : lo(past), hi(past) {}
  void move_to(int64_t i, int64_t q, const Tap* taps, int64_t first) {
    while (lo > first && taps[lo - 1].distance < i + lanes<C>) --lo;
    while (hi > first && taps[hi - 1].distance <= i - q) --hi;
  }
};

// Output rows of a plane that one unit of work covers: whole planes, unless there are few.
static inline int64_t rows_per_unit(int64_t planes, int64_t rows) {
  return planes >= 64 ? rows : ceil_div(rows, ceil_div(64, max64(planes, 1)));
}

template <class C>
constexpr C kLowest = -static_cast<C>(__builtin_inff());

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
  const ivec<C> none = choice < 0;
  if (mode == Choice::offsets) {
    store_u8_n<C>(static_cast<uint8_t*>(to) + at, choice | none, n);
  } else {
    store_i64_n<C>(static_cast<int64_t*>(to) + at, (choice + base) | none, n);
  }
}

// One byte a lane, read once to be compared with several values.
template <class C>
struct LaneBytes {
#if CNNOPS_ISA_avx512
  __m128i bytes;
  [[gnu::always_inline]] explicit LaneBytes(const uint8_t* p)
      : bytes(lanes<C> == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_loadu_si64(p)) {}
#else
  ivec<C> wide;
  [[gnu::always_inline]] explicit LaneBytes(const uint8_t* p) : wide(load_u8_n<C>(p, lanes<C>)) {}
#endif
  // sum + v where the byte is `value`, elsewhere sum.
  [[gnu::always_inline]] vec<C> add_where(uint8_t value, vec<C> sum, vec<C> v) const {
#if CNNOPS_ISA_avx512
    const __mmask16 equal = _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(value)));
    if constexpr (sizeof(C) == 4) {
      const __m512 s = reinterpret_cast<__m512>(sum);
      return reinterpret_cast<vec<C>>(_mm512_mask_add_ps(s, equal, s, reinterpret_cast<__m512>(v)));
    } else {
      const __m512d s = reinterpret_cast<__m512d>(sum);
      return reinterpret_cast<vec<C>>(
          _mm512_mask_add_pd(s, static_cast<__mmask8>(equal), s, reinterpret_cast<__m512d>(v)));
    }
#else
    return sum + (wide == ivec<C>{} + static_cast<int_t<C>>(value) ? v : vec<C>{});
#endif
  }
};

// Stays negative with the distance of any row of a window added to it, in 32 bits too.
constexpr int64_t kNoCells = -(int64_t{1} << 31);

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
