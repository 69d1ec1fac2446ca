// Gradient of the input in NCHW by one product with the weights where they lie, PyTorch's contiguous ones:
//
//   sums[q][c, r, s] = sum over k of dy[k][q] * weight[k][c, r, s]
//
// whose columns are then added up in dx, h = p * stride - pad + r * dilation, w likewise (col2im). A convolution per phase of
// the stride reads every stride-th tap from the weights, and so packs them: 40 % of the time where 49 pixels meet 4.7 MB.
//
// A task is a block of channels, with all their taps, times a block of pixels of dy: whole images where windows overlap. It
// walks over the filters in chunks; in each, the first tile of pixels reads a panel of weights from memory and leaves a copy
// in L1 for the others, which call the next panel to L2 meanwhile. dy is read where it lies. The sums are transposed.
//
// What is added in which order depends on shapes alone, so results have the same bits for any number of threads.
#include <omp.h>

#include "cpu/conv2d_blocks.h"
#include "cpu/conv2d_lattice.h"
#include "cpu/micro/gemm_tile.h"
#include "cpu/micro/panels.h"
#include "cpu/simd/transpose.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kChunk = 128;  // filters between two visits of the sums: a panel of weights, 24 KB, stays in L1
// Terms of a running sum in 1x1 convolutions, where PyTorch's own error is the lower one.
constexpr int64_t kFlush = 32;
constexpr int64_t kColumns = 192;   // of a task, at most
constexpr int64_t kPixels = 208;    // of a task, where windows do not overlap: with kColumns, 160 KB of sums
constexpr int64_t kMinPixels = 48;  // fewer would copy the weights too often
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kLanes = lanes<float>;

struct Plan {
  int64_t taps, plane;                // pixels of an image of dy
  bool overlap, pointwise;            // pointwise: the image of dx is that of dy
  int64_t channels, channel_blocks;   // per task, at most
  int64_t images, image_blocks;       // the same
  int64_t rows, row_blocks, row;      // rows of dy, the same; their pixels
  int64_t pitch;                      // of a pixel's sums
  int64_t block_pixels, plane_pitch;  // per task; of a column of transposed sums
  int64_t phase_pitch;                // of a row of dx's pixels of one phase
};

Plan plan_of(const Conv2dParams& p) {
  Plan g{};
  g.taps = p.r * p.s, g.plane = p.p * p.q;
  g.overlap = p.pad_h || p.pad_w || (p.r - 1) * p.dilation_h >= p.stride_h || (p.s - 1) * p.dilation_w >= p.stride_w;
  g.pointwise = g.taps == 1 && !g.overlap && p.stride_h == 1 && p.stride_w == 1 && p.p == p.h && p.q == p.w;
  const int64_t rows = g.pointwise ? g.plane : p.p;
  g.row = g.pointwise ? 1 : p.q;
  g.rows = g.overlap ? rows : ceil_div(rows, ceil_div(g.plane, kPixels));
  g.row_blocks = ceil_div(rows, g.rows);
  g.images = max64(1, min64(p.n, kPixels / g.plane));
  g.image_blocks = ceil_div(p.n, g.images);
  // Channels in whole panels of columns, where their taps allow it, and as even a share for each thread as may be.
  int64_t unit = 1;
  while (unit * g.taps % kTileColumns<float> && (unit + 1) * g.taps <= kColumns) ++unit;
  if (unit * g.taps % kTileColumns<float>) unit = max64(1, kTileColumns<float> / g.taps);
  int64_t least = 0;
  for (int64_t channels = max64(1, kColumns / (unit * g.taps)) * unit; channels >= unit; channels -= unit) {
    const int64_t tasks = ceil_div(p.c, channels) * g.image_blocks * g.row_blocks;
    const int64_t load = ceil_div(tasks, p.threads) * channels;
    if (g.channels == 0 || load < least) g.channels = channels, least = load;
  }
  if (g.taps == 1) g.channels = round_up(ceil_div(p.c, ceil_div(p.c, g.channels)), kLanes);
  g.channel_blocks = ceil_div(p.c, g.channels);
  const int64_t wanted = p.threads == 1 ? 1 : kTasksPerThread * p.threads;
  const auto tasks = [&] { return g.channel_blocks * g.image_blocks * g.row_blocks; };
  while (tasks() < wanted && g.images > 1) g.images = ceil_div(g.images, 2), g.image_blocks = ceil_div(p.n, g.images);
  for (int64_t want = g.row_blocks + 1; !g.overlap && tasks() < wanted && rows / want * g.row >= kMinPixels; ++want)
    g.rows = ceil_div(rows, want), g.row_blocks = ceil_div(rows, g.rows);
  g.pitch = round_up(g.channels * g.taps, kLanes);
  g.block_pixels = g.images * g.rows * g.row;
  g.plane_pitch = round_up(g.block_pixels, kLanes);
  g.phase_pitch = round_up(ceil_div(p.w, p.stride_w), kLanes);
  return g;
}

struct Phase {
  Lattice lattice;
  const Tap* taps;
};

struct Block {
  const Conv2dParams& p;
  const Plan& g;
  const Phase* phases;
  int64_t phase_columns;
  int64_t n0, images, row0, rows, c0, channels;

  int64_t segment() const { return rows * g.row; }  // pixels of an image

  // A panel of columns of the weights, `filled` of them.
  struct Panel {
    int64_t first, width, filled;
  };
  int64_t panels() const { return ceil_div(ceil_div(channels * g.taps, kLanes), kTileVecs); }
  Panel panel(int64_t index) const {
    const int64_t columns = channels * g.taps, vectors = ceil_div(columns, kLanes), count = panels();
    const int64_t first = vectors * index / count * kLanes, last = vectors * (index + 1) / count * kLanes;
    return {first, last - first, min64(last, columns) - first};
  }

  // `copy` has room for a panel of a chunk.
  void multiply(float* sums, float* copy) const {
    constexpr int64_t kSize = static_cast<int64_t>(sizeof(float));
    const float* const weights = static_cast<const float*>(p.weight) + c0 * g.taps;
    const float* const dy = static_cast<const float*>(p.y) + n0 * p.k * g.plane + row0 * g.row;
    const int64_t step = p.weight_stride[0], count = panels(), tiles = ceil_div(segment(), kTileRows);
    const int64_t flush = g.pointwise ? kFlush : kNeverFlush;
    for (int64_t k0 = 0; k0 < p.k; k0 += kChunk) {
      const int64_t terms = min64(kChunk, p.k - k0);
      for (int64_t index = 0; index < count; ++index) {
        const Panel now = panel(index);
        const float* const from = weights + k0 * step + now.first;
        const bool whole = now.filled == now.width;
        for (int64_t k = 0; !whole && k < terms; ++k) {
          copy_run(copy + k * now.width, from + k * step, 1, now.filled);
          zero_run(copy + k * now.width + now.filled, now.width - now.filled);
        }
        const bool last = index + 1 == count;
        const int64_t next_k = last ? k0 + kChunk : k0;
        const Panel next = panel(last ? 0 : index + 1);
        const char* const ahead = reinterpret_cast<const char*>(weights + next_k * step + next.first);
        const int64_t skew = static_cast<int64_t>(reinterpret_cast<uintptr_t>(ahead) % 64);
        const Ahead lines{ahead - skew, max64(0, min64(kChunk, p.k - next_k)), step * kSize,
                          next.filled * kSize + skew};
        const int vecs = static_cast<int>(now.width / kLanes);
        for (int64_t i = 0; i < images * tiles; ++i) {
          const int64_t image = i / tiles, tile = i % tiles, first = segment() * tile / tiles;
          const int tile_rows = static_cast<int>(segment() * (tile + 1) / tiles - first);
          float* const to = sums + (image * segment() + first) * g.pitch + now.first;
          const PanelRows<float> a = lines.rows_of_tile(i, terms, dy + (image * p.k + k0) * g.plane + first, g.plane);
          if (i == 0 && whole)
            gemm_tile<float>(tile_rows, vecs, CopyingRows<float, PanelRows<float>>{a, copy}, from, step, terms, 1, to,
                             g.pitch, k0 > 0, flush);
          else
            gemm_tile<float>(tile_rows, vecs, a, copy, now.width, terms, 1, to, g.pitch, k0 > 0, flush);
        }
      }
    }
  }

  // The rows of dx that the block's pixels reach.
  int64_t first_row() const { return g.overlap ? 0 : row0 * p.stride_h; }
  int64_t last_row() const { return row0 + rows == p.p ? p.h : min64(p.h, (row0 + rows) * p.stride_h); }

  // Rows of dx from planes of [channel, tap][pixel], of which lanes before and after are read too.
  void add_planes(const float* planes, float* phase_rows) const {
    // Lanes of a row's vector that lie in the image: ones between zeros.
    int32_t ones[3 * kLanes];
    for (int64_t i = 0; i < 3 * kLanes; ++i) ones[i] = i >= kLanes && i < 2 * kLanes ? -1 : 0;
    const float* const bias = static_cast<const float*>(p.bias);
    for (int64_t image = 0; image < images; ++image)
      for (int64_t c = 0; c < channels; ++c) {
        const float* const plane = planes + c * g.taps * g.plane_pitch + image * segment();
        const vec<float> before = set1(bias ? bias[c0 + c] : 0.f);
        float* const dx = static_cast<float*>(p.x) + ((n0 + image) * p.c + c0 + c) * p.h * p.w;
        for (int64_t h = first_row(); h < last_row(); ++h) {
          for (int64_t w0 = 0; w0 < phase_columns; ++w0) {
            const Phase& phase = phases[h % p.stride_h * phase_columns + w0];
            const int64_t i = h / p.stride_h;
            for (int64_t j = 0; j < phase.lattice.columns; j += kLanes) {
              vec<float> sum = before;
              for (int64_t t = 0; t < phase.lattice.count; ++t) {
                const Tap& tap = phase.taps[t];
                const int64_t row = i + tap.dh - row0, column = j + tap.dw;
                if (row < 0 || row >= rows || column <= -kLanes || column >= p.q) continue;
                const vec<float> v = load(plane + tap.weight * g.plane_pitch + row * p.q + column);
                const ivec<float> low = *reinterpret_cast<const ivec<float>*>(ones + kLanes - max64(0, -column));
                const ivec<float> high =
                    *reinterpret_cast<const ivec<float>*>(ones + 2 * kLanes - min64(kLanes, p.q - column));
                sum += reinterpret_cast<vec<float>>(reinterpret_cast<ivec<float>>(v) & low & high);
              }
              store(phase_rows + w0 * g.phase_pitch + j, sum);
            }
          }
          interleave(phase_rows, dx + h * p.w);
        }
      }
  }
  void interleave(const float* phase, float* to) const {
    const auto put = [&](int64_t i, vec<float> v) {
      if (i < p.w) store_n(to + i, v, static_cast<int>(min64(p.w - i, kLanes)));
    };
    if (p.stride_w == 1) {
      for (int64_t j = 0; j < p.w; j += kLanes) put(j, load(phase + j));
    } else if (p.stride_w == 2) {
      for (int64_t j = 0; 2 * j < p.w; j += kLanes) {
        const vec<float> a = load(phase + j), b = load(phase + g.phase_pitch + j);
        put(2 * j, zip_low(a, b));
        put(2 * j + kLanes, zip_high(a, b));
      }
    } else {
      for (int64_t w = 0; w < p.w; ++w) to[w] = phase[w % p.stride_w * g.phase_pitch + w / p.stride_w];
    }
  }

  void finish(const float* sums, float* planes, float* phase_rows) const {
    if (!g.pointwise) {
      transpose(sums, g.pitch, images * segment(), channels * g.taps, planes, g.plane_pitch);
      return add_planes(planes, phase_rows);
    }
    const float* const bias = static_cast<const float*>(p.bias);
    for (int64_t image = 0; image < images; ++image) {
      float* const to = static_cast<float*>(p.x) + ((n0 + image) * p.c + c0) * g.plane + row0;
      transpose(sums + image * segment() * g.pitch, g.pitch, segment(), channels, to, g.plane);
      for (int64_t c = 0; bias && c < channels; ++c)
        for (int64_t i = 0; i < segment(); ++i) to[c * g.plane + i] += bias[c0 + c];
    }
  }
};

}  // namespace

void conv2d_columns_input_grad_f32(const Conv2dParams& p) {
  const Plan g = plan_of(p);
  const int64_t phase_rows = min64(p.stride_h, p.h), phase_columns = min64(p.stride_w, p.w);
  Scratch<Phase> phases(phase_rows * phase_columns);
  Scratch<Tap> taps(2 * g.taps);  // of a phase; of all
  int64_t phase_count = 0, tap_count = g.taps;
  input_grad_lattices(p, taps.data, [&](const Lattice& l, const Tap* t) {
    Tap* const own = taps.data + tap_count;
    for (int64_t i = 0; i < l.count; ++i) own[i] = t[i];
    phases.data[phase_count++] = {l, own};
    tap_count += l.count;
  });
  const int64_t copy_size = kChunk * kTileColumns<float>, sums_size = g.block_pixels * g.pitch;
  const int64_t planes_size = g.pointwise ? 0 : g.channels * g.taps * g.plane_pitch + 2 * kLanes;
  const int64_t size = copy_size + sums_size + planes_size + phase_columns * g.phase_pitch;
  const ScratchPieces scratch(p.threads, size * static_cast<int64_t>(sizeof(float)));
  const int64_t rows = g.pointwise ? g.plane : p.p;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < g.channel_blocks * g.image_blocks * g.row_blocks; ++task) {
    const int64_t channel_block = task % g.channel_blocks, rest = task / g.channel_blocks;
    const int64_t n0 = rest / g.row_blocks * g.images, row0 = rest % g.row_blocks * g.rows;
    const int64_t c0 = channel_block * g.channels;
    const Block block{p,           g,
                      phases.data, phase_columns,
                      n0,          min64(g.images, p.n - n0),
                      row0,        min64(g.rows, rows - row0),
                      c0,          min64(g.channels, p.c - c0)};
    float* const copy = static_cast<float*>(scratch.piece(omp_get_thread_num()));
    float* const sums = copy + copy_size;
    block.multiply(sums, copy);
    block.finish(sums, sums + sums_size + kLanes, sums + sums_size + planes_size);
  }
}
}  // namespace cnnops::CNNOPS_ISA
