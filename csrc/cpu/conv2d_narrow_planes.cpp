// Depthwise convolution of NCHW images of a few pixels a row: filters of 3 x 3, 5 x 5 and 7 x 7, padded so that their middle
// meets the pixels of the output (every second one, for stride 2). For AVX-512.
//
// A row is one or two vectors, or, with 3 x 3 of up to 8 pixels, half of one: then two rows are worked on at once. So every
// row is read once, nothing outside of it has to be, and the columns of a filter meet it shifted by whole lanes, with zeros
// coming in from the sides. A step takes one vector of rows of the input, of stride 2 two rows, and adds it to all the rows
// of the output that it belongs to, which stay in registers meanwhile. In the gradient of the weights the sums of the taps
// stay there; with 7 x 7 those of three rows of a filter at a time.
//
// Kernels are for float. Planes of the other types are converted once, in the L1 cache.
//
// In the gradient of the weights zeros stand for what is outside of x and dy: next to an infinite number they give NaN.
//
// Tasks are planes (weight_grad: slices of the images x blocks of channels): cut by shape alone.
#if CNNOPS_ISA_avx512
#include "cpu/depthwise_planes.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int kRowLanes = lanes<float>, kHalfRow = kRowLanes / 2;
using LaneMask = uint16_t;

LaneMask first_lanes(int64_t n) { return static_cast<LaneMask>((uint32_t{1} << max64(0, min64(n, kRowLanes))) - 1); }

[[gnu::always_inline]] inline f32v load_where(const float* p, LaneMask mask) {
  return reinterpret_cast<f32v>(_mm512_maskz_loadu_ps(mask, p));
}
[[gnu::always_inline]] inline void store_where(float* p, f32v v, LaneMask mask) {
  _mm512_mask_storeu_ps(p, mask, reinterpret_cast<__m512>(v));
}
[[gnu::always_inline]] inline f32v permute_where(f32v v, ivec<float> index, LaneMask mask) {
  return reinterpret_cast<f32v>(
      _mm512_maskz_permutexvar_ps(mask, reinterpret_cast<__m512i>(index), reinterpret_cast<__m512>(v)));
}
// Lane i is lane (i + kBy) mod lanes of v.
template <int kBy>
[[gnu::always_inline]] inline f32v rotate_where(f32v v, LaneMask mask) {
  const __m512i bits = reinterpret_cast<__m512i>(v);
  return reinterpret_cast<f32v>(_mm512_maskz_alignr_epi32(mask, bits, bits, (kBy + kRowLanes) % kRowLanes));
}

// How rows lie in vectors: two to a vector, or in one or two vectors.
enum class Rows { paired, single, pair };

// Two rows of `width` in memory as halves of a vector, and back; sides: the lanes that a column of a filter meets in a row.
struct Halves {
  ivec<float> apart, together;
  LaneMask live, one, both, sides[3];  // one, both: rows in memory

  explicit Halves(int64_t width) : live(0), one(first_lanes(width)), both(first_lanes(2 * width)) {
    const int w = static_cast<int>(width);
    for (int i = 0; i < kRowLanes; ++i) {
      apart[i] = i < kHalfRow ? i : w + i - kHalfRow;
      together[i] = i < w ? i : kHalfRow + i - w;
      if (i % kHalfRow < w) live = static_cast<LaneMask>(live | 1 << i);
    }
    for (int s = 0; s < 3; ++s) {
      sides[s] = 0;
      for (int i = 0; i < kRowLanes; ++i) {
        const int64_t at = i % kHalfRow + s - 1;
        if (at >= 0 && at < width) sides[s] = static_cast<LaneMask>(sides[s] | 1 << i);
      }
    }
  }
};

// An image's rows, step by step: of each step the vectors of rows, those that are paired with the last row of the step before
// too. kStride 2: the even and the odd pixels of two rows.
template <int kTaps, int kStride, Rows kRows>
struct Steps {
  static constexpr bool kPaired = kRows == Rows::paired;
  static_assert(!kPaired || kTaps == 3);
  static constexpr int kMiddle = kTaps / 2, kKinds = kPaired || kStride == 2 ? 2 : 1,
                       kTiles = kRows == Rows::pair ? 2 : 1;
  // A filter's row meets rows of one kind,
  static constexpr int kind(int r) { return kKinds == 1 ? 0 : (r - kMiddle) & 1; }
  // and takes those of step j to output step j + ahead(r).
  static constexpr int ahead(int r) {
    const int by = r - kMiddle;
    if (kKinds == 1) return -by;
    return by % 2 == 0 ? -by / 2 : kPaired ? -(by + 1) / 2 : -(by - 1) / 2;
  }
  static constexpr int kFirst = ahead(kTaps - 1), kLast = ahead(0), kLive = kLast - kFirst + 1;
  static constexpr int64_t outputs(int64_t rows) { return kPaired ? (rows + 1) / 2 : rows; }

  const float* const from;
  const int64_t height, width, count;
  const LaneMask low, high, live, one, both;
  ivec<float> apart;
  LaneMask sides[kTaps];
  f32v x[kKinds][2];  // [kind][tile], or, with stride 2, [kind][phase]

  [[gnu::always_inline]] Steps(const float* plane, int64_t rows, int64_t columns, const Halves& halves)
      : from(plane),
        height(rows),
        width(columns),
        count(kPaired ? rows / 2 + 1 : ceil_div(rows, kStride)),
        low(first_lanes(columns)),
        high(first_lanes(columns - kRowLanes)),
        live(halves.live),
        one(halves.one),
        both(halves.both) {
    if constexpr (kPaired) {
      apart = halves.apart;
      unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE { sides[s.value] = halves.sides[s.value]; });
    }
    unrolled<0, kKinds>([&](auto i) CNNOPS_INLINE { x[i.value][0] = x[i.value][1] = f32v{}; });
  }
  [[gnu::always_inline]] void load_step(int64_t j) {
    if constexpr (kPaired) {
      const f32v before = x[0][0];
      const int64_t row = 2 * j;
      const LaneMask inside = row + 1 < height ? both : row < height ? one : 0;
      x[0][0] = permute_where(load_where(from + row * width, inside), apart, live);
      x[1][0] = window<kHalfRow>(before, x[0][0]);
    } else {
      unrolled<0, kKinds>([&](auto kind) CNNOPS_INLINE {
        const int64_t row = j * kStride + kind.value;
        const bool inside = kKinds == 1 || kind.value == 0 || row < height;
        const float* const p = from + row * width;
        const f32v a = load_where(p, inside ? low : 0);
        if constexpr (kStride == 2) {
          const f32v b = load_where(p + kRowLanes, inside ? high : 0);
          x[kind.value][0] = evens(a, b), x[kind.value][1] = odds(a, b);
        } else {
          x[kind.value][0] = a;
          if constexpr (kTiles == 2) x[kind.value][1] = load_where(p + kRowLanes, high);
        }
      });
    }
  }
  // What column kS of a filter meets.
  template <int kKind, int kS, int kTile>
  [[gnu::always_inline]] f32v at() const {
    constexpr int kBy = kS - kMiddle;
    if constexpr (kPaired) {
      if constexpr (kBy == 0) return x[kKind][0];
      return rotate_where<kBy>(x[kKind][0], sides[kS]);
    } else {
      constexpr int kPhase = kStride == 2 ? kBy & 1 : 0, kShift = (kBy - kPhase) / kStride;
      constexpr int kAt = kStride == 2 ? kPhase : kTile;
      const f32v before = kTile > 0 ? x[kKind][0] : f32v{};
      const f32v after = kTile + 1 < kTiles ? x[kKind][1] : f32v{};
      if constexpr (kShift < 0)
        return window<kRowLanes + kShift>(before, x[kKind][kAt]);
      else
        return window<kShift>(x[kKind][kAt], after);
    }
  }
};

struct NarrowPlane {
  const float* in;
  float* out;  // weight_grad: dy
  int64_t in_h, in_w, out_h, out_w;
  const float* weights;  // [tap]
  float bias;
  float* sums;           // [tap][lane]
  const Halves* halves;  // of x
};

// out[y, j] = bias + sum over taps of in[kStride*y - kTaps / 2 + r, kStride*j - kTaps / 2 + s] * w[r, s]
template <int kTaps, int kStride, Rows kRows>
void filter_narrow(const NarrowPlane& b) {
  using S = Steps<kTaps, kStride, kRows>;
  const Halves& halves = *b.halves;
  S steps(b.in, b.in_h, b.in_w, halves);
  const int64_t outputs = S::outputs(b.out_h), width = b.out_w;
  const LaneMask last = first_lanes(width - (S::kTiles - 1) * kRowLanes);
  const float* const weights = b.weights;
  const f32v bias = set1(b.bias);
  float* const out = b.out;
  // A sum waits four cycles for the one before it: a few have several parts each.
  constexpr int kParts = S::kLive * S::kTiles <= 3 ? 3 : S::kLive * S::kTiles == 4 ? 2 : 1;
  f32v sum[S::kLive][S::kTiles][kParts];
  const auto clear = [&](auto m) CNNOPS_INLINE {
    unrolled<0, S::kTiles * kParts>([&](auto i) CNNOPS_INLINE {
      constexpr int kPart = decltype(i)::value % kParts;
      sum[m.value][i.value / kParts][kPart] = kPart == 0 ? bias : f32v{};
    });
  };
  unrolled<0, S::kLive>(clear);
  for (int64_t j = 0; j < outputs - S::kFirst; ++j) {
    if (j < steps.count) {
      steps.load_step(j);
      unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
        constexpr int kS = decltype(s)::value;
        unrolled<0, S::kKinds>([&](auto kind) CNNOPS_INLINE {
          constexpr int kKind = decltype(kind)::value;
          f32v x[S::kTiles];
          unrolled<0, S::kTiles>(
              [&](auto t) CNNOPS_INLINE { x[t.value] = steps.template at<kKind, kS, decltype(t)::value>(); });
          unrolled<0, kTaps>([&](auto r) CNNOPS_INLINE {
            constexpr int kR = decltype(r)::value;
            if constexpr (S::kind(kR) == kKind) {
              const f32v w = set1(weights[kR * kTaps + kS]);
              unrolled<0, S::kTiles>(
                  [&](auto t) CNNOPS_INLINE { sum[S::ahead(kR) - S::kFirst][t.value][kS % kParts] += x[t.value] * w; });
            }
          });
        });
      });
    }
    if (const int64_t o = j + S::kFirst; o >= 0) {
      f32v row[S::kTiles];
      unrolled<0, S::kTiles>([&](auto t) CNNOPS_INLINE {
        row[t.value] = sum[0][t.value][0];
        unrolled<1, kParts>([&](auto i) CNNOPS_INLINE { row[t.value] += sum[0][t.value][i.value]; });
      });
      if constexpr (S::kPaired) {
        const LaneMask live = 2 * o + 1 < b.out_h ? halves.both : halves.one;
        store_where(out + 2 * o * width, permute(row[0], halves.together), live);
      } else {
        float* const to = out + o * width;
        if constexpr (S::kTiles == 2) store(to, row[0]);
        store_where(to + (S::kTiles - 1) * kRowLanes, row[S::kTiles - 1], last);
      }
    }
    unrolled<1, S::kLive>([&](auto m) CNNOPS_INLINE {
      unrolled<0, S::kTiles * kParts>([&](auto i) CNNOPS_INLINE {
        constexpr int kI = decltype(i)::value;
        sum[m.value - 1][kI / kParts][kI % kParts] = sum[m.value][kI / kParts][kI % kParts];
      });
    });
    clear(Constant<S::kLive - 1>{});
  }
}

// out[2*k - kTaps / 2 + r, 2*j - kTaps / 2 + s] += in[k, j] * w[r, s]; two rows of `out` at a time.
template <int kTaps>
void spread_narrow(const NarrowPlane& b) {
  constexpr int kMiddle = kTaps / 2, kFirst = -((kMiddle + 1) / 2), kLast = kMiddle / 2, kLive = kLast - kFirst + 1;
  const LaneMask in_live = first_lanes(b.in_w), low = first_lanes(b.out_w), high = first_lanes(b.out_w - kRowLanes);
  const float* const weights = b.weights;
  const f32v bias = set1(b.bias);
  f32v sum[kLive][2][2];  // [pair of rows][row][even, odd columns]
  unrolled<0, kLive * 4>([&](auto i) CNNOPS_INLINE { sum[i.value / 4][i.value / 2 % 2][i.value % 2] = bias; });
  const int64_t pairs = ceil_div(b.out_h, 2);
  for (int64_t j = 0; j < pairs - kFirst; ++j) {
    if (j < b.in_h) {
      const f32v in = load_where(b.in + j * b.in_w, in_live);
      unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
        constexpr int kBy = decltype(s)::value - kMiddle, kPhase = kBy & 1, kShift = -(kBy - kPhase) / 2;
        f32v x;
        if constexpr (kShift < 0)
          x = window<kRowLanes + kShift>(f32v{}, in);
        else
          x = window<kShift>(in, f32v{});
        unrolled<0, kTaps>([&](auto r) CNNOPS_INLINE {
          constexpr int kDown = decltype(r)::value - kMiddle, kRow = kDown & 1;
          sum[(kDown - kRow) / 2 - kFirst][kRow][kPhase] += x * set1(weights[r.value * kTaps + s.value]);
        });
      });
    }
    if (const int64_t o = j + kFirst; o >= 0)
      for (int row = 0; row < 2 && 2 * o + row < b.out_h; ++row) {
        float* const to = b.out + (2 * o + row) * b.out_w;
        store_where(to, zip_low(sum[0][row][0], sum[0][row][1]), low);
        if (high) store_where(to + kRowLanes, zip_high(sum[0][row][0], sum[0][row][1]), high);
      }
    unrolled<0, kLive>([&](auto i) CNNOPS_INLINE {
      constexpr int kTo = decltype(i)::value;
      unrolled<0, 4>([&](auto v) CNNOPS_INLINE {
        constexpr int kV = decltype(v)::value;
        if constexpr (kTo + 1 < kLive)
          sum[kTo][kV / 2][kV % 2] = sum[kTo + 1][kV / 2][kV % 2];
        else
          sum[kTo][kV / 2][kV % 2] = bias;
      });
    });
  }
}

// sums[r, s] += out[y, j] * in[kStride*y - kTaps / 2 + r, kStride*j - kTaps / 2 + s], kFrom <= r < kFrom + kCount
template <int kTaps, int kStride, Rows kRows, int kFrom, int kCount>
void correlate_narrow(const NarrowPlane& b) {
  using S = Steps<kTaps, kStride, kRows>;
  S steps(b.in, b.in_h, b.in_w, *b.halves);
  const int64_t outputs = b.out_h, width = b.out_w;
  const LaneMask last = first_lanes(width - (S::kTiles - 1) * kRowLanes);
  float* const sums = b.sums + kFrom * kTaps * kRowLanes;
  f32v sum[kCount][kTaps];
  unrolled<0, kCount * kTaps>(
      [&](auto i) CNNOPS_INLINE { sum[i.value / kTaps][i.value % kTaps] = load(sums + i.value * kRowLanes); });
  for (int64_t j = 0; j < steps.count; ++j) {
    steps.load_step(j);
    unrolled<0, S::kTiles>([&](auto t) CNNOPS_INLINE {
      constexpr int kTile = decltype(t)::value;
      unrolled<0, S::kKinds>([&](auto kind) CNNOPS_INLINE {
        constexpr int kKind = decltype(kind)::value;
        f32v x[kTaps];
        unrolled<0, kTaps>([&](auto s)
                               CNNOPS_INLINE { x[s.value] = steps.template at<kKind, decltype(s)::value, kTile>(); });
        unrolled<0, kCount>([&](auto r) CNNOPS_INLINE {
          constexpr int kR = kFrom + decltype(r)::value, kAhead = S::ahead(kR);
          if constexpr (S::kind(kR) == kKind) {
            const int64_t o = j + kAhead;
            if (o < 0 || o >= outputs) return;
            const float* const dy = b.out + o * width + kTile * kRowLanes;
            f32v d;
            if constexpr (kTile + 1 < S::kTiles)
              d = load(dy);
            else
              d = load_where(dy, last);
            unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE { sum[r.value][s.value] += x[s.value] * d; });
          }
        });
      });
    });
  }
  unrolled<0, kCount * kTaps>(
      [&](auto i) CNNOPS_INLINE { store(sums + i.value * kRowLanes, sum[i.value / kTaps][i.value % kTaps]); });
}
template <int kTaps, int kStride, Rows kRows>
void correlate_narrow(const NarrowPlane& b) {
  if constexpr (kTaps == 7) {
    correlate_narrow<kTaps, kStride, kRows, 0, 3>(b);
    correlate_narrow<kTaps, kStride, kRows, 3, 2>(b);
    correlate_narrow<kTaps, kStride, kRows, 5, 2>(b);
  } else {
    correlate_narrow<kTaps, kStride, kRows, 0, kTaps>(b);
  }
}

// ---- Choice of kernels -----------------------------------------------------------------------------------------------

using NarrowKernel = void (*)(const NarrowPlane&);

// make(taps, stride, rows), all constants, for the problem's.
template <class Make>
NarrowKernel choose_narrow(const Conv2dParams& p, bool gradient, const Make& make) {
  const auto of_rows = [&](auto taps) -> NarrowKernel {
    constexpr int kTaps = decltype(taps)::value;
    if constexpr (kTaps < 7) {
      if (p.stride_w == 2) return make(taps, Constant<2>{}, Constant<int(Rows::single)>{});
    }
    if constexpr (kTaps == 3) {
      if (p.q <= kHalfRow && !gradient) return make(taps, Constant<1>{}, Constant<int(Rows::paired)>{});
    }
    if (p.q <= kRowLanes) return make(taps, Constant<1>{}, Constant<int(Rows::single)>{});
    return make(taps, Constant<1>{}, Constant<int(Rows::pair)>{});
  };
  return p.s == 3 ? of_rows(Constant<3>{}) : p.s == 5 ? of_rows(Constant<5>{}) : of_rows(Constant<7>{});
}

// A plane as floats: where it lies, or converted to `held`.
template <class T>
const float* as_floats(const T* plane, int64_t pixels, float* held) {
  if constexpr (__is_same(T, float)) return plane;
  if constexpr (!__is_same(T, float)) {
    for (int64_t i = 0; i < pixels; i += kRowLanes) store(held + i, load_n(plane + i, live_lanes<T>(pixels - i)));
    return held;
  }
}

template <class T>
void filter_all(const Conv2dParams& p, bool transposed) {
  const int64_t planes = p.n * p.c, count = p.r * p.s;
  if (planes * p.h * p.w == 0) return;
  const bool spread = transposed && p.stride_w == 2, flip = transposed && !spread;
  const NarrowKernel kernel =
      spread ? (p.s == 3 ? &spread_narrow<3> : &spread_narrow<5>)
             : choose_narrow(p, false, [](auto taps, auto stride, auto rows) -> NarrowKernel {
                 return &filter_narrow<decltype(taps)::value, decltype(stride)::value, Rows(decltype(rows)::value)>;
               });
  const int threads = threads_of(p);
  const Planes<T> images(p, transposed);
  const bool direct = __is_same(T, float) && !images.residual && p.activation == Activation::none;
  const TapOffsets offsets(p);
  const Halves halves(images.out_w);
  const bool contiguous = p.weight_stride[2] == p.s && p.weight_stride[3] == 1;
  const int64_t in_held = round_up(images.in_size, kRowLanes), out_held = round_up(images.out_size, kRowLanes);
  const ScratchPieces scratch(threads,
                              (in_held + out_held + round_up(count, kRowLanes)) * static_cast<int64_t>(sizeof(float)));
#pragma omp parallel num_threads(threads)
  {
    float* const held = static_cast<float*>(scratch.piece(omp_get_thread_num()));
    float *const made = held + in_held, *const weights = made + out_held;
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < planes; ++plane) {
      const int64_t c = plane % p.c;
      const T* const filter = images.weight + c * p.weight_stride[0];
      const float* ordered = weights;
      if (!contiguous) {
        for (int64_t t = 0; t < count; ++t) weights[t] = load_scalar(filter[offsets.of[flip ? count - 1 - t : t]]);
      } else if (flip) {
        for (int64_t t = 0; t < count; t += kRowLanes) {
          const int64_t now = min64(count - t, kRowLanes);
          const f32v taps = load_n(filter + count - t - now, static_cast<int>(now));
          store(weights + t, permute(taps, static_cast<int>(now) - 1 - iota<ivec<float>>()));
        }
      } else {
        ordered = as_floats(filter, count, weights);
      }
      NarrowPlane b{};
      b.in = as_floats(images.in + plane * images.in_size, images.in_size, held);
      b.out = made;
      if constexpr (__is_same(T, float)) {
        if (direct) b.out = images.out + plane * images.out_size;
      }
      b.in_h = images.in_h, b.in_w = images.in_w, b.out_h = images.out_h, b.out_w = images.out_w;
      b.weights = ordered;
      b.halves = &halves;
      b.bias = images.bias ? load_scalar(images.bias[c]) : 0;
      kernel(b);
      if (!direct)
        finish_row(made, images.out_size, images.out + plane * images.out_size,
                   images.residual ? images.residual + plane * images.out_size : nullptr, p.activation);
    }
  }
}

template <class T>
void forward(const Conv2dParams& p) {
  filter_all<T>(p, false);
}
template <class T>
void input_grad(const Conv2dParams& p) {
  filter_all<T>(p, true);
}
template <class T>
void weight_grad(const Conv2dParams& p) {
  const NarrowKernel kernel = choose_narrow(p, true, [](auto taps, auto stride, auto rows) -> NarrowKernel {
    constexpr Rows kRows = Rows(decltype(rows)::value);
    if constexpr (kRows == Rows::paired)
      return nullptr;
    else
      return &correlate_narrow<decltype(taps)::value, decltype(stride)::value, kRows>;
  });
  const int64_t x_plane = p.h * p.w, dy_plane = p.p * p.q, x_held = round_up(x_plane, kRowLanes);
  const ScratchPieces scratch(p.threads,
                              (x_held + round_up(dy_plane, kRowLanes)) * static_cast<int64_t>(sizeof(float)));
  const Cut rows{p.p, 1};
  const Halves halves(p.q);
  reduce_planes<T>(p, rows, p.p * ceil_div(p.q, kRowLanes), [&](int64_t plane, int64_t, float* sums) {
    float* const held = static_cast<float*>(scratch.piece(omp_get_thread_num()));
    NarrowPlane b{};
    b.in = as_floats(static_cast<const T*>(p.x) + plane * x_plane, x_plane, held);
    b.out = const_cast<float*>(as_floats(static_cast<const T*>(p.y) + plane * dy_plane, dy_plane, held + x_held));
    b.in_h = p.h, b.in_w = p.w, b.out_h = p.p, b.out_w = p.q;
    b.sums = sums;
    b.halves = &halves;
    kernel(b);
  });
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT_FLOAT(conv2d_narrow_planes_forward, Conv2dParams, forward)
CNNOPS_EXPORT_FLOAT(conv2d_narrow_planes_input_grad, Conv2dParams, input_grad)
#if !CNNOPS_ISA_avx512_bf16  // it rounds few numbers
CNNOPS_EXPORT_FLOAT(conv2d_narrow_planes_weight_grad, Conv2dParams, weight_grad)
#endif
#endif
