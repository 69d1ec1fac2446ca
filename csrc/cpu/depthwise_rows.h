// The inner loops of convolution in narrow groups, for one vector of output channels: a block of neighbouring output pixels in
// registers, over the rows of a filter. A run is kTaps taps side by side in one filter row, of one of the input channels that
// each filter sees (depthwise: the only one):
//
//   filter_block   the block's sums; each input vector that is loaded meets every tap of the run that it belongs to
//   correlate      the taps' gradients over several rows of pixels; the same with the roles of taps and pixels exchanged
//
// so that the loop is bound by its products, not by loads. Columns of a block are numbered from the leftmost input pixel of
// its first output pixel; those outside of the image are stepped over, which costs a compare and saves the products with
// zeros: in a 7 x 7 image a filter of 7 x 7 has only 57% of its taps inside. Runs of one tap take any stride and dilation;
// there each column is an output pixel's.
//
// Depthwise, lane l meets channel l. In wider groups the input channels that the lanes meet are picked from the one or two
// vectors of channels where they lie: one permutation serves kTaps products.
//
// Depthwise in bfloat16, where products of pairs exist, a run has two filter rows: lane l meets the pair of channel l's pixels
// in both, which one permutation makes of two loads. 3 x 3 in blocks of 14 pixels takes 6 products of pairs and 4 shuffles a
// vector of the output, where widened pixels take 9 products and 7 conversions.
#pragma once

#include <utility>

#include "cpu/conv2d_lattice.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/stream.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <int kFrom, int... kOffsets, class F>
[[gnu::always_inline]] inline void unrolled_from(std::integer_sequence<int, kOffsets...>, const F& f) {
  (f(Constant<kFrom + kOffsets>{}), ...);
}
// f(Constant<kFrom>{}), ..., f(Constant<kTo - 1>{}), each inlined: side by side, as one within the other each would be copied
// once for every one before it.
template <int kFrom, int kTo, class F>
[[gnu::always_inline]] inline void unrolled(const F& f) {
  unrolled_from<kFrom>(std::make_integer_sequence<int, kTo - kFrom>{}, f);
}
#define CNNOPS_INLINE __attribute__((always_inline))

struct Run {
  int64_t dh, dw;       // its first tap reads input pixel (i*ish + dh, j*isw + dw)
  int64_t first, last;  // its columns, counted from output pixel 0, that lie inside the image
  int64_t input;        // which of the input channels that a filter sees
  int64_t below = 0;    // kPairs: how far below is the second row of the run; 0: it has none
};

// Whether runs have two filter rows.
#if CNNOPS_ISA_avx512_bf16
template <class T>
constexpr bool kPairs = __is_same(T, ::cnnops::bf16);
#else
template <class T>
constexpr bool kPairs = false;
#endif

// Where the lanes of a vector of output channels find one of their input channels.
template <class C>
struct Pick {
  int64_t first, second;  // of two vectors of channels, from the first input channel of any lane
  ivec<C> index;          // in their 2 * lanes channels
};

// How input vectors are read; `part`: images of fewer channels than lanes, or vectors of fewer output channels.
enum class Load { whole, part, picked, picked_two, picked_part };
constexpr bool is_picked(Load load) { return load != Load::whole && load != Load::part; }
constexpr bool is_part(Load load) { return load == Load::part || load == Load::picked_part; }

// For the run of a block.
template <class T, Load kLoad>
struct Loader {
  using C = compute_t<T>;
  int64_t first, second;
  ivec<C> index;
  int part;

  template <class Block>
  [[gnu::always_inline]] Loader(const Block& b, const Run& run) : part(b.in_part) {
    if constexpr (is_picked(kLoad)) {  // member by member: the whole would stay in memory
      const Pick<C>& pick = b.picks[run.input];
      first = pick.first, second = pick.second, index = pick.index;
    }
  }
  [[gnu::always_inline]] vec<C> operator()(const T* p) const {
    if constexpr (kLoad == Load::whole) return load(p);
    if constexpr (kLoad == Load::part) return load_n(p, part);
    if constexpr (kLoad == Load::picked) return permute(load(p + first), index);
    if constexpr (kLoad == Load::picked_two) return permute(load(p + first), load(p + second), index);
    if constexpr (kLoad == Load::picked_part) return permute(load_n(p + first, part), load_n(p + second, part), index);
  }
};
template <Load kLoad, class T>
[[gnu::always_inline]] inline vec<compute_t<T>> load_output(const T* p, int part) {
  if constexpr (is_part(kLoad)) return load_n(p, part);
  return load(p);
}

inline void fetch_run(const char* at, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(at + byte, 0, 2);
}
// Memory that is needed soon: `runs` runs of bytes, `step` bytes apart. Each of `steps` steps of the work before asks for its
// share. The processor's own prefetchers do not follow reads that jump from pixel to pixel or from plane to plane.
struct Ahead {
  const void* first = nullptr;
  int64_t runs = 0, step = 0, bytes = 0;

  void fetch(int64_t now, int64_t steps) const {
    for (int64_t run = runs * now / steps; run < runs * (now + 1) / steps; ++run) {
      const char* const at = static_cast<const char*>(first) + run * step;
      fetch_run(at, bytes);
    }
  }
};

// The same, step by step without divisions: two for each vector of a row took a tenth of the time of 3 x 3 at 7 x 7.
struct AheadSteps {
  const char* at;
  int64_t runs, step, bytes, steps, due = 0;

  AheadSteps(const Ahead& a, int64_t steps)
      : at(static_cast<const char*>(a.first)), runs(a.runs), step(a.step), bytes(a.bytes), steps(steps) {}
  void fetch() {
    for (due += runs; due >= steps; due -= steps, at += step) fetch_run(at, bytes);
  }
};

// The same by `calls` calls, each of some whole runs: from far away, many lines at once would hold up the loads behind them, and
// lines apart from each other take longer.
struct PixelsAhead {
  const char* at = nullptr;
  int64_t left = 0, step = 0, bytes = 0, share = 0;

  PixelsAhead() = default;
  PixelsAhead(const Ahead& a, int64_t calls)
      : at(static_cast<const char*>(a.first)),
        left(a.runs),
        step(a.step),
        bytes(a.bytes),
        share(ceil_div(a.runs, calls)) {}
  void fetch() {
    for (int64_t i = min64(share, left); i > 0; --i, at += step) fetch_run(at, bytes);
    left -= share;
  }
};

// Whether the gradient of the weights asks for pixels so: it holds nine sums, and with 16 registers took 1.2 times as long.
constexpr bool kFetchesPixels = kVectorBytes >= 64;

// ---- Sums over taps --------------------------------------------------------------------------------------------------

template <class T>
struct FilterBlock {
  using C = compute_t<T>;
  const T* in;           // below the block's first output pixel, tap offset (0, 0), the vector's first input channel
  int64_t row, pixel;    // elements from one input row, one input pixel to the next
  int64_t column;        // elements from one column to the next
  int64_t origin;        // the first column, counted from output pixel 0
  const Run* runs;       // those whose row lies inside the image
  int64_t count;         // of the runs
  int64_t top, bottom;   // input rows [top, bottom) lie inside the image, counted as Run::dh is
  const Pick<C>* picks;  // of each input channel of a filter
  const C* filters;      // [run][tap][lane]; kPairs: both rows' in a lane
  const C* bias;         // [lane]
  T* out;                // the block's first pixel
  int64_t out_pixel;     // elements from one output pixel to the next
  const T* residual;     // laid out as out; null: none
  Activation activation;
  bool stream;  // around the caches
  int live;     // pixels that are stored
  int part;     // lanes that are stored
  int in_part;  // lanes of the input that exist, for a partial load
};

template <class T>
[[gnu::noinline]] void finish_block(const FilterBlock<T>& b, const compute_t<T>* sums) {
  using C = compute_t<T>;
  for (int j = 0; j < b.live; ++j) {
    vec<C> z = load(sums + j * lanes<C>);
    if (b.residual) z += load_n(b.residual + j * b.out_pixel, b.part);
    if (b.activation != Activation::none) z = activate<C>(z, b.activation);
    store_output(b.out + j * b.out_pixel, z, b.part, b.stream);
  }
}

template <bool kPart, class T, int kCount>
[[gnu::always_inline]] inline void store_block(const FilterBlock<T>& b, const vec<compute_t<T>> (&sum)[kCount]) {
  using C = compute_t<T>;
  const int live = b.live;
  const int64_t out_pixel = b.out_pixel;
  T* const out = b.out;
  if (!kPart && !b.residual && b.activation == Activation::none) {
    if (b.stream) {
      unrolled<0, kCount>([&](auto j) CNNOPS_INLINE {
        if (j.value < live) store_streaming(out + j.value * out_pixel, sum[j.value]);
      });
      return;
    }
    unrolled<0, kCount>([&](auto j) CNNOPS_INLINE {
      if (j.value < live) store(out + j.value * out_pixel, sum[j.value]);
    });
    return;
  }
  // A copy: the sums themselves must not have addresses, or they would not stay in registers above.
  C finished[kCount * lanes<C>];
  unrolled<0, kCount>([&](auto j) CNNOPS_INLINE { store(finished + j.value * lanes<C>, sum[j.value]); });
  finish_block(b, finished);
}

template <class T, int kTaps, int kStep, int kCount, Load kLoad>
void filter_block(const FilterBlock<T>& b) {
  using C = compute_t<T>;
  constexpr int kColumns = kTaps == 1 ? kCount : (kCount - 1) * kStep + kTaps;
  vec<C> sum[kCount];
  const vec<C> bias = load(b.bias);
  unrolled<0, kCount>([&](auto j) CNNOPS_INLINE { sum[j.value] = bias; });
  const C* filter = b.filters;
  const T* const in = b.in;
  const int64_t column = b.column, row = b.row, pixel = b.pixel, origin = b.origin;
  for (const Run *run = b.runs, *const end = run + b.count; run < end; ++run, filter += kTaps * lanes<C>) {
    vec<C> f[kTaps];
    unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE { f[s.value] = load(filter + s.value * lanes<C>); });
    const Loader<T, kLoad> get(b, *run);
    int64_t at = run->dh * row + run->dw * pixel;
    const int64_t first = run->first - origin, last = run->last - origin;
    unrolled<0, kColumns>([&](auto w) CNNOPS_INLINE {
      constexpr int kColumn = decltype(w)::value;
      if (kColumn >= first && kColumn < last) {
        const vec<C> x = get(in + at);
        if constexpr (kTaps == 1) {
          sum[kColumn] += x * f[0];
        } else {
          unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
            constexpr int kAhead = kColumn - decltype(s)::value;
            if constexpr (kAhead >= 0 && kAhead % kStep == 0 && kAhead / kStep < kCount)
              sum[kAhead / kStep] += x * f[decltype(s)::value];
          });
        }
      }
      at += column;
    });
  }
  store_block<is_part(kLoad)>(b, sum);
}

#if CNNOPS_ISA_avx512_bf16
// Lane i of two vectors of 16 numbers, side by side.
[[gnu::always_inline]] inline __m512i paired(__m256i upper, __m256i lower) {
  const __m512i lanes = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(lanes, _mm512_inserti64x4(_mm512_castsi256_si512(upper), lower, 1));
}

template <int kTaps, int kStep, int kCount, Load kLoad>
void filter_pairs(const FilterBlock<bf16>& b) {
  constexpr int kColumns = kTaps == 1 ? kCount : (kCount - 1) * kStep + kTaps;
  constexpr int kLanes = lanes<float>;
  __m512 sum[kCount];
  const __m512 bias = _mm512_loadu_ps(b.bias);
  unrolled<0, kCount>([&](auto j) CNNOPS_INLINE { sum[j.value] = bias; });
  const __mmask16 mask = is_part(kLoad) ? (1u << b.in_part) - 1 : 0xffff;
  const auto get = [&](const bf16* p) CNNOPS_INLINE {
    if constexpr (is_part(kLoad)) return _mm256_maskz_loadu_epi16(mask, p);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  const float* filter = b.filters;
  const int64_t column = b.column, row = b.row, pixel = b.pixel, origin = b.origin;
  for (const Run *run = b.runs, *const end = run + b.count; run < end; ++run, filter += kTaps * kLanes) {
    const int64_t second = run->dh + run->below;
    const bool above = run->dh >= b.top && run->dh < b.bottom;
    const bool below = run->below != 0 && second >= b.top && second < b.bottom;
    const int64_t first = run->first - origin, last = run->last - origin;
    const bf16* const in = b.in + run->dw * pixel;
    const auto columns = [&](const __m512i(&f)[kTaps], const auto& pairs) CNNOPS_INLINE {
      int64_t at = 0;
      unrolled<0, kColumns>([&](auto w) CNNOPS_INLINE {
        constexpr int kColumn = decltype(w)::value;
        if (kColumn >= first && kColumn < last) {
          const __m512bh x = reinterpret_cast<__m512bh>(pairs(at));
          unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
            constexpr int kAhead = kColumn - decltype(s)::value;
            if constexpr (kTaps == 1)
              sum[kColumn] = _mm512_dpbf16_ps(sum[kColumn], x, reinterpret_cast<__m512bh>(f[0]));
            else if constexpr (kAhead >= 0 && kAhead % kStep == 0 && kAhead / kStep < kCount)
              sum[kAhead / kStep] =
                  _mm512_dpbf16_ps(sum[kAhead / kStep], x, reinterpret_cast<__m512bh>(f[decltype(s)::value]));
          });
        }
        at += column;
      });
    };
    __m512i f[kTaps];
    unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE { f[s.value] = _mm512_loadu_si512(filter + s.value * kLanes); });
    if (above && below) {
      const bf16 *const upper = in + run->dh * row, *const lower = in + second * row;
      columns(f, [&](int64_t at) CNNOPS_INLINE { return paired(get(upper + at), get(lower + at)); });
    } else if (above || below) {  // the other row's numbers are zeros
      const bf16* const only = in + (above ? run->dh : second) * row;
      unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
        f[s.value] =
            above ? _mm512_and_si512(f[s.value], _mm512_set1_epi32(0xffff)) : _mm512_srli_epi32(f[s.value], 16);
      });
      columns(f, [&](int64_t at) CNNOPS_INLINE { return _mm512_cvtepu16_epi32(get(only + at)); });
    }
  }
  vec<float> sums[kCount];
  unrolled<0, kCount>([&](auto j) CNNOPS_INLINE { sums[j.value] = reinterpret_cast<vec<float>>(sum[j.value]); });
  store_block<is_part(kLoad)>(b, sums);
}
#endif

// float64 and the portable level do with fewer kernels, to save time of compilation: runs of 3 taps or one, and any pick from
// two vectors.
#if CNNOPS_ISA_avx2 || CNNOPS_ISA_avx512
template <class C>
constexpr bool kFewKernels = sizeof(C) > sizeof(float);
#else
template <class C>
constexpr bool kFewKernels = true;
#endif

// Widths of blocks: with the taps of a run they fill the registers. Where inputs are picked, or kernels few, there are those
// that rows of 7 * 2^n pixels need.
#if CNNOPS_ISA_avx512
constexpr int kWidths[] = {4, 7, 10, 14};
#else
constexpr int kWidths[] = {4, 7};
#endif
constexpr int kWidthCount = sizeof kWidths / sizeof kWidths[0];
constexpr int kMostPixels = kWidths[kWidthCount - 1];

template <class T>
struct FilterKernels {
  using Kernel = void (*)(const FilterBlock<T>&);
  Kernel of[kWidthCount];

  template <int kTaps, int kStep, Load kLoad>
  void set() {
    unrolled<0, kWidthCount>([&](auto i) CNNOPS_INLINE {
      constexpr int kWidth = kWidths[decltype(i)::value], kFew = 7;
      constexpr bool kAll = !is_picked(kLoad) && !kFewKernels<compute_t<T>>;
      constexpr int kCount = kAll ? kWidth : kWidth <= kFew ? kFew : kMostPixels;
#if CNNOPS_ISA_avx512_bf16
      if constexpr (kPairs<T>) {
        of[i.value] = &filter_pairs<kTaps, kStep, kCount, kLoad>;
        return;
      }
#endif
      of[i.value] = &filter_block<T, kTaps, kStep, kCount, kLoad>;
    });
  }
  // taps: as side_by_side gives them.
  template <Load kLoad>
  void choose(int64_t taps, int64_t step) {
    if constexpr (!is_part(kLoad)) {
      switch (taps * 4 + step) {
        case 3 * 4 + 1: return set<3, 1, kLoad>();
        case 3 * 4 + 2: return set<3, 2, kLoad>();
      }
    }
    if constexpr (!is_part(kLoad) && !kFewKernels<compute_t<T>>) {
      switch (taps * 4 + step) {
        case 2 * 4 + 1: return set<2, 1, kLoad>();
        case 5 * 4 + 1: return set<5, 1, kLoad>();
        case 7 * 4 + 1: return set<7, 1, kLoad>();
        case 5 * 4 + 2: return set<5, 2, kLoad>();
      }
    }
    set<1, 1, kLoad>();
  }
};

// How many taps of a filter row a run takes, where `width` of them lie side by side (1: they do not) and output pixels are
// `step` input pixels apart.
template <class C>
int64_t side_by_side(int64_t width, int64_t step) {
  if (step <= 2)
    for (int64_t taps = kFewKernels<C> ? 3 : step == 1 ? 7 : 5; taps > 1; taps -= 2)
      if (width % taps == 0) return taps;
  return !kFewKernels<C> && step == 1 && width % 2 == 0 ? 2 : 1;
}

// ---- Gradients of taps -----------------------------------------------------------------------------------------------

template <class T>
struct Correlation {
  using C = compute_t<T>;
  const T* x;                        // below output pixel (0, 0), tap offset (0, 0), the vector's first input channel
  const T* dy;                       // output pixel (0, 0)
  int64_t x_row, x_pixel, x_column;  // elements from one input row, input pixel and column to the next
  int64_t x_step;                    // from the input row of one output row to that of the next
  int64_t dy_row, dy_pixel;
  int64_t first_row, last_row;  // output rows
  int64_t columns;              // output pixels of a row
  Ahead next_x, next_dy;        // fetched meanwhile: this is step `now` of `steps`
  int64_t now, steps;
  PixelsAhead pixels_x, pixels_dy;  // the same, of several runs at once
  const Pick<C>* picks;             // of each input channel of a filter
  int part, in_part;                // lanes of dy and of x that exist, for a partial load
};

template <class T, int kTaps, int kStep, int kCount, Load kLoad, int kSets, class Sums>
[[gnu::always_inline]] inline void correlate_block(const Correlation<T>& b, const Loader<T, kLoad>& get, const T* x,
                                                   const vec<compute_t<T>> (&d)[kCount], int64_t first, int64_t last,
                                                   Sums& sum) {
  using C = compute_t<T>;
  constexpr int kColumns = kTaps == 1 ? kCount : (kCount - 1) * kStep + kTaps;
  int64_t at = 0;
  unrolled<0, kColumns>([&](auto w) CNNOPS_INLINE {
    constexpr int kColumn = decltype(w)::value;
    if (kColumn >= first && kColumn < last) {
      const vec<C> v = get(x + at);
      if constexpr (kTaps == 1) {
        sum[kColumn % kSets][0] += v * d[kColumn];
      } else {
        unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
          constexpr int kAhead = kColumn - decltype(s)::value;
          if constexpr (kAhead >= 0 && kAhead % kStep == 0 && kAhead / kStep < kCount)
            sum[kColumn / kStep % kSets][decltype(s)::value] += v * d[kAhead / kStep];
        });
      }
    }
    at += b.x_column;
  });
}

struct GradRun {
  Run run;
  Range rows;  // the output rows for which its input row lies inside the image
};

#if CNNOPS_ISA_avx512_bf16
// sum[r][s] += the correlation of the nine taps of 3 x 3, stride 1, with two output rows, `x` and `dy` at the first column of
// the upper one and tap (0, 0): a lane's pair are its channel's pixels in both rows. An input column makes three pairs of rows,
// and each meets three columns of dy: 9 products and 8 shuffles for what takes 18 products and 18 conversions of widened
// pixels, 1.2 to 1.4 times as fast.
[[gnu::always_inline]] inline void correlate_two_rows(Correlation<bf16>& b, const bf16* x, const bf16* dy,
                                                      int64_t first, int64_t last, vec<float> (&sum)[3][1][3]) {
  const auto get = [](const bf16* p) CNNOPS_INLINE { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  const bf16 *const x1 = x + b.x_row, *const x2 = x1 + b.x_row, *const x3 = x2 + b.x_row, *const dy1 = dy + b.dy_row;
  const int64_t columns = b.columns;
  __m512i d[3] = {};  // of this column of dy and the two before
  // Column w of x, of which taps s from `from` to `to` meet columns w - s of dy.
  const auto column = [&](int64_t w, auto from, auto to) CNNOPS_INLINE {
    d[2] = d[1], d[1] = d[0];
    if constexpr (decltype(from)::value == 0) d[0] = paired(get(dy + w * b.dy_pixel), get(dy1 + w * b.dy_pixel));
    if (w < first || w >= last) return;
    const int64_t at = w * b.x_pixel;
    const __m256i rows[] = {get(x + at), get(x1 + at), get(x2 + at), get(x3 + at)};
    unrolled<0, 3>([&](auto r) CNNOPS_INLINE {
      const __m512bh pairs = reinterpret_cast<__m512bh>(paired(rows[r.value], rows[r.value + 1]));
      unrolled<decltype(from)::value, decltype(to)::value>([&](auto s) CNNOPS_INLINE {
        vec<float>& of_tap = sum[r.value][0][s.value];
        of_tap = reinterpret_cast<vec<float>>(
            _mm512_dpbf16_ps(reinterpret_cast<__m512>(of_tap), pairs, reinterpret_cast<__m512bh>(d[s.value])));
      });
    });
  };
  column(0, Constant<0>{}, Constant<1>{});
  column(1, Constant<0>{}, Constant<2>{});
  for (int64_t w = 2; w < columns;) {
    b.pixels_x.fetch(), b.pixels_dy.fetch();
    for (const int64_t end = min64(w + kMostPixels / 2, columns); w < end; ++w) column(w, Constant<0>{}, Constant<3>{});
  }
  column(columns, Constant<1>{}, Constant<3>{});
  column(columns + 1, Constant<2>{}, Constant<3>{});
}
#endif

// sums[run][tap][lane] += the correlation of kRuns runs with output rows [b.first_row, b.last_row). Several runs at once read
// each row of dy once.
template <class T, int kTaps, int kStep, Load kLoad, int kRuns>
void correlate(Correlation<T>& b, const GradRun* runs, compute_t<T>* sums) {
  using C = compute_t<T>;
  // A sum waits four cycles for the one before it: fewer taps have several sums each.
  constexpr int kSets = kRuns > 1 ? 1 : kTaps == 1 ? 4 : kTaps <= 3 ? 2 : 1;
  constexpr int kPixels = kTaps == 1 ? 1 : kStep;  // columns from one output pixel to the next
  vec<C> sum[kRuns][kSets][kTaps];
  int64_t offset[kRuns];
  unrolled<0, kRuns>([&](auto r) CNNOPS_INLINE {
    offset[r.value] = runs[r.value].run.dh * b.x_row + runs[r.value].run.dw * b.x_pixel;
    unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
      constexpr int kRun = decltype(r)::value, kTap = decltype(s)::value;
      sum[kRun][0][kTap] = load(sums + (kRun * kTaps + kTap) * lanes<C>);
      unrolled<1, kSets>([&](auto k) CNNOPS_INLINE { sum[kRun][k.value][kTap] = vec<C>{}; });
    });
  });
  const Loader<T, kLoad> get(b, runs[0].run);
  const Range rows = kRuns == 1 ? runs[0].rows : Range{b.first_row, b.last_row};
  int64_t paired = 0;  // rows below this one have been taken with the one above
  for (int64_t i = max64(b.first_row, rows.first); i < min64(b.last_row, rows.last); ++i) {
    const int64_t now = b.now * (b.last_row - b.first_row) + i - b.first_row;
    b.next_x.fetch(now, b.steps * (b.last_row - b.first_row));
    b.next_dy.fetch(now, b.steps * (b.last_row - b.first_row));
    const T* x = b.x + i * b.x_step;
    const T* dy = b.dy + i * b.dy_row;
    // The runs of a block differ by their rows alone, so their columns and input channel are the first one's.
    int64_t left = b.columns, first = runs[0].run.first, last = runs[0].run.last;
#if CNNOPS_ISA_avx512_bf16
    if constexpr (kPairs<T> && kLoad == Load::whole && kTaps == 3 && kStep == 1 && kRuns == 3) {
      if (i < paired) continue;
      // The first run is inside of the image at this row, and the last one at the next: so are all.
      if (i + 1 < b.last_row && i >= runs[0].rows.first && i + 1 < runs[2].rows.last && left > 1 &&
          b.x_step == b.x_row && runs[1].run.dh == runs[0].run.dh + 1) {
        correlate_two_rows(b, x + offset[0], dy, first, last, sum);
        paired = i + 2;
        continue;
      }
    }
#endif
    const auto blocks = [&](auto count) CNNOPS_INLINE {
      constexpr int kCount = decltype(count)::value;
      for (; left >= kCount; left -= kCount) {
        if constexpr (kRuns > 1 && kFetchesPixels) b.pixels_x.fetch(), b.pixels_dy.fetch();
        vec<C> d[kCount];
        unrolled<0, kCount>([&](auto j)
                                CNNOPS_INLINE { d[j.value] = load_output<kLoad>(dy + j.value * b.dy_pixel, b.part); });
        unrolled<0, kRuns>([&](auto r) CNNOPS_INLINE {
          constexpr int kRun = decltype(r)::value;
          if (kRuns == 1 || (i >= runs[kRun].rows.first && i < runs[kRun].rows.last))
            correlate_block<T, kTaps, kStep, kCount, kLoad, kSets>(b, get, x + offset[kRun], d, first, last, sum[kRun]);
        });
        first -= kCount * kPixels, last -= kCount * kPixels;
        x += kCount * kPixels * b.x_column, dy += kCount * b.dy_pixel;
      }
    };
    // Nine sums and seven pixels are more than 16 registers hold.
    constexpr bool kFull = kRuns > 1 && kMostPixels == 7, kFew = kFewKernels<C>;
    if constexpr (kMostPixels > 7 && !kFew) blocks(Constant<kMostPixels>{});
    if constexpr (!kFull) blocks(Constant<7>{});
    if constexpr ((!is_picked(kLoad) && !kFew) || kFull) blocks(Constant<4>{});
    blocks(Constant<1>{});
  }
  unrolled<0, kRuns>([&](auto r) CNNOPS_INLINE {
    unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
      constexpr int kRun = decltype(r)::value, kTap = decltype(s)::value;
      unrolled<1, kSets>([&](auto k) CNNOPS_INLINE { sum[kRun][0][kTap] += sum[kRun][k.value][kTap]; });
      store(sums + (kRun * kTaps + kTap) * lanes<C>, sum[kRun][0][kTap]);
    });
  });
}

template <class T>
using CorrelateKernel = void (*)(Correlation<T>&, const GradRun*, compute_t<T>*);
// For so many taps a run, and `runs` of 1, or (not kFewKernels) of 3 runs of 3 taps that differ by their rows alone.
template <class T, Load kLoad>
CorrelateKernel<T> correlate_kernel(int64_t taps, int64_t step, int64_t runs) {
  if constexpr (!is_part(kLoad)) {
    if constexpr (!kFewKernels<compute_t<T>>) {
      if (runs == 3) return step == 1 ? &correlate<T, 3, 1, kLoad, 3> : &correlate<T, 3, 2, kLoad, 3>;
      switch (taps * 4 + step) {
        case 2 * 4 + 1: return &correlate<T, 2, 1, kLoad, 1>;
        case 5 * 4 + 1: return &correlate<T, 5, 1, kLoad, 1>;
        case 7 * 4 + 1: return &correlate<T, 7, 1, kLoad, 1>;
        case 5 * 4 + 2: return &correlate<T, 5, 2, kLoad, 1>;
      }
    }
    switch (taps * 4 + step) {
      case 3 * 4 + 1: return &correlate<T, 3, 1, kLoad, 1>;
      case 3 * 4 + 2: return &correlate<T, 3, 2, kLoad, 1>;
    }
  }
  return &correlate<T, 1, 1, kLoad, 1>;
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
