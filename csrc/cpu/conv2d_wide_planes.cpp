// Depthwise convolution of NCHW images where they lie: filters of 3 x 3 and 5 x 5, padded so that the middle of a row of
// the filter meets the pixels of an output row (every second one, for stride 2). For AVX-512: with narrower vectors, and parts
// of them taken element by element, vectors of channels (conv2d_channel_vectors.h) are as fast or faster.
//
// Lanes are neighbouring pixels of a row. A strip of a few vectors is walked from the top down: each input row is read
// once, shifted by whole lanes to meet each column of the filter, and added to all the output rows that it belongs to,
// which stay in registers meanwhile; so do, in the gradient of the weights, the sums of up to 3 rows of a filter. Per
// vector of output pixels that is the products of the filter, S - 1 shifts, one load and one store, 10 to 30 cycles, where
// a copy from and to memory takes 32 (2 threads on 2 cores of 30 GB/s). Large outputs go around the caches: a row follows
// its neighbour at once, so that they are joined to whole lines.
//
// Narrow images are for conv2d_narrow_planes.cpp, float64 and 7 x 7, which is bound by its 49 products either way, for vectors
// of channels.
//
// In the gradient of the weights zeros stand for what is outside of x and, in a row's last vector, of dy: next to an
// infinite number they give NaN.
//
// Tasks are planes and, if there are few, strips of rows of them (weight_grad: slices of the images and rows x blocks of
// channels): cut by shape alone.
#if CNNOPS_ISA_avx512
#include "cpu/depthwise_planes.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kFetchBytes = 4 << 10;  // ahead; at 4 bytes a cycle, a few times the latency of memory

// Rows of pixels as vectors. What lies outside of the image is zero.
template <class T>
struct Pixels {
  const T* first;      // in row 0, the strip's first column
  int64_t rows, step;  // elements from one row to the next
  int64_t left;        // columns of the image from the strip's first one on
  bool inner;          // the strip is not the image's first one
  int64_t width;       // of the rows to be fetched meanwhile; 0: none

  // The processor's own prefetchers do not follow a strip that is narrower than the rows.
  [[gnu::always_inline]] void fetch_after(int64_t row) const {
    const char* const p = reinterpret_cast<const char*>(first + row * step) + kFetchBytes;
    for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(p + i, 0, 2);
  }
};

// How many lanes of a strip's last tile, and of the one after it, lie in the image.
template <class T, int kTiles, int kStride>
struct Edges {
  int last[kStride], after[kStride];

  explicit Edges(int64_t left) {
    for (int i = 0; i < kStride; ++i) {
      last[i] = live_lanes<T>(left - ((kTiles - 1) * kStride + i) * lanes<compute_t<T>>);
      after[i] = live_lanes<T>(left - (kTiles * kStride + i) * lanes<compute_t<T>>);
    }
  }
};

// A row of a strip: kTiles vectors of every kStride-th pixel, with those before and after them; in kStride phases.
template <class T, int kTiles, int kStride>
struct Row {
  using C = compute_t<T>;
  static constexpr int kLanes = lanes<C>;
  vec<C> phase[kStride][kTiles + 2];

  [[gnu::always_inline]] Row(const Pixels<T>& image, const Edges<T, kTiles, kStride>& edges, int64_t row) {
    const T* const p = image.first + row * image.step;
    unrolled<0, kTiles + 2>([&](auto t) CNNOPS_INLINE {
      constexpr int kTile = decltype(t)::value;
      vec<C> v[kStride];
      unrolled<0, kStride>([&](auto j) CNNOPS_INLINE {
        const T* const from = p + ((kTile - 1) * kStride + j.value) * kLanes;
        if constexpr (kTile == 0)
          v[j.value] = image.inner ? load(from) : vec<C>{};
        else if constexpr (kTile < kTiles)
          v[j.value] = load(from);
        else if constexpr (kTile == kTiles)
          v[j.value] = load_n(from, edges.last[j.value]);
        else
          v[j.value] = edges.after[j.value] > 0 ? load_n(from, edges.after[j.value]) : vec<C>{};
      });
      if constexpr (kStride == 1) {
        phase[0][kTile] = v[0];
      } else {
        phase[0][kTile] = evens(v[0], v[1]);
        phase[1][kTile] = odds(v[0], v[1]);
      }
    });
  }
  // Tile kTile, kBy pixels on.
  template <int kTile, int kBy>
  [[gnu::always_inline]] vec<C> at() const {
    constexpr int kPhase = (kBy % kStride + kStride) % kStride, kShift = (kBy - kPhase) / kStride;
    if constexpr (kShift < 0)
      return window<kLanes + kShift>(phase[kPhase][kTile], phase[kPhase][kTile + 1]);
    else
      return window<kShift>(phase[kPhase][kTile + 1], phase[kPhase][kTile + 2]);
  }
};

// ---- Sums over taps --------------------------------------------------------------------------------------------------

// O: of the output, the compute type where more is done to it.
template <class T, class O>
struct PlaneStrip {
  using C = compute_t<T>;
  Pixels<T> in;
  int64_t pad;          // rows
  const C* weights;     // [tap][lane]
  const C* bias;        // [lane]
  O* out;               // as in.first
  int64_t first, last;  // output rows
  int64_t out_row, out_left;
  bool stream;
};

// Of kCount vectors all but the last kEdge have all their lanes in the image.
template <class T, class O, int kCount, int kEdge>
[[gnu::always_inline]] inline void store_row(const PlaneStrip<T, O>& b, const Edges<O, kCount / kEdge, kEdge>& edges,
                                             int64_t y, const vec<compute_t<T>> (&sum)[kCount]) {
  using C = compute_t<T>;
  constexpr int kLanes = lanes<C>;
  O* const out = b.out + y * b.out_row;
  const auto each = [&](const auto& write) CNNOPS_INLINE {
    unrolled<0, kCount>([&](auto i) CNNOPS_INLINE {
      constexpr int kAt = decltype(i)::value;
      if constexpr (kAt < kCount - kEdge)
        write(out + kAt * kLanes, sum[kAt], kLanes);
      else
        write(out + kAt * kLanes, sum[kAt], edges.last[kAt - (kCount - kEdge)]);
    });
  };
  if (b.stream)
    each([](O* to, vec<C> v, int n) CNNOPS_INLINE { store_streaming_halves(to, v, n); });
  else
    each([](O* to, vec<C> v, int n) CNNOPS_INLINE { store_n(to, v, n); });
}

// The weights in registers, if they fit.
template <class C, int kCount>
struct Weights {
  static constexpr bool kHeld = kCount <= 9;
  const C* const from;
  vec<C> held[kHeld ? kCount : 1];
  [[gnu::always_inline]] explicit Weights(const C* weights) : from(weights) {
    if constexpr (kHeld)
      unrolled<0, kCount>([&](auto i) CNNOPS_INLINE { held[i.value] = load(from + i.value * lanes<C>); });
  }
  template <int kAt>
  [[gnu::always_inline]] vec<C> at() const {
    if constexpr (kHeld)
      return held[kAt];
    else
      return load(from + kAt * lanes<C>);
  }
};

// out[y, j] += sum over taps of in[kStride*y - pad + r, kStride*j + kStep*(s - kTaps / 2)] * w[r, s]
template <class T, class O, int kTaps, int kStep, int kStride, int kTiles>
void filter_strip(const PlaneStrip<T, O>& strip) {
  using C = compute_t<T>;
  constexpr int kLive = (kTaps + kStride - 1) / kStride;  // output rows that an input row may belong to
  // A sum waits four cycles for the one before it: a few have several parts each.
  constexpr int kParts = kTaps == 3 && kTiles * kLive <= 4 ? 3 : 1;
  const PlaneStrip<T, O> b = strip;
  const Edges<T, kTiles, kStride> edges(b.in.left);
  const Edges<O, kTiles, 1> out_edges(b.out_left);
  const Weights<C, kTaps * kTaps> weights(b.weights);
  const vec<C> bias = load(b.bias);
  vec<C> sum[kLive][kParts][kTiles];  // of output rows k, k - 1, ...
  const auto clear = [&](auto m) CNNOPS_INLINE {
    unrolled<0, kParts * kTiles>([&](auto i) CNNOPS_INLINE {
      constexpr int kPart = decltype(i)::value / kTiles, kTile = decltype(i)::value % kTiles;
      if constexpr (kPart == 0)
        sum[m.value][kPart][kTile] = bias;
      else
        sum[m.value][kPart][kTile] = vec<C>{};
    });
  };
  unrolled<0, kLive>(clear);
  for (int64_t k = b.first; k < b.last + kLive - 1; ++k) {
    unrolled<0, kStride>([&](auto j) CNNOPS_INLINE {
      constexpr int kRow = decltype(j)::value;
      const int64_t row = k * kStride - b.pad + kRow;
      if (row < 0 || row >= b.in.rows) return;
      b.in.fetch_after(row);
      const Row<T, kTiles, kStride> in(b.in, edges, row);
      unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
        constexpr int kS = decltype(s)::value;
        vec<C> x[kTiles];
        unrolled<0, kTiles>(
            [&](auto t) CNNOPS_INLINE { x[t.value] = in.template at<decltype(t)::value, (kS - kTaps / 2) * kStep>(); });
        unrolled<0, kLive>([&](auto m) CNNOPS_INLINE {
          constexpr int kR = decltype(m)::value * kStride + kRow;
          if constexpr (kR < kTaps) {
            const vec<C> w = weights.template at<kR * kTaps + kS>();
            unrolled<0, kTiles>([&](auto t) CNNOPS_INLINE { sum[m.value][kS % kParts][t.value] += x[t.value] * w; });
          }
        });
      });
    });
    if (const int64_t y = k - (kLive - 1); y >= b.first) {
      vec<C> row[kTiles];
      unrolled<0, kTiles>([&](auto t) CNNOPS_INLINE {
        row[t.value] = sum[kLive - 1][0][t.value];
        unrolled<1, kParts>([&](auto i) CNNOPS_INLINE { row[t.value] += sum[kLive - 1][i.value][t.value]; });
      });
      store_row<T, O, kTiles, 1>(b, out_edges, y, row);
    }
    unrolled<1, kLive>([&](auto m) CNNOPS_INLINE {
      constexpr int kTo = kLive - decltype(m)::value;
      unrolled<0, kParts * kTiles>([&](auto i) CNNOPS_INLINE {
        constexpr int kI = decltype(i)::value;
        sum[kTo][kI / kTiles][kI % kTiles] = sum[kTo - 1][kI / kTiles][kI % kTiles];
      });
    });
    clear(Constant<0>{});
  }
}

// out[2*k - pad + r, 2*j + s - kTaps / 2] += in[k, j] * w[r, s]
template <class T, class O, int kTaps, int kTiles>
void spread_strip(const PlaneStrip<T, O>& strip) {
  using C = compute_t<T>;
  const PlaneStrip<T, O> b = strip;
  const Edges<T, kTiles, 1> edges(b.in.left);
  const Edges<O, kTiles, 2> out_edges(b.out_left);
  const Weights<C, kTaps * kTaps> weights(b.weights);
  const vec<C> bias = load(b.bias);
  vec<C> sum[kTaps][2][kTiles];  // of output rows 2*k - pad and on; even and odd columns
  const auto clear = [&](auto r) CNNOPS_INLINE {
    unrolled<0, 2 * kTiles>([&](auto i) CNNOPS_INLINE { sum[r.value][i.value / kTiles][i.value % kTiles] = bias; });
  };
  unrolled<0, kTaps>(clear);
  for (int64_t k = (b.first + b.pad - kTaps + 2) >> 1; 2 * k - b.pad < b.last; ++k) {
    if (k >= 0 && k < b.in.rows) {
      b.in.fetch_after(k);
      const Row<T, kTiles, 1> in(b.in, edges, k);
      unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
        constexpr int kBy = decltype(s)::value - kTaps / 2, kPhase = (kBy % 2 + 2) % 2;
        vec<C> x[kTiles];
        unrolled<0, kTiles>(
            [&](auto t) CNNOPS_INLINE { x[t.value] = in.template at<decltype(t)::value, -(kBy - kPhase) / 2>(); });
        unrolled<0, kTaps>([&](auto r) CNNOPS_INLINE {
          const vec<C> w = weights.template at<decltype(r)::value * kTaps + decltype(s)::value>();
          unrolled<0, kTiles>([&](auto t) CNNOPS_INLINE { sum[r.value][kPhase][t.value] += x[t.value] * w; });
        });
      });
    }
    unrolled<0, 2>([&](auto r) CNNOPS_INLINE {
      const int64_t y = 2 * k - b.pad + r.value;
      if (y < b.first || y >= b.last) return;
      vec<C> row[2 * kTiles];
      unrolled<0, kTiles>([&](auto t) CNNOPS_INLINE {
        row[2 * t.value] = zip_low(sum[r.value][0][t.value], sum[r.value][1][t.value]);
        row[2 * t.value + 1] = zip_high(sum[r.value][0][t.value], sum[r.value][1][t.value]);
      });
      store_row<T, O, 2 * kTiles, 2>(b, out_edges, y, row);
    });
    unrolled<2, kTaps>([&](auto r) CNNOPS_INLINE {
      unrolled<0, 2 * kTiles>([&](auto i) CNNOPS_INLINE {
        constexpr int kI = decltype(i)::value;
        sum[r.value - 2][kI / kTiles][kI % kTiles] = sum[r.value][kI / kTiles][kI % kTiles];
      });
    });
    unrolled<kTaps - 2, kTaps>(clear);
  }
}

// ---- Gradients of taps -----------------------------------------------------------------------------------------------

template <class T>
struct PlaneGradStrip {
  using C = compute_t<T>;
  Pixels<T> x;
  int64_t pad;  // rows, for the first of the filter's rows
  Pixels<T> dy;
  int64_t first, last;  // rows of dy
  C* sums;              // [tap][lane]
};

// sums[r, s] += dy[y, j] * x[kStride*y - pad + r, kStride*j + kStep*(s - kTaps / 2)], r < kRows
template <class T, int kRows, int kTaps, int kStep, int kStride, int kTiles>
void correlate_strip(const PlaneGradStrip<T>& strip) {
  using C = compute_t<T>;
  const PlaneGradStrip<T> b = strip;
  const Edges<T, kTiles, kStride> edges(b.x.left);
  const Edges<T, kTiles, 1> dy_edges(b.dy.left);
  constexpr int kLive = (kRows + kStride - 1) / kStride;
  vec<C> sum[kRows][kTaps];
  unrolled<0, kRows * kTaps>(
      [&](auto i) CNNOPS_INLINE { sum[i.value / kTaps][i.value % kTaps] = load(b.sums + i.value * lanes<C>); });
  for (int64_t k = b.first; k < b.last + kLive - 1; ++k) {
    unrolled<0, kStride>([&](auto j) CNNOPS_INLINE {
      constexpr int kRow = decltype(j)::value;
      const int64_t row = k * kStride - b.pad + kRow;
      if (row < 0 || row >= b.x.rows) return;
      b.x.fetch_after(row);
      if (kRow == 0) b.dy.fetch_after(k);
      const Row<T, kTiles, kStride> in(b.x, edges, row);
      vec<C> x[kTaps][kTiles];
      unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE {
        unrolled<0, kTiles>([&](auto t) CNNOPS_INLINE {
          x[s.value][t.value] = in.template at<decltype(t)::value, (decltype(s)::value - kTaps / 2) * kStep>();
        });
      });
      unrolled<0, kLive>([&](auto m) CNNOPS_INLINE {
        constexpr int kR = decltype(m)::value * kStride + kRow;
        if constexpr (kR < kRows) {
          const int64_t y = k - m.value;
          if (y < b.first || y >= b.last) return;
          const T* const p = b.dy.first + y * b.dy.step;
          unrolled<0, kTiles>([&](auto t) CNNOPS_INLINE {
            constexpr int kTile = decltype(t)::value, kAt = kTile * lanes<C>;
            vec<C> d;
            if constexpr (kTile < kTiles - 1)
              d = load(p + kAt);
            else
              d = load_n(p + kAt, dy_edges.last[0]);
            unrolled<0, kTaps>([&](auto s) CNNOPS_INLINE { sum[kR][s.value] += x[s.value][kTile] * d; });
          });
        }
      });
    });
  }
  unrolled<0, kRows * kTaps>(
      [&](auto i) CNNOPS_INLINE { store(b.sums + i.value * lanes<C>, sum[i.value / kTaps][i.value % kTaps]); });
}

// ---- Choice of kernels -----------------------------------------------------------------------------------------------

constexpr int kMostTiles = 4;

// Kernels for strips of 1, 2, ... `most` tiles.
template <class Strip>
struct StripKernels {
  using Kernel = void (*)(const Strip&);
  Kernel of[kMostTiles] = {};
  int64_t most = 0;

  template <int kTiles, class Make>
  void set(const Make& make) {
    unrolled<1, kTiles + 1>([&](auto t) CNNOPS_INLINE { of[t.value - 1] = make(t); });
    most = kTiles;
  }
};

constexpr int kTiles3 = 4, kTiles3Stride2 = 2, kTiles5 = 2, kGradTiles3 = 2, kGradRows5 = 3;

template <class T, class O>
StripKernels<PlaneStrip<T, O>> filter_kernels(int64_t taps, int64_t step, int64_t stride) {
  StripKernels<PlaneStrip<T, O>> kernels;
  if (taps == 3 && step == 1 && stride == 1)
    kernels.template set<kTiles3>([](auto t) { return &filter_strip<T, O, 3, 1, 1, decltype(t)::value>; });
  if (taps == 3 && step == 2 && stride == 1)
    kernels.template set<kTiles5>([](auto t) { return &filter_strip<T, O, 3, 2, 1, decltype(t)::value>; });
  if (taps == 5 && step == 1 && stride == 1)
    kernels.template set<kTiles5>([](auto t) { return &filter_strip<T, O, 5, 1, 1, decltype(t)::value>; });
  if (taps == 3 && stride == 2)
    kernels.template set<kTiles3Stride2>([](auto t) { return &filter_strip<T, O, 3, 1, 2, decltype(t)::value>; });
  if (taps == 5 && stride == 2)
    kernels.template set<kTiles3Stride2>([](auto t) { return &filter_strip<T, O, 5, 1, 2, decltype(t)::value>; });
  return kernels;
}
template <class T, class O>
StripKernels<PlaneStrip<T, O>> spread_kernels(int64_t taps) {
  StripKernels<PlaneStrip<T, O>> kernels;
  if (taps == 3)
    kernels.template set<kTiles3Stride2>([](auto t) { return &spread_strip<T, O, 3, decltype(t)::value>; });
  return kernels;
}
// Two sets: for `rows` rows of a filter, and for what is left of it.
template <class T>
struct GradKernels {
  StripKernels<PlaneGradStrip<T>> all, rest;
  int64_t rows = 0;

  template <int kTaps, int kStep, int kStride, int kRows, int kTiles>
  void set() {
    rows = kRows;
    all.template set<kTiles>(
        [](auto t) { return &correlate_strip<T, kRows, kTaps, kStep, kStride, decltype(t)::value>; });
    if constexpr (kTaps % kRows != 0)
      rest.template set<kTiles>(
          [](auto t) { return &correlate_strip<T, kTaps % kRows, kTaps, kStep, kStride, decltype(t)::value>; });
  }
};
template <class T>
GradKernels<T> grad_kernels(int64_t taps, int64_t step, int64_t stride) {
  GradKernels<T> kernels;
  if (taps == 3 && step == 1 && stride == 1) kernels.template set<3, 1, 1, 3, kGradTiles3>();
  if (taps == 3 && step == 2 && stride == 1) kernels.template set<3, 2, 1, 3, kGradTiles3>();
  if (taps == 5 && step == 1 && stride == 1) kernels.template set<5, 1, 1, kGradRows5, 1>();
  if (taps == 3 && stride == 2) kernels.template set<3, 1, 2, 3, 1>();
  if (taps == 5 && stride == 2) kernels.template set<5, 1, 2, kGradRows5, 1>();
  return kernels;
}

// Rows of an output that, with dilated filters, read the same rows of an input: every `step`-th, from a first one.
struct Comb {
  int64_t in_first, pad;

  Comb(int64_t step, int64_t pad_h, int64_t first)
      : in_first(((first - pad_h) % step + step) % step), pad((in_first - (first - pad_h)) / step) {}
  static int64_t count(int64_t rows, int64_t first, int64_t step) {
    return first < rows ? ceil_div(rows - first, step) : 0;
  }
};

constexpr int64_t kFinishBytes = 64 << 10;  // of output rows, kept until more is done to them

template <class T, class O>
void filter_planes(const Conv2dParams& p, bool transposed) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = lanes<C>;
  const int threads = threads_of(p);
  const int64_t taps = p.r, step = p.dilation_w, stride = p.stride_w;
  const bool spread = transposed && stride == 2;
  const auto kernels = spread ? spread_kernels<T, O>(taps) : filter_kernels<T, O>(taps, step, stride);
  const bool flip = transposed && !spread;
  const Planes<T> images(p, transposed);
  const int64_t planes = p.n * p.c;
  const int64_t pad = flip ? (taps - 1) * step - p.pad_h : p.pad_h;
  constexpr int64_t kHalf = kLanes * static_cast<int64_t>(sizeof(T)) / 2;
  const bool finish = p.residual || p.activation != Activation::none;
  const bool stream = !finish && planes * images.out_size * static_cast<int64_t>(sizeof(T)) >= kLargeImage &&
                      images.out_w * static_cast<int64_t>(sizeof(T)) % kHalf == 0 &&
                      reinterpret_cast<uintptr_t>(images.out) % static_cast<uintptr_t>(kHalf) == 0;
  // A tile is one vector of the narrower image.
  const int64_t in_tile = kLanes * (spread ? 1 : stride), out_tile = kLanes * (spread ? 2 : 1);
  const int64_t tiles = ceil_div(images.out_w, out_tile);
  const int64_t most =
      finish ? max64(8, kFinishBytes / (images.out_w * static_cast<int64_t>(sizeof(C)))) : images.out_h;
  const Cut rows = cut(images.out_h, ceil_div(kWantedTasks, planes), 8, most);
  const TapOffsets offsets(p);
  const int64_t held = finish ? ceil_div(images.out_h, rows.parts) * images.out_w : 0;
  const ScratchPieces scratch(threads, (taps * taps + 1) * kVectorBytes + held * static_cast<int64_t>(sizeof(C)));
#pragma omp parallel num_threads(threads)
  {
    C* const weights = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    C* const biases = weights + taps * taps * kLanes;
    C* const made = biases + kLanes;
    int64_t ready = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < planes * rows.parts; ++task) {
      const int64_t plane = task / rows.parts, part = task % rows.parts;
      if (plane != ready) {
        const int64_t c = plane % p.c;
        const T* const from = images.weight + c * p.weight_stride[0];
        for (int64_t t = 0; t < offsets.count; ++t) {
          const int64_t at = offsets.of[flip ? offsets.count - 1 - t : t];
          store(weights + t * kLanes, set1(load_scalar(from[at])));
        }
        store(biases, images.bias ? set1(load_scalar(images.bias[c])) : vec<C>{});
        ready = plane;
      }
      PlaneStrip<T, O> b{};
      b.weights = weights, b.bias = biases;
      b.stream = stream;
      b.in.step = images.in_w * step, b.out_row = images.out_w * step;
      for (int64_t comb = 0; comb < min64(step, images.out_h); ++comb) {
        const Comb of(step, pad, comb);
        b.in.rows = Comb::count(images.in_h, of.in_first, step);
        b.pad = of.pad;
        b.first = Comb::count(rows.begin(part), comb, step), b.last = Comb::count(rows.end(part), comb, step);
        for (int64_t tile = 0; tile < tiles; tile += kernels.most) {
          const int64_t now = min64(kernels.most, tiles - tile);
          b.in.first = images.in + plane * images.in_size + of.in_first * images.in_w + tile * in_tile;
          b.in.left = images.in_w - tile * in_tile;
          b.in.inner = tile > 0;
          b.in.width = tile == 0 ? images.in_w : 0;
          const int64_t to = comb * images.out_w + tile * out_tile;
          if constexpr (__is_same(O, T)) b.out = images.out + plane * images.out_size + to;
          if constexpr (__is_same(O, C)) {
            if (finish) b.out = made + to - rows.begin(part) * images.out_w;
          }
          b.out_left = images.out_w - tile * out_tile;
          kernels.of[now - 1](b);
        }
      }
      if (!finish) continue;
      const int64_t to = plane * images.out_size + rows.begin(part) * images.out_w;
      const int64_t count = (rows.end(part) - rows.begin(part)) * images.out_w;
      finish_row(made, count, images.out + to, images.residual ? images.residual + to : nullptr, p.activation);
    }
    if (stream) end_streaming();
  }
}

template <class T>
void forward(const Conv2dParams& p) {
  if (p.residual || p.activation != Activation::none) return filter_planes<T, compute_t<T>>(p, false);
  filter_planes<T, T>(p, false);
}
template <class T>
void input_grad(const Conv2dParams& p) {
  if (p.residual || p.activation != Activation::none) return filter_planes<T, compute_t<T>>(p, true);
  filter_planes<T, T>(p, true);
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  using C = compute_t<T>;
  constexpr int64_t kLanes = lanes<C>;
  const int64_t taps = p.r, step = p.dilation_w, stride = p.stride_w;
  const auto kernels = grad_kernels<T>(taps, step, stride);
  const int64_t x_plane = p.h * p.w, dy_plane = p.p * p.q;
  // Strips of rows add to one lane what is between kFlushPixels and twice that; then it goes to a float64 sum.
  const int64_t tiles = ceil_div(p.q, kLanes);
  const Cut rows{p.p, ceil_div(p.p, max64(8, kFlushPixels / tiles))};
  reduce_planes<T>(p, rows, ceil_div(p.p, rows.parts) * tiles, [&](int64_t plane, int64_t part, C* sums) {
    PlaneGradStrip<T> b{};
    b.x.step = p.w * step, b.dy.step = p.q * step;
    for (int64_t comb = 0; comb < min64(step, p.p); ++comb) {
      const Comb of(step, p.pad_h, comb);
      b.x.rows = Comb::count(p.h, of.in_first, step);
      b.first = Comb::count(rows.begin(part), comb, step), b.last = Comb::count(rows.end(part), comb, step);
      for (int64_t r = 0; r < taps; r += kernels.rows) {
        const auto& set = r + kernels.rows <= taps ? kernels.all : kernels.rest;
        b.pad = of.pad - r;
        b.sums = sums + r * taps * kLanes;
        for (int64_t tile = 0; tile < tiles; tile += set.most) {
          const int64_t column = tile * kLanes;
          b.x.first = static_cast<const T*>(p.x) + plane * x_plane + of.in_first * p.w + column * stride;
          b.x.left = p.w - column * stride;
          b.x.inner = tile > 0;
          b.x.width = tile + r == 0 ? p.w : 0, b.dy.width = tile + r == 0 ? p.q : 0;
          b.dy.first = static_cast<const T*>(p.y) + plane * dy_plane + comb * p.q + column;
          b.dy.left = p.q - column;
          set.of[min64(set.most, tiles - tile) - 1](b);
        }
      }
    }
  });
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT_FLOAT(conv2d_wide_planes_forward, Conv2dParams, forward)
CNNOPS_EXPORT_FLOAT(conv2d_wide_planes_input_grad, Conv2dParams, input_grad)
#if !CNNOPS_ISA_avx512_bf16  // it rounds few numbers
CNNOPS_EXPORT_FLOAT(conv2d_wide_planes_weight_grad, Conv2dParams, weight_grad)
#endif
#endif
