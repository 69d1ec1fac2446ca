// Derivatives of picking poolings. Backward is a gather: each element of dx asks the windows that hold it whether they
// chose it, so nothing is zeroed first, nothing is added atomically, and one thread adds in the contract's order.
// NCHW: vectors run along a row of dx, one phase of the stride at a time; dy and choice rows lie padded in a small ring;
// windows of 2 x 2 side by side need none of that.
// NHWC: vectors run along the channels.
#include "ops/index_pool2d.h"

#include <omp.h>

#include "cpu/pool_rows.h"
#include "cpu/simd/stream.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T, bool kIndices>
void backward_nchw(const IndexPool2dParams& p) {
  using C = compute_t<T>;
  using I = int_t<C>;
  const Windows& v = p.windows;
  const PhasedRow<C> phases(p.w, p.q, v.pad_w, v.kernel_w, v.stride_w, v.dilation_w);
  const int64_t reach = (v.kernel_h - 1) * v.dilation_h + 1;
  const int64_t ring = min64(p.p, (reach - 1) / v.stride_h + 1);
  const int64_t lead = round_up((v.kernel_w - 1) * v.dilation_w / phases.stride, lanes<C>);
  const int64_t length = lead + phases.length;
  const int64_t unit_rows = rows_per_unit(p.n * p.c, p.h), units_each = ceil_div(p.h, unit_rows);

  struct Row {
    const C* dy;
    const I* choice;
    I offset;  // r * kernel_w
  };
  struct Piece {
    C *sums, *dy;
    I* choices;
    int64_t *held, *phase_begin;
    Tap* taps;
    Row* rows;
  };
  const auto lay_out = [&](Arena arena, int64_t* bytes) {
    Piece s;
    s.sums = arena.take<C>(phases.size());
    s.dy = arena.take<C>(ring * length);
    s.choices = arena.take<I>(ring * length);
    s.held = arena.take<int64_t>(ring);
    s.phase_begin = arena.take<int64_t>(phases.stride + 1);
    s.taps = arena.take<Tap>(v.kernel_w);
    s.rows = arena.take<Row>(ring);
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
    for (int64_t i = 0; i < ring * length; ++i) s.dy[i] = 0, s.choices[i] = -1;
    list_taps(phases, v.kernel_w, v.dilation_w, s.phase_begin, s.taps);

#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < p.n * p.c * units_each; ++unit) {
      const int64_t plane = unit / units_each, from = unit % units_each * unit_rows;
      const T* const dy = static_cast<const T*>(p.in) + plane * p.p * p.q;
      const int64_t choice = plane * p.p * p.q;
      for (int64_t i = 0; i < ring; ++i) s.held[i] = -1;
      for (int64_t h = from; h < min64(from + unit_rows, p.h); ++h) {
        const int64_t p0 = first_window(h, v.pad_h, reach, v.stride_h), p1 = last_window(h, v.pad_h, v.stride_h, p.p);
        int64_t rows = 0;
        for (int64_t pp = p0; pp < p1; ++pp) {
          const int64_t down = h + v.pad_h - pp * v.stride_h;
          if (v.dilation_h != 1 && down % v.dilation_h != 0) continue;
          const int64_t slot = pp % ring;
          C* const held_dy = s.dy + slot * length + lead;
          I* const held_choice = s.choices + slot * length + lead;
          if (s.held[slot] != pp) {
            s.held[slot] = pp;
            for (int64_t q = 0; q < p.q; q += lanes<C>) {
              const int part = part_of<C>(q, p.q);
              const int64_t at = choice + pp * p.q + q;
              ivec<C> chosen;
              if constexpr (kIndices) {
                chosen = load_i64_n<C>(static_cast<const int64_t*>(p.choice) + at, part);
              } else {
                chosen = load_u8_n<C>(static_cast<const uint8_t*>(p.choice) + at, part);
              }
              // Past the row's end dy is 0 already, so it does not matter what was chosen there.
              *reinterpret_cast<ivec<C>*>(held_choice + q) = chosen;
              store(held_dy + q, load_n(dy + pp * p.q + q, part));
            }
          }
          s.rows[rows++] = {held_dy, held_choice, static_cast<I>(down / v.dilation_h * v.kernel_w)};
        }
        for (int64_t j = 0; j < phases.stride; ++j) {
          TapRange<C> range(s.phase_begin[j + 1]);
          for (int64_t i = phases.begin(j), end = phases.end(j); i < end; i += lanes<C>) {
            range.move_to(i, p.q, s.taps, s.phase_begin[j]);
            [[maybe_unused]] ivec<C> cell;
            if constexpr (kIndices)
              cell = iota<ivec<C>>() * static_cast<I>(phases.stride) +
                     static_cast<I>(h * p.w + i * phases.stride + j - phases.pad);
            vec<C> sum = {};
            for (int64_t k = 0; k < rows; ++k) {
              const Row& row = s.rows[k];
              for (int64_t t = range.lo; t < range.hi; ++t) {
                const int64_t at = i - s.taps[t].distance;
                if constexpr (!kIndices) cell = ivec<C>{} + (row.offset + static_cast<I>(s.taps[t].index));
                const ivec<C> chosen = *reinterpret_cast<const ivec<C>*>(row.choice + at);
                sum += chosen == cell ? load(row.dy + at) : vec<C>{};
              }
            }
            store(s.sums + j * phases.length + i, sum);
          }
        }
        phases.merge(s.sums, static_cast<T*>(p.out) + (plane * p.h + h) * p.w);
      }
    }
  }
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

template <class T>
void backward_nchw_adaptive(const IndexPool2dParams& p) {
  using C = compute_t<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.c * p.h; ++row) {
    const int64_t plane = row / p.h, h = row % p.h;
    const T* const dy = static_cast<const T*>(p.in) + plane * p.p * p.q;
    const int64_t* const choice = static_cast<const int64_t*>(p.choice) + plane * p.p * p.q;
    T* const dx = static_cast<T*>(p.out) + row * p.w;
    const int64_t p0 = adaptive_first(h, p.h, p.p), p1 = adaptive_last(h, p.h, p.p);
    for (int64_t w = 0; w < p.w; ++w) {
      const int64_t q0 = adaptive_first(w, p.w, p.q), q1 = adaptive_last(w, p.w, p.q);
      C sum = 0;
      for (int64_t pp = p0; pp < p1; ++pp)
        for (int64_t q = q0; q < q1; ++q)
          if (choice[pp * p.q + q] == h * p.w + w) sum += load_scalar(dy[pp * p.q + q]);
      store_scalar(&dx[w], sum);
    }
  }
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
      ivec<C> chosen;
      if constexpr (kIndices) {
        chosen = load_i64_n<C>(static_cast<const int64_t*>(choice) + choice_at + at, part);
      } else {
        chosen = load_u8_n<C>(static_cast<const uint8_t*>(choice) + choice_at + at, part);
      }
      sum += chosen == ivec<C>{} + static_cast<I>(holders[k].chosen) ? load_n(dy + at, part) : vec<C>{};
    }
    store_output(dx + c, sum, part, stream);
  };
  int64_t c = 0;
  for (; c + lanes<C> <= channels; c += lanes<C>) vectors(c, lanes<C>);
  if (c < channels) vectors(c, static_cast<int>(channels - c));
}

template <class T, bool kIndices>
void backward_nhwc(const IndexPool2dParams& p) {
  const bool stream = p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
  const Windows& v = p.windows;
  const int64_t reach_h = (v.kernel_h - 1) * v.dilation_h + 1, reach_w = (v.kernel_w - 1) * v.dilation_w + 1;
  const int64_t most = p.adaptive ? (p.p / p.h + 2) * (p.q / p.w + 2)
                                  : ((reach_h - 1) / v.stride_h + 1) * ((reach_w - 1) / v.stride_w + 1);
  const int64_t holders_each = min64(most, p.p * p.q);
  const ScratchPieces scratch(p.threads, holders_each * static_cast<int64_t>(sizeof(Holder)));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t row = 0; row < p.n * p.h; ++row) {
    Holder* const holders = static_cast<Holder*>(scratch.piece(omp_get_thread_num()));
    const int64_t h = row % p.h, image = row / p.h * p.p * p.q * p.c;
    const T* const dy = static_cast<const T*>(p.in) + image;
    const int64_t p0 = p.adaptive ? adaptive_first(h, p.h, p.p) : first_window(h, v.pad_h, reach_h, v.stride_h);
    const int64_t p1 = p.adaptive ? adaptive_last(h, p.h, p.p) : last_window(h, v.pad_h, v.stride_h, p.p);
    for (int64_t w = 0; w < p.w; ++w) {
      const int64_t q0 = p.adaptive ? adaptive_first(w, p.w, p.q) : first_window(w, v.pad_w, reach_w, v.stride_w);
      const int64_t q1 = p.adaptive ? adaptive_last(w, p.w, p.q) : last_window(w, v.pad_w, v.stride_w, p.q);
      int64_t count = 0;
      for (int64_t pp = p0; pp < p1; ++pp)
        for (int64_t q = q0; q < q1; ++q) {
          int64_t chosen = h * p.w + w;
          if constexpr (!kIndices) {
            int64_t down = h + v.pad_h - pp * v.stride_h, right = w + v.pad_w - q * v.stride_w;
            if (v.dilation_h != 1 || v.dilation_w != 1) {
              if (down % v.dilation_h != 0 || right % v.dilation_w != 0) continue;
              down /= v.dilation_h, right /= v.dilation_w;
            }
            chosen = down * v.kernel_w + right;
          }
          holders[count++] = {(pp * p.q + q) * p.c, chosen};
        }
      T* const dx = static_cast<T*>(p.out) + (row * p.w + w) * p.c;
      switch (count) {
        case 1: pixel_nhwc<T, kIndices, 1>(dx, dy, p.choice, image, holders, count, p.c, stream); break;
        case 2: pixel_nhwc<T, kIndices, 2>(dx, dy, p.choice, image, holders, count, p.c, stream); break;
        case 4: pixel_nhwc<T, kIndices, 4>(dx, dy, p.choice, image, holders, count, p.c, stream); break;
        default: pixel_nhwc<T, kIndices, 0>(dx, dy, p.choice, image, holders, count, p.c, stream);
      }
    }
    if (stream) end_streaming();
  }
}

template <class T>
void backward(const IndexPool2dParams& p) {
  const bool indices = p.mode == Choice::indices;
  if (p.layout == Layout::nhwc) {
    indices ? backward_nhwc<T, true>(p) : backward_nhwc<T, false>(p);
  } else if (p.adaptive) {
    backward_nchw_adaptive<T>(p);
  } else if (side_by_side_2x2(p)) {
    indices ? backward_nchw_2x2<T, true>(p) : backward_nchw_2x2<T, false>(p);
  } else {
    indices ? backward_nchw<T, true>(p) : backward_nchw<T, false>(p);
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
