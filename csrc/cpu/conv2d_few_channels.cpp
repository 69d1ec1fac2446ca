// Gradient of a channels_last image of a few channels, such as the RGB image that a network's first layer sees, and the forward
// of a transposed convolution to one.
//
// A vector of output channels would be nearly empty. The columns of the product are all taps' channels instead:
//   product[q][r, s, c] = sum over k of dy[p, q, k] * weight[k, c, r, s]
// of one row of dy, whose part of filter row r is then added to row p * stride - pad + r * dilation of dx, S * C neighbours at
// a time. A row of dx is kept until no further row of dy reaches it.
//
// A pixel's terms are added in the order of the rows and pixels of dy, so results have the same bits for any number of threads.
#include <omp.h>

#include "common/arith.h"
#include "common/scratch.h"
#include "cpu/micro/gemm_tile.h"
#include "cpu/micro/panels.h"
#include "ops/conv2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kPixels = 32;  // multiplied at a time
constexpr int64_t kChunk = 128;  // filters added up before they go to a sum
constexpr int64_t kTasks = 16;   // at least, while they have kLeastRows
constexpr int64_t kLeastRows = 16;

struct Plan {
  int64_t columns, pitch;  // of the product; of its rows, in whole vectors
  int64_t reach;           // rows of dx under a filter
  int64_t row;             // elements of a kept row of dx, with the padding on both sides
  int64_t strips;          // of an image's rows
};

Plan plan_of(const Conv2dParams& p) {
  Plan g{};
  g.columns = p.r * p.s * p.c;
  g.pitch = round_up(g.columns, lanes<float>);
  g.reach = (p.r - 1) * p.dilation_h + 1;
  g.row = max64((p.q - 1) * p.stride_w + p.s, p.pad_w + p.w) * p.c + lanes<float>;
  g.strips = max64(1, min64(ceil_div(kTasks, p.n), p.h / max64(kLeastRows, 2 * g.reach)));
  return g;
}

// to[i] += from[i]; no vector begins after n.
[[gnu::always_inline]] inline void add_run(float* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + lanes<float> <= n; i += lanes<float>) store(to + i, load(to + i) + load(from + i));
#if CNNOPS_ISA_HAS_MASKS
  if (i < n) {
    const int part = static_cast<int>(n - i);
    store_n(to + i, load_n(to + i, part) + load_n(from + i, part), part);
  }
#else
  for (; i < n; ++i) to[i] += from[i];
#endif
}

// One strip of rows of one image of dx.
struct Strip {
  const Conv2dParams& p;
  const Plan& g;
  const float* weights;  // [panel][filter][width]
  float *product, *rows;
  const float* dy;  // of the image
  float* dx;
  int64_t last;            // row of the strip, exclusive
  int64_t opened, closed;  // rows of dx that have been begun and finished

  float* kept(int64_t h) const { return rows + h % g.reach * g.row; }

  void open(int64_t end) {
    const float* const bias = static_cast<const float*>(p.bias);
    for (; opened < min64(end, last); ++opened) {
      float* const row = kept(opened);
      for (int64_t i = 0; i < g.row; ++i) row[i] = 0;
      if (bias)
        for (int64_t w = 0; w < p.w; ++w)
          for (int64_t c = 0; c < p.c; ++c) row[(p.pad_w + w) * p.c + c] = bias[c];
    }
  }
  void close(int64_t end) {
    for (; closed < min64(end, last); ++closed) {
      if (opened <= closed) open(closed + 1);
      copy_run(dx + closed * p.w * p.c, kept(closed) + p.pad_w * p.c, 1, p.w * p.c);
    }
  }

  // Pixels [q, q + count) of a row of dy, times all filters.
  void multiply(const float* pixels, int64_t count) {
    const int64_t vectors = g.pitch / lanes<float>, panels = ceil_div(vectors, kTileVecs);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = vectors * panel / panels * lanes<float>;
      const int64_t width = vectors * (panel + 1) / panels * lanes<float> - first;
      for (int64_t k = 0; k < p.k; k += kChunk)
        for (int64_t i = 0; i < count; i += kTileRows)
          gemm_tile<float>(static_cast<int>(min64(kTileRows, count - i)), static_cast<int>(width / lanes<float>),
                           PitchedRows<float>{pixels + i * p.k + k, p.k}, weights + first * p.k + k * width, width,
                           min64(kChunk, p.k - k), 1, product + i * g.pitch + first, g.pitch, k > 0);
    }
  }

  void add_row(int64_t y) {
    const int64_t top = y * p.stride_h - p.pad_h;
    close(top);
    open(top + g.reach);
    for (int64_t q = 0; q < p.q; q += kPixels) {
      const int64_t count = min64(kPixels, p.q - q);
      multiply(dy + (y * p.q + q) * p.k, count);
      for (int64_t j = 0; j < count; ++j)  // a filter's rows in turn: each pixel waits for its neighbour's sum
        for (int64_t r = 0; r < p.r; ++r) {
          const int64_t h = top + r * p.dilation_h;
          if (h >= closed && h < last)
            add_run(kept(h) + (q + j) * p.stride_w * p.c, product + j * g.pitch + r * p.s * p.c, p.s * p.c);
        }
    }
  }

  void run() {
    const int64_t before = closed + p.pad_h - g.reach + 1;  // rows of dy reach the strip from this distance on
    const int64_t first = before <= 0 ? 0 : ceil_div(before, p.stride_h);
    for (int64_t y = first; y < p.p && y * p.stride_h - p.pad_h < last; ++y) add_row(y);
    close(last);
  }
};

}  // namespace

void conv2d_few_channels_input_grad_f32(const Conv2dParams& p) {
  const Plan g = plan_of(p);
  const int64_t vectors = g.pitch / lanes<float>, panels = ceil_div(vectors, kTileVecs);
  Scratch<float> weights(p.k * g.pitch);
  const float* const from = static_cast<const float*>(p.weight);
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = vectors * panel / panels * lanes<float>;
    const int64_t width = vectors * (panel + 1) / panels * lanes<float> - first;
    for (int64_t k = 0; k < p.k; ++k)
      for (int64_t i = 0; i < width; ++i) {
        const int64_t column = first + i, tap = column / p.c;
        weights.data[first * p.k + k * width + i] =
            column < g.columns ? from[k * p.weight_stride[0] + column % p.c * p.weight_stride[1] +
                                      tap / p.s * p.weight_stride[2] + tap % p.s * p.weight_stride[3]]
                               : 0;
      }
  }
  const ScratchPieces scratch(p.threads, (kPixels * g.pitch + g.reach * g.row) * static_cast<int64_t>(sizeof(float)));
#pragma omp parallel for num_threads(p.threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < p.n * g.strips; ++task) {
    const int64_t n = task / g.strips, strip = task % g.strips, first = p.h * strip / g.strips;
    float* const product = static_cast<float*>(scratch.piece(omp_get_thread_num()));
    Strip{p,
          g,
          weights.data,
          product,
          product + kPixels * g.pitch,
          static_cast<const float*>(p.y) + n * p.p * p.q * p.k,
          static_cast<float*>(p.x) + n * p.h * p.w * p.c,
          p.h * (strip + 1) / g.strips,
          first,
          first}
        .run();
  }
}
}  // namespace cnnops::CNNOPS_ISA
