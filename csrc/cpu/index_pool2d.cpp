// Derivatives of picking poolings. Every element of dx is added up by one thread in the contract's order, so nothing is
// added atomically. NCHW: windows of common shapes in strips of dx, with vectors along its rows; others where their choice
// says; windows of 2 x 2 side by side are simpler than either. NHWC: vectors run along the channels; windows of common shapes
// in blocks of pixels of dx, else each pixel asks the windows that hold it whether they chose it. Both: larger windows that
// share no cell store one element each.
#include "ops/index_pool2d.h"

#include <omp.h>

#include "cpu/pool_pixels.h"
#include "cpu/pool_rows.h"
#include "cpu/simd/stream.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// Where loads take masks, rows are read in place: what lies beside them is not touched. Else from copies.
constexpr bool kMaskedLoads = CNNOPS_ISA_HAS_MASKS;
// The lanes from `at` on that lie in [0, count).
template <class C>
[[gnu::always_inline]] inline unsigned lanes_within(int64_t at, int64_t count) {
  const auto below = [](int64_t n) { return (1u << min64(max64(n, 0), lanes<C>)) - 1; };
  return below(count - at) & ~below(-at);
}
// Those lanes, the others zero.
template <class T>
[[gnu::always_inline]] inline vec<compute_t<T>> load_within(const T* p, [[maybe_unused]] unsigned inside) {
#if CNNOPS_ISA_avx512
  if constexpr (std::is_same_v<T, float>) {
    return reinterpret_cast<vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), p));
  } else if constexpr (std::is_same_v<T, double>) {
    return reinterpret_cast<vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(inside), p));
  } else {
    return widened<T>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(inside), p));
  }
#else
  return load(p);
#endif
}

// One byte a lane, read once to be compared with several values; `less` is subtracted from each first, so that few values
// need a register.
template <class C>
struct LaneBytes {
#if CNNOPS_ISA_avx512
  __m128i bytes;
  [[gnu::always_inline]] LaneBytes(const uint8_t* p, int less)
      : LaneBytes(lanes<C> == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_loadu_si64(p), less) {}
  [[gnu::always_inline]] LaneBytes(const uint8_t* p, int less, unsigned inside)
      : LaneBytes(_mm_maskz_loadu_epi8(static_cast<__mmask16>(inside), p), less) {}
  [[gnu::always_inline]] LaneBytes(__m128i bytes, int less)
      : bytes(_mm_sub_epi8(bytes, _mm_set1_epi8(static_cast<char>(less)))) {}
#else
  ivec<C> wide;
  [[gnu::always_inline]] LaneBytes(const uint8_t* p, int less)
      : wide(load_u8_n<C>(p, lanes<C>) - static_cast<int_t<C>>(less)) {}
  [[gnu::always_inline]] LaneBytes(const uint8_t* p, int less, unsigned) : LaneBytes(p, less) {}
#endif
  // sum + v where the byte is `value`, elsewhere sum.
  [[gnu::always_inline]] vec<C> add_where(int value, vec<C> sum, vec<C> v) const {
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

// Rows of dx under rows of windows.
template <class T, class U>
struct Strips {
  const U* dy;  // rows of windows; T itself where loads take masks, else copies with zeros on both sides
  const uint8_t* choice;
  int64_t pitch, p, q;  // of dy and choice
  T* dx;
  int64_t h0, h1, w;  // rows of dx
  int64_t pad_h;
  int64_t shift[2];  // by phase of the padded row
  bool swapped;      // the second phase of the padded row comes first in dx
  bool stream;
};

// A strip of dx, as wide as a vector of windows from window i on: all rows of windows over it pass, and the sums that later
// ones add to stay in registers. Each tap compares the windows' bytes with its offset, so that a vector of windows costs
// kKernel^2 compares and no scattered access.
template <class T, class U, int kKernel, int kStride, int kDilation>
void backward_strip(const Strips<T, U>& s, int64_t i) {
  using C = compute_t<T>;
  constexpr int kReach = (kKernel - 1) * kDilation + 1;
  int64_t at[kKernel];
  unsigned inside[kKernel];
#pragma GCC unroll 8
  for (int t = 0; t < kKernel; ++t) {
    at[t] = i + s.shift[t * kDilation % kStride] - t * kDilation / kStride;
    inside[t] = lanes_within<C>(at[t], s.q);
  }
  const int64_t left = s.w - kStride * i;
  const int part = static_cast<int>(min64(left, lanes<C>)), rest = static_cast<int>(min64(left - part, lanes<C>));
  vec<C> sums[kReach][kStride] = {};
  const int64_t last = ceil_div(s.h1 + s.pad_h, kStride);
  for (int64_t pp = first_window(s.h0, s.pad_h, kReach, kStride); pp < last; ++pp) {
    if (pp < s.p) {
      const U* const dy = s.dy + pp * s.pitch;
      const uint8_t* const choice = s.choice + pp * s.pitch;
#pragma GCC unroll 8
      for (int t = kKernel - 1; t >= 0; --t) {  // the farthest tap is the first window's
        const LaneBytes<C> chosen(choice + at[t], t, inside[t]);
        const vec<C> g = load_within(dy + at[t], inside[t]);
#pragma GCC unroll 8
        for (int r = 0; r < kKernel; ++r) {
          vec<C>& sum = sums[r * kDilation][t * kDilation % kStride];
          sum = chosen.add_where(r * kKernel, sum, g);
        }
      }
    }
#pragma GCC unroll 2
    for (int a = 0; a < kStride; ++a) {
      const int64_t h = pp * kStride - s.pad_h + a;
      if (h < s.h0 || h >= s.h1) continue;
      T* const to = s.dx + h * s.w + kStride * i;
      if constexpr (kStride == 1) {
        store_output(to, sums[a][0], part, s.stream);
      } else {
        const vec<C> even = s.swapped ? sums[a][1] : sums[a][0], odd = s.swapped ? sums[a][0] : sums[a][1];
#if CNNOPS_ISA_avx512
        if constexpr (std::is_same_v<T, bf16>) {
          if (s.stream) {
            store_output(to, zip_low(even, odd), part, true);
            if (rest > 0) store_output(to + lanes<C>, zip_high(even, odd), rest, true);
          } else {
            store_zipped_n(to, even, odd, part + rest);
          }
          continue;
        }
#endif
        store_output(to, zip_low(even, odd), part, s.stream);
        if (rest > 0) store_output(to + lanes<C>, zip_high(even, odd), rest, s.stream);
      }
    }
#pragma GCC unroll 16
    for (int a = 0; a < kReach; ++a)
#pragma GCC unroll 2
      for (int k = 0; k < kStride; ++k)
        sums[a][k] = a + kStride < kReach ? sums[min64(a + kStride, kReach - 1)][k] : vec<C>{};
  }
}

// Overlapping windows of a few common shapes, in strips of a band of rows. Vectors run along a row of dx, by phases of the
// stride.
constexpr int64_t kBandRows = 64;

template <class T, int kKernel, int kStride, int kDilation>
void backward_nchw_strips(const IndexPool2dParams& p) {
  using C = compute_t<T>;
  using U = std::conditional_t<kMaskedLoads, T, C>;
  constexpr int kReach = (kKernel - 1) * kDilation + 1;
  static_assert((kStride == 1 || kStride == 2) && kReach >= kStride);
  const Windows& v = p.windows;
  Strips<T, U> shape{};
  shape.p = p.p, shape.q = p.q, shape.w = p.w, shape.pad_h = v.pad_h;
  const int64_t width = round_up(ceil_div(p.w, kStride), lanes<C>);
  // Element i of phase j of a row of dx is column kStride*i + j. That is cell kStride*(i + shift[k]) + k of the padded
  // row, and tap t sees it in window i + shift[k] - t*kDilation / kStride where t*kDilation is k modulo kStride.
  for (int j = 0; j < kStride; ++j) shape.shift[(j + v.pad_w) % kStride] = (j + v.pad_w) / kStride;
  shape.swapped = v.pad_w % kStride != 0;
  shape.stream = p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) >= kLargeImage &&
                 p.w * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  const int64_t lead = round_up((kReach - 1) / kStride, lanes<C>);
  shape.pitch = kMaskedLoads ? p.q : lead + round_up(max64(p.q, width + v.pad_w / kStride + 1), lanes<C>);
  const int64_t unit_rows = min64(rows_per_unit(p.n * p.c, p.h), kBandRows), units_each = ceil_div(p.h, unit_rows);
  // Copies of the rows of windows over a band.
  const int64_t copied = kMaskedLoads ? 0 : shape.pitch * ((unit_rows + kReach - 2) / kStride + 2);

  struct Piece {
    C* dy;
    uint8_t* choice;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.dy = arena.take<C>(copied);
    s.choice = arena.take<uint8_t>(copied);
    return s;
  });

#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    for (int64_t i = 0; i < copied; ++i) s.dy[i] = 0, s.choice[i] = kNoOffset;

#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
      const int64_t plane = unit / units_each;
      Strips<T, U> strips = shape;
      strips.h0 = unit % units_each * unit_rows, strips.h1 = min64(strips.h0 + unit_rows, p.h);
      strips.dx = static_cast<T*>(p.out) + plane * p.h * p.w;
      const T* const dy = static_cast<const T*>(p.in) + plane * p.p * p.q;
      const uint8_t* const choice = static_cast<const uint8_t*>(p.choice) + plane * p.p * p.q;
      if constexpr (kMaskedLoads) {
        strips.dy = dy, strips.choice = choice;
      } else {
        const int64_t first = first_window(strips.h0, v.pad_h, kReach, kStride);
        const int64_t last = min64(ceil_div(strips.h1 + v.pad_h, kStride), p.p);
        strips.dy = s.dy + lead - first * shape.pitch, strips.choice = s.choice + lead - first * shape.pitch;
        for (int64_t pp = first; pp < last; ++pp) {
          const int64_t at = (pp - first) * shape.pitch + lead;
          for (int64_t q = 0; q < p.q; q += lanes<C>)
            store(s.dy + at + q, load_n(dy + pp * p.q + q, part_of<C>(q, p.q)));
          std::memcpy(s.choice + at, choice + pp * p.q, p.q);
        }
      }
      for (int64_t i = 0; i < width; i += lanes<C>) backward_strip<T, U, kKernel, kStride, kDilation>(strips, i);
      if (shape.stream) end_streaming();
    }
  }
}

// Any other windows: dy is added where the choice says, in bands of dx that stay in L1 until they are done. Windows that
// reach over the edge of a band are visited for both. With offsets, a band is padded to hold whatever its windows may
// choose; indices are looked at one by one, and may be added to dx itself.
constexpr int64_t kBandBytes = 16 << 10;

template <class T, bool kIndices>
void backward_nchw_scatter(const IndexPool2dParams& p) {
  using C = compute_t<T>;
  const Windows& v = p.windows;
  const int64_t reach_h = p.adaptive ? 1 : (v.kernel_h - 1) * v.dilation_h + 1;
  const int64_t reach_w = p.adaptive ? 1 : (v.kernel_w - 1) * v.dilation_w + 1;
  const int64_t pad_w = kIndices ? 0 : v.pad_w, above = kIndices ? 0 : reach_h - 1;
  const int64_t pitch = kIndices ? p.w : max64(pad_w + p.w, (p.q - 1) * v.stride_w + reach_w);
  const int64_t fit = max64(kBandBytes / (pitch * static_cast<int64_t>(sizeof(C))), 4 * reach_h);
  const int64_t bands = ceil_div(p.h, min64(fit, max64(rows_per_unit(p.n * p.c, p.h), reach_h)));
  const int64_t band = ceil_div(p.h, bands);
  const int64_t cells = (band + 2 * above) * pitch, offsets = v.kernel_h * v.kernel_w;
  const bool stream = p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
  const bool in_place = kIndices && std::is_same_v<T, C> && !stream;

  struct Piece {
    C* sums;
    int64_t *step, *begin, *end;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.sums = arena.take<C>(in_place ? 0 : round_up(cells, lanes<C>));
    s.step = arena.take<int64_t>(kIndices ? 0 : offsets);
    s.begin = arena.take<int64_t>(kIndices ? p.q : 0);
    s.end = arena.take<int64_t>(kIndices ? p.q : 0);
    return s;
  });

#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    if constexpr (kIndices) {
      for (int64_t q = 0; q < p.q; ++q) {
        s.begin[q] = p.adaptive ? adaptive_start(q, p.w, p.q) : q * v.stride_w - v.pad_w;
        s.end[q] = p.adaptive ? adaptive_end(q, p.w, p.q) : s.begin[q] + reach_w;
      }
    } else {
      for (int64_t i = 0; i < offsets; ++i)
        s.step[i] = i / v.kernel_w * v.dilation_h * pitch + i % v.kernel_w * v.dilation_w;
    }

#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * p.c * bands; ++unit) {
      const int64_t plane = unit / bands, from = min64(unit % bands * band, p.h), to = min64(from + band, p.h);
      if (from == to) continue;
      const T* const dy = static_cast<const T*>(p.in) + plane * p.p * p.q;
      T* const dx = static_cast<T*>(p.out) + (plane * p.h + from) * p.w;
      C* band_sums = s.sums;
      if (in_place) {
        if constexpr (std::is_same_v<T, C>) band_sums = dx;
        std::memset(static_cast<void*>(dx), 0, (to - from) * p.w * sizeof(T));
      } else {
        for (int64_t i = 0; i < cells; i += lanes<C>) store(s.sums + i, vec<C>{});
      }
      const int64_t p0 = p.adaptive ? adaptive_first(from, p.h, p.p) : first_window(from, v.pad_h, reach_h, v.stride_h);
      const int64_t p1 = p.adaptive ? adaptive_last(to - 1, p.h, p.p) : last_window(to - 1, v.pad_h, v.stride_h, p.p);
      for (int64_t pp = p0; pp < p1; ++pp) {
        const int64_t at = (plane * p.p + pp) * p.q;
        if constexpr (kIndices) {
          const int64_t* const choice = static_cast<const int64_t*>(p.choice) + at;
          const int64_t begin = p.adaptive ? adaptive_start(pp, p.h, p.p) : pp * v.stride_h - v.pad_h;
          const int64_t end = p.adaptive ? adaptive_end(pp, p.h, p.p) : begin + reach_h;
          const int64_t first = max64(begin, from), last = min64(end, to);
          const bool dilated = v.dilation_h != 1 || v.dilation_w != 1;
          for (int64_t q = 0; q < p.q; ++q) {
            const int64_t cell = choice[q];
            if (cell < first * p.w || cell >= last * p.w) continue;
            const int64_t h = static_cast<uint32_t>(cell) / static_cast<uint32_t>(p.w), w = cell - h * p.w;
            if (w < s.begin[q] || w >= s.end[q]) continue;
            if (dilated && ((h - begin) % v.dilation_h != 0 || (w - s.begin[q]) % v.dilation_w != 0)) continue;
            band_sums[cell - from * p.w] += load_scalar(dy[pp * p.q + q]);
          }
        } else {
          const uint8_t* const choice = static_cast<const uint8_t*>(p.choice) + at;
          C* const corner = band_sums + (pp * v.stride_h - v.pad_h - from + above) * pitch;
          for (int64_t q = 0; q < p.q; ++q)
            if (choice[q] < offsets) corner[q * v.stride_w + s.step[choice[q]]] += load_scalar(dy[pp * p.q + q]);
        }
      }
      if (in_place) continue;
      const C* const sums = s.sums + above * pitch + pad_w;
      const bool gapless = pitch == p.w;
      const int64_t lines = gapless ? 1 : to - from, length = gapless ? (to - from) * p.w : p.w;
      for (int64_t line = 0; line < lines; ++line)
        for (int64_t i = 0; i < length; i += lanes<C>) {
          const int part = part_of<C>(i, length);
          store_output(dx + line * p.w + i, load_n(sums + line * pitch + i, part), part, stream);
        }
      if (stream) end_streaming();
    }
  }
}

// Windows that share no cell: each writes the cell it chose into zeros that were laid just before, while they lie in the
// cache. A band is the rows of several rows of windows, and those below them until the next.
constexpr int64_t kZeroBytes = 16 << 10;

template <class T>
void backward_nchw_apart(const IndexPool2dParams& p) {
  const Windows& v = p.windows;
  const int64_t reach_h = (v.kernel_h - 1) * v.dilation_h + 1, reach_w = (v.kernel_w - 1) * v.dilation_w + 1;
  const int64_t row_bytes = v.stride_h * p.w * static_cast<int64_t>(sizeof(T)), offsets = v.kernel_h * v.kernel_w;
  const int64_t most = min64(max64(kZeroBytes / row_bytes, 1), rows_per_unit(p.n * p.c, p.p));
  const int64_t bands = ceil_div(p.p, most), band = ceil_div(p.p, bands);
  // Windows [q0, q1) lie in the image's columns.
  const int64_t q0 = min64(ceil_div(v.pad_w, v.stride_w), p.q);
  const int64_t q1 = p.w + v.pad_w < reach_w ? q0 : max64(min64((p.w + v.pad_w - reach_w) / v.stride_w + 1, p.q), q0);
  const Scratch<int64_t> steps(offsets);
  for (int64_t i = 0; i < offsets; ++i)
    steps.data[i] = i / v.kernel_w * v.dilation_h * p.w + i % v.kernel_w * v.dilation_w;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < p.n * p.c * bands; ++unit) {
    const int64_t plane = unit / bands, first = min64(unit % bands * band, p.p), last = min64(first + band, p.p);
    if (first == last) continue;
    T* const dx = static_cast<T*>(p.out) + plane * p.h * p.w;
    const int64_t from = first == 0 ? 0 : min64(max64(first * v.stride_h - v.pad_h, 0), p.h);
    const int64_t to = last == p.p ? p.h : min64(max64(last * v.stride_h - v.pad_h, 0), p.h);
    std::memset(static_cast<void*>(dx + from * p.w), 0, (to - from) * p.w * sizeof(T));
    for (int64_t pp = first; pp < last; ++pp) {
      const int64_t top = pp * v.stride_h - v.pad_h;
      const T* const dy = static_cast<const T*>(p.in) + (plane * p.p + pp) * p.q;
      const uint8_t* const choice = static_cast<const uint8_t*>(p.choice) + (plane * p.p + pp) * p.q;
      const auto put = [&](int64_t q, bool inside) __attribute__((always_inline)) {
        const int64_t offset = choice[q], left = q * v.stride_w - v.pad_w;
        if (offset >= offsets) return;
        if (!inside) {
          const int64_t h = top + offset / v.kernel_w * v.dilation_h, w = left + offset % v.kernel_w * v.dilation_w;
          if (h < 0 || h >= p.h || w < 0 || w >= p.w) return;
        }
        store_scalar(&dx[top * p.w + left + steps.data[offset]], load_scalar(dy[q]) + 0);  // a sum has no -0
      };
      const bool whole = top >= 0 && top + reach_h <= p.h;
      int64_t q = 0;
      for (; q < (whole ? q0 : p.q); ++q) put(q, false);
      for (; q < q1; ++q) put(q, true);
      for (; q < p.q; ++q) put(q, false);
    }
  }
}
// Where nearly all of dx is zero.
bool apart(const IndexPool2dParams& p) {
  const Windows& v = p.windows;
  return !p.adaptive && v.stride_h > (v.kernel_h - 1) * v.dilation_h && v.stride_w > (v.kernel_w - 1) * v.dilation_w &&
         v.stride_h * v.stride_w >= 8;
}

// Windows of 2 x 2 side by side (kernel 2, stride 2, nothing padded or dilated): a row of windows makes its two rows of dx
// by itself.
template <class T, bool kIndices>
void backward_nchw_2x2(const IndexPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const int64_t unit_rows = ceil_div(rows_per_unit(p.n * p.c, p.h), 2), units_each = ceil_div(p.p, unit_rows);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
    const int64_t plane = unit / units_each, from = unit % units_each * unit_rows;
    const T* const dy = static_cast<const T*>(p.in) + plane * p.p * p.q;
    T* const dx = static_cast<T*>(p.out) + plane * p.h * p.w;
    const auto row = [&](int64_t pp, int64_t q, int part) __attribute__((always_inline)) {
      const int64_t at = plane * p.p * p.q + pp * p.q + q;
      ivec<C> chosen;
      if constexpr (kIndices) {
        chosen = load_i64_n<C>(static_cast<const int64_t*>(p.choice) + at, part);
      } else {
        chosen = load_u8_n<C>(static_cast<const uint8_t*>(p.choice) + at, part);
      }
      const vec<C> g = load_n(dy + pp * p.q + q, part), zero = {};
      for (int64_t r = 0; r < 2; ++r) {
        ivec<C> first = ivec<C>{} + static_cast<I>(2 * r);
        if constexpr (kIndices) first = iota<ivec<C>>() * 2 + static_cast<I>((2 * pp + r) * p.w + 2 * q);
        const vec<C> even = chosen == first ? g : zero, odd = chosen == first + 1 ? g : zero;
        T* const to = dx + (2 * pp + r) * p.w + 2 * q;
        const int cells = 2 * part;
        store_n(to, zip_low(even, odd), cells);
        if (cells > lanes<C>) store_n(to + lanes<C>, zip_high(even, odd), cells - lanes<C>);
      }
    };
    for (int64_t pp = from; pp < min64(from + unit_rows, p.p); ++pp) {
      int64_t q = 0;
      for (; q + lanes<C> <= p.q; q += lanes<C>) row(pp, q, lanes<C>);
      if (q < p.q) row(pp, q, static_cast<int>(p.q - q));
      for (int64_t h = 2 * pp; h < 2 * pp + 2; ++h)
        for (int64_t w = 2 * p.q; w < p.w; ++w) dx[h * p.w + w] = T{};
    }
    if (from + unit_rows >= p.p)
      std::memset(static_cast<void*>(dx + 2 * p.p * p.w), 0, (p.h - 2 * p.p) * p.w * sizeof(T));
  }
}
// Not where windows run past the input (ceil_mode).
bool side_by_side_2x2(const IndexPool2dParams& p) {
  const Windows& v = p.windows;
  return v.kernel_h == 2 && v.kernel_w == 2 && v.stride_h == 2 && v.stride_w == 2 && v.pad_h == 0 && v.pad_w == 0 &&
         v.dilation_h == 1 && v.dilation_w == 1 && 2 * p.p <= p.h && 2 * p.q <= p.w;
}

// A window that holds a pixel: where its channels lie in dy and choice, and what it would have chosen.
struct Holder {
  int64_t at, chosen;
};

// kCount: the number of holders where it is worth unrolling, else 0.
template <class T, bool kIndices, int kCount>
void pixel_nhwc(T* dx, const T* dy, const void* choice, int64_t choice_at, const Holder* holders, int64_t count,
                int64_t channels, bool stream) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const int64_t total = kCount ? kCount : count;
  const auto vectors = [&](int64_t c, int part) {
    vec<C> sum = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < total; ++k) {
      const int64_t at = holders[k].at + c;
      const vec<C> g = load_n(dy + at, part);
      if constexpr (!kIndices) {
        if (part == lanes<C>) {
          sum = LaneBytes<C>(static_cast<const uint8_t*>(choice) + choice_at + at, 0)
                    .add_where(static_cast<int>(holders[k].chosen), sum, g);
          continue;
        }
      }
      ivec<C> chosen;
      if constexpr (kIndices) {
        chosen = load_i64_n<C>(static_cast<const int64_t*>(choice) + choice_at + at, part);
      } else {
        chosen = load_u8_n<C>(static_cast<const uint8_t*>(choice) + choice_at + at, part);
      }
      sum += chosen == ivec<C>{} + static_cast<I>(holders[k].chosen) ? g : vec<C>{};
    }
    store_output(dx + c, sum, part, stream);
  };
  int64_t c = 0;
  for (; c + lanes<C> <= channels; c += lanes<C>) vectors(c, lanes<C>);
  if (c < channels) vectors(c, static_cast<int>(channels - c));
}

// Channels_last, windows of common shapes: kBlocks blocks of kStride x kStride pixels of dx side by side at a time, so that
// most of what is loaded serves several pixels. Rows and columns of windows that miss the image are rows of bytes that
// nothing chose, and pixels outside of it are stored aside: no branch is left in the loop.
template <class T, int kKernel, int kStride, int kDilation>
struct Blocks {
  using C = compute_t<T>;
  static constexpr int kBlocks = kStride == 1 ? 4 : CNNOPS_ISA_HAS_MASKS ? 2 : 1;
  static constexpr int kReach = (kKernel - 1) * kDilation / kStride + 1;  // windows over a block, along an axis
  static constexpr int kWindows = kBlocks + kReach - 1, kPixels = kBlocks * kStride;

  // Of the rows of windows over the blocks, upper ones first.
  const T* dy[kReach][kWindows];
  const uint8_t* choice[kReach][kWindows];
  T* dx[kStride][kPixels];

  void vector(int64_t c, bool stream) const {
    vec<C> sums[kStride][kPixels] = {};
    // Adds what the windows of row i chose of taps [first, last), whose bytes are `less` smaller.
    const auto row = [&](int i, int first, int last, int less) __attribute__((always_inline)) {
#pragma GCC unroll 16
      for (int j = 0; j < kWindows; ++j) {
        const LaneBytes<C> bytes(choice[i][j] + c, less);
        const vec<C> g = load(dy[i][j] + c);
#pragma GCC unroll 8
        for (int r = first; r < last; ++r)
#pragma GCC unroll 8
          for (int t = 0; t < kKernel; ++t) {
            const int block = j + t * kDilation / kStride - (kReach - 1);
            if (block < 0 || block >= kBlocks) continue;
            vec<C>& sum = sums[r * kDilation % kStride][block * kStride + t * kDilation % kStride];
            sum = bytes.add_where(r * kKernel + t, sum, g);
          }
      }
    };
    if constexpr (kStride == 1) {
      for (int i = 0; i < kReach; ++i) row(i, 0, 1, (kReach - 1 - i) * kKernel);
    } else {
#pragma GCC unroll 8
      for (int i = 0; i < kReach; ++i) {
        const int window = kReach - 1 - i;
        row(i, ceil_div(window * kStride, kDilation), min64(ceil_div((window + 1) * kStride, kDilation), kKernel), 0);
      }
    }
#pragma GCC unroll 2
    for (int a = 0; a < kStride; ++a)
#pragma GCC unroll 8
      for (int b = 0; b < kPixels; ++b) store_output(dx[a][b] + c, sums[a][b], lanes<C>, stream);
  }
};

template <class T, int kKernel, int kStride, int kDilation>
void backward_nhwc_blocks(const IndexPool2dParams& p) {
  using C = compute_t<T>;
  using B = Blocks<T, kKernel, kStride, kDilation>;
  const Windows& v = p.windows;
  // Around the caches lines should leave whole, and in runs: where a vector is half a line or pixels are short, they are put
  // together first.
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  const bool stream = p.n * p.c * p.h * p.w * kSize >= kLargeImage;
  const bool staged = stream && (sizeof(T) < sizeof(C) || p.c * kSize < 512);
  // Block i is the cells from kStride * i on of the padded image, and the windows over it are those up to window i.
  const int64_t first_row = v.pad_h / kStride, rows = ceil_div(p.h + v.pad_h, kStride) - first_row;
  const int64_t first_column = v.pad_w / kStride, columns = ceil_div(p.w + v.pad_w, kStride);

  struct Piece {
    uint8_t* nothing;
    T* aside;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.nothing = arena.take<uint8_t>(p.c);
    s.aside = arena.take<T>((staged ? kStride * B::kPixels : 1) * p.c);
    return s;
  });

#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    std::memset(s.nothing, kNoOffset, static_cast<size_t>(p.c));
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * rows; ++unit) {
      const int64_t i = first_row + unit % rows, image = unit / rows * p.p * p.q * p.c;
      const T* const dy = static_cast<const T*>(p.in) + image;
      const uint8_t* const choice = static_cast<const uint8_t*>(p.choice) + image;
      T* const dx = static_cast<T*>(p.out) + unit / rows * p.h * p.w * p.c;
      // The row of windows that the next row of blocks is the first to reach.
      const int64_t next_at = min64(i + 1, p.p) * p.q * p.c, next_size = i + 1 < p.p ? p.q * p.c : 0;
      const int64_t shares = ceil_div(columns - first_column, B::kBlocks);
      Ahead ahead(dy + next_at, next_size * kSize, shares);
      Ahead ahead_choice(choice + next_at, next_size, shares);
      for (int64_t j = first_column; j < columns; j += B::kBlocks) {
        ahead.fetch();
        ahead_choice.fetch();
        B blocks;
        for (int m = 0; m < B::kReach; ++m)
          for (int k = 0; k < B::kWindows; ++k) {
            const int64_t pp = i - (B::kReach - 1) + m, q = j - (B::kReach - 1) + k;
            const bool inside = pp >= 0 && pp < p.p && q >= 0 && q < p.q;
            blocks.dy[m][k] = dy + (inside ? (pp * p.q + q) * p.c : 0);
            blocks.choice[m][k] = inside ? choice + (pp * p.q + q) * p.c : s.nothing;
          }
        for (int a = 0; a < kStride; ++a)
          for (int b = 0; b < B::kPixels; ++b) {
            const int64_t h = i * kStride - v.pad_h + a, w = j * kStride - v.pad_w + b;
            const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
            blocks.dx[a][b] = staged   ? s.aside + (a * B::kPixels + b) * p.c
                              : inside ? dx + (h * p.w + w) * p.c
                                       : s.aside;
          }
        for (int64_t c = 0; c < p.c; c += lanes<C>) blocks.vector(min64(c, p.c - lanes<C>), stream && !staged);
        if (!staged) continue;
        const int64_t w = j * kStride - v.pad_w, w0 = max64(w, 0), w1 = min64(w + B::kPixels, p.w);
        for (int a = 0; a < kStride; ++a) {
          const int64_t h = i * kStride - v.pad_h + a;
          if (h >= 0 && h < p.h)
            stream_copy(dx + (h * p.w + w0) * p.c, s.aside + (a * B::kPixels + w0 - w) * p.c, (w1 - w0) * p.c);
        }
      }
      if (stream) end_streaming();
    }
  }
}

template <class T, bool kIndices>
void backward_nhwc(const IndexPool2dParams& p) {
  const bool stream = p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
  const Windows& v = p.windows;
  const int64_t reach_h = (v.kernel_h - 1) * v.dilation_h + 1, reach_w = (v.kernel_w - 1) * v.dilation_w + 1;
  const int64_t most = p.adaptive ? (p.p / p.h + 2) * (p.q / p.w + 2)
                                  : ((reach_h - 1) / v.stride_h + 1) * ((reach_w - 1) / v.stride_w + 1);
  struct Piece {
    Holder* holders;
    int64_t *q0, *q1;              // the windows over each column
    int64_t *offset_h, *offset_w;  // what a tap so many cells into a window adds to an offset; negative between taps
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.holders = arena.take<Holder>(min64(most, p.p * p.q));
    s.q0 = arena.take<int64_t>(p.w);
    s.q1 = arena.take<int64_t>(p.w);
    s.offset_h = arena.take<int64_t>(kIndices ? 0 : reach_h);
    s.offset_w = arena.take<int64_t>(kIndices ? 0 : reach_w);
    return s;
  });

#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    for (int64_t w = 0; w < p.w; ++w) {
      s.q0[w] = p.adaptive ? adaptive_first(w, p.w, p.q) : first_window(w, v.pad_w, reach_w, v.stride_w);
      s.q1[w] = p.adaptive ? adaptive_last(w, p.w, p.q) : last_window(w, v.pad_w, v.stride_w, p.q);
    }
    if constexpr (!kIndices) {
      constexpr int64_t kNone = -1 - kNoOffset;
      for (int64_t i = 0; i < reach_h; ++i)
        s.offset_h[i] = i % v.dilation_h == 0 ? i / v.dilation_h * v.kernel_w : kNone;
      for (int64_t i = 0; i < reach_w; ++i) s.offset_w[i] = i % v.dilation_w == 0 ? i / v.dilation_w : kNone;
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.n * p.h; ++row) {
      const int64_t h = row % p.h, image = row / p.h * p.p * p.q * p.c;
      const T* const dy = static_cast<const T*>(p.in) + image;
      const int64_t p0 = p.adaptive ? adaptive_first(h, p.h, p.p) : first_window(h, v.pad_h, reach_h, v.stride_h);
      const int64_t p1 = p.adaptive ? adaptive_last(h, p.h, p.p) : last_window(h, v.pad_h, v.stride_h, p.p);
      // Of the windows, those that the next row of dx is the first to reach.
      const int64_t next = min64(p1 + 1, p.p), next_at = p1 * p.q * p.c, next_size = (next - p1) * p.q * p.c;
      const bool fetches = !kIndices && !p.adaptive;
      Ahead ahead(dy + next_at, fetches ? next_size * static_cast<int64_t>(sizeof(T)) : 0, p.w);
      Ahead ahead_choice(static_cast<const uint8_t*>(p.choice) + image + next_at, fetches ? next_size : 0, p.w);
      for (int64_t w = 0; w < p.w; ++w) {
        ahead.fetch();
        ahead_choice.fetch();
        int64_t count = 0;
        for (int64_t pp = p0; pp < p1; ++pp)
          for (int64_t q = s.q0[w]; q < s.q1[w]; ++q) {
            int64_t chosen = h * p.w + w;
            if constexpr (!kIndices) {
              chosen = s.offset_h[h + v.pad_h - pp * v.stride_h] + s.offset_w[w + v.pad_w - q * v.stride_w];
              if (chosen < 0) continue;
            }
            s.holders[count++] = {(pp * p.q + q) * p.c, chosen};
          }
        T* const dx = static_cast<T*>(p.out) + (row * p.w + w) * p.c;
        switch (count) {
          case 0: std::memset(static_cast<void*>(dx), 0, p.c * sizeof(T)); break;
          case 1: pixel_nhwc<T, kIndices, 1>(dx, dy, p.choice, image, s.holders, count, p.c, stream); break;
          case 2: pixel_nhwc<T, kIndices, 2>(dx, dy, p.choice, image, s.holders, count, p.c, stream); break;
          case 4: pixel_nhwc<T, kIndices, 4>(dx, dy, p.choice, image, s.holders, count, p.c, stream); break;
          default: pixel_nhwc<T, kIndices, 0>(dx, dy, p.choice, image, s.holders, count, p.c, stream);
        }
      }
      if (stream) end_streaming();
    }
  }
}

// Windows that share no cell: each row of windows lays zeros in its rows of dx, and in those until the next, and stores into
// them.
template <class T, bool kIndices>
void backward_nhwc_apart(const IndexPool2dParams& p) {
  const Windows& v = p.windows;
  const int64_t offsets = v.kernel_h * v.kernel_w, reach_h = (v.kernel_h - 1) * v.dilation_h + 1;
  const int64_t reach_w = (v.kernel_w - 1) * v.dilation_w + 1;
  const Scratch<int64_t> steps(kIndices ? 0 : offsets);
  if constexpr (!kIndices)
    for (int64_t i = 0; i < offsets; ++i)
      steps.data[i] = (i / v.kernel_w * v.dilation_h * p.w + i % v.kernel_w * v.dilation_w) * p.c;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    const int64_t pp = row % p.p, top = pp * v.stride_h - v.pad_h;
    const int64_t from = pp == 0 ? 0 : min64(max64(top, 0), p.h);
    const int64_t to = pp + 1 == p.p ? p.h : min64(max64(top + v.stride_h, 0), p.h);
    T* const image = static_cast<T*>(p.out) + row / p.p * p.h * p.w * p.c;
    std::memset(static_cast<void*>(image + from * p.w * p.c), 0, (to - from) * p.w * p.c * sizeof(T));
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t left = q * v.stride_w - v.pad_w, at = (row * p.q + q) * p.c;
      const T* const dy = static_cast<const T*>(p.in) + at;
      const auto put = [&](int64_t c, int64_t cell) {
        store_scalar(&image[cell * p.c + c], load_scalar(dy[c]) + 0);  // a sum has no -0
      };
      if constexpr (kIndices) {
        const int64_t* const choice = static_cast<const int64_t*>(p.choice) + at;
        for (int64_t c = 0; c < p.c; ++c) {
          const int64_t cell = choice[c];
          if (cell < from * p.w || cell >= to * p.w) continue;
          const int64_t h = static_cast<uint32_t>(cell) / static_cast<uint32_t>(p.w), w = cell - h * p.w;
          if (h < top || h >= top + reach_h || (h - top) % v.dilation_h != 0) continue;
          if (w >= left && w < left + reach_w && (w - left) % v.dilation_w == 0) put(c, cell);
        }
      } else {
        const uint8_t* const choice = static_cast<const uint8_t*>(p.choice) + at;
        if (top >= 0 && top + reach_h <= p.h && left >= 0 && left + reach_w <= p.w) {
          T* const corner = image + (top * p.w + left) * p.c;
          for (int64_t c = 0; c < p.c; ++c)
            if (choice[c] < offsets) store_scalar(&corner[steps.data[choice[c]] + c], load_scalar(dy[c]) + 0);
        } else {
          for (int64_t c = 0; c < p.c; ++c) {
            const int64_t h = top + choice[c] / v.kernel_w * v.dilation_h;
            const int64_t w = left + choice[c] % v.kernel_w * v.dilation_w;
            if (choice[c] < offsets && h >= 0 && h < p.h && w >= 0 && w < p.w) put(c, h * p.w + w);
          }
        }
      }
    }
  }
}

// The kernel of windows of a common shape, square as their stride and dilation are, or null.
template <class T>
auto shape_kernel(const IndexPool2dParams& p) -> void (*)(const IndexPool2dParams&) {
  if constexpr (kShapeKernels<T>) {
    const Windows& v = p.windows;
    const bool nhwc = p.layout == Layout::nhwc;
    if (p.mode != Choice::offsets || (nhwc && p.c < lanes<compute_t<T>>)) return nullptr;
    const auto is = [&](int64_t kernel, int64_t stride, int64_t dilation) {
      return v.kernel_h == kernel && v.kernel_w == kernel && v.stride_h == stride && v.stride_w == stride &&
             v.dilation_h == dilation && v.dilation_w == dilation;
    };
    if (is(3, 2, 1)) return nhwc ? backward_nhwc_blocks<T, 3, 2, 1> : backward_nchw_strips<T, 3, 2, 1>;
    if (is(3, 2, 2)) return nhwc ? backward_nhwc_blocks<T, 3, 2, 2> : backward_nchw_strips<T, 3, 2, 2>;
    if (is(3, 1, 1)) return nhwc ? backward_nhwc_blocks<T, 3, 1, 1> : backward_nchw_strips<T, 3, 1, 1>;
    if (is(5, 1, 1)) return nhwc ? backward_nhwc_blocks<T, 5, 1, 1> : backward_nchw_strips<T, 5, 1, 1>;
    if (nhwc && is(2, 2, 1)) return backward_nhwc_blocks<T, 2, 2, 1>;
  }
  return nullptr;
}

template <class T>
void backward(const IndexPool2dParams& p) {
  const bool indices = p.mode == Choice::indices;
  if (const auto kernel = shape_kernel<T>(p)) {
    kernel(p);
  } else if (p.layout == Layout::nhwc) {
    if (apart(p)) return indices ? backward_nhwc_apart<T, true>(p) : backward_nhwc_apart<T, false>(p);
    indices ? backward_nhwc<T, true>(p) : backward_nhwc<T, false>(p);
  } else if (!p.adaptive && side_by_side_2x2(p)) {
    indices ? backward_nchw_2x2<T, true>(p) : backward_nchw_2x2<T, false>(p);
  } else if (indices) {
    backward_nchw_scatter<T, true>(p);
  } else if (apart(p)) {
    backward_nchw_apart<T>(p);
  } else {
    backward_nchw_scatter<T, false>(p);
  }
}

template <class T>
void gather(const IndexPool2dParams& p) {
  const T* const dx = static_cast<const T*>(p.in);
  T* const dy = static_cast<T*>(p.out);
  const Windows& v = p.windows;
  const bool nchw = p.layout == Layout::nchw;
  // Elements of an output row: [Q] of one plane, or [Q, C] of one image.
  const int64_t channels = nchw ? 1 : p.c, rows = nchw ? p.n * p.c * p.p : p.n * p.p;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const T* const from = dx + row / p.p * p.h * p.w * channels;
    for (int64_t q = 0; q < p.q; ++q)
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = (row * p.q + q) * channels + c;
        int64_t cell;
        if (p.mode == Choice::indices) {
          cell = static_cast<const int64_t*>(p.choice)[at];
        } else {
          const int64_t offset = static_cast<const uint8_t*>(p.choice)[at];
          const int64_t h = row % p.p * v.stride_h - v.pad_h + offset / v.kernel_w * v.dilation_h;
          const int64_t w = q * v.stride_w - v.pad_w + offset % v.kernel_w * v.dilation_w;
          const bool inside = offset < v.kernel_h * v.kernel_w && h >= 0 && h < p.h && w >= 0 && w < p.w;
          cell = inside ? h * p.w + w : kNoIndex;
        }
        dy[at] = cell >= 0 && cell < p.h * p.w ? from[cell * channels + c] : T{};
      }
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(index_pool2d_backward, IndexPool2dParams, backward)
CNNOPS_EXPORT(index_pool2d_gather, IndexPool2dParams, gather)
