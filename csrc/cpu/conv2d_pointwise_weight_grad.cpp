// Gradient of 1x1 filters without padding: dw[k][c] = sum over pixels of dy[k] * x[c], one product of two matrices. Windows
// that do not overlap, of strided 1x1 filters and in channels_last of RxS filters with such strides, are first gathered to an
// image of R*S*C channels, once: tasks would each gather them again.
//
// Tasks are blocks of filters times blocks of channels times slices of the output's rows. A task adds the product of kPixels
// pixels of both blocks to Z [filter][channel], in register tiles of rows of filters and columns of channels: a panel of
// channels stays in L1 for all filters. Either is packed as the tiles read it, panels of [pixel][filter] and [pixel][channel],
// or, in channels_last without strides, read where it lies, unless the pixels of a tile would share few sets of the cache.
// The slices' Z are added in order.
//
// All cuts depend on shapes alone, so results have the same bits for any number of threads.
#include "common/arith.h"
#include "common/scratch.h"
#include "cpu/micro/gemm_tile.h"
#include "cpu/micro/panels.h"
#include "cpu/simd/transpose.h"
#include "ops/conv2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kPixels = 136;  // at most, a little over 128: slices are often so; with a panel of channels: 26 KB
constexpr int64_t kFlush = 32;    // terms of one running sum
constexpr int64_t kBlockFilters = 256, kBlockChannels = 288;  // of a task: 295 KB of Z
constexpr int64_t kLeastFilters = 48;                         // smaller blocks would pack the image too often
constexpr int64_t kMostTurned = 64;                           // channels: dw is then stored element by element
// Enough tasks to balance a few threads, fewer of little work, as each packs what it reads; by shape alone, so that cuts do
// not depend on threads.
constexpr int64_t kMostTasks = 16, kLeastTasks = 4, kTaskProducts = 2 << 20;

// A power of two that divides the bytes from pixel to pixel: above it, pixels share few sets of L1.
constexpr int64_t kMostAligned = 1024;
constexpr int64_t kTogether = 8;  // pixels: their channels fit L1

// Filters of a panel: rows of tiles, and blocks of 8 for transpose().
constexpr int64_t kPanelFilters = kTileRows % 8 == 0 ? kTileRows : 4 * kTileRows;
// From one panel of filters to the next: an odd number of cache lines, or pixels of all panels would share a set of L1.
template <class C>
constexpr int64_t kFilterPanel = kPixels * kPanelFilters + 64 / sizeof(C);

struct Plan {
  int64_t group_c, group_k;
  int64_t channels, filters;  // of a block, at most; channels in whole vectors
  int64_t channel_blocks, filter_blocks, slices;
  int64_t rows;                  // of dy, all images'
  bool direct;                   // dw itself is the one Z
  bool x_in_place, dy_in_place;  // tiles read them where they lie
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
  const int64_t products = p.n * p.p * p.q * g.group_c * p.k;
  const int64_t wanted = max64(kLeastTasks, min64(products / kTaskProducts, kMostTasks)) / 2 * 2;
  g.slices = min64(max64(1, p.n * p.p * p.q / (2 * kPixels)), g.rows);
  const int64_t others = g.channel_blocks * g.slices * p.groups;
  for (int64_t want = ceil_div(g.group_k, kBlockFilters);; ++want) {
    g.filters = round_up(ceil_div(g.group_k, want), kTileRows);
    g.filter_blocks = ceil_div(g.group_k, g.filters);
    const int64_t tasks = g.filter_blocks * others;
    if (tasks >= wanted && tasks % 2 == 0) break;
    if (ceil_div(g.group_k, want + 1) < kLeastFilters) break;
  }
  g.slices = min64(ceil_div(wanted, g.channel_blocks * g.filter_blocks * p.groups), g.slices);
  g.direct = __is_same(T, C) && g.slices == 1 && g.group_c % lanes<C> == 0 && p.weight_stride[1] == 1;
  const bool close = __is_same(T, C) && p.layout == Layout::nhwc && p.n == 1 && p.groups == 1 && p.h * p.w == p.p * p.q;
  const auto spread = [](int64_t bytes) { return (bytes & -bytes) <= kMostAligned; };
  g.x_in_place = close && p.c % lanes<C> == 0 && spread(p.c * static_cast<int64_t>(sizeof(C)));
  g.dy_in_place = close && spread(p.k * static_cast<int64_t>(sizeof(C)));
  return g;
}

// The pixels of an image that the filters see: `columns` of each row, `step` and `row` elements apart.
struct Grid {
  int64_t columns, step, row;
  int64_t channel;  // from one channel to the next
};

// Channels first .. first + width of a pixel, at to[0], to[width] ... of one pixel after the other.
template <class C>
struct Panel {
  int64_t first, width;
  C* to;
};

template <int64_t kWidth, class T>
[[gnu::always_inline]] inline void copy_whole(compute_t<T>* to, const T* from) {
  for (int64_t i = 0; i < kWidth; ++i) to[i] = load_scalar(from[i]);
}

// Packs pixels [q, q + count) of a grid into `panels`, as pixels `at` and on. `line` has room for kPixels pixels of 8
// channels.
template <int64_t kWidth, class T>
void pack(const T* from, const Grid& grid, int64_t q, int64_t count, int64_t channels,
          const Panel<compute_t<T>>* panels, int64_t panel_count, int64_t at, compute_t<T>* line) {
  using C = compute_t<T>;
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
    for_rows([&](const T* pixels, int64_t i, int64_t length) {
      for (int64_t j0 = 0; j0 < length; j0 += kTogether, pixels += kTogether * grid.step) {
        const int64_t together = min64(kTogether, length - j0);
        for (int64_t index = 0; index < panel_count; ++index) {
          const Panel<C>& panel = panels[index];
          const int64_t filled = min64(panel.width, channels - panel.first);
          const T* pixel = pixels + panel.first;
          C* to = panel.to + (at + i + j0) * panel.width;
          if (kWidth && filled == kWidth)
            for (int64_t j = 0; j < together; ++j, pixel += grid.step, to += kWidth) copy_whole<kWidth>(to, pixel);
          else
            for (int64_t j = 0; j < together; ++j, pixel += grid.step, to += panel.width)
              copy_run(to, pixel, 1, filled);
        }
      }
    });
    return;
  }
  for (int64_t index = 0; index < panel_count; ++index) {
    const Panel<C>& panel = panels[index];
    const int64_t filled = min64(panel.width, channels - panel.first);
    C* const to = panel.to + at * panel.width;
    if (dense && grid.step == 1) {
      transpose(from + panel.first * grid.channel + q, grid.channel, filled, count, to, panel.width);
      continue;
    }
    for (int64_t c = 0; c < filled; c += 8) {
      const int64_t together = min64(8, filled - c);
      for_rows([&](const T* pixel, int64_t i, int64_t length) {
        for (int64_t j = 0; j < together; ++j)
          copy_run(line + j * kPixels + i, pixel + (panel.first + c + j) * grid.channel, grid.step, length);
      });
      transpose(line, kPixels, together, count, to + c, panel.width);
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

// Pixels [q, q + count) of a grid without gaps; of others nothing.
template <class T>
Ahead ahead_of(const T* from, const Grid& grid, int64_t q, int64_t count, int64_t channels) {
  constexpr int64_t kSize = sizeof(T);
  if (grid.row != grid.columns * grid.step) return {};
  const char* const first = reinterpret_cast<const char*>(from + q * grid.step);
  if (grid.channel == 1) return {first, count, grid.step * kSize, channels * kSize};
  return {first, channels, grid.channel * kSize, count * grid.step * kSize};
}

template <class T>
struct Task {
  using C = compute_t<T>;
  const Conv2dParams& p;
  const Plan& g;
  const T *x, *dy;  // image 0, the first channel and filter of the block
  int64_t channels, filters;
  C *v, *w, *z;
  int64_t z_pitch;
  C* line;
  int64_t filled = 0;
  bool add = false;

  // Of channels, as even as possible, and of filters.
  int64_t channel_panels = 0, filter_panels = 0;
  Panel<C> columns[kBlockChannels / lanes<C> + 1] = {}, rows[kBlockFilters / kPanelFilters + 1] = {};

  void cut_into_panels() {
    const int64_t vectors = ceil_div(channels, lanes<C>);
    channel_panels = ceil_div(vectors, kTileVecs);
    for (int64_t i = 0; i < channel_panels; ++i) {
      const int64_t first = vectors * i / channel_panels, last = vectors * (i + 1) / channel_panels;
      columns[i] = {first * lanes<C>, (last - first) * lanes<C>, v + first * lanes<C> * kPixels};
    }
    filter_panels = ceil_div(filters, kPanelFilters);
    for (int64_t i = 0; i < filter_panels; ++i) rows[i] = {i * kPanelFilters, kPanelFilters, w + i * kFilterPanel<C>};
  }

  // Adds the product of `filled` pixels. `x_pixels` and `dy_pixels` are where they lie, if they are not packed. Meanwhile the
  // next pixels are called from memory.
  void multiply(const C* x_pixels, const C* dy_pixels, const Ahead& next_x, const Ahead& next_dy) {
    const int64_t x_tiles = next_x.tiles(filled);
    for (int64_t i = 0, tile = 0; filled > 0 && i < channel_panels; ++i) {
      const Panel<C>& panel = columns[i];
      for (int64_t k = 0; k < filters; k += kTileRows, ++tile) {
        const C* const base = dy_pixels ? dy_pixels + k : rows[k / kPanelFilters].to + k % kPanelFilters;
        const int64_t pitch = dy_pixels ? p.k : kPanelFilters;
        gemm_tile<C>(static_cast<int>(min64(kTileRows, filters - k)), static_cast<int>(panel.width / lanes<C>),
                     tile < x_tiles ? next_x.rows_of_tile(tile, filled, base, pitch)
                                    : next_dy.rows_of_tile(tile - x_tiles, filled, base, pitch),
                     x_pixels ? x_pixels + panel.first : panel.to, x_pixels ? p.c : panel.width, filled, 1,
                     z + k * z_pitch + panel.first, z_pitch, add, kFlush);
      }
    }
    filled = 0;
    add = true;
  }

  // Output rows [first, last) of all images.
  void run(int64_t first, int64_t last) {
    const Grid x_grid = grid_of_x(p), dy_grid = grid_of_dy(p);
    const int64_t pixels = (last - first) * p.q, together = ceil_div(pixels, ceil_div(pixels, kPixels));
    cut_into_panels();
    // Lanes beyond the last channel are computed and thrown away; zeros keep them finite.
    const Panel<C>& end = columns[channel_panels - 1];
    for (int64_t i = 0; end.first + end.width > channels && i < kPixels; ++i)
      zero_run(end.to + i * end.width + channels - end.first, end.first + end.width - channels);
    if constexpr (__is_same(T, C)) {
      if (g.x_in_place || g.dy_in_place) {
        const int64_t end = last * p.q;
        for (int64_t q = first * p.q; q < end; q += together) {
          const int64_t count = min64(together, end - q), next = min64(together, end - q - count);
          if (!g.x_in_place) pack<0>(x, x_grid, q, count, channels, columns, channel_panels, 0, line);
          if (!g.dy_in_place) pack<kPanelFilters>(dy, dy_grid, q, count, filters, rows, filter_panels, 0, line);
          filled = count;
          multiply(g.x_in_place ? x + q * p.c : nullptr, g.dy_in_place ? dy + q * p.k : nullptr,
                   ahead_of(x, x_grid, q + count, next, channels), ahead_of(dy, dy_grid, q + count, next, filters));
        }
        return;
      }
    }
    for (int64_t row = first; row < last;) {
      const int64_t n = row / p.p, image_rows = min64(p.p - row % p.p, last - row);
      for (int64_t q = row % p.p * p.q, end = q + image_rows * p.q; q < end;) {
        const T* const x_image = x + n * p.c * p.h * p.w;
        const T* const dy_image = dy + n * p.k * p.p * p.q;
        if (filled == together) {
          const int64_t next = min64(together, end - q);
          multiply(nullptr, nullptr, ahead_of(x_image, x_grid, q, next, channels),
                   ahead_of(dy_image, dy_grid, q, next, filters));
        }
        const int64_t count = min64(together - filled, end - q);
        pack<0>(x_image, x_grid, q, count, channels, columns, channel_panels, filled, line);
        pack<kPanelFilters>(dy_image, dy_grid, q, count, filters, rows, filter_panels, filled, line);
        filled += count;
        q += count;
      }
      row += image_rows;
    }
    multiply(nullptr, nullptr, {}, {});
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

// The images as one, where its rows of pixels follow each other without a gap.
Conv2dParams joined(Conv2dParams p) {
  if (p.layout == Layout::nhwc && p.stride_h == 1 && p.stride_w == 1 && p.h == p.p && p.w == p.q)
    p.h *= p.n, p.p *= p.n, p.n = 1;
  return p;
}

// `count` elements, `step` apart.
template <class T>
[[gnu::always_inline]] inline void gather_run(T* to, const T* from, int64_t step, int64_t count) {
  if constexpr (__is_same(T, compute_t<T>)) {
    copy_run(to, from, step, count);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * step];
  }
}

// The windows' pixels, as planes [P][Q] of 1x1 windows (NCHW) or as pixels of R*S*C channels (channels_last).
template <class T>
void gather(const Conv2dParams& p, T* to) {
  const T* const x = static_cast<const T*>(p.x);
  const bool nchw = p.layout == Layout::nchw;
  const int64_t image = nchw ? p.c : 1, pixel = nchw ? 1 : p.c, size = p.r * p.s * pixel;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t line = 0; line < p.n * image * p.p; ++line) {
    const T* const row = x + (line / p.p * p.h + line % p.p * p.stride_h) * p.w * pixel;
    T* out = to + line * p.q * size;
    if (nchw) {
      gather_run(out, row, p.stride_w, p.q);
      continue;
    }
    for (int64_t q = 0; q < p.q; ++q)
      for (int64_t r = 0; r < p.r; ++r, out += p.s * p.c)
        gather_run(out, row + (r * p.w + q * p.stride_w) * p.c, 1, p.s * p.c);
  }
}

// The same problem on the gathered image.
Conv2dParams gathered(Conv2dParams p, void* image) {
  p.x = image;
  p.c *= p.r * p.s;
  p.h = p.p, p.w = p.q;
  p.r = p.s = p.stride_h = p.stride_w = 1;
  return p;
}

template <class T>
void weight_grad(const Conv2dParams& given) {
  using C = compute_t<T>;
  const bool gathers = given.h != given.p || given.w != given.q;
  Scratch<T> image(gathers ? given.n * given.c * given.r * given.s * given.p * given.q : 0);
  if (gathers) gather(given, image.data);
  const Conv2dParams p = joined(turned<C>(gathers ? gathered(given, image.data) : given));
  const Plan g = plan_of<T>(p);
  const int64_t blocks = p.groups * g.filter_blocks * g.channel_blocks;
  const int64_t z_size = round_up(g.filters * g.channels, 64);
  struct Pieces {
    C *v, *w;
    C* line;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Pieces pieces;
    pieces.v = arena.take<C>(kPixels * g.channels);
    pieces.w = arena.take<C>(ceil_div(g.filters, kPanelFilters) * kFilterPanel<C>);
    pieces.line = arena.take<C>(8 * kPixels);
    return pieces;
  });
  Scratch<C> partial(g.direct ? 0 : blocks * g.slices * z_size);
#pragma omp parallel num_threads(p.threads)
  {
    const Pieces mine = scratch.mine();
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
                   min64(g.channels, g.group_c - c0),
                   min64(g.filters, g.group_k - k0),
                   mine.v,
                   mine.w,
                   z,
                   z_pitch,
                   mine.line};
      task.run(g.rows * slice / g.slices, g.rows * (slice + 1) / g.slices);
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
