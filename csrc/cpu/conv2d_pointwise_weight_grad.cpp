// Gradient of 1x1 filters without padding: dw[k][c] = sum over pixels of dy[k] * x[c], one product of two matrices.
//
// Tasks are blocks of filters times blocks of channels times slices of the output's rows. A task copies kPixels pixels of both
// blocks to [pixel][filter] and [pixel][channel] (strides and NCHW end here) and adds their product to Z [filter][channel],
// in register tiles of rows of filters and columns of channels: a panel of channels stays in L1 for all filters. The slices'
// Z are added in order.
//
// All cuts depend on shapes alone, so results have the same bits for any number of threads.
#include <omp.h>

#include "common/arith.h"
#include "common/scratch.h"
#include "cpu/micro/gemm_tile.h"
#include "cpu/micro/panels.h"
#include "cpu/simd/transpose.h"
#include "ops/conv2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kPixels = 128;                              // with a panel of channels: 24 KB
constexpr int64_t kFlush = 32;                                // terms of one running sum
constexpr int64_t kBlockFilters = 256, kBlockChannels = 288;  // of a task: 295 KB of Z
constexpr int64_t kLeastFilters = 48;                         // smaller blocks would copy the image too often
constexpr int64_t kWantedTasks = 16;  // enough to balance a few threads; fixed, so that cuts do not depend on threads

struct Plan {
  int64_t group_c, group_k;
  int64_t channels, filters;  // of a block, at most; channels in whole vectors
  int64_t channel_blocks, filter_blocks, slices;
  int64_t rows;  // of dy, all images'
};

template <class C>
Plan plan_of(const Conv2dParams& p) {
  Plan g{};
  g.group_c = p.c / p.groups, g.group_k = p.k / p.groups;
  g.channel_blocks = ceil_div(g.group_c, kBlockChannels);
  g.channels = round_up(ceil_div(g.group_c, g.channel_blocks), lanes<C>);
  g.channel_blocks = ceil_div(g.group_c, g.channels);
  g.rows = p.n * p.p;
  g.slices = min64(max64(1, p.n * p.p * p.q / (2 * kPixels)), g.rows);
  g.filter_blocks = ceil_div(g.group_k, kBlockFilters);
  const int64_t others = g.channel_blocks * g.slices * p.groups;
  while (g.filter_blocks * others < kWantedTasks && ceil_div(g.group_k, g.filter_blocks + 1) >= kLeastFilters)
    ++g.filter_blocks;
  g.filters = round_up(ceil_div(g.group_k, g.filter_blocks), kTileRows);
  g.filter_blocks = ceil_div(g.group_k, g.filters);
  g.slices = min64(ceil_div(kWantedTasks, g.channel_blocks * g.filter_blocks * p.groups), g.slices);
  return g;
}

// `count` pixels, `step` elements of a channels_last image or of a plane apart, as rows of `pitch`. `line` has room for
// kPixels pixels of 8 channels.
template <class T>
void copy_pixels(Layout layout, const T* from, int64_t step, int64_t plane, int64_t count, int64_t channels,
                 compute_t<T>* to, int64_t pitch, T* line) {
  if (layout == Layout::nhwc) {
    for (int64_t i = 0; i < count; ++i) copy_run(to + i * pitch, from + i * step, 1, channels);
  } else if (step == 1) {
    transpose(from, plane, channels, count, to, pitch);
  } else {
    for (int64_t c = 0; c < channels; c += 8) {
      const int64_t together = min64(8, channels - c);
      for (int64_t j = 0; j < together; ++j)
        for (int64_t i = 0; i < count; ++i) line[j * kPixels + i] = from[(c + j) * plane + i * step];
      transpose(line, kPixels, together, count, to + c, pitch);
    }
  }
}

template <class T>
struct Task {
  using C = compute_t<T>;
  const Conv2dParams& p;
  const Plan& g;
  const T *x, *dy;  // image 0, the first channel and filter of the block
  int64_t channels, filters;
  C *v, *w, *z;
  T* line;
  int64_t filled = 0;
  bool add = false;

  void multiply() {
    if (filled == 0) return;
    const int64_t vectors = ceil_div(channels, lanes<C>), panels = ceil_div(vectors, kTileVecs);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = vectors * panel / panels, last = vectors * (panel + 1) / panels;
      for (int64_t k = 0; k < filters; k += kTileRows)
        gemm_tile<C>(static_cast<int>(min64(kTileRows, filters - k)), static_cast<int>(last - first),
                     ColumnRows<C>{w + k, g.filters, 0}, v + first * lanes<C>, g.channels, filled, 1,
                     z + k * g.channels + first * lanes<C>, g.channels, add, kFlush);
    }
    filled = 0;
    add = true;
  }

  // Pixels [q, q + count) of row i of image n.
  void add_pixels(int64_t n, int64_t i, int64_t q, int64_t count) {
    const bool nchw = p.layout == Layout::nchw;
    const int64_t x_pixel = nchw ? 1 : p.c, dy_pixel = nchw ? 1 : p.k;
    copy_pixels(p.layout, x + n * p.c * p.h * p.w + (i * p.stride_h * p.w + q * p.stride_w) * x_pixel,
                p.stride_w * x_pixel, p.h * p.w, count, channels, v + filled * g.channels, g.channels, line);
    copy_pixels(p.layout, dy + n * p.k * p.p * p.q + (i * p.q + q) * dy_pixel, dy_pixel, p.p * p.q, count, filters,
                w + filled * g.filters, g.filters, line);
    filled += count;
  }

  void run(int64_t first, int64_t last) {
    const bool whole = p.stride_h == 1 && p.stride_w == 1;  // an image's pixels are one row
    for (int64_t row = first; row < last;) {
      const int64_t n = row / p.p, i = row % p.p, rows = whole ? min64(p.p - i, last - row) : 1;
      for (int64_t q = 0; q < rows * p.q;) {
        if (filled == kPixels) multiply();
        const int64_t count = min64(kPixels - filled, rows * p.q - q);
        add_pixels(n, i, q, count);
        q += count;
      }
      row += rows;
    }
    multiply();
  }
};

template <class T>
void weight_grad(const Conv2dParams& p) {
  using C = compute_t<T>;
  const Plan g = plan_of<C>(p);
  const int64_t blocks = p.groups * g.filter_blocks * g.channel_blocks;
  const int64_t z_size = round_up(g.filters * g.channels, 64);
  struct Pieces {
    C *v, *w;
    T* line;
  };
  const auto lay_out = [&](Arena arena, Pieces* pieces) {
    C* const v = arena.take<C>(kPixels * g.channels);
    C* const w = arena.take<C>(kPixels * g.filters);
    T* const line = arena.take<T>(8 * kPixels);
    if (pieces) *pieces = {v, w, line};
    return arena.used;
  };
  const ScratchPieces scratch(p.threads, lay_out(Arena{nullptr}, nullptr));
  Scratch<C> partial(blocks * g.slices * z_size);
#pragma omp parallel num_threads(p.threads)
  {
    Pieces mine;
    lay_out(Arena{static_cast<char*>(scratch.piece(omp_get_thread_num()))}, &mine);
    // Lanes and rows beyond the last channel and filter are computed and thrown away; zeros keep them finite.
    zero_run(mine.v, kPixels * g.channels);
    zero_run(mine.w, kPixels * g.filters);
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < blocks * g.slices; ++index) {
      const int64_t block = index / g.slices, slice = index % g.slices;
      const int64_t c0 = block % g.channel_blocks * g.channels;
      const int64_t k0 = block / g.channel_blocks % g.filter_blocks * g.filters;
      const int64_t group = block / g.channel_blocks / g.filter_blocks;
      const bool nchw = p.layout == Layout::nchw;
      Task<T> task{p,
                   g,
                   static_cast<const T*>(p.x) + (group * g.group_c + c0) * (nchw ? p.h * p.w : 1),
                   static_cast<const T*>(p.y) + (group * g.group_k + k0) * (nchw ? p.p * p.q : 1),
                   min64(g.channels, g.group_c - c0),
                   min64(g.filters, g.group_k - k0),
                   mine.v,
                   mine.w,
                   partial.data + index * z_size,
                   mine.line};
      task.run(g.rows * slice / g.slices, g.rows * (slice + 1) / g.slices);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * g.filters; ++i) {
      const int64_t block = i / g.filters, k = i % g.filters;
      const int64_t c0 = block % g.channel_blocks * g.channels;
      const int64_t k0 = block / g.channel_blocks % g.filter_blocks * g.filters;
      const int64_t group = block / g.channel_blocks / g.filter_blocks;
      if (k0 + k >= g.group_k) continue;
      const C* const z = partial.data + block * g.slices * z_size + k * g.channels;
      T* const to =
          static_cast<T*>(p.weight) + (group * g.group_k + k0 + k) * p.weight_stride[0] + c0 * p.weight_stride[1];
      const int64_t channels = min64(g.channels, g.group_c - c0);
      for (int64_t c = 0; c < channels; c += lanes<C>) {
        const int part = static_cast<int>(min64(channels - c, lanes<C>));
        vec<C> sum = load(z + c);
        for (int64_t slice = 1; slice < g.slices; ++slice) sum += load(z + slice * z_size + c);
        if (p.weight_stride[1] == 1) {
          store_n(to + c, sum, part);
        } else {
          for (int j = 0; j < part; ++j) store_scalar(to + (c + j) * p.weight_stride[1], sum[j]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_pointwise_weight_grad, Conv2dParams, weight_grad)
