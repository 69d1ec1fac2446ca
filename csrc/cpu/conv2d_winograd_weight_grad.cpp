// Gradient of 3x3 filters (stride 1, padding 1) with 16 products where a direct kernel takes 36 (micro/winograd.h).
//
// Tasks are blocks of filters times blocks of input channels times slices of the rows of tiles. A task takes kTiles tiles of
// 2 x 2 pixels of dy at a time, transforms them to W [16][tile][filter] and the image's 4 x 4 pixels around them to
// V [16][tile][channel], and adds the 16 products to Z [16][filter][channel]. NCHW is transposed on the way in, a few rows at
// a time. The slices' Z are added in order and transformed back to dw.
//
// The sums that tell whether data is fit for it (conv2d_winograd.h) are of |x| and of |dy| over a task's channels, by position
// in the tile: all tiles' together, and in each tile those that are not zero, where tiles may fail that hold little of it all. All cuts depend on shapes alone, so results have the same bits for any number of threads.
#include <omp.h>

#include "common/arith.h"
#include "common/scratch.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/micro/gemm_tile.h"
#include "cpu/micro/panels.h"
#include "cpu/simd/transpose.h"
#include "ops/conv2d.h"

namespace cnnops::CNNOPS_ISA {

// The direct kernels, conv2d.cpp.
void conv2d_weight_grad_f32(const Conv2dParams&);
void conv2d_weight_grad_bf16(const Conv2dParams&);
void conv2d_weight_grad_f16(const Conv2dParams&);

namespace {

constexpr int64_t kTiles = 48;  // tiles whose products are summed before Z is visited
constexpr int64_t kFlush = 24;  // tiles of one running sum,
constexpr int64_t kFewTerms = 1600,
                  kShortFlush = 12;  // in channels_last of so few pixels, where PyTorch's sums are short
constexpr int64_t kBlockFilters = 64, kBlockChannels = 128;  // of a task: 524 KB of Z
constexpr float kMostFailed = 16;  // the share of the magnitudes that may lie in tiles of too many sizes is 1 / this
// Enough to balance a few threads, where there is room for the sums; fixed, so that cuts do not depend on threads.
constexpr int64_t kWantedTasks = 16, kLeastTasks = 4;

struct Plan {
  int64_t group_c, group_k;
  int64_t channels, filters;  // of a block, at most; channels in whole vectors
  int64_t channel_blocks, filter_blocks, slices;
  int64_t tile_rows, tile_columns, lines;
  int64_t v_step, w_step, z_step;  // from matrix to matrix
  int64_t flush;
  int64_t strip_rows;  // NCHW: rows of the image that are transposed at a time, at most
};

template <class C>
Plan plan_of(const Conv2dParams& p) {
  Plan g{};
  g.group_c = p.c / p.groups, g.group_k = p.k / p.groups;
  g.channel_blocks = ceil_div(g.group_c, kBlockChannels);
  g.channels = round_up(ceil_div(g.group_c, g.channel_blocks), lanes<C>);
  g.channel_blocks = ceil_div(g.group_c, g.channels);
  g.filter_blocks = ceil_div(g.group_k, kBlockFilters);
  g.filters = min64(round_up(ceil_div(g.group_k, g.filter_blocks), kTileRows), round_up(g.group_k, lanes<C>));
  g.filter_blocks = ceil_div(g.group_k, g.filters);
  g.tile_rows = ceil_div(p.h, 2), g.tile_columns = ceil_div(p.w, 2);
  g.lines = p.n * g.tile_rows;
  const int64_t blocks = g.channel_blocks * g.filter_blocks * p.groups;
  // Sums of more slices than these would take more room than the images.
  const int64_t room = p.n * (p.c + p.k) * p.h * p.w / (blocks * kFrequencies * g.channels * g.filters);
  g.slices = min64(min64(ceil_div(kWantedTasks, blocks), g.lines), max64(room, ceil_div(kLeastTasks, blocks)));
  g.flush = p.layout == Layout::nhwc && p.n * p.h * p.w < kFewTerms ? kShortFlush : kFlush;
  g.v_step = kTiles * g.channels + kPad;
  g.w_step = kTiles * round_up(g.filters, lanes<C>) + kPad;
  g.z_step = g.filters * g.channels + kPad;
  g.strip_rows = 2 * min64(g.tile_rows, max64(1, kTiles / g.tile_columns)) + 2;
  return g;
}

// The sums of magnitudes at the four positions of tiles.
template <class C>
struct Sizes {
  float sums[4] = {}, failed = 0;

  void add(const vec<C> (&tile)[4]) {
    float least = __builtin_inff(), most = 0;
    for (int i = 0; i < 4; ++i) {
      const float sum = sum_lanes<C>(tile[i]);
      sums[i] += sum;
      least = sum > 0 && sum < least ? sum : least, most = sum > most ? sum : most;
    }
    if (least * kMostRatio < most) failed += most;
  }
  bool fit() const {
    float least = sums[0], most = sums[0], total = sums[0];
    for (int i = 1; i < 4; ++i) {
      least = sums[i] < least ? sums[i] : least, most = sums[i] > most ? sums[i] : most;
      total += sums[i];
    }
    return total <= kLargest && one_size(least, most) && failed * kMostFailed <= total;
  }
};

template <class T>
struct Task {
  using C = compute_t<T>;
  const Conv2dParams& p;
  const Plan& g;
  const T *x, *dy;  // image 0, the first channel and filter of the block
  int64_t channels, filters;
  const T* zeros;
  C *v, *w, *z, *x_strip, *dy_strip;
  const C* zeros_c;
  int64_t filled = 0;
  bool add = false;
  Sizes<C> x_sizes = {}, dy_sizes = {};

  // Z += W' V over the tiles at hand.
  void multiply() {
    if (filled == 0) return;
    const int64_t vectors = ceil_div(channels, lanes<C>), panels = ceil_div(vectors, kTileVecs);
    const int64_t w_pitch = round_up(g.filters, lanes<C>);
    for (int f = 0; f < kFrequencies; ++f)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = vectors * panel / panels, last = vectors * (panel + 1) / panels;
        for (int64_t k = 0; k < filters; k += kTileRows)
          gemm_tile<C>(static_cast<int>(min64(kTileRows, filters - k)), static_cast<int>(last - first),
                       ColumnRows<C>{w + f * g.w_step + k, w_pitch, 0}, v + f * g.v_step + first * lanes<C>, g.channels,
                       filled, 1, z + f * g.z_step + k * g.channels + first * lanes<C>, g.channels, add, g.flush);
      }
    filled = 0;
    add = true;
  }

  // Tile (row, column) of the images at x and dy, whose first rows are first_x and first_dy.
  template <class E>
  void add_tile(const E* image, int64_t row_step, int64_t pixel_step, int64_t first_x, const E* grad,
                int64_t grad_row_step, int64_t grad_pixel_step, int64_t first_dy, int64_t row, int64_t column,
                const E* none) {
    if (filled == kTiles) multiply();
    const E* pixel[16];
    tile_pixels(image, row_step, pixel_step, first_x, row, column, p.h, p.w, none, pixel);
    vec<C> sums[4] = {}, grad_sums[4] = {};
    tile_to_v(pixel, 0, channels, v + filled * g.channels, g.v_step, sums);
    x_sizes.add(sums);
    const E* grads[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t h = 2 * row + i / 2, w_at = 2 * column + i % 2;
      grads[i] = h < p.h && w_at < p.w ? grad + (h - first_dy) * grad_row_step + w_at * grad_pixel_step : none;
    }
    C* const to = w + filled * round_up(g.filters, lanes<C>);
    for (int64_t k = 0; k < filters; k += lanes<C>) {
      const int part = static_cast<int>(min64(filters - k, lanes<C>));
      vec<C> d[4], transformed[16];
      for (int i = 0; i < 4; ++i) {
        d[i] = load_n(grads[i] + k, part);
        grad_sums[i] += abs_of<C>(d[i]);
      }
      transform_grad(d, transformed);
#pragma GCC unroll 16
      for (int f = 0; f < kFrequencies; ++f) store(to + f * g.w_step + k, transformed[f]);
    }
    dy_sizes.add(grad_sums);
    ++filled;
  }

  // Rows [row, row + rows) of tiles of image n.
  void add_rows(int64_t n, int64_t row, int64_t rows) {
    if (p.layout == Layout::nhwc) {
      for (int64_t i = row; i < row + rows; ++i)
        for (int64_t j = 0; j < g.tile_columns; ++j)
          add_tile(x + n * p.h * p.w * p.c, p.w * p.c, p.c, 0, dy + n * p.h * p.w * p.k, p.w * p.k, p.k, 0, i, j,
                   zeros);
      return;
    }
    const int64_t plane = p.h * p.w, k_pitch = round_up(g.filters, lanes<C>);
    const int64_t first_x = max64(2 * row - 1, 0), last_x = min64(2 * (row + rows) + 1, p.h);
    const int64_t first_dy = 2 * row, last_dy = min64(2 * (row + rows), p.h);
    transpose(x + n * p.c * plane + first_x * p.w, plane, channels, (last_x - first_x) * p.w, x_strip, g.channels);
    transpose(dy + n * p.k * plane + first_dy * p.w, plane, filters, (last_dy - first_dy) * p.w, dy_strip, k_pitch);
    for (int64_t i = row; i < row + rows; ++i)
      for (int64_t j = 0; j < g.tile_columns; ++j)
        add_tile<C>(x_strip, p.w * g.channels, g.channels, first_x, dy_strip, p.w * k_pitch, k_pitch, first_dy, i, j,
                    zeros_c);
  }

  void run(int64_t first_line, int64_t last_line) {
    const int64_t rows_together = max64(1, kTiles / g.tile_columns);
    for (int64_t line = first_line; line < last_line;) {
      const int64_t row = line % g.tile_rows;
      const int64_t rows = min64(min64(g.tile_rows - row, last_line - line), rows_together);
      add_rows(line / g.tile_rows, row, rows);
      line += rows;
    }
    multiply();
  }
};

// dw of one filter of a block from its Z, `slices` of them.
template <class T>
void finish(const Conv2dParams& p, const Plan& g, const compute_t<T>* z, int64_t slice_step, int64_t channels, T* dw) {
  using C = compute_t<T>;
  const int64_t* const stride = p.weight_stride;
  for (int64_t c = 0; c < channels; c += lanes<C>) {
    const int part = static_cast<int>(min64(channels - c, lanes<C>));
    vec<C> sums[16], filter[9];
    for (int f = 0; f < kFrequencies; ++f) {
      const C* const from = z + f * g.z_step + c;
      vec<C> sum = load(from);
      for (int64_t slice = 1; slice < g.slices; ++slice) sum += load(from + slice * slice_step);
      sums[f] = sum;
    }
    inverse_filter(sums, filter);
    if (stride[1] == 1) {
      for (int t = 0; t < 9; ++t) store_n(dw + c + t / 3 * stride[2] + t % 3 * stride[3], filter[t], part);
      continue;
    }
    C taps[9 * lanes<C>];
    for (int t = 0; t < 9; ++t) store(taps + t * lanes<C>, filter[t]);
    if constexpr (__is_same(T, C)) {
      if (stride[1] == 9 && stride[2] == 3 && stride[3] == 1) {
        transpose(taps, lanes<C>, 9, part, dw + c * 9, 9);
        continue;
      }
    }
    for (int i = 0; i < part; ++i)
      for (int t = 0; t < 9; ++t)
        store_scalar(dw + (c + i) * stride[1] + t / 3 * stride[2] + t % 3 * stride[3], taps[t * lanes<C> + i]);
  }
}

// Returns whether the data was fit for it; if not, dw is not to be used.
template <class T>
bool run(const Conv2dParams& p) {
  using C = compute_t<T>;
  const Plan g = plan_of<C>(p);
  const bool nchw = p.layout == Layout::nchw;
  const int64_t blocks = p.groups * g.filter_blocks * g.channel_blocks;
  const int64_t z_size = round_up(kFrequencies * g.z_step, 64), k_pitch = round_up(g.filters, lanes<C>);
  Scratch<C> partial(g.slices > 1 ? blocks * g.slices * z_size : 0);
  struct Pieces {
    C *v, *w, *z, *x_strip, *dy_strip;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    C* const v = arena.take<C>(kFrequencies * g.v_step);
    C* const w = arena.take<C>(kFrequencies * g.w_step);
    C* const z = g.slices > 1 ? nullptr : arena.take<C>(z_size);
    C* const x_strip = nchw ? arena.take<C>(g.strip_rows * p.w * g.channels) : nullptr;
    C* const dy_strip = nchw ? arena.take<C>(g.strip_rows * p.w * k_pitch) : nullptr;
    return Pieces{v, w, z, x_strip, dy_strip};
  });
  const int64_t zero_count = max64(g.channels, k_pitch);
  Scratch<C> zeros(zero_count);  // zero in every storage type
  zero_run(zeros.data, zero_count);
  T* const dw = static_cast<T*>(p.weight);
  int unfit = 0;
#pragma omp parallel num_threads(p.threads) reduction(| : unfit)
  {
    const Pieces mine = scratch.mine();
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < blocks * g.slices; ++index) {
      const int64_t block = index / g.slices, slice = index % g.slices;
      const int64_t c0 = block % g.channel_blocks * g.channels;
      const int64_t k0 = block / g.channel_blocks % g.filter_blocks * g.filters;
      const int64_t group = block / g.channel_blocks / g.filter_blocks;
      const int64_t channel = group * g.group_c + c0, filter = group * g.group_k + k0;
      const int64_t step = nchw ? p.h * p.w : 1;
      Task<T> task{p,
                   g,
                   static_cast<const T*>(p.x) + channel * step,
                   static_cast<const T*>(p.y) + filter * step,
                   min64(g.channels, g.group_c - c0),
                   min64(g.filters, g.group_k - k0),
                   reinterpret_cast<const T*>(zeros.data),
                   mine.v,
                   mine.w,
                   g.slices > 1 ? partial.data + index * z_size : mine.z,
                   mine.x_strip,
                   mine.dy_strip,
                   zeros.data};
      task.run(g.lines * slice / g.slices, g.lines * (slice + 1) / g.slices);
      unfit |= !task.x_sizes.fit() || !task.dy_sizes.fit();
      if (g.slices > 1) continue;
      for (int64_t k = 0; k < task.filters; ++k)
        finish(p, g, task.z + k * g.channels, 0, task.channels,
               dw + (filter + k) * p.weight_stride[0] + c0 * p.weight_stride[1]);
    }
    if (g.slices > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < blocks * g.filters; ++i) {
        const int64_t block = i / g.filters, k = i % g.filters;
        const int64_t c0 = block % g.channel_blocks * g.channels;
        const int64_t k0 = block / g.channel_blocks % g.filter_blocks * g.filters;
        const int64_t group = block / g.channel_blocks / g.filter_blocks;
        if (k0 + k >= g.group_k) continue;
        finish(p, g, partial.data + block * g.slices * z_size + k * g.channels, z_size,
               min64(g.channels, g.group_c - c0),
               dw + (group * g.group_k + k0 + k) * p.weight_stride[0] + c0 * p.weight_stride[1]);
      }
    }
  }
  return !unfit;
}

}  // namespace

void conv2d_winograd_weight_grad_f32(const Conv2dParams& p) {
  if (!run<float>(p)) conv2d_weight_grad_f32(p);
}
void conv2d_winograd_weight_grad_bf16(const Conv2dParams& p) {
  if (!run<bf16>(p)) conv2d_weight_grad_bf16(p);
}
void conv2d_winograd_weight_grad_f16(const Conv2dParams& p) {
  if (!run<f16>(p)) conv2d_weight_grad_f16(p);
}

}  // namespace cnnops::CNNOPS_ISA
