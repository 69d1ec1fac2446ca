// Median pooling. A vector of windows (NCHW: neighbours in an output row, from padded rows cut into phases; NHWC: channels
// of one pixel) is settled at once by forgetful selection: of n = 2k + 1 values, neither the smallest nor the largest of
// any k + 2 is the median, so both are dropped, one value is added, and so on until one is left. Cells outside the image
// and the missing value of an even count are filled in with -Inf and Inf such that the lower middle of the cells inside
// stays in the middle. Which cell it was is found by comparing afterwards. Large windows are settled one by one.
#include "ops/median_pool2d.h"

#include <omp.h>

#include "cpu/pool_pixels.h"
#include "cpu/pool_rows.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// Selection costs about n * n / 2 exchanges; windows beyond this many cells take a scalar quickselect.
constexpr int64_t kMostVectors = 121;

template <class C>
[[gnu::always_inline]] inline void order(vec<C>& a, vec<C>& b) {
  const vec<C> low = min_of(a, b);
  b = max_of(a, b);
  a = low;
}

// Moves the smallest of v[0..m) to the front and the largest to the back.
template <class C>
[[gnu::always_inline]] inline void extremes(vec<C>* v, int m) {
#pragma GCC unroll 16
  for (int i = 0; i < m / 2; ++i) order<C>(v[i], v[m - 1 - i]);
#pragma GCC unroll 16
  for (int i = 1; i < (m + 1) / 2; ++i) order<C>(v[0], v[i]);
#pragma GCC unroll 16
  for (int i = m / 2; i < m - 1; ++i) order<C>(v[i], v[m - 1]);
}

// The median of v[0..n), n odd. v is not kept.
template <class C>
vec<C> median_of(vec<C>* v, int n) {
  if (n == 1) return v[0];
  int next = (n - 1) / 2 + 2;
  for (int m = next;; --m) {
    extremes<C>(v, m);
    if (next == n) return v[1];
    v[0] = v[next++];
  }
}
// The same for n known at compile time, unrolled into registers: m values are in play, kNext is the one to come.
template <class C, int kCount, int kHeld = (kCount - 1) / 2 + 2, int kNext = kHeld>
[[gnu::always_inline]] inline vec<C> median_of(vec<C>* v) {
  extremes<C>(v, kHeld);
  if constexpr (kNext == kCount) {
    return v[1];
  } else {
    v[0] = v[kNext];
    return median_of<C, kCount, kHeld - 1, kNext + 1>(v);
  }
}

template <class C, int kCount>
[[gnu::always_inline]] inline void sort(vec<C>* v) {
  static_assert(kCount == 2 || kCount == 3 || kCount == 5);
  if constexpr (kCount == 2) {
    order<C>(v[0], v[1]);
  } else if constexpr (kCount == 3) {
    order<C>(v[0], v[1]), order<C>(v[1], v[2]), order<C>(v[0], v[1]);
  } else {
    order<C>(v[0], v[3]), order<C>(v[1], v[4]), order<C>(v[0], v[2]), order<C>(v[1], v[3]), order<C>(v[0], v[1]);
    order<C>(v[2], v[4]), order<C>(v[1], v[2]), order<C>(v[3], v[4]), order<C>(v[2], v[3]);
  }
}
// Moves kLow of the smallest of v[0..kCount) to the front and kHigh of the largest to the back.
template <class C, int kCount, int kLow, int kHigh>
[[gnu::always_inline]] inline void part(vec<C>* v) {
#pragma GCC unroll 4
  for (int k = 0; k < kLow; ++k)
#pragma GCC unroll 4
    for (int i = k + 1; i < kCount; ++i) order<C>(v[k], v[i]);
#pragma GCC unroll 4
  for (int k = kCount - 1; k >= kCount - kHigh; --k)
#pragma GCC unroll 4
    for (int i = kLow; i < k; ++i) order<C>(v[i], v[k]);
}
template <class C>
[[gnu::always_inline]] inline vec<C> middle(vec<C> a, vec<C> b, vec<C> c) {
  return max_of(min_of(a, b), min_of(max_of(a, b), c));
}
// The median (the lower middle of 4) of kSide sorted columns of as many values, v[rank][column]. With the ranks put in order
// along the columns too, the element at (i, j) is at least (i + 1)(j + 1) of 25, itself among them, and at most
// (5 - i)(5 - j) of them: that leaves 13 that may be the median, and it is theirs.
template <class C, int kSide>
[[gnu::always_inline]] inline vec<C> median_of_sorted(vec<C> (*v)[kSide]) {
  if constexpr (kSide == 2) {
    return min_of(max_of(v[0][0], v[0][1]), min_of(v[1][0], v[1][1]));
  } else if constexpr (kSide == 3) {
    const vec<C> low = max_of(max_of(v[0][0], v[0][1]), v[0][2]), high = min_of(min_of(v[2][0], v[2][1]), v[2][2]);
    return middle<C>(low, middle<C>(v[1][0], v[1][1], v[1][2]), high);
  } else {
    part<C, 5, 3, 0>(v[0]), part<C, 5, 2, 0>(v[1]), part<C, 5, 1, 1>(v[2]);
    part<C, 5, 0, 2>(v[3]), part<C, 5, 0, 3>(v[4]);
    vec<C> left[13] = {v[0][3], v[0][4], v[1][2], v[1][3], v[1][4], v[2][1], v[2][2],
                       v[2][3], v[3][0], v[3][1], v[3][2], v[4][0], v[4][1]};
    return median_of<C, 13>(left);
  }
}

// The value at `rank` of v[0..n) in ascending order, without NaNs. v is not kept.
template <class C>
C select(C* v, int64_t n, int64_t rank) {
  int64_t low = 0, high = n - 1;
  while (low < high) {
    const C a = v[low], b = v[low + (high - low) / 2], c = v[high];
    const C pivot = a < b ? (b < c ? b : (a < c ? c : a)) : (a < c ? a : (b < c ? c : b));
    int64_t i = low, j = high;
    while (i <= j) {
      while (v[i] < pivot) ++i;
      while (v[j] > pivot) --j;
      if (i <= j) {
        const C t = v[i];
        v[i++] = v[j];
        v[j--] = t;
      }
    }
    if (rank <= j) {
      high = j;
    } else if (rank >= i) {
      low = i;
    } else {
      return v[rank];
    }
  }
  return v[low];
}

template <class C>
constexpr C kNan = static_cast<C>(__builtin_nanf(""));
template <class C>
constexpr C kHighest = static_cast<C>(__builtin_inff());

// What forward_nchw, for all types that are computed in C, does with rows of the image's own type.
template <class C>
struct RowsOf {
  void (*split)(const PhasedRow<C>& phases, const void* x, int64_t from, C* to);
  void (*put)(const C* row, int64_t count, void* y, int64_t to);  // null where rows are made in y itself
};
template <class T>
void split_row(const PhasedRow<compute_t<T>>& phases, const void* x, int64_t from, compute_t<T>* to) {
  phases.split(static_cast<const T*>(x) + from, to);
}
template <class T>
void put_row(const compute_t<T>* row, int64_t count, void* y, int64_t to) {
  constexpr int64_t kLanes = lanes<compute_t<T>>;
  for (int64_t i = 0; i < count; i += kLanes)
    store_n(static_cast<T*>(y) + to + i, load(row + i), part_of<compute_t<T>>(i, count));
}
template <class T>
RowsOf<compute_t<T>> rows_of() {
  if constexpr (__is_same(T, compute_t<T>)) return {&split_row<T>, nullptr};
  return {&split_row<T>, &put_row<T>};
}

template <class C, bool kPick, int kHeight, int kWidth>
void forward_nchw(const MedianPool2dParams& p, const RowsOf<C> images) {
  using I = int_t<C>;
  const Windows& v = p.windows;
  const int kernel_h = kHeight ? kHeight : static_cast<int>(v.kernel_h);
  const int kernel_w = kWidth ? kWidth : static_cast<int>(v.kernel_w);
  const int taps = kernel_h * kernel_w, count = taps | 1;
  const PhasedRow<C> phases(p.w, p.q, v.pad_w, v.kernel_w, v.stride_w, v.dilation_w);
  const Steps steps(p.mode, v, p.w);
  const int64_t width = round_up(p.q, lanes<C>);
  const int64_t unit_rows = rows_per_unit(p.n * p.c, p.p), units_each = ceil_div(p.p, unit_rows);
  // Windows [inner_first, inner_last) have all their columns inside.
  const int64_t inner_first = ceil_div(v.pad_w, v.stride_w);
  const int64_t room = p.w + v.pad_w - (v.kernel_w - 1) * v.dilation_w - 1;
  const int64_t inner_last = room < 0 ? 0 : min64(room / v.stride_w + 1, p.q);

  struct Piece {
    C *rows, *made;
    I *base, *columns;
    int64_t* held_row;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.rows = arena.take<C>(v.kernel_h * phases.size());
    s.made = arena.take<C>(width);
    s.base = arena.take<I>(width);
    s.columns = arena.take<I>(width);
    s.held_row = arena.take<int64_t>(v.kernel_h);
    return s;
  });

#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
    for (int64_t i = 0; i < v.kernel_h; ++i) phases.fill(s.rows + i * phases.size(), 0);
    int64_t tap_at[kMostVectors];
    for (int i = 0; i < kernel_w; ++i) tap_at[i] = phases.at(i * v.dilation_w);
    for (int64_t q = 0; q < width; ++q) {
      const int64_t begin = q * v.stride_w - v.pad_w;
      s.base[q] = static_cast<I>(begin);
      s.columns[q] =
          static_cast<I>(max64(last_tap(begin, v.kernel_w, v.dilation_w, p.w) - first_tap(begin, v.dilation_w), 0));
    }

#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
      const int64_t plane = unit / units_each, from = unit % units_each * unit_rows;
      for (int64_t i = 0; i < v.kernel_h; ++i) s.held_row[i] = -1;
      for (int64_t pp = from; pp < min64(from + unit_rows, p.p); ++pp) {
        const int64_t top = pp * v.stride_h - v.pad_h;
        const int r0 = static_cast<int>(first_tap(top, v.dilation_h));
        const int r1 = static_cast<int>(last_tap(top, v.kernel_h, v.dilation_h, p.h));
        const C* row[kMostVectors];
        for (int i = 0; i < kernel_h; ++i) row[i] = s.rows;
        for (int i = r0; i < r1; ++i) {
          const int64_t h = top + i * v.dilation_h, slot = v.dilation_h == 1 ? h % v.kernel_h : i;
          C* const buffer = s.rows + slot * phases.size();
          if (s.held_row[slot] != h) {
            images.split(phases, p.x, (plane * p.h + h) * p.w, buffer);
            s.held_row[slot] = h;
          }
          row[i] = buffer;
        }
        const int64_t out = (plane * p.p + pp) * p.q;
        C* const made = images.put ? s.made : static_cast<C*>(p.y) + out;
        const I rows = static_cast<I>(max64(r1 - r0, 0));
        for (int64_t q = 0; q < p.q; q += lanes<C>) {
          const int part = part_of<C>(q, p.q);
          const bool inner = r0 == 0 && r1 == kernel_h && q >= inner_first && q + part <= inner_last;
          const ivec<C> begin = *reinterpret_cast<const ivec<C>*>(s.base + q);
          const auto inside = [&](int r, int t) {
            const ivec<C> column = begin + static_cast<I>(t * v.dilation_w);
            return (column >= 0) & (column < static_cast<I>(p.w)) & (r >= r0 && r < r1 ? -1 : 0);
          };
          vec<C> values[kHeight ? (kHeight * kWidth | 1) : kMostVectors | 1];
          ivec<C> nan = {}, empty = {};
          if (inner) {
            vec<C>* to = values;
#pragma GCC unroll 8
            for (int r = 0; r < kernel_h; ++r)
#pragma GCC unroll 8
              for (int t = 0; t < kernel_w; ++t, ++to) {
                *to = load(row[r] + tap_at[t] + q);
                nan |= *to != *to;
              }
            if (taps != count) *to = set1(kLowest<C>);
          } else {
            const ivec<C> cells = *reinterpret_cast<const ivec<C>*>(s.columns + q) * rows;
            const ivec<C> lows = static_cast<I>(taps / 2) - ((cells - 1) >> 1);  // -Infs wanted; count / 2 = taps / 2
            empty = cells == 0;
            ivec<C> filled = {};
            const auto fill = [&]() {
              const vec<C> value = filled < lows ? set1(kLowest<C>) : set1(kHighest<C>);
              return value;
            };
            vec<C>* to = values;
            for (int r = 0; r < kernel_h; ++r)
              for (int t = 0; t < kernel_w; ++t, ++to) {
                const ivec<C> in = inside(r, t);
                const vec<C> cell = load(row[r] + tap_at[t] + q);
                nan |= in & (cell != cell);
                *to = in ? cell : fill();
                filled += in + 1;
              }
            if (taps != count) *to = fill();
          }
          vec<C> median;
          if constexpr (kHeight > 0) {
            median = median_of<C, (kHeight * kWidth | 1)>(values);
          } else {
            median = median_of<C>(values, count);
          }
          median = nan ? set1(kNan<C>) : median;
          store_n(made + q, empty ? set1(kNan<C>) : median, part);
          if constexpr (kPick) {
            ivec<C> choice = ivec<C>{} - 1;
            for (int r = r1 - 1; r >= r0; --r)
              for (int t = kernel_w - 1; t >= 0; --t) {
                const vec<C> cell = load(row[r] + tap_at[t] + q);
                ivec<C> hit = (cell == median) | (nan & (cell != cell));
                if (!inner) hit &= inside(r, t);
                choice = hit ? ivec<C>{} + static_cast<I>(r * steps.row + t * steps.column) : choice;
              }
            store_choice<C>(p.choice, p.mode, out + q, choice, begin + static_cast<I>(top * p.w), part);
          }
        }
        if (images.put) images.put(made, p.q, p.y, out);
      }
    }
  }
}

// The cells of one window that lie inside, in row-major order.
struct Cell {
  int64_t at, step;  // where it lies from the image's start; what is chosen with it
};
int64_t list_cells(const MedianPool2dParams& p, const Steps& steps, int64_t pp, int64_t q, int64_t pitch, Cell* cells) {
  const Windows& v = p.windows;
  const int64_t top = pp * v.stride_h - v.pad_h, left = q * v.stride_w - v.pad_w;
  const int64_t r1 = last_tap(top, v.kernel_h, v.dilation_h, p.h), s1 = last_tap(left, v.kernel_w, v.dilation_w, p.w);
  int64_t count = 0;
  for (int64_t r = first_tap(top, v.dilation_h); r < r1; ++r)
    for (int64_t s = first_tap(left, v.dilation_w); s < s1; ++s)
      cells[count++] = {((top + r * v.dilation_h) * p.w + left + s * v.dilation_w) * pitch,
                        r * steps.row + s * steps.column};
  return count;
}

template <class T>
void forward_nhwc(const MedianPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const bool pick = p.mode != Choice::none;
  const Windows& v = p.windows;
  const Steps steps(p.mode, v, p.w);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    const T* const image = static_cast<const T*>(p.x) + row / p.p * p.h * p.w * p.c;
    Cell cells[kMostVectors];
    for (int64_t q = 0; q < p.q; ++q) {
      const int count = static_cast<int>(list_cells(p, steps, row % p.p, q, p.c, cells));
      const int64_t out = (row * p.q + q) * p.c;
      const int64_t base = (row % p.p * v.stride_h - v.pad_h) * p.w + q * v.stride_w - v.pad_w;
      for (int64_t c = 0; c < p.c; c += lanes<C>) {
        const int part = part_of<C>(c, p.c);
        vec<C> values[kMostVectors | 1];
        ivec<C> nan = {};
        for (int i = 0; i < count; ++i) {
          values[i] = load_n(image + cells[i].at + c, part);
          nan |= values[i] != values[i];
        }
        if (count % 2 == 0) values[count] = set1(kLowest<C>);
        vec<C> median;
        switch (count) {
          case 0: median = set1(kNan<C>); break;
          case 4: median = median_of<C, 5>(values); break;
          case 9: median = median_of<C, 9>(values); break;
          default: median = median_of<C>(values, count | 1);
        }
        median = nan ? set1(kNan<C>) : median;
        store_n(static_cast<T*>(p.y) + out + c, median, part);
        if (pick) {
          ivec<C> choice = ivec<C>{} - 1;
          for (int i = count - 1; i >= 0; --i) {
            const vec<C> cell = load_n(image + cells[i].at + c, part);
            choice = (cell == median) | (nan & (cell != cell)) ? ivec<C>{} + static_cast<I>(cells[i].step) : choice;
          }
          store_choice<C>(p.choice, p.mode, out + c, choice, ivec<C>{} + static_cast<I>(base), part);
        }
      }
    }
  }
}

// Square windows of 2, 3 or 5 cells a side that lie inside the image: the columns of a row of windows are sorted one after the
// other, in a ring in L1, and each serves the windows it is part of. Those at the border are filled up to whole windows.
template <class T, int kSide>
void forward_nhwc_sorted(const MedianPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const bool pick = p.mode != Choice::none;
  constexpr int kCells = kSide * kSide;
  const Windows& v = p.windows;
  const Steps steps(p.mode, v, p.w);
  const bool stream = large_output<T>(p.n * p.c * p.h * p.w, p.n * p.c * p.p * p.q);
  const int64_t reach_h = (kSide - 1) * v.dilation_h + 1, reach_w = (kSide - 1) * v.dilation_w + 1;
  const int64_t pitch = round_up(p.c, lanes<C>), column = (kSide + 1) * pitch;  // the ranks, and where there is a NaN
  const ScratchPieces scratch(p.threads, reach_w * column * static_cast<int64_t>(sizeof(C)));

#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    C* const ring = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    const int64_t pp = row % p.p, top = pp * v.stride_h - v.pad_h;
    const T* const image = static_cast<const T*>(p.x) + row / p.p * p.h * p.w * p.c;
    const bool rows_inside = top >= 0 && top + reach_h <= p.h;
    Ahead ahead = rows_of_next_windows(image, pp + 1, p.p, v.stride_h, v.pad_h, reach_h, p.h, p.w * p.c, p.q);
    int64_t sorted = 0, slot = 0;  // columns before `sorted` are, or are not needed; the next one's slot
    for (int64_t q = 0; q < p.q; ++q) {
      ahead.fetch();
      const int64_t left = q * v.stride_w - v.pad_w, out = (row * p.q + q) * p.c;
      const ivec<C> base = ivec<C>{} + static_cast<I>(top * p.w + left);
      const auto finish = [&](int64_t c, int part, vec<C> median, ivec<C> nan, const Cell* cells,
                              int count) __attribute__((always_inline)) {
        if (count == 0) median = set1(kNan<C>);
        median = nan ? set1(kNan<C>) : median;
        store_output(static_cast<T*>(p.y) + out + c, median, part, stream);
        if (pick) {
          ivec<C> choice = ivec<C>{} - 1;
          for (int i = count - 1; i >= 0; --i) {
            const vec<C> cell = load_n(image + cells[i].at + c, part);
            choice = (cell == median) | (nan & (cell != cell)) ? ivec<C>{} + static_cast<I>(cells[i].step) : choice;
          }
          store_choice<C>(p.choice, p.mode, out + c, choice, base, part);
        }
      };
      Cell cells[kCells];
      if (rows_inside && left >= 0 && left + reach_w <= p.w) {
        if (pick) list_cells(p, steps, pp, q, p.c, cells);
        if (sorted < left) sorted = left;
        for (; sorted < left + reach_w; ++sorted) {
          C* const to = ring + slot * column;
          slot = slot + 1 == reach_w ? 0 : slot + 1;
          const T* const x = image + (top * p.w + sorted) * p.c;
          for (int64_t c = 0; c < p.c; c += lanes<C>) {
            const int part = part_of<C>(c, p.c);
            vec<C> values[kSide];
            ivec<C> nan = {};
#pragma GCC unroll 5
            for (int r = 0; r < kSide; ++r) {
              values[r] = load_n(x + r * v.dilation_h * p.w * p.c + c, part);
              nan |= values[r] != values[r];
            }
            sort<C, kSide>(values);
#pragma GCC unroll 5
            for (int r = 0; r < kSide; ++r) store(to + r * pitch + c, values[r]);
            store(to + kSide * pitch + c, reinterpret_cast<vec<C>>(nan));
          }
        }
        const C* columns[kSide];  // the ring's next slot is the leftmost column's
        for (int t = 0; t < kSide; ++t) {
          const int64_t at = slot + t * v.dilation_w;
          columns[t] = ring + (at >= reach_w ? at - reach_w : at) * column;
        }
        for (int64_t c = 0; c < p.c; c += lanes<C>) {
          vec<C> values[kSide][kSide];
          ivec<C> nan = {};
#pragma GCC unroll 5
          for (int t = 0; t < kSide; ++t) {
#pragma GCC unroll 5
            for (int r = 0; r < kSide; ++r) values[r][t] = load(columns[t] + r * pitch + c);
            nan |= reinterpret_cast<ivec<C>>(load(columns[t] + kSide * pitch + c));
          }
          finish(c, part_of<C>(c, p.c), median_of_sorted<C, kSide>(values), nan, cells, kCells);
        }
      } else {
        const int count = static_cast<int>(list_cells(p, steps, pp, q, p.c, cells));
        const int lows = kCells / 2 - (count - 1) / 2;  // -Infs wanted
        for (int64_t c = 0; c < p.c; c += lanes<C>) {
          const int part = part_of<C>(c, p.c);
          vec<C> values[kCells | 1];
          ivec<C> nan = {};
          for (int i = 0; i < count; ++i) {
            values[i] = load_n(image + cells[i].at + c, part);
            nan |= values[i] != values[i];
          }
          for (int i = count; i < (kCells | 1); ++i) values[i] = set1(i - count < lows ? kLowest<C> : kHighest<C>);
          finish(c, part, median_of<C, (kCells | 1)>(values), nan, cells, count);
        }
      }
    }
    if (stream) end_streaming();
  }
}

// Large windows, either layout: one window at a time.
template <class T>
void forward_large(const MedianPool2dParams& p) {
  using C = compute_t<T>;
  const Windows& v = p.windows;
  const Steps steps(p.mode, v, p.w);
  const bool nchw = p.layout == Layout::nchw;
  const int64_t channels = nchw ? 1 : p.c, rows = nchw ? p.n * p.c * p.p : p.n * p.p;
  const int64_t most = min64(v.kernel_h, p.h) * min64(v.kernel_w, p.w);
  struct Piece {
    C* values;
    Cell* cells;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.values = arena.take<C>(most);
    s.cells = arena.take<Cell>(most);
    return s;
  });
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const Piece s = scratch.mine();
    const T* const image = static_cast<const T*>(p.x) + row / p.p * p.h * p.w * channels;
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t count = list_cells(p, steps, row % p.p, q, channels, s.cells);
      const int64_t base = (row % p.p * v.stride_h - v.pad_h) * p.w + q * v.stride_w - v.pad_w;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t out = (row * p.q + q) * channels + c;
        int64_t chosen = -1;
        for (int64_t i = 0; i < count; ++i) {
          s.values[i] = load_scalar(image[s.cells[i].at + c]);
          if (s.values[i] != s.values[i] && chosen < 0) chosen = i;  // the first NaN
        }
        C median = kNan<C>;
        if (chosen < 0 && count > 0) {
          median = select(s.values, count, (count - 1) / 2);
          for (chosen = 0; load_scalar(image[s.cells[chosen].at + c]) != median;) ++chosen;
        }
        store_scalar(static_cast<T*>(p.y) + out, median);
        if (p.mode == Choice::offsets)
          static_cast<uint8_t*>(p.choice)[out] = chosen < 0 ? kNoOffset : static_cast<uint8_t>(s.cells[chosen].step);
        if (p.mode == Choice::indices)
          static_cast<int64_t*>(p.choice)[out] = chosen < 0 ? kNoIndex : base + s.cells[chosen].step;
      }
    }
  }
}

// To ask at run time whether cells are picked costs up to 8% here.
template <class C, bool kPick>
void forward_planes(const MedianPool2dParams& p, int64_t side, const RowsOf<C>& images) {
  if (side == 2) return forward_nchw<C, kPick, 2, 2>(p, images);
  if (side == 3) return forward_nchw<C, kPick, 3, 3>(p, images);
  if (side == 5) return forward_nchw<C, kPick, 5, 5>(p, images);
  forward_nchw<C, kPick, 0, 0>(p, images);
}

// float64, and on the portable level the types that are converted, do without, to save time of compilation.
template <class T>
#if CNNOPS_ISA_avx2 || CNNOPS_ISA_avx512
constexpr bool kSorts = !__is_same(T, double);
#else
constexpr bool kSorts = __is_same(T, float);
#endif

template <class T>
void forward(const MedianPool2dParams& p) {
  using C = compute_t<T>;
  const Windows& v = p.windows;
  if (v.kernel_h > kMostVectors || v.kernel_h * v.kernel_w > kMostVectors) return forward_large<T>(p);
  const int64_t side = v.kernel_h == v.kernel_w ? v.kernel_w : 0;
  if (p.layout == Layout::nhwc) {
    if constexpr (kSorts<T>) {
      if (v.stride_w <= v.kernel_w) {
        if (side == 2) return forward_nhwc_sorted<T, 2>(p);
        if (side == 3) return forward_nhwc_sorted<T, 3>(p);
        if (side == 5) return forward_nhwc_sorted<T, 5>(p);
      }
    }
    return forward_nhwc<T>(p);
  }
  const RowsOf<C> images = rows_of<T>();
  p.mode == Choice::none ? forward_planes<C, false>(p, side, images) : forward_planes<C, true>(p, side, images);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(median_pool2d_forward, MedianPool2dParams, forward)
