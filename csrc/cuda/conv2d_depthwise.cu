// Convolution in narrow groups, depthwise above all: too few channels meet for matrix products, so that memory is the bound.
//
// Depthwise filters of 3 and 5 pixels square, of step 1 or 2, and of 7 pixels square: a thread has a strip of rows of one column (and, where
// channels are neighbours, 16 bytes of channels), so that each number it reads meets all the taps of its column. Warps go along
// columns or channels. The input's gradient is the same with flipped filters, for step 1. In the weights' gradient a thread
// keeps the sums of all taps, over the strips of its part of the pixels; a block's threads are then added up, and then the
// parts.
//
// All else: forward and the input's gradient have a thread per element of the result, or per 16 bytes of channels where each
// channel is a group; the weights' gradient a block per filter, channel and tap, and part of the pixels; where channels are
// neighbours, per 32 filters, a warp for every eighth pixel.
#include "cuda/conv2d.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int kThreads = 256;

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    forward_kernel(Conv2dParams p, ConvGroups group, Strides in, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.k, p.p, p.q);
  const int64_t c0 = V > 1 ? e.c : divided(e.c, group.k) * group.c;
  compute_t<T> sum[V] = {};
  for (int64_t r = 0; r < p.r; ++r) {
    const int64_t h = e.h * p.stride_h - p.pad_h + r * p.dilation_h;
    if (h < 0 || h >= p.h) continue;
    for (int64_t s = 0; s < p.s; ++s) {
      const int64_t w = e.w * p.stride_w - p.pad_w + s * p.dilation_w;
      if (w < 0 || w >= p.w) continue;
      const T* const x = static_cast<const T*>(p.x) + offset(in, e.n, c0, h, w);
      for (int64_t c = 0; c < group.c; ++c) {
        compute_t<T> v[V];
        load<T, V>(v, x + c * in.c);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += v[j] * weight_at<T>(p, e.c + j, c, r, s);
      }
    }
  }
  if constexpr (V == 1) {
    finish<T>(p, sum[0], e.c, i);
  } else {
    const int64_t at = i * V;
    compute_t<T> extra[V];
    if (p.residual) load<T, V>(extra, static_cast<const T*>(p.residual) + at);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (p.bias) sum[j] += load(static_cast<const T*>(p.bias) + e.c + j);
      if (p.residual) sum[j] += extra[j];
    }
    activate_each(sum, p.activation);
    store<T, V>(static_cast<T*>(p.y) + at, sum);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    input_grad_kernel(Conv2dParams p, ConvGroups group, Strides out, int64_t count) {
  const int64_t i = thread_index();
  if (i >= count) return;
  const Element e = element_at<V>(i, p.layout, p.c, p.h, p.w);
  const int64_t k0 = V > 1 ? e.c : divided(e.c, group.c) * group.k, c = V > 1 ? 0 : remainder_of(e.c, group.c);
  compute_t<T> sum[V] = {};
  for (int64_t r = 0; r < p.r; ++r) {
    const int64_t down = e.h + p.pad_h - r * p.dilation_h;
    if (down < 0 || remainder_of(down, p.stride_h) || divided(down, p.stride_h) >= p.p) continue;
    for (int64_t s = 0; s < p.s; ++s) {
      const int64_t right = e.w + p.pad_w - s * p.dilation_w;
      if (right < 0 || remainder_of(right, p.stride_w) || divided(right, p.stride_w) >= p.q) continue;
      const T* const dy =
          static_cast<const T*>(p.y) + offset(out, e.n, k0, divided(down, p.stride_h), divided(right, p.stride_w));
      for (int64_t k = 0; k < group.k; ++k) {
        compute_t<T> v[V];
        load<T, V>(v, dy + k * out.c);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += v[j] * weight_at<T>(p, k0 + k + j, c, r, s);
      }
    }
  }
  if (p.bias) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] += load(static_cast<const T*>(p.bias) + e.c + j);
  }
  store<T, V>(static_cast<T*>(p.x) + i * V, sum);
}

// partial[split][k][c][r][s]; the grid's x counts parts and blocks of filters, y channels of the group, z taps.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    weight_grad_kernel(Conv2dParams p, ConvGroups group, Strides in, Strides out, int64_t splits, int64_t each,
                       compute_t<T>* partial) {
  double* const scratch = shared<double>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const bool wide = p.layout == Layout::nhwc;
  const int64_t split = blockIdx.x % splits, block = blockIdx.x / splits, k = wide ? block * kWarp + lane : block;
  const int64_t c = blockIdx.y, r = blockIdx.z / p.s, s = blockIdx.z % p.s;
  const int64_t pixels = p.n * p.p * p.q, end = min64((split + 1) * each, pixels);
  const T* const dy = static_cast<const T*>(p.y) + k * out.c;
  const T* const x = static_cast<const T*>(p.x) + (k / group.k * group.c + c) * in.c;
  compute_t<T> sum = 0;
  if (k < p.k)
    for (int64_t i = split * each + (wide ? warp : thread); i < end; i += wide ? kThreads / kWarp : kThreads) {
      const int64_t rows = divided(i, p.q), n = divided(rows, p.p), pp = rows - n * p.p, qq = i - rows * p.q;
      const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h, w = qq * p.stride_w - p.pad_w + s * p.dilation_w;
      if (h < 0 || h >= p.h || w < 0 || w >= p.w) continue;
      sum += load(dy + offset(out, n, 0, pp, qq)) * load(x + offset(in, n, 0, h, w));
    }
  scratch[thread] = static_cast<double>(sum);
  __syncthreads();
  if (wide ? warp > 0 || k >= p.k : thread > 0) return;
  double total = 0;
  for (int i = wide ? lane : 0; i < kThreads; i += wide ? kWarp : 1) total += scratch[i];
  partial[(((split * p.k + k) * group.c + c) * p.r + r) * p.s + s] = static_cast<compute_t<T>>(total);
}

// ---- Depthwise, in strips

struct Strips {  // sizes of the source and of the result
  const void* source;
  void* result;
  int64_t n, c, h, w, p, q, pad_h, pad_w;
  int64_t strips;  // of a column of the result
  int lanes;       // NHWC: packs of channels side by side in a block
  int64_t items;   // NHWC: strips of all columns and images; NCHW: of all planes, too
  bool flip, finishes;
};

template <int R, bool wide>
constexpr int kStrip = wide     ? (R == 3 ? 4 : 2)
                       : R == 7 ? 4
                                : 8;

// Reads the numbers that a strip of `rows` results meets, whose first is at (h0, w0) of the source, once, and calls f(t, r, s,
// numbers) for each row t of the strip that meets them, and its tap.
template <class T, int V, int R, int stride, int rows, class F>
__device__ __forceinline__ void go_down(const Strips& g, const T* source, int64_t step, int64_t h0, int64_t w0,
                                        const F& f) {
  bool inside[R];
#pragma unroll
  for (int s = 0; s < R; ++s) inside[s] = w0 + s >= 0 && w0 + s < g.w;
#pragma unroll
  for (int down = 0; down < (rows - 1) * stride + R; ++down) {
    const int64_t h = h0 + down;
    if (h < 0 || h >= g.h) continue;
    const T* const row = source + h * g.w * step;
#pragma unroll
    for (int s = 0; s < R; ++s) {
      if (!inside[s]) continue;
      compute_t<T> v[V];
      load<T, V>(v, row + s * step);
#pragma unroll
      for (int t = 0; t < rows; ++t) {
        const int r = down - t * stride;
        if (r >= 0 && r < R) f(t, r, s, v);
      }
    }
  }
}

template <class T, int V, int R, int stride, bool wide>
__global__ void __launch_bounds__(kThreads, 2) strips_kernel(Conv2dParams p, Strips g) {
  using A = compute_t<T>;
  constexpr int rows = kStrip<R, wide>, taps = R * R;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = wide ? thread % g.lanes : 0, lines = wide ? kThreads / g.lanes : kThreads;
  const int64_t first_c = wide ? int64_t{blockIdx.y} * g.lanes * V : 0;
  A* const staged = shared<A>();  // NHWC: [tap][channel of the block]
  if constexpr (wide) {
    const int across = g.lanes * V;
    for (int i = thread; i < taps * across; i += kThreads) {
      const int tap = g.flip ? taps - 1 - i / across : i / across;
      const int64_t c = first_c + i % across;
      staged[i] = c < g.c ? weight_at<T>(p, c, 0, tap / R, tap % R) : A(0);
    }
    __syncthreads();
  }
  const int64_t item = blockIdx.x * int64_t{lines} + (wide ? thread / g.lanes : thread);
  int64_t c = first_c + lane * V;
  if (item >= g.items || (wide && c >= g.c)) return;
  const int64_t up = divided(item, g.q), column = item - up * g.q, planes = divided(up, g.strips),
                strip = up - planes * g.strips;
  int64_t n = planes;
  if (!wide) n = divided(planes, g.c), c = planes - n * g.c;
  const int64_t step = wide ? g.c : 1, p0 = strip * rows, h0 = p0 * stride - g.pad_h, w0 = column * stride - g.pad_w;
  A filter[wide ? 1 : taps];
  if constexpr (!wide) {
#pragma unroll
    for (int i = 0; i < taps; ++i)
      filter[i] = weight_at<T>(p, c, 0, (g.flip ? taps - 1 - i : i) / R, (g.flip ? taps - 1 - i : i) % R);
  }
  const T* const source =
      static_cast<const T*>(g.source) + (wide ? n * g.h * g.w * g.c + c : (n * g.c + c) * g.h * g.w) + w0 * step;
  A sum[rows][V] = {};
  go_down<T, V, R, stride, rows>(g, source, step, h0, w0, [&](int t, int r, int s, const A(&v)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      sum[t][i] += v[i] * (wide ? staged[(r * R + s) * g.lanes * V + lane * V + i] : filter[wide ? 0 : r * R + s]);
  });
  const int64_t first = wide ? ((n * g.p + p0) * g.q + column) * g.c + c : ((n * g.c + c) * g.p + p0) * g.q + column;
  const int64_t below = g.q * step;
  if (g.finishes) {
    if (p.bias) {
      A bias[V];
#pragma unroll
      for (int i = 0; i < V; ++i) bias[i] = load(static_cast<const T*>(p.bias) + c + i);
#pragma unroll
      for (int t = 0; t < rows; ++t)
#pragma unroll
        for (int i = 0; i < V; ++i) sum[t][i] += bias[i];
    }
    if (p.residual) {
#pragma unroll
      for (int t = 0; t < rows; ++t) {
        if (p0 + t >= g.p) continue;
        A residual[V];
        load<T, V>(residual, static_cast<const T*>(p.residual) + first + t * below);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[t][i] += residual[i];
      }
    }
    activate_simply(sum, p.activation);
  }
#pragma unroll
  for (int t = 0; t < rows; ++t)
    if (p0 + t < g.p) store<T, V>(static_cast<T*>(g.result) + first + t * below, sum[t]);
}

template <int R>
constexpr int kGradientStrip = R == 7 ? 4 : 8;

// partial[split][k][r][s]; a block per part of the items and channel (NCHW) or 32 packs of channels (NHWC).
template <class T, int V, int R, int stride, bool wide>
__global__ void __launch_bounds__(kThreads, R* V > 10 ? 1 : 2)
    strips_weight_grad_kernel(Strips g, int64_t splits, int64_t each, compute_t<T>* partial) {
  using A = compute_t<T>;
  constexpr int rows = kGradientStrip<R>, taps = R * R, lines = wide ? kThreads / kWarp : kThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t block = divided(blockIdx.x, splits), split = blockIdx.x - block * splits;
  const int64_t c = wide ? (block * kWarp + lane) * V : block, step = wide ? g.c : 1;
  const int64_t end = min64((split + 1) * each, g.items);
  A sum[taps][V] = {};
  for (int64_t item = split * each + (wide ? warp : thread); item < end && c < g.c; item += lines) {
    const int64_t up = divided(item, g.q), column = item - up * g.q, n = divided(up, g.strips),
                  p0 = (up - n * g.strips) * rows;
    const int64_t h0 = p0 * stride - g.pad_h, w0 = column * stride - g.pad_w;
    const int64_t image = wide ? n * g.h * g.w * g.c + c : (n * g.c + c) * g.h * g.w;
    const T* const x = static_cast<const T*>(g.source) + image + w0 * step;
    const T* const dy = static_cast<const T*>(g.result) + (wide ? n * g.p * g.q * g.c + c : (n * g.c + c) * g.p * g.q) +
                        (p0 * g.q + column) * step;
    A d[rows][V];
#pragma unroll
    for (int t = 0; t < rows; ++t)
      if (p0 + t < g.p) load<T, V>(d[t], dy + t * g.q * step);
    go_down<T, V, R, stride, rows>(g, x, step, h0, w0, [&](int t, int r, int s, const A(&v)[V]) {
      if (p0 + t >= g.p) return;
#pragma unroll
      for (int i = 0; i < V; ++i) sum[r * R + s][i] += d[t][i] * v[i];
    });
  }
  double* const scratch = shared<double>();
  if constexpr (wide) {  // [line][channel], tap by tap
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < V; ++i) scratch[warp * kWarp * V + lane * V + i] = static_cast<double>(sum[tap][i]);
      __syncthreads();
      const int64_t channel = block * kWarp * V + thread;
      if (thread >= kWarp * V || channel >= g.c) continue;
      double total = 0;
      for (int i = 0; i < lines; ++i) total += scratch[i * kWarp * V + thread];
      partial[(split * g.c + channel) * taps + tap] = static_cast<A>(total);
    }
  } else {
    constexpr int warps = kThreads / kWarp;
#pragma unroll
    for (int tap = 0; tap < taps; ++tap) {
      const A of_warp = warp_sum(sum[tap][0]);
      if (lane == 0) scratch[tap * warps + warp] = static_cast<double>(of_warp);
    }
    __syncthreads();
    if (thread >= taps) return;
    double total = 0;
    for (int i = 0; i < warps; ++i) total += scratch[thread * warps + i];
    partial[(split * g.c + c) * taps + thread] = static_cast<A>(total);
  }
}

template <int R_, int stride_, bool wide_>
struct Shape {
  static constexpr int R = R_, stride = stride_;
  static constexpr bool wide = wide_;
};

// Calls f with the shape of the filter, where strips are for it.
template <bool wide, class F>
bool with_shape(const Conv2dParams& p, const F& f) {
  if (p.groups != p.c || p.k != p.c || p.r != p.s || p.stride_h != p.stride_w || p.dilation_h != 1 ||
      p.dilation_w != 1 || p.stride_h > 2)
    return false;
  const bool one = p.stride_h == 1;
  switch (p.r) {
    case 3: one ? f(Shape<3, 1, wide>{}) : f(Shape<3, 2, wide>{}); return true;
    case 5: one ? f(Shape<5, 1, wide>{}) : f(Shape<5, 2, wide>{}); return true;
    case 7:
      if (one) f(Shape<7, 1, wide>{});
      return one;
    default: return false;
  }
}

template <class T, int V, class S>
void launch_strips(const char* name, const Conv2dParams& p, Strips g, S) {
  g.strips = ceil_div(g.p, int64_t{kStrip<S::R, S::wide>});
  g.items = g.n * (S::wide ? 1 : g.c) * g.strips * g.q;
  g.lanes = kWarp;
  Grid grid = one_each(g.items);
  if (S::wide) {
    const int64_t packs = g.c / V;
    g.lanes = 128 / V;  // 25 KiB of shared memory for 7 x 7 taps
    while (g.lanes / 2 >= packs) g.lanes /= 2;
    grid = {ceil_div(g.items, int64_t{kThreads / g.lanes}), ceil_div(packs, int64_t{g.lanes}), 1, kThreads,
            S::R * S::R * g.lanes * V * static_cast<int64_t>(sizeof(compute_t<T>))};
  }
  launch(name, *p.launch, grid, &strips_kernel<T, V, S::R, S::stride, S::wide>, p, g);
}

template <class T>
bool strips_forward(const Conv2dParams& p) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return false;
  } else {
    if (!is_simple(p.activation)) return false;
    static constexpr const char* kName = "conv2d_depthwise_forward";
    const Strips g{p.x, p.y, p.n, p.c,     p.h,
                   p.w, p.p, p.q, p.pad_h, p.pad_w,
                   0,   0,   0,   false,   p.bias || p.residual || p.activation != Activation::none};
    if (p.layout == Layout::nchw)
      return with_shape<false>(p, [&](auto shape) { launch_strips<T, 1>(kName, p, g, shape); });
    return packable(p.layout, p.c, kPack<T>, p.x, p.y, p.residual) &&
           with_shape<true>(p, [&](auto shape) { launch_strips<T, kPack<T>>(kName, p, g, shape); });
  }
}

template <class T>
bool strips_input_grad(const Conv2dParams& p) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return false;
  } else {
    if (p.stride_h != 1) return false;
    static constexpr const char* kName = "conv2d_depthwise_input_grad";
    const Strips g{
        p.y, p.x, p.n, p.c, p.p, p.q, p.h, p.w, p.r - 1 - p.pad_h, p.s - 1 - p.pad_w, 0, 0, 0, true, p.bias != nullptr};
    if (p.layout == Layout::nchw)
      return with_shape<false>(p, [&](auto shape) { launch_strips<T, 1>(kName, p, g, shape); });
    return packable(p.layout, p.c, kPack<T>, p.x, p.y) &&
           with_shape<true>(p, [&](auto shape) { launch_strips<T, kPack<T>>(kName, p, g, shape); });
  }
}

template <class T, int V, class S>
void launch_strips_weight_grad(const Conv2dParams& p, S) {
  using A = compute_t<T>;
  constexpr int64_t taps = S::R * S::R, lines = S::wide ? kThreads / kWarp : kThreads;
  Strips g{p.x, p.y, p.n,   p.c,  p.h, p.w, p.p, p.q, p.pad_h, p.pad_w, ceil_div(p.p, int64_t{kGradientStrip<S::R>}),
           0,   0,   false, false};
  g.items = g.n * g.strips * g.q;
  const int64_t blocks = S::wide ? ceil_div(g.c, int64_t{kWarp} * V) : g.c;
  const auto [splits, each] = splits_for(g.items, blocks, lines * 4);
  A* const partial = static_cast<A*>(p.launch->allocate(splits * g.c * taps * static_cast<int64_t>(sizeof(A))));
  const int64_t doubles = S::wide ? kThreads * V : taps * (kThreads / kWarp);
  launch("conv2d_depthwise_weight_grad", *p.launch,
         Grid{blocks * splits, 1, 1, kThreads, doubles * static_cast<int64_t>(sizeof(double))},
         &strips_weight_grad_kernel<T, V, S::R, S::stride, S::wide>, g, splits, each, partial);
  launch("conv2d_depthwise_weight_grad sum", *p.launch, one_each(g.c * taps), &add_splits_kernel<T>, p,
         static_cast<const A*>(partial), splits, g.c * taps, false);
}

template <class T>
bool strips_weight_grad(const Conv2dParams& p) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return false;
  } else {
    constexpr int V = 4 / static_cast<int>(sizeof(T));  // whose sums of 49 taps stay in registers
    if (p.layout == Layout::nchw)
      return with_shape<false>(p, [&](auto shape) { launch_strips_weight_grad<T, 1>(p, shape); });
    return packable(p.layout, p.c, V, p.x, p.y) &&
           with_shape<true>(p, [&](auto shape) { launch_strips_weight_grad<T, V>(p, shape); });
  }
}

// ---- All shapes

template <class T>
void forward(const Conv2dParams& p) {
  if (strips_forward<T>(p)) return;
  const ConvGroups group = group_sizes(p);
  const Strides in = strides_of(p.layout, p.c, p.h, p.w);
  const int64_t count = p.n * p.k * p.p * p.q;
  const bool packs = group.c == 1 && group.k == 1 && packable(p.layout, p.c, kPack<T>, p.x, p.y, p.residual);
  if (packs)
    launch("conv2d_depthwise_forward", *p.launch, one_each(count / kPack<T>), &forward_kernel<T, kPack<T>>, p, group,
           in, count / kPack<T>);
  else
    launch("conv2d_depthwise_forward", *p.launch, one_each(count), &forward_kernel<T, 1>, p, group, in, count);
}

template <class T>
void input_grad(const Conv2dParams& p) {
  if (strips_input_grad<T>(p)) return;
  const ConvGroups group = group_sizes(p);
  const Strides out = strides_of(p.layout, p.k, p.p, p.q);
  const int64_t count = p.n * p.c * p.h * p.w;
  if (group.c == 1 && group.k == 1 && packable(p.layout, p.c, kPack<T>, p.x, p.y))
    launch("conv2d_depthwise_input_grad", *p.launch, one_each(count / kPack<T>), &input_grad_kernel<T, kPack<T>>, p,
           group, out, count / kPack<T>);
  else
    launch("conv2d_depthwise_input_grad", *p.launch, one_each(count), &input_grad_kernel<T, 1>, p, group, out, count);
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  if (strips_weight_grad<T>(p)) return;
  using A = compute_t<T>;
  const ConvGroups group = group_sizes(p);
  const int64_t pixels = p.n * p.p * p.q, count = p.k * group.c * p.r * p.s;
  const int64_t blocks = p.layout == Layout::nhwc ? ceil_div(p.k, int64_t{kWarp}) : p.k;
  const auto [splits, each] = splits_for(pixels, blocks * group.c * p.r * p.s, 1024);
  A* const partial = static_cast<A*>(p.launch->allocate(splits * count * static_cast<int64_t>(sizeof(A))));
  launch("conv2d_depthwise_weight_grad", *p.launch,
         Grid{blocks * splits, group.c, p.r * p.s, kThreads, kThreads * sizeof(double)}, &weight_grad_kernel<T>, p,
         group, strides_of(p.layout, p.c, p.h, p.w), strides_of(p.layout, p.k, p.p, p.q), splits, each, partial);
  launch("conv2d_depthwise_weight_grad sum", *p.launch, one_each(count), &add_splits_kernel<T>, p,
         static_cast<const A*>(partial), splits, count, false);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_depthwise_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_depthwise_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_depthwise_weight_grad, Conv2dParams, weight_grad)
