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

struct Plan {
  int64_t channel_tiles, filter_tiles;  // of a block, at most
  int64_t channel_blocks, filter_blocks, slices;
  int64_t images;          // of a stretch, at most
  int64_t pieces, length;  // of a plane; pixels of a piece, at most
  int64_t stretches;
  bool copies;
  int64_t pitch;  // of copies: an odd number of cache lines

  int64_t tiles() const { return channel_tiles * filter_tiles; }
};

Plan plan_of(const Conv2dParams& p) {
  Plan g{};
  const int64_t plane = p.p * p.q;
  g.images = min64(p.n, max64(1, kStretch / plane));
  g.pieces = ceil_div(plane, kStretch);
  g.length = round_up(ceil_div(plane, g.pieces), 16);
  g.pieces = ceil_div(plane, g.length);
  g.stretches = ceil_div(p.n, g.images) * g.pieces;
  const int64_t channel_tiles = ceil_div(p.c, kChannels), filter_tiles = ceil_div(p.k, kFilters);
  const auto cut = [](int64_t total, int64_t pieces, int64_t& each, int64_t& count) {
    each = ceil_div(total, pieces);
    count = ceil_div(total, each);
  };
  cut(filter_tiles, ceil_div(filter_tiles, kBlockFilters / kFilters), g.filter_tiles, g.filter_blocks);
  const int64_t wanted = min64(ceil_div(kLeastTasks, g.filter_blocks * g.stretches), channel_tiles);
  cut(channel_tiles, max64(wanted, ceil_div(channel_tiles, kBlockChannels / kChannels)), g.channel_tiles,
      g.channel_blocks);
  g.slices = min64(ceil_div(kWantedTasks, g.channel_blocks * g.filter_blocks), g.stretches);
  g.copies = plane % 16 != 0;
  const int64_t lines = ceil_div(g.images * g.length, 16);
  g.pitch = (lines + (lines + 1) % 2) * 16;
  return g;
}

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

// The first channel or filter of tile `index` of a block, of `count` in all: the last tile begins early.
int64_t first_of(int64_t block, int64_t block_tiles, int64_t index, int64_t side, int64_t count) {
  return min64((block * block_tiles + index) * side, count - side);
}

// Adds the slices' sums of a tile and stores them.
void store_tile(const float* z, int64_t slice_size, int64_t slices, int64_t channel_stride, int64_t filter_stride,
                float* dw) {
  alignas(64) float sums[kSums];
  for (int i = 0; i < kSums; i += kLanes) {
    f32v sum = load(z + i);
    for (int64_t slice = 1; slice < slices; ++slice) sum += load(z + slice * slice_size + i);
    store(sums + i, sum);
  }
  for (int k = 0; k < kFilters; ++k)
    for (int c = 0; c < kChannels; ++c) dw[k * filter_stride + c * channel_stride] = sums[k * kChannels + c];
}

}  // namespace

void conv2d_plane_dots_weight_grad_f32(const Conv2dParams& p) {
  const Plan g = plan_of(p);
  const float *const x = static_cast<const float*>(p.x), *const dy = static_cast<const float*>(p.y);
  float* const dw = static_cast<float*>(p.weight);
  const int64_t plane = p.p * p.q, blocks = g.channel_blocks * g.filter_blocks, block_size = g.tiles() * kSums;
  const Scratch<float> sums(g.slices * blocks * block_size);
  const auto channel_of = [&](int64_t block, int64_t tile) {
    return first_of(block % g.channel_blocks, g.channel_tiles, tile / g.filter_tiles, kChannels, p.c);
  };
  const auto filter_of = [&](int64_t block, int64_t tile) {
    return first_of(block / g.channel_blocks, g.filter_tiles, tile % g.filter_tiles, kFilters, p.k);
  };
  struct Copies {
    float *x, *dy;
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Copies copies;
    copies.x = arena.take<float>(g.copies ? kChannels * g.pitch : 0);
    copies.dy = arena.take<float>(g.copies ? g.filter_tiles * kFilters * g.pitch : 0);
    return copies;
  });
#pragma omp parallel num_threads(p.threads)
  {
    const Copies mine = scratch.mine();
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < g.slices * blocks; ++task) {
      const int64_t block = task % blocks, slice = task / blocks;
      const int64_t first = g.stretches * slice / g.slices, last = g.stretches * (slice + 1) / g.slices;
      for (int64_t stretch = first; stretch < last; ++stretch) {
        const int64_t n = stretch / g.pieces * g.images, pixel = stretch % g.pieces * g.length;
        const Stretch s{plane, min64(g.length, plane - pixel), min64(g.images, p.n - n), p.c * plane, p.k * plane};
        const float* const x_stretch = x + n * p.c * plane + pixel;
        const float* const dy_stretch = dy + n * p.k * plane + pixel;
        const int64_t k0 = filter_of(block, 0), k1 = filter_of(block, g.filter_tiles - 1) + kFilters;
        if (g.copies) s.copy(dy_stretch + k0 * plane, s.dy_image, k1 - k0, g.pitch, mine.dy);
        for (int64_t tile = 0; tile < g.tiles(); ++tile) {
          const int64_t c = channel_of(block, tile), k = filter_of(block, tile);
          float* const z = sums.data + task * block_size + tile * kSums;
          if (g.copies) {
            if (tile % g.filter_tiles == 0) s.copy(x_stretch + c * plane, s.x_image, kChannels, g.pitch, mine.x);
            dot_tile(mine.x, mine.dy + (k - k0) * g.pitch, s.of_copies(g.pitch), z, stretch > first);
          } else {
            dot_tile(x_stretch + c * plane, dy_stretch + k * plane, s, z, stretch > first);
          }
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * g.tiles(); ++i) {
      const int64_t block = i / g.tiles(), tile = i % g.tiles();
      store_tile(sums.data + i * kSums, blocks * block_size, g.slices, p.weight_stride[1], p.weight_stride[0],
                 dw + filter_of(block, tile) * p.weight_stride[0] + channel_of(block, tile) * p.weight_stride[1]);
    }
  }
}
}  // namespace cnnops::CNNOPS_ISA
