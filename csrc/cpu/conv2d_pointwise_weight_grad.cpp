// Gradient of 1x1 filters without padding: dw[k][c] = sum over pixels of dy[k] * x[c], one product of two matrices.
//
// Tasks are blocks of filters times blocks of channels times slices of the output's rows. A task adds the product of kPixels
// pixels of both blocks, [pixel][filter] and [pixel][channel], to Z [filter][channel], in register tiles of rows of filters
// and columns of channels: a panel of channels stays in L1 for all filters. The slices' Z are added in order.
//
// Images in channels_last are such matrices. Of others, or with strides, each task copies its pixels, or, where many tasks
// would copy the same ones, all are gathered beforehand.
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
constexpr int64_t kAliases = 512;                             // bytes: rows so far apart share few of the 64 sets of L1
constexpr int64_t kMostTurned = 64;                           // channels: dw is then stored element by element
constexpr int64_t kGatherChannels = 64;
constexpr int64_t kGatherCosts = 3;   // times what a task's copy in its cache costs
constexpr int64_t kWantedTasks = 16;  // enough to balance a few threads; fixed, so that cuts do not depend on threads

struct Plan {
  int64_t group_c, group_k;
  int64_t channels, filters;  // of a block, at most; channels in whole vectors
  int64_t channel_blocks, filter_blocks, slices;
  int64_t rows;        // of dy, all images'
  bool gather;         // the pixels of x and dy, before all tasks
  bool in_place;       // tasks read pixels where they lie,
  bool copy_channels;  // all but those of x
  bool direct;         // dw itself is the one Z
};

template <class T>
Plan plan_of(const Conv2dParams& p) {
  using C = compute_t<T>;
  Plan g{};
  g.group_c = p.c / p.groups, g.group_k = p.k / p.groups;
  g.channel_blocks = ceil_div(g.group_c, kBlockChannels);
  g.channels = round_up(ceil_div(g.group_c, g.channel_blocks), lanes<C>);
  g.channel_blocks = ceil_div(g.group_c, g.channels);
  g.rows = p.n * p.p;
  g.slices = min64(max64(1, p.n * p.p * p.q / (2 * kPixels)), g.rows);
  const int64_t others = g.channel_blocks * g.slices * p.groups;
  for (int64_t want = ceil_div(g.group_k, kBlockFilters);; ++want) {
    g.filters = round_up(ceil_div(g.group_k, want), kTileRows);
    g.filter_blocks = ceil_div(g.group_k, g.filters);
    const int64_t tasks = g.filter_blocks * others;
    if (tasks >= kWantedTasks && tasks % 2 == 0) break;
    if (ceil_div(g.group_k, want + 1) < kLeastFilters) break;
  }
  g.slices = min64(ceil_div(kWantedTasks, g.channel_blocks * g.filter_blocks * p.groups), g.slices);
  constexpr bool plain = __is_same(T, C);
  const bool matrices = p.layout == Layout::nhwc && p.stride_h == 1 && p.stride_w == 1;
  g.gather = plain && !matrices && p.c * g.filter_blocks + p.k * g.channel_blocks > kGatherCosts * (p.c + p.k);
  g.in_place = plain && (matrices || g.gather);
  g.copy_channels = !g.gather && p.c * static_cast<int64_t>(sizeof(C)) % kAliases == 0;
  g.direct = plain && g.slices == 1 && g.group_c % lanes<C> == 0 && p.weight_stride[1] == 1;
  return g;
}

// The pixels of an image that the filters see: `columns` of each row, `step` and `row` elements apart.
struct Grid {
  int64_t columns, step, row;
  int64_t channel;  // from one channel to the next
};

// Pixels [q, q + count) of a grid as rows of `pitch`. `line` has room for kPixels pixels of 8 channels.
template <class T>
void copy_pixels(const T* from, const Grid& grid, int64_t q, int64_t count, int64_t channels, compute_t<T>* to,
                 int64_t pitch, compute_t<T>* line) {
  const bool dense = grid.row == grid.columns * grid.step;  // one long row
  const auto for_rows = [&](auto copy) {                    // copy(first element, first pixel, pixels)
    for (int64_t i = 0; i < count;) {
      const int64_t column = dense ? 0 : (q + i) % grid.columns;
      const int64_t length = dense ? count : min64(grid.columns - column, count - i);
      copy(from + (dense ? q * grid.step : (q + i) / grid.columns * grid.row + column * grid.step), i, length);
      i += length;
    }
  };
  if (grid.channel == 1) {
    for_rows([&](const T* pixel, int64_t i, int64_t length) {
      for (int64_t j = 0; j < length; ++j) copy_run(to + (i + j) * pitch, pixel + j * grid.step, 1, channels);
    });
  } else if (dense && grid.step == 1) {
    transpose(from + q, grid.channel, channels, count, to, pitch);
  } else {
    for (int64_t c = 0; c < channels; c += 8) {
      const int64_t together = min64(8, channels - c);
      for_rows([&](const T* pixel, int64_t i, int64_t length) {
        for (int64_t j = 0; j < together; ++j)
          copy_run(line + j * kPixels + i, pixel + (c + j) * grid.channel, grid.step, length);
      });
      transpose(line, kPixels, together, count, to + c, pitch);
    }
  }
}

Grid grid_of_x(const Conv2dParams& p) {
  const int64_t pixel = p.layout == Layout::nchw ? 1 : p.c;
  return {p.q, p.stride_w * pixel, p.stride_h * p.w * pixel, p.layout == Layout::nchw ? p.h * p.w : 1};
}
Grid grid_of_dy(const Conv2dParams& p) {
  const int64_t pixel = p.layout == Layout::nchw ? 1 : p.k;
  return {p.q, pixel, p.q * pixel, p.layout == Layout::nchw ? p.p * p.q : 1};
}

// Copies a grid's pixels of all images, of image_size elements each, to `to`. For all threads of a parallel region.
template <class T>
void gather(const Conv2dParams& p, const T* from, int64_t image_size, const Grid& grid, int64_t channels,
            compute_t<T>* to, int64_t pitch, compute_t<T>* line) {
  const int64_t plane = p.p * p.q, chunks = ceil_div(plane, kPixels), blocks = ceil_div(channels, kGatherChannels);
#pragma omp for schedule(static)
  for (int64_t i = 0; i < p.n * blocks * chunks; ++i) {
    const int64_t n = i / chunks / blocks, c0 = i / chunks % blocks * kGatherChannels, q = i % chunks * kPixels;
    copy_pixels(from + n * image_size + c0 * grid.channel, grid, q, min64(kPixels, plane - q),
                min64(kGatherChannels, channels - c0), to + (n * plane + q) * pitch + c0, pitch, line);
  }
}

// [pixel][channel]
template <class C>
struct Pixels {
  const C* data;
  int64_t pitch;
};

template <class T>
struct Task {
  using C = compute_t<T>;
  const Conv2dParams& p;
  const Plan& g;
  const T *x, *dy;          // image 0, the first channel and filter of the block
  Pixels<C> all_x, all_dy;  // the same in place
  int64_t channels, filters;
  C *v, *w, *z;
  int64_t z_pitch;
  C* line;
  int64_t filled = 0;
  bool add = false;

  void multiply(Pixels<C> in, Pixels<C> grads, int64_t count) {
    if (count == 0) return;
    const int64_t vectors = ceil_div(channels, lanes<C>), panels = ceil_div(vectors, kTileVecs);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = vectors * panel / panels, last = vectors * (panel + 1) / panels;
      for (int64_t k = 0; k < filters; k += kTileRows)
        gemm_tile<C>(static_cast<int>(min64(kTileRows, filters - k)), static_cast<int>(last - first),
                     ColumnRows<C>{grads.data + k, grads.pitch, 0}, in.data + first * lanes<C>, in.pitch, count, 1,
                     z + k * z_pitch + first * lanes<C>, z_pitch, add, kFlush);
    }
    add = true;
  }

  void multiply_copied() {
    multiply({v, g.channels}, {w, g.filters}, filled);
    filled = 0;
  }

  void run(int64_t first, int64_t last) {
    const Grid x_grid = grid_of_x(p), dy_grid = grid_of_dy(p);
    for (int64_t row = first; row < last;) {
      const int64_t n = row / p.p, rows = min64(p.p - row % p.p, last - row);
      for (int64_t q = row % p.p * p.q, end = q + rows * p.q; q < end;) {
        if (filled == kPixels) multiply_copied();
        const int64_t count = min64(kPixels - filled, end - q);
        copy_pixels(x + n * p.c * p.h * p.w, x_grid, q, count, channels, v + filled * g.channels, g.channels, line);
        copy_pixels(dy + n * p.k * p.p * p.q, dy_grid, q, count, filters, w + filled * g.filters, g.filters, line);
        filled += count;
        q += count;
      }
      row += rows;
    }
    multiply_copied();
  }

  void run_in_place(int64_t first, int64_t last) {
    // A vector that ends past the last channel must not end past the last pixel.
    const int64_t end = g.rows * p.q, safe = channels % lanes<C> == 0 ? end : end - 1;
    for (int64_t i = first * p.q; i < last * p.q; i += kPixels) {
      const int64_t count = min64(kPixels, last * p.q - i);
      Pixels<C> in{all_x.data + i * all_x.pitch, all_x.pitch};
      if (g.copy_channels || (!g.gather && i + count > safe)) {
        copy_pixels(in.data, Grid{count, in.pitch, 0, 1}, 0, count, channels, v, g.channels, line);
        in = {v, g.channels};
      }
      multiply(in, {all_dy.data + i * all_dy.pitch, all_dy.pitch}, count);
    }
  }
};

// Without strides x and dy may change places, and dw with its transpose: so that columns fill their vectors.
template <class C>
Conv2dParams turned(Conv2dParams p) {
  const int64_t group_c = p.c / p.groups, group_k = p.k / p.groups;
  const bool pays =
      group_c <= kMostTurned && 8 * round_up(group_c, lanes<C>) * group_k > 9 * group_c * round_up(group_k, lanes<C>);
  if (p.stride_h != 1 || p.stride_w != 1 || p.groups != 1 || p.h != p.p || p.w != p.q || !pays) return p;
  const auto exchange = [](auto& a, auto& b) {
    const auto kept = a;
    a = b, b = kept;
  };
  exchange(p.x, p.y);
  exchange(p.c, p.k);
  exchange(p.weight_stride[0], p.weight_stride[1]);
  return p;
}

template <class T>
void weight_grad(const Conv2dParams& given) {
  using C = compute_t<T>;
  const Conv2dParams p = turned<C>(given);
  const Plan g = plan_of<T>(p);
  const int64_t blocks = p.groups * g.filter_blocks * g.channel_blocks;
  const int64_t z_size = round_up(g.filters * g.channels, 64);
  struct Pieces {
    C *v, *w;
    C* line;
  };
  const auto lay_out = [&](Arena arena, Pieces* pieces) {
    C* const v = arena.take<C>(kPixels * g.channels);
    C* const w = arena.take<C>(kPixels * g.filters);
    C* const line = arena.take<C>(8 * kPixels);
    if (pieces) *pieces = {v, w, line};
    return arena.used;
  };
  const ScratchPieces scratch(p.threads, lay_out(Arena{nullptr}, nullptr));
  Scratch<C> partial(g.direct ? 0 : blocks * g.slices * z_size);
  // Whole vectors, an odd number of cache lines: see kAliases.
  const auto gathered_pitch = [](int64_t channels) {
    const int64_t vectors = ceil_div(channels, lanes<C>);
    return (vectors + (vectors + 1) % 2) * lanes<C>;
  };
  const int64_t pixels = p.n * p.p * p.q;
  Pixels<C> all_x{static_cast<const C*>(p.x), p.c}, all_dy{static_cast<const C*>(p.y), p.k};
  if (g.gather) all_x.pitch = gathered_pitch(p.c), all_dy.pitch = gathered_pitch(p.k);
  Scratch<C> gathered_x(g.gather ? pixels * all_x.pitch : 0), gathered_dy(g.gather ? pixels * all_dy.pitch : 0);
  if (g.gather) all_x.data = gathered_x.data, all_dy.data = gathered_dy.data;
#pragma omp parallel num_threads(p.threads)
  {
    Pieces mine;
    lay_out(Arena{static_cast<char*>(scratch.piece(omp_get_thread_num()))}, &mine);
    // Lanes and rows beyond the last channel and filter are computed and thrown away; zeros keep them finite.
    zero_run(mine.v, g.in_place && g.group_c % lanes<C> == 0 ? 0 : kPixels * g.channels);
    zero_run(mine.w, g.in_place ? 0 : kPixels * g.filters);
    if (g.gather) {
      gather(p, static_cast<const T*>(p.x), p.c * p.h * p.w, grid_of_x(p), p.c, gathered_x.data, all_x.pitch,
             mine.line);
      gather(p, static_cast<const T*>(p.y), p.k * p.p * p.q, grid_of_dy(p), p.k, gathered_dy.data, all_dy.pitch,
             mine.line);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < blocks * g.slices; ++index) {
      const int64_t block = index / g.slices, slice = index % g.slices;
      const int64_t c0 = block % g.channel_blocks * g.channels;
      const int64_t k0 = block / g.channel_blocks % g.filter_blocks * g.filters;
      const int64_t group = block / g.channel_blocks / g.filter_blocks;
      const bool nchw = p.layout == Layout::nchw;
      C* z = partial.data + index * z_size;
      int64_t z_pitch = g.channels;
      if constexpr (__is_same(T, C)) {
        if (g.direct) {
          z_pitch = p.weight_stride[0];
          z = static_cast<T*>(p.weight) + (group * g.group_k + k0) * z_pitch + c0;
        }
      }
      Task<T> task{p,
                   g,
                   static_cast<const T*>(p.x) + (group * g.group_c + c0) * (nchw ? p.h * p.w : 1),
                   static_cast<const T*>(p.y) + (group * g.group_k + k0) * (nchw ? p.p * p.q : 1),
                   {all_x.data + group * g.group_c + c0, all_x.pitch},
                   {all_dy.data + group * g.group_k + k0, all_dy.pitch},
                   min64(g.channels, g.group_c - c0),
                   min64(g.filters, g.group_k - k0),
                   mine.v,
                   mine.w,
                   z,
                   z_pitch,
                   mine.line};
      const int64_t first = g.rows * slice / g.slices, last = g.rows * (slice + 1) / g.slices;
      if (g.in_place)
        task.run_in_place(first, last);
      else
        task.run(first, last);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < (g.direct ? 0 : blocks * g.filters); ++i) {
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
