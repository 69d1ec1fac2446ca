// Batch normalization: bound by memory, so threads read and write 16 bytes at once where that many numbers are neighbours, and
// read x once for its statistics.
//
// Each block takes a tile of the image. Where a plane's pixels are neighbours (NCHW) that is a piece of one plane, for 256
// threads, or 8 small planes, a warp each. Else (NHWC, and planes of one pixel) it is some pixels' neighbouring channels:
// `lanes` threads side by side, the others of the block below them, and so many pixels that about kBlocks blocks fill a device.
//
// Statistics: a thread takes a few numbers of a channel at a time, less its first one, so that a large mean costs no precision;
// their mean and their squared deviations from it are merged into those of what it has seen (Chan, Golub, LeVeque: "Algorithms
// for computing the sample variance", 1983). A block's threads are merged in float64, and then a channel's tiles, by one block,
// in an order that the shape gives. An elementwise kernel over the same tiles normalizes. Backward has the same three steps with
// sum(dz) and sum(dz * (x - mean) * invstd).
#include "ops/batch_norm.h"

#include "cuda/activation.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kEach = 16;
constexpr int64_t kBlocks = 1056;  // 8 on each of 132 multiprocessors

// How threads take the image: V neighbours at once, along planes or along channels; kSimple: the activation is cheap.
template <int V, bool planes_, bool simple_>
struct Way {
  static constexpr int pack = V, channels = planes_ ? 1 : V;  // channels: of one thread
  static constexpr bool planes = planes_, simple = simple_;
};

struct Tiling {
  int lanes;               // threads side by side: along a plane, or along packs of channels
  int64_t plane, pixels;   // pixels: N * plane
  int64_t along;           // of a tile: elements of its plane, or pixels
  int64_t pieces;          // tiles of one plane
  int64_t tiles;           // of one channel
  int64_t channel_blocks;  // tiles side by side
  int64_t units;           // all tiles
};

template <class W>
Tiling tiling_of(const BatchNormParams& p) {
  Tiling t{};
  t.plane = p.h * p.w;
  t.pixels = p.n * t.plane;
  if (W::planes) {
    t.lanes = t.plane <= kWarp * kEach ? kWarp : kThreads;
    t.along = t.lanes * kEach;
    t.pieces = ceil_div(t.plane, t.along);
    t.tiles = p.n * t.pieces;
    t.channel_blocks = p.c;
  } else {
    const int64_t packs = ceil_div(p.c, int64_t{W::pack});
    t.lanes = kWarp;
    while (t.lanes > 8 && packs % t.lanes) t.lanes /= 2;
    if (packs % t.lanes) {
      t.lanes = kWarp;
      while (t.lanes / 2 >= packs) t.lanes /= 2;
    }
    t.channel_blocks = ceil_div(packs, int64_t{t.lanes});
    const int64_t lines = kThreads / t.lanes, wanted = max64(kBlocks / t.channel_blocks, 1);
    t.along = round_up(ceil_div(t.pixels, wanted), lines * 4);
    t.pieces = 1;
    t.tiles = ceil_div(t.pixels, t.along);
  }
  t.units = t.tiles * t.channel_blocks;
  return t;
}

template <class W>
Grid grid_of(const Tiling& t) {
  const int64_t blocks = W::planes ? ceil_div(t.units, int64_t{kThreads / t.lanes}) : t.units;
  return {blocks, 1, 1, kThreads, W::channels * kThreads * static_cast<int64_t>(sizeof(double))};
}

// What a thread takes of its tile: pack j of it is at `begin + j * step` for j < count.
struct Part {
  int64_t begin, step, tile, channel;
  int count;
  int64_t tile_count;  // elements of the tile in one channel
  bool reports;        // this thread writes the sums of its channels
};

template <class W>
__device__ Part part_of(const BatchNormParams& p, const Tiling& t) {
  const int64_t block = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % t.lanes, line = thread / t.lanes;
  const int lines = kThreads / t.lanes;
  Part part{};
  if (W::planes) {
    const int64_t unit = block * lines + line;
    if (unit >= t.units) return part;
    const int64_t image_plane = divided(unit, t.pieces), piece = unit - image_plane * t.pieces;
    const int64_t n = divided(image_plane, p.c), first = piece * t.along, length = min64(t.plane - first, t.along);
    part.channel = image_plane - n * p.c;
    part.tile = n * t.pieces + piece;
    part.begin = image_plane * t.plane + first + lane * W::pack;
    part.step = t.lanes * W::pack;
    part.count = static_cast<int>((length - lane * W::pack + part.step - 1) / part.step);
    part.tile_count = length;
    part.reports = lane == 0;
  } else {
    part.tile = divided(block, t.channel_blocks);
    part.channel = ((block - part.tile * t.channel_blocks) * t.lanes + lane) * W::pack;
    if (part.channel >= p.c) return part;
    const int64_t first = part.tile * t.along, length = min64(t.pixels - first, t.along);
    part.begin = (first + line) * p.c + part.channel;
    part.step = lines * p.c;
    part.count = static_cast<int>(max64(length - line + lines - 1, 0)) / lines;
    part.tile_count = length;
    part.reports = line == 0;
  }
  return part;
}

// The sums over the threads that share channels, for all of them. Ends and begins with the scratch free.
template <class W>
__device__ void channel_sums(double (&v)[W::channels], const Tiling& t) {
  constexpr int S = W::channels;
  double* const scratch = shared<double>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int width = W::planes ? 1 : t.lanes;  // lanes of a warp that have different channels
#pragma unroll
  for (int s = 0; s < S; ++s)
    for (int mask = kWarp / 2; mask >= width; mask /= 2) v[s] += __shfl_xor_sync(kWholeWarp, v[s], mask);
  if (W::planes && t.lanes == kWarp) return;
#pragma unroll
  for (int s = 0; s < S; ++s)
    if (lane < width) scratch[(s * kWarps + warp) * width + lane] = v[s];
  __syncthreads();
#pragma unroll
  for (int s = 0; s < S; ++s) {
    v[s] = 0;
    for (int i = 0; i < kWarps; ++i) v[s] += scratch[(s * kWarps + i) * width + lane % width];
  }
  __syncthreads();
}

// partial[(channel * tiles + tile) * 2]: the tile's mean and its sum of squared deviations.
template <class T, class W>
__global__ void __launch_bounds__(kThreads, 2) statistics_kernel(BatchNormParams p, Tiling t, double* partial) {
  using A = compute_t<T>;
  constexpr int V = W::pack, S = W::channels, kAtOnce = W::planes || V == 1 ? kEach / V : 4;  // packs
  const Part part = part_of<W>(p, t);
  const T* const x = static_cast<const T*>(p.x) + part.begin;
  A first[S] = {}, mean[S] = {}, squares[S] = {};
  int seen = 0;  // numbers of each channel
  for (int j0 = 0; j0 < part.count; j0 += kAtOnce) {
    A v[kAtOnce][V];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      if (j0 + j < part.count) load<T, V>(v[j], x + (j0 + j) * part.step);
    const int packs = part.count - j0 < kAtOnce ? part.count - j0 : kAtOnce, fresh = packs * (V / S);
    if (j0 == 0) {
#pragma unroll
      for (int s = 0; s < S; ++s) first[s] = v[0][s];
    }
    const A share = static_cast<A>(fresh) / static_cast<A>(seen + fresh), each = A(1) / static_cast<A>(fresh);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      A sum = 0, of_squares = 0;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int i = s; i < V; i += S) {
          v[j][i] -= first[s];
          if (j < packs) sum += v[j][i];
        }
      const A middle = sum * each;
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
#pragma unroll
        for (int i = s; i < V; i += S)
          if (j < packs) of_squares += (v[j][i] - middle) * (v[j][i] - middle);
      const A apart = middle - mean[s];
      mean[s] += apart * share;
      squares[s] += of_squares + apart * apart * share * static_cast<A>(seen);
    }
    seen += fresh;
  }
  double means[S], sums[S];
#pragma unroll
  for (int s = 0; s < S; ++s) {
    means[s] = static_cast<double>(first[s]) + static_cast<double>(mean[s]);
    sums[s] = seen ? means[s] * seen : 0;
  }
  channel_sums<W>(sums, t);
  double total[S];
#pragma unroll
  for (int s = 0; s < S; ++s) {
    sums[s] /= static_cast<double>(part.tile_count);
    const double apart = means[s] - sums[s];
    total[s] = seen ? static_cast<double>(squares[s]) + apart * apart * seen : 0;
  }
  channel_sums<W>(total, t);
  if (!part.reports) return;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    double* const to = partial + ((part.channel + s) * t.tiles + part.tile) * 2;
    to[0] = sums[s], to[1] = total[s];
  }
}

// A block's sum, for all of its threads.
__device__ double block_sum(double v) {
  double* const scratch = shared<double>();
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = 0;
  for (int i = 0; i < kWarps; ++i) v += scratch[i];
  __syncthreads();
  return v;
}

// A block per channel: mean and variance of all tiles.
template <class W>
__global__ void __launch_bounds__(kThreads, 2) combine_kernel(BatchNormParams p, Tiling t, const double* partial) {
  const int64_t c = blockIdx.x, thread = threadIdx.x;
  const double* const of = partial + c * t.tiles * 2;
  const auto elements = [&](int64_t tile) {
    const int64_t first = (W::planes ? remainder_of(tile, t.pieces) : tile) * t.along;
    return static_cast<double>(min64((W::planes ? t.plane : t.pixels) - first, t.along));
  };
  // The first tile's mean is taken off before the means are weighed, so that a large mean costs no precision.
  const double count = static_cast<double>(t.pixels), shift = of[0];
  double sum = 0;
  for (int64_t i = thread; i < t.tiles; i += kThreads) sum += elements(i) * (of[2 * i] - shift);
  const double mean = shift + block_sum(sum) / count;
  double squares = 0;
  for (int64_t i = thread; i < t.tiles; i += kThreads) {
    const double apart = of[2 * i] - mean;
    squares += of[2 * i + 1] + elements(i) * apart * apart;
  }
  squares = block_sum(squares);
  if (thread) return;
  static_cast<double*>(p.mean)[c] = mean;
  static_cast<double*>(p.var)[c] = squares / count;
}

__device__ __forceinline__ float inverse_root(float v) { return 1 / sqrtf(v); }
__device__ __forceinline__ double inverse_root(double v) { return 1 / sqrt(v); }

// What a channel's elements are computed with; the mean in two parts, since it is not rounded.
template <class A>
struct Channel {
  A mean, mean_low, invstd, scale, bias;

  __device__ A deviation(A x) const { return (x - mean) - mean_low; }
};

template <class A>
__device__ Channel<A> channel_of(const BatchNormParams& p, int64_t c) {
  const double mean = batch_norm_get(p.mean, p.statistics, c);
  Channel<A> k;
  k.mean = static_cast<A>(mean);
  // An infinite mean has no second part.
  k.mean_low = mean - mean == 0 ? static_cast<A>(mean - static_cast<double>(k.mean)) : A(0);
  k.invstd = inverse_root(static_cast<A>(batch_norm_get(p.var, p.statistics, c) + p.eps));
  k.scale = p.weight ? k.invstd * static_cast<A>(batch_norm_get(p.weight, p.affine, c)) : k.invstd;
  k.bias = p.bias ? static_cast<A>(batch_norm_get(p.bias, p.affine, c)) : A(0);
  return k;
}

template <class W, class A>
__device__ void channels_of(const BatchNormParams& p, int64_t c, Channel<A> (&k)[W::channels]) {
#pragma unroll
  for (int s = 0; s < W::channels; ++s) k[s] = channel_of<A>(p, c + s);
}

template <class W, class A, class T>
__device__ __forceinline__ void load_if(A (&v)[W::pack], const void* from, int64_t at) {
  if (from) load<T, W::pack>(v, static_cast<const T*>(from) + at);
}

// Elementwise kernels go over the same tiles, so that a thread's channels are known from the start.
template <class T, class W>
__global__ void __launch_bounds__(kThreads, 2) normalize_kernel(BatchNormParams p, Tiling t) {
  using A = compute_t<T>;
  constexpr int V = W::pack;
  const Part part = part_of<W>(p, t);
  if (part.count == 0) return;
  Channel<A> k[W::channels];
  channels_of<W>(p, part.channel, k);
#pragma unroll(W::simple ? 2 : 1)
  for (int j = 0; j < part.count; ++j) {
    const int64_t at = part.begin + j * part.step;
    A v[V], residual[V];
    load<T, V>(v, static_cast<const T*>(p.x) + at);
    load_if<W, A, T>(residual, p.residual, at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Channel<A>& of = k[i % W::channels];
      v[i] = of.deviation(v[i]) * of.scale + of.bias;
      if (p.residual) v[i] += residual[i];
      v[i] = activate_if<W::simple>(v[i], p.activation);
    }
    store<T, V>(static_cast<T*>(p.y) + at, v);
  }
}

// x and dz of a pack.
template <class T, class W>
__device__ __forceinline__ void dz_at(const BatchNormParams& p, const Channel<compute_t<T>> (&k)[W::channels],
                                      int64_t at, compute_t<T> (&x)[W::pack], compute_t<T> (&dz)[W::pack]) {
  using A = compute_t<T>;
  constexpr int V = W::pack;
  load<T, V>(x, static_cast<const T*>(p.x) + at);
  load<T, V>(dz, static_cast<const T*>(p.dy) + at);
  if (p.activation == Activation::none) return;
  A other[V];  // y, or else what was added before the activation
  load_if<W, A, T>(other, p.saved_y ? p.saved_y : p.residual, at);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const Channel<A>& of = k[i % W::channels];
    A z = of.deviation(x[i]) * of.scale + of.bias;
    if (p.residual) z += other[i];
    if constexpr (W::simple)
      dz[i] *= simple_derivative(p.saved_y ? other[i] : z, p.activation);  // that of z is that of y
    else
      dz[i] *= p.saved_y ? derivative_of_output(other[i], p.activation) : derivative(z, p.activation);
  }
}

// partial[(channel * tiles + tile) * 2]: the tile's sum of dz and of dz * (x - mean) * invstd.
template <class T, class W>
__global__ void __launch_bounds__(kThreads, 2) gradient_sums_kernel(BatchNormParams p, Tiling t, double* partial) {
  using A = compute_t<T>;
  constexpr int V = W::pack, S = W::channels;
  const Part part = part_of<W>(p, t);
  A sum[S] = {}, dot[S] = {};
  if (part.count) {
    Channel<A> k[S];
    channels_of<W>(p, part.channel, k);
#pragma unroll(W::simple ? 2 : 1)
    for (int j = 0; j < part.count; ++j) {
      A x[V], dz[V];
      dz_at<T, W>(p, k, part.begin + j * part.step, x, dz);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[i % S] += dz[i];
        dot[i % S] += dz[i] * (k[i % S].deviation(x[i]) * k[i % S].invstd);
      }
    }
  }
  double sums[S], dots[S];
#pragma unroll
  for (int s = 0; s < S; ++s) sums[s] = static_cast<double>(sum[s]), dots[s] = static_cast<double>(dot[s]);
  channel_sums<W>(sums, t);
  channel_sums<W>(dots, t);
  if (!part.reports) return;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    double* const to = partial + ((part.channel + s) * t.tiles + part.tile) * 2;
    to[0] = sums[s], to[1] = dots[s];
  }
}

// A block per channel: totals[2 c], totals[2 c + 1], and the gradients of bias and weight.
__global__ void __launch_bounds__(kThreads, 2)
    combine_gradients_kernel(BatchNormParams p, Tiling t, const double* partial, double* totals) {
  const int64_t c = blockIdx.x;
  const double* const of = partial + c * t.tiles * 2;
  double sum = 0, dot = 0;
  for (int64_t i = threadIdx.x; i < t.tiles; i += kThreads) sum += of[2 * i], dot += of[2 * i + 1];
  sum = block_sum(sum), dot = block_sum(dot);
  if (threadIdx.x) return;
  totals[2 * c] = sum, totals[2 * c + 1] = dot;
  if (p.dbias) batch_norm_set(p.dbias, p.affine, c, sum);
  if (p.dweight) batch_norm_set(p.dweight, p.affine, c, dot);
}

template <class T, class W>
__global__ void __launch_bounds__(kThreads, 2) gradient_kernel(BatchNormParams p, Tiling t, const double* totals) {
  using A = compute_t<T>;
  constexpr int V = W::pack, S = W::channels;
  const Part part = part_of<W>(p, t);
  if (part.count == 0) return;
  Channel<A> k[S];
  channels_of<W>(p, part.channel, k);
  A mean_dz[S] = {}, mean_dot[S] = {};
  if (p.training && totals) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const double* const total = totals + 2 * (part.channel + s);
      mean_dz[s] = static_cast<A>(total[0] / static_cast<double>(t.pixels));
      mean_dot[s] = static_cast<A>(total[1] / static_cast<double>(t.pixels));
    }
  }
#pragma unroll(W::simple ? 2 : 1)
  for (int j = 0; j < part.count; ++j) {
    const int64_t at = part.begin + j * part.step;
    A x[V], dz[V];
    dz_at<T, W>(p, k, at, x, dz);
    if (p.dresidual) store<T, V>(static_cast<T*>(p.dresidual) + at, dz);
    if (!p.dx) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const Channel<A>& of = k[i % S];
      if (p.training) dz[i] = dz[i] - mean_dz[i % S] - of.deviation(x[i]) * of.invstd * mean_dot[i % S];
      dz[i] *= of.scale;
    }
    store<T, V>(static_cast<T*>(p.dx) + at, dz);
  }
}

double* partials(const BatchNormParams& p, const Tiling& t) {
  return static_cast<double*>(p.launch->allocate(p.c * t.tiles * 2 * static_cast<int64_t>(sizeof(double))));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) update_kernel(BatchNormParams p) {
  const int64_t c = thread_index();
  if (c >= p.c) return;
  const double unbiased = static_cast<double>(p.count) / static_cast<double>(p.count - 1);
  T* const mean = static_cast<T*>(p.running_mean) + c * p.running_mean_stride;
  T* const var = static_cast<T*>(p.running_var) + c * p.running_var_stride;
  const double old_mean = static_cast<double>(load(mean)), old_var = static_cast<double>(load(var));
  store(mean,
        static_cast<compute_t<T>>((1 - p.momentum) * old_mean + p.momentum * static_cast<const double*>(p.mean)[c]));
  store(var, static_cast<compute_t<T>>((1 - p.momentum) * old_var +
                                       p.momentum * unbiased * static_cast<const double*>(p.var)[c]));
}

template <class T>
void update(const BatchNormParams& p) {
  launch("batch_norm update", *p.launch, one_each(p.c), &update_kernel<T>, p);
}

// Calls f with the way that layout, sizes and alignment allow.
template <class T, class F, class... Pointers>
void take_a_way(const BatchNormParams& p, Activation activation, const F& f, Pointers... images) {
  const bool planes = p.layout == Layout::nchw && p.h * p.w > 1;
  if constexpr (sizeof(T) < sizeof(double)) {
    if ((planes ? p.h * p.w : p.c) % kPack<T> == 0 && (aligned(images) && ...) && is_simple(activation)) {
      if (planes)
        f(Way<kPack<T>, true, true>{});
      else
        f(Way<kPack<T>, false, true>{});
      return;
    }
  }
  if (planes)
    f(Way<1, true, false>{});
  else
    f(Way<1, false, false>{});
}

template <class T>
void evaluation(const BatchNormParams& p) {
  const auto go = [&](auto way) {
    using W = decltype(way);
    const Tiling t = tiling_of<W>(p);
    launch("batch_norm normalize", *p.launch, grid_of<W>(t), &normalize_kernel<T, W>, p, t);
  };
  take_a_way<T>(p, p.activation, go, p.x, p.residual, p.y);
}

template <class T>
void training(const BatchNormParams& p) {
  const auto go = [&](auto way) {
    using W = decltype(way);
    const Tiling t = tiling_of<W>(p);
    double* const partial = partials(p, t);
    launch("batch_norm statistics", *p.launch, grid_of<W>(t), &statistics_kernel<T, W>, p, t, partial);
    launch("batch_norm combine", *p.launch, Grid{p.c, 1, 1, kThreads, kWarps * sizeof(double)}, &combine_kernel<W>, p,
           t, static_cast<const double*>(partial));
  };
  take_a_way<T>(p, Activation::none, go, p.x);
  evaluation<T>(p);
}

template <class T>
void backward(const BatchNormParams& p) {
  const auto go = [&](auto way) {
    using W = decltype(way);
    const Tiling t = tiling_of<W>(p);
    double* totals = nullptr;
    if (p.dweight || p.dbias || (p.dx && p.training)) {
      double* const partial = partials(p, t);
      totals = static_cast<double*>(p.launch->allocate(p.c * 2 * static_cast<int64_t>(sizeof(double))));
      launch("batch_norm gradient sums", *p.launch, grid_of<W>(t), &gradient_sums_kernel<T, W>, p, t, partial);
      launch("batch_norm combine gradients", *p.launch, Grid{p.c, 1, 1, kThreads, kWarps * sizeof(double)},
             &combine_gradients_kernel, p, t, static_cast<const double*>(partial), totals);
    }
    if (p.dx || p.dresidual)
      launch("batch_norm gradient", *p.launch, grid_of<W>(t), &gradient_kernel<T, W>, p, t,
             static_cast<const double*>(totals));
  };
  take_a_way<T>(p, p.activation, go, p.x, p.dy, p.saved_y, p.residual, p.dx, p.dresidual);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(batch_norm_update, BatchNormParams, update)
CNNOPS_EXPORT(batch_norm_training, BatchNormParams, training)
CNNOPS_EXPORT(batch_norm_evaluation, BatchNormParams, evaluation)
CNNOPS_EXPORT(batch_norm_backward, BatchNormParams, backward)
