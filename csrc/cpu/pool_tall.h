// Windows of NCHW images that share few rows or none: the best of each column of a row of windows is found along whole rows of
// the image, then the best of those of each window, where of equal values in two columns the upper is first. Windows side by
// side are one vector then: their first columns, their second ones, and so on.
#pragma once

#include <omp.h>

#include "cpu/pool_rows.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class C>
class TallWindows {
  using I = int_t<C>;

 public:
  // What came out for a vector of windows: the tap is negative where a window has no column.
  struct Pick {
    vec<C> value;
    ivec<C> row, tap;
  };

  // Of `count` windows of at most `most` columns, over rows of w cells.
  TallWindows(Arena& arena, int64_t w, int64_t count, int64_t most)
      : w_(w), count_(count), most_(most), width_(round_up(w, lanes<C>)), windows_(round_up(count, lanes<C>)) {
    values_ = arena.take<C>(2 * width_);
    rows_ = arena.take<I>(2 * width_);
    picked_ = arena.take<C>(2 * most_ * windows_);
    picked_rows_ = arena.take<I>(2 * most_ * windows_);
    column_ = arena.take<I>(most_ * windows_);
    tap_ = arena.take<I>(most_ * windows_);
  }

  // Window q has `columns` columns, column i is cell first_column + i * step of a row and called first_tap + i. What is
  // missing to `most` is its last column again, which changes nothing.
  void set(int64_t q, int64_t columns, int64_t first_column, int64_t step, int64_t first_tap) {
    for (int64_t i = 0; i < most_; ++i) {
      const int64_t nearest = min64(i, columns - 1);
      column_[i * windows_ + q] = static_cast<I>(columns > 0 ? first_column + nearest * step : 0);
      tap_[i * windows_ + q] = static_cast<I>(columns > 0 ? first_tap + nearest : -1);
    }
  }
  void clear() {
    for (int64_t i = 0; i < 2 * most_ * windows_; ++i) picked_[i] = 0, picked_rows_[i] = 0;
    for (int64_t i = 0; i < most_ * windows_; ++i) column_[i] = 0, tap_[i] = -1;
  }

  // Rows of windows pass through three steps: read(), pick(), and at() for each vector. What a step stored is slow to load
  // until it has left for the cache, so each works on the row after the next step's, in the buffers of its parity.
  template <class T>
  void read(int64_t parity, const T* x, int64_t pitch, int64_t first, int64_t last) {
    const auto columns = [&](int64_t w, int part) __attribute__((always_inline)) {
      const T* at = x + w;
      Best<C> best{load_n(at, part), ivec<C>{} + static_cast<I>(first)};
      for (int64_t r = first + 1; r < last; ++r)
        take<C, true>(best, load_n(at += pitch, part), ivec<C>{} + static_cast<I>(r));
      store(values_ + parity * width_ + w, best.value);
      *reinterpret_cast<ivec<C>*>(rows_ + parity * width_ + w) = best.choice;
    };
    int64_t w = 0;
    for (; w + lanes<C> <= w_; w += lanes<C>) columns(w, lanes<C>);
    if (w < w_) columns(w, static_cast<int>(w_ - w));
  }
  void pick(int64_t parity) {
    const C* const values = values_ + parity * width_;
    const I* const rows = rows_ + parity * width_;
    for (int64_t i = 0; i < most_; ++i) {
      const I* const column = column_ + i * windows_;
      C* const to = picked_ + (parity * most_ + i) * windows_;
      I* const to_rows = picked_rows_ + (parity * most_ + i) * windows_;
      for (int64_t q = 0; q < count_; ++q) to[q] = values[column[q]], to_rows[q] = rows[column[q]];
    }
  }
  Pick at(int64_t parity, int64_t q) const {
    const int64_t from = parity * most_ * windows_ + q;
    Pick best{load(picked_ + from), load_int(picked_rows_ + from), load_int(tap_ + q)};
    for (int64_t i = 1; i < most_; ++i) {
      const vec<C> now = load(picked_ + from + i * windows_);
      const ivec<C> row = load_int(picked_rows_ + from + i * windows_);
      const ivec<C> nan = now != now, was_nan = best.value != best.value;
      const ivec<C> wins =
          (now > best.value) | ((now == best.value) & (row < best.row)) | (nan & (~was_nan | (row >= best.row)));
      best.value = wins ? now : best.value;
      best.row = wins ? row : best.row;
      best.tap = wins ? load_int(tap_ + i * windows_ + q) : best.tap;
    }
    return best;
  }

 private:
  static ivec<C> load_int(const I* p) { return *reinterpret_cast<const ivec<C>*>(p); }

  int64_t w_, count_, most_, width_, windows_;
  C *values_, *picked_;
  I *rows_, *picked_rows_, *column_, *tap_;
};

// Calls write(plane, row, windows) for every row of windows of all planes. set(windows) describes `count` windows of a row of
// w cells, and read(windows, plane, row) reads the rows that they lie in.
template <class C, class Set, class Read, class Write>
void for_tall_rows(int threads, int64_t planes, int64_t rows, int64_t w, int64_t count, int64_t most, const Set& set,
                   const Read& read, const Write& write) {
  const int64_t unit_rows = rows_per_unit(planes, rows), units_each = ceil_div(rows, unit_rows);
  const ThreadScratch scratch(threads, [&](Arena& arena) { return TallWindows<C>(arena, w, count, most); });
#pragma omp parallel num_threads(threads)
  {
    TallWindows<C> windows = scratch.mine();
    windows.clear();
    set(windows);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < planes * units_each; ++unit) {
      const int64_t plane = unit / units_each, from = unit % units_each * unit_rows, to = min64(from + unit_rows, rows);
      for (int64_t i = from; i < to + 2; ++i) {
        if (i < to) read(windows, plane, i);
        if (i - 1 >= from && i - 1 < to) windows.pick((i - 1) % 2);
        if (i - 2 >= from) write(windows, plane, i - 2);
      }
    }
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
