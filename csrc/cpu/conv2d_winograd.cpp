// 3x3 convolution of stride 1 and padding 1 with 16 products where a direct kernel takes 36 (micro/winograd.h).
//
// forward and input_grad: the output is cut into tiles of 2 x 2 pixels, numbered over n, row, column; a block of kTiles tiles
// is a task (times a share of the filters where there are few blocks). A task transforms its tiles' 4 x 4 neighbourhoods for
// all input channels to 16 matrices V, multiplies each with the transformed filters U (chunk by chunk of kChunk channels, a
// block of filters at a time) and transforms the products M back, adding bias and residual and applying the activation.
//   NCHW           V [chunk][16][channel][tile], M [16][filter][tile]: vectors of tiles
//   channels_last  V [chunk][16][tile][channel], M [16][tile][filter]: vectors of channels
// U is computed once per call, or by each task where few share it.
//
// The sums that tell whether data is fit for it (conv2d_winograd.h) are of |x| over the channels of each pixel, compared within
// each tile and its neighbours, and of |w| over the channels of each tap, compared within each filter.
//
// What is added in which order depends on shapes alone, so results have the same bits for any number of threads.
#include <omp.h>

#include "common/arith.h"
#include "common/scratch.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/micro/gemm_tile.h"
#include "cpu/micro/panels.h"
#include "cpu/simd/activation.h"
#include "cpu/simd/stream.h"
#include "cpu/simd/transpose.h"
#include "ops/conv2d.h"

namespace cnnops::CNNOPS_ISA {

// The direct kernels, conv2d.cpp.
#define CNNOPS_DIRECT(dtype)                        \
  void conv2d_forward_##dtype(const Conv2dParams&); \
  void conv2d_input_grad_##dtype(const Conv2dParams&);
CNNOPS_DIRECT(f32)
CNNOPS_DIRECT(bf16)
CNNOPS_DIRECT(f16)
#undef CNNOPS_DIRECT

namespace {

constexpr int64_t kTiles = 48;          // tiles of a block
constexpr int64_t kChunk = 128;         // channels between two visits of the accumulators
constexpr int64_t kFlush = 32;          // terms of a sum in NCHW, where PyTorch's own error is the lower one
constexpr int64_t kBlockFilters = 96;   // with kTiles: 295 KB of M
constexpr int64_t kTasksPerThread = 4;  // enough for an even share
constexpr int64_t kFewBlocks = 2;       // of tiles: too few to pay for writing U to memory
constexpr int64_t kPackChannels = 16;

// Lanes [first, last) of the vector at p, the others zero; nothing else is touched.
template <class T>
[[gnu::always_inline]] inline vec<compute_t<T>> load_within(const T* p, int first, int last) {
  constexpr int kLanes = lanes<compute_t<T>>;
  if (first <= 0 && last >= kLanes) return load(p);
#if CNNOPS_ISA_avx512
  if constexpr (__is_same(T, float)) {
    const unsigned below = last >= kLanes ? 0xffffu : last <= 0 ? 0 : (1u << last) - 1;
    return reinterpret_cast<vec<float>>(_mm512_maskz_loadu_ps(below & (0xffffu << (first < 0    ? 0
                                                                                   : first > 16 ? 16
                                                                                                : first)),
                                                              p));
  }
#endif
  vec<compute_t<T>> out = {};
  for (int i = first < 0 ? 0 : first; i < last && i < kLanes; ++i) out[i] = load_scalar(p[i]);
  return out;
}

// One group of a forward or input_grad.
template <class T>
struct Problem {
  using C = compute_t<T>;
  Layout layout;
  bool flip;  // the filters' taps, for input_grad
  int64_t images, in_channels, out_channels, h, w;
  int64_t tile_rows, tile_columns, tiles;
  int64_t image_in, image_out;  // elements from image to image
  int64_t all_in, all_out;      // channels of all groups: channels_last's step from pixel to pixel
  const T* input;
  const T* weight;
  int64_t stride_m, stride_c, stride_r, stride_s;
  int64_t flush;  // terms of one running sum
  T* output;
  bool stream;  // around the caches
  const T* bias;
  const T* residual;
  Activation activation;

  int64_t chunk, chunks;                   // channels of a chunk, at most; their number
  int64_t pitch(int64_t channels) const {  // of a row of V
    return layout == Layout::nchw ? kTiles : round_up(channels, lanes<C>);
  }
  int64_t v_step(int64_t channels) const {  // from matrix to matrix
    return (layout == Layout::nchw ? channels * kTiles : kTiles * pitch(channels)) + kPad;
  }
};

// ---- Filters ---------------------------------------------------------------------------------------------------------

template <class C>
int64_t u_step(int64_t channels, int64_t width) {
  return channels * width + kPad;
}
// Elements of a panel's U before chunk `chunk`.
template <class T>
int64_t u_offset(const Problem<T>& g, int64_t width, int64_t chunk) {
  return kFrequencies * (min64(chunk * g.chunk, g.in_channels) * width + chunk * kPad);
}

// U of channels [c0, c1) of the panel of `width` filters from m0: [16][channel][width]. Adds |w| to sums[tap][width].
template <class T>
void transform_filters(const Problem<T>& g, int64_t m0, int64_t width, int64_t c0, int64_t c1, compute_t<T>* u,
                       float* sums) {
  using C = compute_t<T>;
  const int64_t filled = min64(width, g.out_channels - m0), step = u_step<C>(c1 - c0, width);
  const bool rows_of_taps = g.stride_s == 1 && g.stride_r == 3;
  C packed[kPackChannels * 9 * kTileColumns<C>];  // [channel][tap][width]
  for (int64_t c = c0; c < c1; c += kPackChannels) {
    const int64_t channels = min64(kPackChannels, c1 - c);
    const T* const from = g.weight + m0 * g.stride_m + c * g.stride_c;
    if (filled < width)
      for (int64_t i = 0; i < channels * 9; ++i) zero_run(packed + i * width + filled, width - filled);
    if (rows_of_taps && g.stride_c == 9) {
      transpose(from, g.stride_m, filled, channels * 9, packed, width);
    } else if (rows_of_taps) {
      for (int64_t i = 0; i < channels; ++i)
        transpose(from + i * g.stride_c, g.stride_m, filled, 9, packed + i * 9 * width, width);
    } else if (g.stride_c == 1) {
      for (int64_t t = 0; t < 9; ++t)
        transpose(from + t / 3 * g.stride_r + t % 3 * g.stride_s, g.stride_m, filled, channels, packed + t * width,
                  9 * width);
    } else {
      for (int64_t i = 0; i < channels; ++i)
        for (int64_t t = 0; t < 9; ++t)
          copy_run(packed + (i * 9 + t) * width, from + i * g.stride_c + t / 3 * g.stride_r + t % 3 * g.stride_s,
                   g.stride_m, filled);
    }
    for (int64_t j = 0; j < width; j += lanes<C>) {
      const int part = static_cast<int>(min64(width - j, lanes<C>));
      for (int64_t i = 0; i < channels; ++i) {
        vec<C> filter[9], transformed[16];
        for (int t = 0; t < 9; ++t) {
          const vec<C> v = load_n(packed + (i * 9 + t) * width + j, part);
          filter[g.flip ? 8 - t : t] = v;
        }
        transform_filter(filter, transformed);
        C* const to = u + (c - c0 + i) * width + j;
        for (int f = 0; f < kFrequencies; ++f) store_n(to + f * step, transformed[f], part);
      }
      for (int t = 0; t < 9; ++t) {
        vec<C> sum = load_n(sums + t * width + j, part);
        for (int64_t i = 0; i < channels; ++i) sum += abs_of<C>(load_n(packed + (i * 9 + t) * width + j, part));
        store_n(sums + t * width + j, sum, part);
      }
    }
  }
}

bool filters_fit(const float* sums, int64_t width, int64_t filled) {
  for (int64_t j = 0; j < filled; ++j) {
    float least = sums[j], most = sums[j];
    for (int t = 1; t < 9; ++t) {
      const float sum = sums[t * width + j];
      if (!(sum <= kLargest)) return false;
      least = sum < least ? sum : least, most = sum > most ? sum : most;
    }
    if (!one_size(least, most)) return false;
  }
  return true;
}

// ---- Image to V ------------------------------------------------------------------------------------------------------

// Tiles of one row of tiles: tiles [dst, dst + length) of a block.
struct Run {
  int64_t n, row, column, length, dst;
};

int64_t find_runs(int64_t tile_rows, int64_t tile_columns, int64_t begin, int64_t count, Run* runs) {
  int64_t found = 0;
  for (int64_t at = 0; at < count;) {
    const int64_t line = (begin + at) / tile_columns, column = (begin + at) % tile_columns;
    const int64_t length = min64(tile_columns - column, count - at);
    runs[found++] = {line / tile_rows, line % tile_rows, column, length, at};
    at += length;
  }
  return found;
}

// `sums` are of |x| at the four inner pixels of each tile, [4][kTiles], which together are every pixel of the image once.
template <class T>
void image_to_v_nchw(const Problem<T>& g, const Run* runs, int64_t run_count, compute_t<T>* v, float* sums) {
  using C = compute_t<T>;
  constexpr int kLanes = lanes<C>;
  for (int64_t c0 = 0; c0 < g.in_channels; c0 += g.chunk) {
    const int64_t c1 = min64(c0 + g.chunk, g.in_channels), step = g.v_step(c1 - c0);
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t r = 0; r < run_count; ++r) {
        const Run& run = runs[r];
        const T* const image = g.input + run.n * g.image_in + c * g.h * g.w;
        for (int64_t at = 0; at < run.length; at += kLanes) {
          const int part = static_cast<int>(min64(run.length - at, kLanes));
          const int64_t w = 2 * (run.column + at) - 1;
          vec<C> d[16];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const int64_t h = 2 * run.row - 1 + i;
            if (h < 0 || h >= g.h) {
              d[4 * i] = d[4 * i + 1] = d[4 * i + 2] = d[4 * i + 3] = vec<C>{};
              continue;
            }
            const T* const row = image + h * g.w + w;
            const int first = static_cast<int>(-w), last = static_cast<int>(min64(g.w - w, 4 * kLanes));
            const vec<C> a = load_within(row, first, last), b = load_within(row + kLanes, 0, last - kLanes);
            const vec<C> e = load_within(row + 2, 0, last - 2);
            const vec<C> f = load_within(row + 2 + kLanes, 0, last - 2 - kLanes);
            d[4 * i] = evens(a, b), d[4 * i + 1] = odds(a, b);
            d[4 * i + 2] = evens(e, f), d[4 * i + 3] = odds(e, f);
          }
          float* const sum = sums + run.dst + at;
          constexpr int kInner[4] = {5, 6, 9, 10};
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
            store_n(sum + i * kTiles, load_n(sum + i * kTiles, part) + abs_of<C>(d[kInner[i]]), part);
          transform_image(d);
          C* const to = v + (c - c0) * kTiles + run.dst + at;
#pragma GCC unroll 16
          for (int f = 0; f < kFrequencies; ++f) store_n(to + f * step, d[f], part);
        }
      }
    v += kFrequencies * step;
  }
}

template <class T>
void image_to_v_nhwc(const Problem<T>& g, const Run* runs, int64_t run_count, const T* zeros, compute_t<T>* v,
                     float* sums) {
  using C = compute_t<T>;
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    for (int64_t at = 0; at < run.length; ++at) {
      const T* pixel[16];
      tile_pixels(g.input + run.n * g.image_in, g.w * g.all_in, g.all_in, 0, run.row, run.column + at, g.h, g.w, zeros,
                  pixel);
      vec<C> sum[4] = {};
      C* to = v;
      for (int64_t c0 = 0; c0 < g.in_channels; c0 += g.chunk) {
        const int64_t channels = min64(g.chunk, g.in_channels - c0), step = g.v_step(channels);
        tile_to_v(pixel, c0, channels, to + (run.dst + at) * g.pitch(channels), step, sum);
        to += kFrequencies * step;
      }
      for (int i = 0; i < 4; ++i) sums[i * kTiles + run.dst + at] = sum_lanes<C>(sum[i]);
    }
  }
}

// The smallest and the largest sum of each tile's pixels; a sum out of range makes its tile unfit.
template <class T>
void sizes_of(const Problem<T>& g, const Run* runs, int64_t run_count, const float* sums, float* least, float* most) {
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    for (int64_t at = 0; at < run.length; ++at) {
      float small = __builtin_inff(), large = 0;
      for (int i = 0; i < 4; ++i) {
        if (2 * run.row + i / 2 >= g.h || 2 * (run.column + at) + i % 2 >= g.w) continue;
        const float sum = sums[i * kTiles + run.dst + at];
        if (!(sum <= kLargest)) small = -1, large = kLargest;
        small = sum < small ? sum : small, large = sum > large ? sum : large;
      }
      least[run.dst + at] = small, most[run.dst + at] = large;
    }
  }
}

// ---- M to the output -------------------------------------------------------------------------------------------------

template <class T>
void m_to_output_nchw(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t m0, int64_t m1,
                      const compute_t<T>* products, int64_t step) {
  using C = compute_t<T>;
  constexpr int kLanes = lanes<C>;
  for (int64_t m = m0; m < m1; ++m) {
    const C bias = g.bias ? load_scalar(g.bias[m]) : C{0};
    for (int64_t r = 0; r < run_count; ++r) {
      const Run& run = runs[r];
      for (int64_t at = 0; at < run.length; at += kLanes) {
        const int part = static_cast<int>(min64(run.length - at, kLanes));
        const C* const from = products + (m - m0) * kTiles + run.dst + at;
        vec<C> p[16], y[4];
#pragma GCC unroll 16
        for (int f = 0; f < kFrequencies; ++f) p[f] = load_n(from + f * step, part);
        inverse_image(p, y);
        const int64_t w = 2 * (run.column + at), count = min64(2 * part, g.w - w);
        for (int i = 0; i < 2; ++i) {
          const int64_t h = 2 * run.row + i;
          if (h >= g.h) break;
          const int64_t to = run.n * g.image_out + (m * g.h + h) * g.w + w;
          const vec<C> halves[2] = {zip_low(y[2 * i], y[2 * i + 1]), zip_high(y[2 * i], y[2 * i + 1])};
          for (int half = 0; half < 2; ++half) {
            const int n = static_cast<int>(min64(count - half * kLanes, kLanes));
            if (n <= 0) break;
            vec<C> z = halves[half] + bias;
            if (g.residual) z += load_n(g.residual + to + half * kLanes, n);
            if (g.activation != Activation::none) z = activate<C>(z, g.activation);
            store_output(g.output + to + half * kLanes, z, n, g.stream);
          }
        }
      }
    }
  }
}

template <class T>
void m_to_output_nhwc(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t m0, int64_t m1,
                      const compute_t<T>* products, int64_t step, int64_t pitch) {
  using C = compute_t<T>;
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    for (int64_t at = 0; at < run.length; ++at) {
      const int64_t h = 2 * run.row, w = 2 * (run.column + at);
      const int64_t to = run.n * g.image_out + (h * g.w + w) * g.all_out + m0;
      for (int64_t m = 0; m < m1 - m0; m += lanes<C>) {
        const int part = static_cast<int>(min64(m1 - m0 - m, lanes<C>));
        const C* const from = products + (run.dst + at) * pitch + m;
        vec<C> p[16], y[4];
#pragma GCC unroll 16
        for (int f = 0; f < kFrequencies; ++f) p[f] = load_n(from + f * step, part);
        inverse_image(p, y);
        const vec<C> bias = g.bias ? load_n(g.bias + m0 + m, part) : vec<C>{};
        for (int i = 0; i < 4; ++i) {
          if (h + i / 2 >= g.h || w + i % 2 >= g.w) continue;
          const int64_t offset = to + (i / 2 * g.w + i % 2) * g.all_out + m;
          vec<C> z = y[i] + bias;
          if (g.residual) z += load_n(g.residual + offset, part);
          if (g.activation != Activation::none) z = activate<C>(z, g.activation);
          store_output(g.output + offset, z, part, g.stream);
        }
      }
    }
  }
}

// ---- Tasks -----------------------------------------------------------------------------------------------------------

template <class T>
struct Workspace {
  compute_t<T>*v, *m, *u;  // u: of one block of filters and one chunk, null if all of U is given
  float *sums, *filter_sums;
};

// M of panels [first, last) += V U. Accumulates over the chunks.
template <class T>
void multiply(const Problem<T>& g, const Panels<compute_t<T>>& panels, int64_t first, int64_t last, int64_t tiles,
              int64_t chunk, const compute_t<T>* v, const compute_t<T>* const* u, compute_t<T>* m, int64_t m_step,
              int64_t m_pitch) {
  using C = compute_t<T>;
  const int64_t channels = min64(g.chunk, g.in_channels - chunk * g.chunk);
  const int64_t step = g.v_step(channels), pitch = g.pitch(channels);
  const int64_t m0 = panels.begin(first);
  for (int f = 0; f < kFrequencies; ++f) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t at = panels.begin(panel) - m0, width = panels.width(panel);
      const C* const filters = u[panel - first] + f * u_step<C>(channels, width);
      if (g.layout == Layout::nchw) {
        for (int64_t t = 0; t < tiles; t += kTileColumns<C>) {
          const int vecs = static_cast<int>(min64(kTileVecs, ceil_div(tiles - t, lanes<C>)));
          gemm_tile<C>(static_cast<int>(min64(kTileRows, g.out_channels - panels.begin(panel))), vecs,
                       PackedRows<C>{filters}, v + f * step + t, kTiles, channels, 1, m + f * m_step + at * m_pitch + t,
                       m_pitch, chunk > 0, g.flush);
        }
      } else {
        for (int64_t t = 0; t < tiles; t += kTileRows)
          gemm_tile<C>(static_cast<int>(min64(kTileRows, tiles - t)), static_cast<int>(width / lanes<C>),
                       PitchedRows<C>{v + f * step + t * pitch, pitch}, filters, width, channels, 1,
                       m + f * m_step + t * m_pitch + at, m_pitch, chunk > 0, g.flush);
      }
    }
  }
}

// Returns whether the data was fit for it; if not, the output is not to be used.
template <class T>
bool run(const Conv2dParams& p, bool transposed, int64_t flush) {
  using C = compute_t<T>;
  Problem<T> g{};
  g.flush = flush;
  g.layout = p.layout;
  g.flip = transposed;
  g.images = p.n;
  g.all_in = transposed ? p.k : p.c, g.all_out = transposed ? p.c : p.k;
  g.in_channels = g.all_in / p.groups, g.out_channels = g.all_out / p.groups;
  g.h = p.h, g.w = p.w;
  g.tile_rows = ceil_div(p.h, 2), g.tile_columns = ceil_div(p.w, 2);
  g.tiles = p.n * g.tile_rows * g.tile_columns;
  g.image_in = g.all_in * p.h * p.w, g.image_out = g.all_out * p.h * p.w;
  g.stride_m = p.weight_stride[transposed ? 1 : 0], g.stride_c = p.weight_stride[transposed ? 0 : 1];
  g.stride_r = p.weight_stride[2], g.stride_s = p.weight_stride[3];
  g.activation = p.activation;
  g.stream = p.n * g.image_out * static_cast<int64_t>(sizeof(T)) >= kLargeProduct;
  g.chunk = ceil_div(g.in_channels, ceil_div(g.in_channels, kChunk));
  g.chunks = ceil_div(g.in_channels, g.chunk);
  const bool nchw = p.layout == Layout::nchw;

  const Panels<C> panels(p.layout, g.out_channels);
  const int64_t blocks = ceil_div(g.tiles, kTiles);
  const int64_t block_tiles = min64(round_up(ceil_div(g.tiles, blocks), lanes<C>), kTiles);
  const int64_t tile_blocks = ceil_div(g.tiles, block_tiles);
  const int64_t widest = nchw ? kTileRows : kTileColumns<C>;
  const int64_t block_panels = min64(max64(1, kBlockFilters / widest), panels.count);
  const int64_t filter_blocks = ceil_div(panels.count, block_panels);
  int64_t shares = 1;  // tasks among which the blocks of filters of one block of tiles are dealt out
  while (p.threads > 1 && tile_blocks * p.groups * shares < kTasksPerThread * p.threads && shares < filter_blocks)
    ++shares;
  const bool share_u = tile_blocks > kFewBlocks;

  const int64_t group_u = kFrequencies * (g.in_channels * panels.channels() + panels.count * g.chunks * kPad);
  Scratch<C> all_u(share_u ? p.groups * group_u : 0);
  Scratch<float> sizes(2 * g.tiles * p.groups);
  int64_t v_size = 0;
  for (int64_t c0 = 0; c0 < g.in_channels; c0 += g.chunk)
    v_size += kFrequencies * g.v_step(min64(g.chunk, g.in_channels - c0));
  const int64_t m_pitch = nchw ? kTiles : block_panels * widest;
  const int64_t m_step = (nchw ? block_panels * widest : kTiles) * m_pitch + kPad;
  const int64_t panel_u = kFrequencies * u_step<C>(g.chunk, widest);
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    C* const v = arena.take<C>(v_size + lanes<C>);
    C* const m = arena.take<C>(kFrequencies * m_step);
    C* const u = share_u ? nullptr : arena.take<C>(block_panels * panel_u);
    float* const sums = arena.take<float>(4 * kTiles);
    float* const filter_sums = arena.take<float>(block_panels * 9 * widest);
    return Workspace<T>{v, m, u, sums, filter_sums};
  });
  Scratch<T> zeros(g.in_channels);
  for (int64_t i = 0; i < g.in_channels; ++i) store_scalar(zeros.data + i, C{0});

  const T* const input = static_cast<const T*>(transposed ? p.y : p.x);
  const int64_t group_step_in = nchw ? g.in_channels * p.h * p.w : g.in_channels;
  const int64_t group_step_out = nchw ? g.out_channels * p.h * p.w : g.out_channels;
  const auto group_of = [&](int64_t group) {
    Problem<T> mine = g;
    mine.input = input + group * group_step_in;
    mine.weight = static_cast<const T*>(p.weight) + group * (p.k / p.groups) * p.weight_stride[0];
    mine.output = static_cast<T*>(transposed ? p.x : p.y) + group * group_step_out;
    mine.residual = p.residual ? static_cast<const T*>(p.residual) + group * group_step_out : nullptr;
    mine.bias = p.bias ? static_cast<const T*>(p.bias) + group * g.out_channels : nullptr;
    return mine;
  };
  const auto panel_offset = [&](int64_t panel) {
    return kFrequencies * (g.in_channels * panels.begin(panel) + panel * g.chunks * kPad);
  };
  int unfit = 0;
#pragma omp parallel num_threads(p.threads) reduction(| : unfit)
  {
    Workspace<T> mine = scratch.mine();
    if (share_u) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.groups * panels.count; ++i) {
        const Problem<T> group = group_of(i / panels.count);
        const int64_t panel = i % panels.count, m0 = panels.begin(panel), width = panels.width(panel);
        C* const to = all_u.data + i / panels.count * group_u + panel_offset(panel);
        zero_run(mine.filter_sums, 9 * width);
        for (int64_t chunk = 0; chunk < g.chunks; ++chunk)
          transform_filters(group, m0, width, chunk * g.chunk, min64((chunk + 1) * g.chunk, g.in_channels),
                            to + u_offset(g, width, chunk), mine.filter_sums);
        unfit |= !filters_fit(mine.filter_sums, width, min64(width, g.out_channels - m0));
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tile_blocks * p.groups * shares; ++task) {
      const int64_t share = task % shares, group_index = task / shares % p.groups;
      const int64_t begin = task / shares / p.groups * block_tiles, tiles = min64(block_tiles, g.tiles - begin);
      const Problem<T> group = group_of(group_index);
      Run runs[kTiles];
      const int64_t run_count = find_runs(g.tile_rows, g.tile_columns, begin, tiles, runs);
      zero_run(mine.sums, 4 * kTiles);
      if (nchw)
        image_to_v_nchw(group, runs, run_count, mine.v, mine.sums);
      else
        image_to_v_nhwc(group, runs, run_count, zeros.data, mine.v, mine.sums);
      if (share == 0) {
        float* const least = sizes.data + (group_index * 2) * g.tiles + begin;
        sizes_of(group, runs, run_count, mine.sums, least, least + g.tiles);
      }
      for (int64_t block = filter_blocks * share / shares; block < filter_blocks * (share + 1) / shares; ++block) {
        const int64_t first = panels.count * block / filter_blocks;
        const int64_t last = panels.count * (block + 1) / filter_blocks;
        const int64_t m0 = panels.begin(first), m1 = min64(panels.begin(last), g.out_channels);
        if (!share_u) zero_run(mine.filter_sums, block_panels * 9 * widest);
        const C* v = mine.v;
        for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
          const int64_t c0 = chunk * g.chunk, c1 = min64(c0 + g.chunk, g.in_channels);
          const C* u[kBlockFilters];
          for (int64_t panel = first; panel < last; ++panel) {
            const int64_t width = panels.width(panel);
            if (share_u) {
              u[panel - first] = all_u.data + group_index * group_u + panel_offset(panel) + u_offset(g, width, chunk);
            } else {
              C* const to = mine.u + (panel - first) * panel_u;
              transform_filters(group, panels.begin(panel), width, c0, c1, to,
                                mine.filter_sums + (panel - first) * 9 * widest);
              u[panel - first] = to;
            }
          }
          multiply(group, panels, first, last, tiles, chunk, v, u, mine.m, m_step, m_pitch);
          v += kFrequencies * g.v_step(c1 - c0);
        }
        if (!share_u)
          for (int64_t panel = first; panel < last; ++panel)
            unfit |= !filters_fit(mine.filter_sums + (panel - first) * 9 * widest, panels.width(panel),
                                  min64(panels.width(panel), g.out_channels - panels.begin(panel)));
        if (nchw)
          m_to_output_nchw(group, runs, run_count, m0, m1, mine.m, m_step);
        else
          m_to_output_nhwc(group, runs, run_count, m0, m1, mine.m, m_step, m_pitch);
        if (g.stream) end_streaming();
      }
    }
    // Every pixel against those of the same and the neighbouring tiles.
#pragma omp for schedule(static)
    for (int64_t line = 0; line < p.groups * p.n * g.tile_rows; ++line) {
      const int64_t row = line % g.tile_rows, image = line / g.tile_rows % p.n, group = line / g.tile_rows / p.n;
      const float* const least = sizes.data + group * 2 * g.tiles + image * g.tile_rows * g.tile_columns;
      for (int64_t column = 0; column < g.tile_columns; ++column) {
        float small = __builtin_inff(), large = 0;
        for (int64_t i = max64(row - 1, 0); i < min64(row + 2, g.tile_rows); ++i)
          for (int64_t j = max64(column - 1, 0); j < min64(column + 2, g.tile_columns); ++j) {
            const float a = least[i * g.tile_columns + j], b = least[g.tiles + i * g.tile_columns + j];
            small = a < small ? a : small, large = b > large ? b : large;
          }
        unfit |= !one_size(small, large);
      }
    }
  }
  return !unfit;
}

#define CNNOPS_DIRECT(T, dtype)                                                 \
  void direct_forward(T*, const Conv2dParams& p) { conv2d_forward_##dtype(p); } \
  void direct_input_grad(T*, const Conv2dParams& p) { conv2d_input_grad_##dtype(p); }
CNNOPS_DIRECT(float, f32)
CNNOPS_DIRECT(bf16, bf16)
CNNOPS_DIRECT(f16, f16)
#undef CNNOPS_DIRECT

int64_t flush_of(const Conv2dParams& p) { return p.layout == Layout::nchw ? kFlush : kNeverFlush; }

// What is not fit for it is computed again by the direct kernel.
template <class T>
void filter(const Conv2dParams& p, bool transposed, int64_t flush) {
  T* const type = nullptr;
  if (run<T>(p, transposed, flush)) return;
  transposed ? direct_input_grad(type, p) : direct_forward(type, p);
}

template <class T>
void forward(const Conv2dParams& p) {
  filter<T>(p, false, flush_of(p));
}

template <class T>
void input_grad(const Conv2dParams& p) {
  filter<T>(p, true, flush_of(p));
}

}  // namespace

#define CNNOPS_EXPORT_WINOGRAD(T, dtype)                                         \
  void conv2d_winograd_forward_##dtype(const Conv2dParams& p) { forward<T>(p); } \
  void conv2d_winograd_input_grad_##dtype(const Conv2dParams& p) { input_grad<T>(p); }
CNNOPS_EXPORT_WINOGRAD(float, f32)
CNNOPS_EXPORT_WINOGRAD(bf16, bf16)
CNNOPS_EXPORT_WINOGRAD(f16, f16)
#undef CNNOPS_EXPORT_WINOGRAD

void conv2d_winograd_exactly(const Conv2dParams& p, bool transposed) { filter<float>(p, transposed, kFlush); }

}  // namespace cnnops::CNNOPS_ISA
