// Max pooling. NCHW: vectors run along an output row; the input rows of a window lie converted and padded in a small ring
// in L1 (cpu/pool_rows.h), and with them the best of each row, shared by the output rows of a plane that overlap. NHWC:
// vectors run along the channels. Every window is walked in row-major order by one thread.
#include "ops/max_pool2d.h"

#include <omp.h>

#include "cpu/pool_pixels.h"
#include "cpu/pool_rows.h"
#include "cpu/pool_tall.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class C>
inline ivec<C> load_choice(const int_t<C>* p) {
  return *reinterpret_cast<const ivec<C>*>(p);
}
template <class C>
inline void store_choice_row(int_t<C>* p, ivec<C> v) {
  *reinterpret_cast<ivec<C>*>(p) = v;
}

// The best of each window's cells in one row. `first`: what a window without a cell above -Inf chooses. kWidth: kernel_w
// where it is worth unrolling, else 0.
template <class C, bool kPick, int kWidth>
[[gnu::always_inline]] inline void best_of_row(const C* row, const int64_t* tap_at, int64_t kernel, int64_t step,
                                               const int_t<C>* first, int64_t width, C* values, int_t<C>* choices) {
  using I = int_t<C>;
  const int64_t taps = kWidth ? kWidth : kernel;
  for (int64_t q = 0; q < width; q += lanes<C>) {
    Best<C> best{load(row + tap_at[0] + q), {}};
    if constexpr (kPick) best.choice = load_choice<C>(first + q);
#pragma GCC unroll 8
    for (int64_t t = 1; t < taps; ++t)
      take<C, kPick>(best, load(row + tap_at[t] + q), ivec<C>{} + static_cast<I>(t * step));
    store(values + q, best.value);
    if constexpr (kPick) store_choice_row<C>(choices + q, best.choice);
  }
}

// A row of windows from the best of each of its rows, `pitch` apart; `base` holds the plane index of each window's first cell
// in row 0 of the plane.
template <class T, bool kPick>
void best_of_rows(const MaxPool2dParams& p, const compute_t<T>* values, const int_t<compute_t<T>>* choices,
                  int64_t pitch, int64_t r0, int64_t r1, int64_t row_step, int64_t top, const int_t<compute_t<T>>* base,
                  int64_t out) {
  using C = compute_t<T>;
  using I = int_t<C>;
  T* const y = static_cast<T*>(p.y) + out;
  for (int64_t q = 0; q < p.q; q += lanes<C>) {
    Best<C> best{set1(kLowest<C>), ivec<C>{} - 1};
    if (r0 < r1) {
      best.value = load(values + q);
      if constexpr (kPick) best.choice = load_choice<C>(choices + q) + static_cast<I>(r0 * row_step);
    }
    for (int64_t r = r0 + 1; r < r1; ++r) {
      const int64_t at = (r - r0) * pitch + q;
      ivec<C> choice = {};
      if constexpr (kPick) choice = load_choice<C>(choices + at) + static_cast<I>(r * row_step);
      take<C, kPick>(best, load(values + at), choice);
    }
    const int part = part_of<C>(q, p.q);
    store_n(y + q, best.value, part);
    if constexpr (kPick)
      store_choice<C>(p.choice, p.mode, out + q, best.choice, load_choice<C>(base + q) + static_cast<I>(top * p.w),
                      part);
  }
}

// What the best of the rows of a few rows of windows may take of L1.
constexpr int64_t kHeldBytes = 16 << 10;

// In two steps: the best of each row of a window, which the windows above and below it share, then the best of those; each
// for as many rows as stay in L1.
template <class T, bool kPick>
void forward_nchw(const MaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const Windows& v = p.windows;
  const PhasedRow<C> phases(p.w, p.q, v.pad_w, v.kernel_w, v.stride_w, v.dilation_w);
  const Steps steps(p.mode, v, p.w);
  const int64_t width = round_up(p.q, lanes<C>), reach = (v.kernel_h - 1) * v.dilation_h + 1;
  const int64_t unit_rows = rows_per_unit(p.n * p.c, p.p), units_each = ceil_div(p.p, unit_rows);
  const int64_t fit = kHeldBytes / (width * static_cast<int64_t>(sizeof(C) + sizeof(I)));
  const int64_t group = min64(unit_rows, max64((fit - reach) / v.stride_h, 0) + 1);  // rows of windows at a time
  const int64_t held = min64((group - 1) * v.stride_h + reach, p.h);

  struct Piece {
    C *cells, *rows;
    I *choices, *first, *base;
    int64_t* tap_at;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.cells = arena.take<C>(2 * phases.size());
    s.rows = arena.take<C>(held * width);
    s.choices = arena.take<I>(held * width);
    s.first = arena.take<I>(width);
    s.base = arena.take<I>(width);
    s.tap_at = arena.take<int64_t>(v.kernel_w);
    return s;
  });

#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    for (int64_t i = 0; i < 2; ++i) phases.fill(s.cells + i * phases.size(), kLowest<C>);
    for (int64_t i = 0; i < v.kernel_w; ++i) s.tap_at[i] = phases.at(i * v.dilation_w);
    for (int64_t q = 0; q < width; ++q) {
      const int64_t begin = q * v.stride_w - v.pad_w, tap = first_tap(begin, v.dilation_w);
      s.first[q] = static_cast<I>(tap < last_tap(begin, v.kernel_w, v.dilation_w, p.w) ? tap * steps.column : kNoCells);
      s.base[q] = static_cast<I>(begin);
    }

#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
      const int64_t plane = unit / units_each, from = unit % units_each * unit_rows, to = min64(from + unit_rows, p.p);
      const T* const x = static_cast<const T*>(p.x) + plane * p.h * p.w;
      int64_t begin = 0, end = 0;  // the rows whose best are held
      for (int64_t group_from = from; group_from < to; group_from += group) {
        const int64_t group_to = min64(group_from + group, to), above = group_from * v.stride_h - v.pad_h;
        const int64_t next_begin = min64(max64(above, 0), p.h);
        const int64_t next_end = min64(max64((group_to - 1) * v.stride_h - v.pad_h + reach, next_begin), p.h);
        const int64_t kept = max64(end - next_begin, 0);
        if (kept > 0 && next_begin > begin) {
          std::memmove(s.rows, s.rows + (next_begin - begin) * width, kept * width * sizeof(C));
          std::memmove(s.choices, s.choices + (next_begin - begin) * width, kept * width * sizeof(I));
        }
        begin = next_begin, end = next_end;
        // What was just stored is slow to load until it has left for the cache: the next row's cells are fetched ahead.
        const auto fetch = [&](int64_t h) {
          if (h < end) phases.split(x + h * p.w, s.cells + h % 2 * phases.size());
        };
        fetch(begin + kept);
        for (int64_t h = begin + kept; h < end; ++h) {
          fetch(h + 1);
          const auto find = [&](auto unrolled) __attribute__((always_inline)) {
            best_of_row<C, kPick, decltype(unrolled)::value>(s.cells + h % 2 * phases.size(), s.tap_at, v.kernel_w,
                                                             steps.column, s.first, width, s.rows + (h - begin) * width,
                                                             s.choices + (h - begin) * width);
          };
          switch (kShapeKernels<T> ? v.kernel_w : 0) {
            case 2: find(std::integral_constant<int, 2>{}); break;
            case 3: find(std::integral_constant<int, 3>{}); break;
            case 5: find(std::integral_constant<int, 5>{}); break;
            default: find(std::integral_constant<int, 0>{});
          }
        }
        for (int64_t pp = group_from; pp < group_to; ++pp) {
          const int64_t top = pp * v.stride_h - v.pad_h;
          const int64_t r0 = top >= 0 ? 0 : first_tap(top, v.dilation_h);
          const int64_t r1 = top + reach <= p.h ? v.kernel_h : last_tap(top, v.kernel_h, v.dilation_h, p.h);
          const int64_t at = r0 < r1 ? (top + r0 * v.dilation_h - begin) * width : 0;
          best_of_rows<T, kPick>(p, s.rows + at, s.choices + at, v.dilation_h * width, r0, r1, steps.row, top, s.base,
                                 (plane * p.p + pp) * p.q);
        }
      }
    }
  }
}

// Rows of tall windows that no other row of windows shares.
template <class T, bool kPick>
void forward_nchw_tall(const MaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const Windows& v = p.windows;
  const Steps steps(p.mode, v, p.w);
  for_tall_rows<C>(
      p.threads, p.n * p.c, p.p, p.w, p.q, min64(v.kernel_w, ceil_div(p.w, v.dilation_w)),
      [&](auto& windows) {
        for (int64_t q = 0; q < p.q; ++q) {
          const int64_t left = q * v.stride_w - v.pad_w, tap = first_tap(left, v.dilation_w);
          windows.set(q, last_tap(left, v.kernel_w, v.dilation_w, p.w) - tap, left + tap * v.dilation_w, v.dilation_w,
                      tap);
        }
      },
      [&](auto& windows, int64_t plane, int64_t i) {
        const int64_t top = i * v.stride_h - v.pad_h, r0 = first_tap(top, v.dilation_h);
        const int64_t r1 = last_tap(top, v.kernel_h, v.dilation_h, p.h);
        const T* const x = static_cast<const T*>(p.x) + (plane * p.h + top + r0 * v.dilation_h) * p.w;
        if (r0 < r1) windows.read(i % 2, x, v.dilation_h * p.w, r0, r1);
      },
      [&](const auto& windows, int64_t plane, int64_t i) {
        const int64_t top = i * v.stride_h - v.pad_h, out = (plane * p.p + i) * p.q;
        const bool rows = first_tap(top, v.dilation_h) < last_tap(top, v.kernel_h, v.dilation_h, p.h);
        for (int64_t q = 0; q < p.q; q += lanes<C>) {
          const auto best = windows.at(i % 2, q);
          const ivec<C> none = rows ? best.tap < 0 : ivec<C>{} - 1;
          const int part = part_of<C>(q, p.q);
          store_n(static_cast<T*>(p.y) + out + q, none ? set1(kLowest<C>) : best.value, part);
          if constexpr (kPick) {
            const ivec<C> choice = best.row * static_cast<I>(steps.row) + best.tap * static_cast<I>(steps.column);
            const ivec<C> base =
                iota<ivec<C>>() * static_cast<I>(v.stride_w) + static_cast<I>(top * p.w + q * v.stride_w - v.pad_w);
            store_choice<C>(p.choice, p.mode, out + q, choice | none, base, part);
          }
        }
      });
}

template <class T, bool kPick>
void forward_nhwc(const MaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const Windows& v = p.windows;
  const Steps steps(p.mode, v, p.w);
  const int64_t step_h = v.dilation_h * p.w * p.c, step_w = v.dilation_w * p.c;
  const bool stream = large_output<T>(p.n * p.c * p.h * p.w, p.n * p.c * p.p * p.q);
  const int64_t shares_each = v.kernel_h * ceil_div(p.c, 4 * lanes<C>);  // a row of a window at a time
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    const int64_t top = row % p.p * v.stride_h - v.pad_h;
    const int64_t r0 = first_tap(top, v.dilation_h), r1 = last_tap(top, v.kernel_h, v.dilation_h, p.h);
    const T* const image = static_cast<const T*>(p.x) + row / p.p * p.h * p.w * p.c;
    Ahead ahead = rows_of_next_windows(image, row % p.p + 1, p.p, v.stride_h, v.pad_h,
                                       (v.kernel_h - 1) * v.dilation_h + 1, p.h, p.w * p.c, p.q * shares_each);
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t left = q * v.stride_w - v.pad_w;
      const int64_t s0 = first_tap(left, v.dilation_w), s1 = last_tap(left, v.kernel_w, v.dilation_w, p.w);
      const bool cells = r0 < r1 && s0 < s1;
      const int64_t out = (row * p.q + q) * p.c;
      const T* const corner = image + ((top + r0 * v.dilation_h) * p.w + left + s0 * v.dilation_w) * p.c;
      const I first = cells ? static_cast<I>(r0 * steps.row + s0 * steps.column) : -1;
      const ivec<C> base = ivec<C>{} + static_cast<I>(top * p.w + left);
      // Several vectors at once, since the cells of a window lie far apart.
      const auto vectors = [&](auto at_once, int64_t c, int part) __attribute__((always_inline)) {
        constexpr int kVectors = decltype(at_once)::value;
        Best<C> best[kVectors];
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) best[k] = {set1(kLowest<C>), ivec<C>{} + first};
        for (int64_t r = r0; r < r1; ++r) {
          const T* at = corner + (r - r0) * step_h + c;
          I tap = static_cast<I>(r * steps.row + s0 * steps.column);
          ahead.fetch();
          for (int64_t s = s0; s < s1; ++s, at += step_w, tap += static_cast<I>(steps.column)) {
#pragma GCC unroll 4
            for (int k = 0; k < kVectors; ++k)
              take<C, kPick>(best[k], load_n(at + k * lanes<C>, part), ivec<C>{} + tap);
          }
        }
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) {
          const int64_t to = out + c + k * lanes<C>;
          store_output(static_cast<T*>(p.y) + to, best[k].value, part, stream);
          if constexpr (kPick) store_choice<C>(p.choice, p.mode, to, best[k].choice, base, part);
        }
      };
      int64_t c = 0;
      for (; c + 4 * lanes<C> <= p.c; c += 4 * lanes<C>) vectors(std::integral_constant<int, 4>{}, c, lanes<C>);
      for (; c < p.c; c += lanes<C>) vectors(std::integral_constant<int, 1>{}, c, part_of<C>(c, p.c));
    }
    if (stream) end_streaming();
  }
}

// The best of the cells of windows [q0, q1) in row h of an image; choices are taps. kTaps: kernel_w where it is worth
// unrolling, else 0.
template <class T, bool kPick, int kTaps>
void best_across(const MaxPool2dParams& p, const T* image, int64_t h, int64_t q0, int64_t q1, compute_t<T>* values,
                 uint8_t* choices) {
  using C = compute_t<T>;
  const Windows& v = p.windows;
  for (int64_t q = q0; q < q1; ++q) {
    const int64_t left = q * v.stride_w - v.pad_w, s0 = max64(-left, 0), s1 = min64(v.kernel_w, p.w - left);
    const T* const x = image + (h * p.w + left + s0) * p.c;
    const int64_t to = q * p.c;
    const auto vectors = [&](auto taps, int64_t c, int part) __attribute__((always_inline)) {
      constexpr int kCount = decltype(taps)::value;
      const int64_t count = kCount ? kCount : s1 - s0;
      const int_t<C> first = static_cast<int_t<C>>(kCount ? 0 : s0);
      Best<C> best{load_n(x + c, part), ivec<C>{} + first};
#pragma GCC unroll 8
      for (int64_t s = 1; s < count; ++s)
        take<C, kPick>(best, load_n(x + s * p.c + c, part), ivec<C>{} + (first + static_cast<int_t<C>>(s)));
      store_n(values + to + c, best.value, part);
      if constexpr (kPick) store_u8_n<C>(choices + to + c, best.choice, part);
    };
    int64_t c = 0;
    if (kTaps && s1 - s0 == kTaps)
      for (; c + lanes<C> <= p.c; c += lanes<C>) vectors(std::integral_constant<int, kTaps>{}, c, lanes<C>);
    for (; c + lanes<C> <= p.c; c += lanes<C>) vectors(std::integral_constant<int, 0>{}, c, lanes<C>);
    if (c < p.c) vectors(std::integral_constant<int, 0>{}, c, static_cast<int>(p.c - c));
  }
}

template <class T, bool kPick>
auto best_across_for(int64_t taps) {
  if constexpr (kShapeKernels<T>) {
    if (taps == 3) return best_across<T, kPick, 3>;
    if (taps == 5) return best_across<T, kPick, 5>;
  }
  return best_across<T, kPick, 0>;
}

// Windows without dilation that share rows: the best of each window's cells in one row are kept, in L2, until the last of the
// windows over that row. Those of the last row are taken up a few windows later, from L1.
constexpr int64_t kAtOnce = 4;

template <class T, bool kPick>
void forward_nhwc_shared(const MaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const Windows& v = p.windows;
  const int64_t kernel = v.kernel_h;
  const auto across = best_across_for<T, kPick>(v.kernel_w);
  const Steps steps(p.mode, v, p.w);
  const bool stream = large_output<T>(p.n * p.c * p.h * p.w, p.n * p.c * p.p * p.q);
  // Rows are picked, not rounded: how many of them are found twice changes no result, so units may depend on the threads.
  const int64_t units_each = p.n % p.threads == 0 || p.n >= 4 * p.threads ? 1 : p.threads;
  const int64_t unit_rows = ceil_div(p.p, units_each), pitch = p.q * p.c;

  struct Piece {
    C* values;
    uint8_t* choices;
    int64_t* row_at;  // of a window's rows
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.values = arena.take<C>(kernel * pitch);
    s.row_at = arena.take<int64_t>(kernel);
    s.choices = arena.take<uint8_t>(kPick ? kernel * pitch : 0);
    return s;
  });

#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < p.n * units_each; ++unit) {
    const Piece s = scratch.mine();
    const int64_t n = unit / units_each, from = unit % units_each * unit_rows, to = min64(from + unit_rows, p.p);
    const T* const image = static_cast<const T*>(p.x) + n * p.h * p.w * p.c;
    int64_t done = 0;  // the rows above are kept, or no longer needed
    for (int64_t pp = from; pp < to; ++pp) {
      const int64_t top = pp * v.stride_h - v.pad_h, h0 = max64(top, 0), h1 = min64(top + kernel, p.h);
      for (int64_t h = max64(done, h0); h + 1 < h1; ++h) {
        const int64_t slot = h % kernel * pitch;
        across(p, image, h, 0, p.q, s.values + slot, s.choices + slot);
      }
      const bool last_is_new = done < h1;
      done = h1;
      const int64_t rows = h1 - h0;
      for (int64_t i = 0; i < rows; ++i) s.row_at[i] = (h0 + i) % kernel * pitch;
      Ahead ahead = rows_of_next_windows(image, pp + 1, to, v.stride_h, v.pad_h, kernel, p.h, p.w * p.c, p.q);
      for (int64_t q = 0; q < p.q; ++q) {
        ahead.fetch();
        if (last_is_new && q % kAtOnce == 0)
          across(p, image, h1 - 1, q, min64(q + kAtOnce, p.q), s.values + s.row_at[rows - 1],
                 s.choices + s.row_at[rows - 1]);
        const int64_t out = ((n * p.p + pp) * p.q + q) * p.c;
        const ivec<C> base = ivec<C>{} + static_cast<I>(top * p.w + q * v.stride_w - v.pad_w);
        const auto vectors = [&](auto known, int64_t c, int part) __attribute__((always_inline)) {
          const int64_t at = q * p.c + c, count = decltype(known)::value ? decltype(known)::value : rows;
          const auto choice_of = [&](int64_t i) __attribute__((always_inline)) {
            ivec<C> choice = {};
            if constexpr (kPick) {
              choice = load_u8_n<C>(s.choices + s.row_at[i] + at, part);
              if (steps.column != 1) choice *= static_cast<I>(steps.column);
              choice += static_cast<I>((h0 + i - top) * steps.row);
            }
            return choice;
          };
          Best<C> best{load_n(s.values + s.row_at[0] + at, part), choice_of(0)};
          for (int64_t i = 1; i < count; ++i)
            take<C, kPick>(best, load_n(s.values + s.row_at[i] + at, part), choice_of(i));
          store_output(static_cast<T*>(p.y) + out + c, best.value, part, stream);
          if constexpr (kPick) store_choice<C>(p.choice, p.mode, out + c, best.choice, base, part);
        };
        int64_t c = 0;
        if (kShapeKernels<T> && rows == 3)
          for (; c + lanes<C> <= p.c; c += lanes<C>) vectors(std::integral_constant<int, 3>{}, c, lanes<C>);
        for (; c + lanes<C> <= p.c; c += lanes<C>) vectors(std::integral_constant<int, 0>{}, c, lanes<C>);
        if (c < p.c) vectors(std::integral_constant<int, 0>{}, c, static_cast<int>(p.c - c));
      }
    }
    if (stream) end_streaming();
  }
}

template <class T, bool kPick>
void forward_as(const MaxPool2dParams& p) {
  const Windows& v = p.windows;
  if (p.layout == Layout::nhwc) {
    const bool share = v.stride_h < v.kernel_h && v.dilation_h == 1 && v.dilation_w == 1 && v.kernel_w <= kNoOffset;
    return share ? forward_nhwc_shared<T, kPick>(p) : forward_nhwc<T, kPick>(p);
  }
  if (v.kernel_h >= 4 && v.stride_h > (v.kernel_h - 1) * v.dilation_h) return forward_nchw_tall<T, kPick>(p);
  forward_nchw<T, kPick>(p);
}

template <class T>
void forward(const MaxPool2dParams& p) {
  p.mode == Choice::none ? forward_as<T, false>(p) : forward_as<T, true>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(max_pool2d_forward, MaxPool2dParams, forward)
