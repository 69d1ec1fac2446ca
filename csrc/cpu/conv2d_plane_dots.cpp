// Gradient of 1x1 filters in NCHW as dot products of planes: dw[k][c] = sum over images of dy[n][k] . x[n][c]. Planes are read
// pixel after pixel, where they lie or, if they do not fill cache lines, from copies one after another; nothing is transposed.
// Lanes are pixels, and a sum's lanes are added up at its end, which also keeps its rounding error small.
//
// Tasks are blocks of filters times blocks of channels times slices of the stretches, each of some whole planes or a part of
// one. A register tile is kChannels x kFilters sums over a stretch: the stretch of its channels stays in L1 while all filters
// of the block pass, whose own stays in L2 for all channels. The slices' sums are added in order.
//
// All cuts depend on shapes alone, so results have the same bits for any number of threads.
#include "common/arith.h"
#include "common/scratch.h"
#include "cpu/micro/panels.h"
#include "cpu/simd/sums.h"
#include "ops/conv2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// A tile's sums fill registers with a vector of each of its filters and one of a channel.
#if CNNOPS_ISA_avx512
constexpr int kChannels = 6, kFilters = 4;
#else
constexpr int kChannels = 4, kFilters = 3;
#endif
constexpr int kLanes = lanes<float>;
constexpr int kSums = (kChannels * kFilters + kLanes - 1) / kLanes * kLanes;  // [filter][channel], in whole vectors

constexpr int64_t kStretch = 784;        // pixels: kChannels planes of 18 KB; adding up lanes is 5 % of the work
constexpr int64_t kBlockFilters = 160;   // 500 KB of dy
constexpr int64_t kBlockChannels = 192;  // with kBlockFilters: 160 KB of sums
constexpr int64_t kLeastTasks = 8, kWantedTasks = 16;

// Tiles of `side` channels or filters, of `count` in all, in blocks. The last tile begins early and is whole.
struct Side {
  int64_t side, count;
  int64_t block_tiles, blocks;  // tiles of a block, at most

  Side(int64_t side, int64_t count, int64_t wanted_blocks) : side(side), count(count) {
    block_tiles = ceil_div(all_tiles(), wanted_blocks);
    blocks = ceil_div(all_tiles(), block_tiles);
  }
  int64_t all_tiles() const { return ceil_div(count, side); }
  int64_t tiles(int64_t block) const { return min64(block_tiles, all_tiles() - block * block_tiles); }
  int64_t begin(int64_t block, int64_t tile) const { return min64((block * block_tiles + tile) * side, count - side); }
  // Those that the tile before has, too.
  int64_t shared(int64_t block, int64_t tile) const { return (block * block_tiles + tile) * side - begin(block, tile); }
};

struct Plan {
  Side channels, filters;
  int64_t images;          // of a stretch, at most
  int64_t pieces, length;  // of a plane; pixels of a piece, at most
  int64_t stretches, slices;
  bool copies;
  int64_t pitch;  // of copies: an odd number of cache lines

  explicit Plan(const Conv2dParams& p)
      : channels(kChannels, p.c, ceil_div(p.c, kBlockChannels)), filters(kFilters, p.k, ceil_div(p.k, kBlockFilters)) {
    const int64_t plane = p.p * p.q;
    images = min64(p.n, max64(1, kStretch / plane));
    length = round_up(ceil_div(plane, ceil_div(plane, kStretch)), 16);
    pieces = ceil_div(plane, length);
    stretches = ceil_div(p.n, images) * pieces;
    const int64_t wanted = min64(ceil_div(kLeastTasks, filters.blocks * stretches), channels.all_tiles());
    if (wanted > channels.blocks) channels = {kChannels, p.c, wanted};
    slices = min64(ceil_div(kWantedTasks, channels.blocks * filters.blocks), stretches);
    copies = plane % 16 != 0;
    const int64_t lines = ceil_div(images * length, 16);
    pitch = (lines + (lines + 1) % 2) * 16;
  }
};

// Planes of a stretch: `length` pixels of each of `images` images.
struct Stretch {
  int64_t plane, length, images;
  int64_t x_image, dy_image;  // from one image to the next

  // `rows` planes, one image's pixels after another's, zeros up to a whole vector.
  void copy(const float* from, int64_t image, int64_t rows, int64_t pitch, float* to) const {
    for (int64_t row = 0; row < rows; ++row, from += plane, to += pitch) {
      for (int64_t n = 0; n < images; ++n) copy_run(to + n * length, from + n * image, 1, length);
      zero_run(to + images * length, round_up(images * length, kLanes) - images * length);
    }
  }
  Stretch of_copies(int64_t pitch) const { return {pitch, round_up(images * length, kLanes), 1, 0, 0}; }
};

// z (+)= the dot products of kChannels planes of x and kFilters of dy.
void dot_tile(const float* x, const float* dy, const Stretch& s, float* z, bool add) {
  f32v sum[kFilters][kChannels] = {};
  const int64_t plane = s.plane, whole = s.length / kLanes * kLanes;
  const auto step = [&](auto read) __attribute__((always_inline)) {
    f32v b[kFilters];
#pragma GCC unroll 4
    for (int k = 0; k < kFilters; ++k) b[k] = read(dy + k * plane);
#pragma GCC unroll 6
    for (int c = 0; c < kChannels; ++c) {
      const f32v a = read(x + c * plane);
#pragma GCC unroll 4
      for (int k = 0; k < kFilters; ++k) sum[k][c] += a * b[k];
    }
  };
  for (int64_t n = 0; n < s.images; ++n, x += s.x_image, dy += s.dy_image) {
    for (int64_t i = 0; i < whole; i += kLanes)
      step([&](const float* from) __attribute__((always_inline)) { return load(from + i); });
    if (whole < s.length)
      step([&](const float* from)
               __attribute__((always_inline)) { return load_n(from + whole, static_cast<int>(s.length - whole)); });
  }
  f32v flat[kSums] = {};
#pragma GCC unroll 4
  for (int k = 0; k < kFilters; ++k)
#pragma GCC unroll 6
    for (int c = 0; c < kChannels; ++c) flat[k * kChannels + c] = sum[k][c];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += kLanes) {
    const f32v sums = sum_each<kLanes>(flat + i);
    store(z + i, add ? load(z + i) + sums : sums);
  }
}

// Adds the slices' sums of a tile and stores those from filter k0, channel c0 of it on.
void store_tile(const float* z, int64_t slice_size, int64_t slices, int64_t k0, int64_t c0, int64_t channel_stride,
                int64_t filter_stride, float* dw) {
  alignas(64) float sums[kSums];
  for (int i = 0; i < kSums; i += kLanes) {
    f32v sum = load(z + i);
    for (int64_t slice = 1; slice < slices; ++slice) sum += load(z + slice * slice_size + i);
    store(sums + i, sum);
  }
  for (int64_t k = k0; k < kFilters; ++k)
    for (int64_t c = c0; c < kChannels; ++c) dw[k * filter_stride + c * channel_stride] = sums[k * kChannels + c];
}

}  // namespace

void conv2d_plane_dots_weight_grad_f32(const Conv2dParams& p) {
  const Plan g(p);
  const float *const x = static_cast<const float*>(p.x), *const dy = static_cast<const float*>(p.y);
  float* const dw = static_cast<float*>(p.weight);
  const int64_t plane = p.p * p.q, blocks = g.channels.blocks * g.filters.blocks;
  const int64_t block_size = g.channels.block_tiles * g.filters.block_tiles * kSums;
  const Scratch<float> sums(g.slices * blocks * block_size);
  struct Copies {
    float *x, *dy;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Copies copies;
    copies.x = arena.take<float>(g.copies ? kChannels * g.pitch : 0);
    copies.dy = arena.take<float>(g.copies ? g.filters.block_tiles * kFilters * g.pitch : 0);
    return copies;
  });
#pragma omp parallel num_threads(p.threads)
  {
    const Copies mine = scratch.mine();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < g.slices * blocks; ++task) {
      const int64_t block = task % blocks, slice = task / blocks;
      const int64_t c_block = block % g.channels.blocks, k_block = block / g.channels.blocks;
      const int64_t c_tiles = g.channels.tiles(c_block), k_tiles = g.filters.tiles(k_block);
      const int64_t k0 = g.filters.begin(k_block, 0), k1 = g.filters.begin(k_block, k_tiles - 1) + kFilters;
      const int64_t first = g.stretches * slice / g.slices, last = g.stretches * (slice + 1) / g.slices;
      for (int64_t stretch = first; stretch < last; ++stretch) {
        const int64_t n = stretch / g.pieces * g.images, pixel = stretch % g.pieces * g.length;
        const Stretch s{plane, min64(g.length, plane - pixel), min64(g.images, p.n - n), p.c * plane, p.k * plane};
        const Stretch copies = s.of_copies(g.pitch);
        const float* const x_stretch = x + n * p.c * plane + pixel;
        const float* const dy_stretch = dy + (n * p.k + k0) * plane + pixel;
        if (g.copies) s.copy(dy_stretch, s.dy_image, k1 - k0, g.pitch, mine.dy);
        for (int64_t i = 0; i < c_tiles; ++i) {
          const float* const planes = x_stretch + g.channels.begin(c_block, i) * plane;
          if (g.copies) s.copy(planes, s.x_image, kChannels, g.pitch, mine.x);
          for (int64_t j = 0; j < k_tiles; ++j) {
            const int64_t k = g.filters.begin(k_block, j) - k0;
            float* const z = sums.data + task * block_size + (i * g.filters.block_tiles + j) * kSums;
            if (g.copies)
              dot_tile(mine.x, mine.dy + k * g.pitch, copies, z, stretch > first);
            else
              dot_tile(planes, dy_stretch + k * plane, s, z, stretch > first);
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < blocks * g.channels.block_tiles; ++row) {
      const int64_t block = row / g.channels.block_tiles, i = row % g.channels.block_tiles;
      const int64_t c_block = block % g.channels.blocks, k_block = block / g.channels.blocks;
      if (i >= g.channels.tiles(c_block)) continue;
      for (int64_t j = 0; j < g.filters.tiles(k_block); ++j)
        store_tile(
            sums.data + (row * g.filters.block_tiles + j) * kSums, blocks * block_size, g.slices,
            g.filters.shared(k_block, j), g.channels.shared(c_block, i), p.weight_stride[1], p.weight_stride[0],
            dw + g.filters.begin(k_block, j) * p.weight_stride[0] + g.channels.begin(c_block, i) * p.weight_stride[1]);
    }
  }
}
}  // namespace cnnops::CNNOPS_ISA
