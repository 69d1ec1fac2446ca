// Max pooling. NCHW: vectors run along an output row; the input rows of a window lie converted and padded in a small ring
// in L1 (cpu/pool_rows.h), shared by the output rows of a plane that overlap. NHWC: vectors run along the channels. Every
// window is walked in row-major order by one thread.
#include "ops/max_pool2d.h"

#include <omp.h>

#include "cpu/pool_rows.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class C>
struct Best {
  vec<C> value;
  ivec<C> choice;
};

template <class C, bool kPick>
[[gnu::always_inline]] inline void take(Best<C>& best, vec<C> v, int_t<C> tap) {
  const ivec<C> wins = (v > best.value) | (v != v);
  best.value = wins ? v : best.value;
  if constexpr (kPick) best.choice = wins ? ivec<C>{} + tap : best.choice;
}

// Rows of a window that are held at once; taller windows are walked in parts of this many.
constexpr int64_t kRows = 16;

// kWidth: kernel_w where it is worth unrolling, else 0.
template <class T, bool kPick, int kWidth>
void forward_nchw(const MaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const Windows& v = p.windows;
  const PhasedRow<C> phases(p.w, p.q, v.pad_w, v.kernel_w, v.stride_w, v.dilation_w);
  const Steps steps(p.mode, v, p.w);
  const int64_t held = min64(v.kernel_h, kRows), width = round_up(p.q, lanes<C>);
  const int64_t unit_rows = rows_per_unit(p.n * p.c, p.p), units_each = ceil_div(p.p, unit_rows);

  struct Piece {
    C *rows, *values;
    I *choices, *first, *base;
    int64_t *held_row, *tap_at;
  };
  const auto lay_out = [&](Arena arena, int64_t* bytes) {
    Piece s;
    s.rows = arena.take<C>(held * phases.size());
    s.values = arena.take<C>(width);
    s.choices = arena.take<I>(width);
    s.first = arena.take<I>(width);
    s.base = arena.take<I>(width);
    s.held_row = arena.take<int64_t>(held);
    s.tap_at = arena.take<int64_t>(v.kernel_w);
    *bytes = arena.used;
    return s;
  };
  int64_t bytes;
  lay_out(Arena{nullptr}, &bytes);
  const ScratchPieces scratch(p.threads, bytes);

#pragma omp parallel num_threads(p.threads)
  {
    int64_t ignored;
    const Piece s = lay_out(Arena{static_cast<char*>(scratch.piece(omp_get_thread_num()))}, &ignored);
    for (int64_t i = 0; i < held; ++i) phases.fill(s.rows + i * phases.size(), kLowest<C>);
    for (int64_t i = 0; i < v.kernel_w; ++i) s.tap_at[i] = phases.at(i * v.dilation_w);
    for (int64_t q = 0; q < width; ++q) {
      const int64_t begin = q * v.stride_w - v.pad_w, tap = first_tap(begin, v.dilation_w);
      s.first[q] = static_cast<I>(tap < last_tap(begin, v.kernel_w, v.dilation_w, p.w) ? tap * steps.column : kNoCells);
      s.base[q] = static_cast<I>(begin);
    }

#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
      const int64_t plane = unit / units_each, from = unit % units_each * unit_rows;
      const T* const x = static_cast<const T*>(p.x) + plane * p.h * p.w;
      for (int64_t i = 0; i < held; ++i) s.held_row[i] = -1;
      for (int64_t pp = from; pp < min64(from + unit_rows, p.p); ++pp) {
        const int64_t top = pp * v.stride_h - v.pad_h;
        const int64_t r0 = first_tap(top, v.dilation_h), r1 = last_tap(top, v.kernel_h, v.dilation_h, p.h);
        const int64_t out = (plane * p.p + pp) * p.q;
        T* const y = static_cast<T*>(p.y) + out;
        const ivec<C> top_row = ivec<C>{} + static_cast<I>(top * p.w);
        for (int64_t r = min64(r0, max64(r1 - 1, 0)); r < max64(r1, 1); r += held) {  // once where there is no cell
          const bool begins = r <= r0 || r1 <= r0, ends = r + held >= r1;
          const int64_t part_end = r1 <= r0 ? r : min64(r + held, r1);
          const C* row[kRows];
          for (int64_t i = r; i < part_end; ++i) {
            const int64_t h = top + i * v.dilation_h;
            const int64_t slot = v.dilation_h == 1 ? h % held : i - r;
            C* const buffer = s.rows + slot * phases.size();
            if (s.held_row[slot] != h) {
              phases.split(x + h * p.w, buffer);
              s.held_row[slot] = h;
            }
            row[i - r] = buffer;
          }
          for (int64_t q = 0; q < p.q; q += lanes<C>) {
            Best<C> best;
            if (begins) {
              best.value = set1(kLowest<C>);
              const ivec<C> first = *reinterpret_cast<const ivec<C>*>(s.first + q);
              best.choice = r1 <= r0 ? ivec<C>{} - 1 : first + static_cast<I>(r0 * steps.row);
            } else {
              best.value = load(s.values + q);
              best.choice = *reinterpret_cast<const ivec<C>*>(s.choices + q);
            }
            for (int64_t i = r; i < part_end; ++i) {
              const C* const at = row[i - r] + q;
              I tap = static_cast<I>(i * steps.row);
              if constexpr (kWidth > 0) {
#pragma GCC unroll 8
                for (int t = 0; t < kWidth; ++t, tap += static_cast<I>(steps.column))
                  take<C, kPick>(best, load(at + s.tap_at[t]), tap);
              } else {
                for (int64_t t = 0; t < v.kernel_w; ++t, tap += static_cast<I>(steps.column))
                  take<C, kPick>(best, load(at + s.tap_at[t]), tap);
              }
            }
            if (ends) {
              const int part = part_of<C>(q, p.q);
              store_n(y + q, best.value, part);
              if constexpr (kPick) {
                const ivec<C> base = *reinterpret_cast<const ivec<C>*>(s.base + q) + top_row;
                store_choice<C>(p.choice, p.mode, out + q, best.choice, base, part);
              }
            } else {
              store(s.values + q, best.value);
              *reinterpret_cast<ivec<C>*>(s.choices + q) = best.choice;
            }
          }
        }
      }
    }
  }
}

template <class T, bool kPick>
void forward_nhwc(const MaxPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const Windows& v = p.windows;
  const Steps steps(p.mode, v, p.w);
  const int64_t step_h = v.dilation_h * p.w * p.c, step_w = v.dilation_w * p.c;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.p; ++row) {
    const int64_t top = row % p.p * v.stride_h - v.pad_h;
    const int64_t r0 = first_tap(top, v.dilation_h), r1 = last_tap(top, v.kernel_h, v.dilation_h, p.h);
    const T* const image = static_cast<const T*>(p.x) + row / p.p * p.h * p.w * p.c;
    for (int64_t q = 0; q < p.q; ++q) {
      const int64_t left = q * v.stride_w - v.pad_w;
      const int64_t s0 = first_tap(left, v.dilation_w), s1 = last_tap(left, v.kernel_w, v.dilation_w, p.w);
      const bool cells = r0 < r1 && s0 < s1;
      const int64_t out = (row * p.q + q) * p.c;
      const T* const corner = image + ((top + r0 * v.dilation_h) * p.w + left + s0 * v.dilation_w) * p.c;
      const I first = cells ? static_cast<I>(r0 * steps.row + s0 * steps.column) : -1;
      const ivec<C> base = ivec<C>{} + static_cast<I>(top * p.w + left);
      for (int64_t c = 0; c < p.c; c += lanes<C>) {
        const int part = part_of<C>(c, p.c);
        Best<C> best{set1(kLowest<C>), ivec<C>{} + first};
        for (int64_t r = r0; r < r1; ++r) {
          const T* at = corner + (r - r0) * step_h + c;
          I tap = static_cast<I>(r * steps.row + s0 * steps.column);
          for (int64_t s = s0; s < s1; ++s, at += step_w, tap += static_cast<I>(steps.column))
            take<C, kPick>(best, load_n(at, part), tap);
        }
        store_n(static_cast<T*>(p.y) + out + c, best.value, part);
        if constexpr (kPick) store_choice<C>(p.choice, p.mode, out + c, best.choice, base, part);
      }
    }
  }
}

template <class T, bool kPick>
void forward_as(const MaxPool2dParams& p) {
  if (p.layout == Layout::nhwc) return forward_nhwc<T, kPick>(p);
  if (p.windows.kernel_w == 2) return forward_nchw<T, kPick, 2>(p);
  if (p.windows.kernel_w == 3) return forward_nchw<T, kPick, 3>(p);
  forward_nchw<T, kPick, 0>(p);
}

template <class T>
void forward(const MaxPool2dParams& p) {
  p.mode == Choice::none ? forward_as<T, false>(p) : forward_as<T, true>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(max_pool2d_forward, MaxPool2dParams, forward)
