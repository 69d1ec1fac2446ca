// Dense and grouped convolution as a blocked matrix product over register tiles (micro/gemm_tile.h).
//
// forward and input_grad: the output of one lattice (conv2d_lattice.h), flattened over n, i, j, is cut into blocks of pixels
// and blocks of output channels; a block is one task. A task walks over the reduction in chunks of about kChunk (tap,
// channel) pairs: it packs the chunk's pixels into scratch that fits L2 (padding, strides and conversion happen there,
// nowhere else) and runs register tiles over it, accumulating in a float32 (float64) block that also fits L2. Adding up
// chunk by chunk keeps the rounding error of long reductions near that of one chunk.
//   NCHW           tile rows = output channels (packed weights), columns = pixels
//   channels_last  tile rows = pixels, columns = output channels (packed weights)
// The weights are packed once per call, or by each task where few share them, or, of 1x1 on few pixels, read where they lie.
// The last step adds bias and residual and applies the activation.
//
// weight_grad: tile rows = terms (channel, tap), read from a zero-padded strip of the input by an offset per row, columns =
// output channels of dy; the reduction runs over pixels. Tasks are blocks of rows times slices of the images; the slices'
// partial sums are added in order.
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

constexpr int64_t kChunk = 128;      // reduction terms between two visits of the accumulators in memory
constexpr int64_t kChunkNhwc = 256;  // the same in channels_last, where 128 ran 0.9 to 1.0 times as fast
constexpr int64_t kFlush = 32;       // terms of a running sum in NCHW, where PyTorch's own error is the lower one
constexpr int64_t kFlushNhwc = 128;
constexpr int64_t kTapChannels = 48;    // channels_last: so many channels of one tap are a chunk that needs no packing
constexpr int64_t kBlockPixels = 192;   // with kChunk: 196 KB of packed float32 pixels
constexpr int64_t kBlockFilters = 256;  // with kBlockPixels: 196 KB of accumulators
constexpr int64_t kTasksPerThread = 4;  // enough for an even share; twice as many of more than four blocks
constexpr int64_t kMinFilters = 96;     // smaller blocks would pack the same pixels too often
constexpr int64_t kMinPixels = 32;      // smaller blocks would read the same weights too often
constexpr int64_t kChunkWeights = 131072;  // 512 KB of float32: half of L2
constexpr int64_t kFewBlocks = 2;          // of pixels: too few to pay for packing all weights to memory
// Too few, if the weights are small enough to stay in L2, and tiles read more than a line of the cache of each row.
constexpr int64_t kSomeBlocks = kTileVecs * kVectorBytes > 64 ? 17 : kFewBlocks;
constexpr int64_t kSmallWeights = 262144;  // 1 MB of float32
constexpr int64_t kWantedTasks = 16;       // weight_grad: fixed, because its cuts decide the order of its sums

// One group of one lattice: everything the tasks read.
template <class T>
struct Problem {
  using C = compute_t<T>;
  Layout layout;
  Lattice lattice;
  const Tap* taps;
  int64_t images, in_channels, out_channels;  // channels per group
  int64_t in_h, in_w;
  Strides in, out;
  const T* input;
  T* output;
  const T* bias;
  const T* residual;
  Activation activation;
  bool stream;  // the output goes around the caches

  int64_t chunk_channels, chunk_taps;  // of a chunk of the reduction
  // channels_last, few channels: the taps are rows of so many neighbours, and tiles read them from strips of the image, whose
  // rows lie strip_pitch apart. 0: pixels are packed.
  int64_t filter_columns, strip_pitch;
  const int64_t* window;  // a chunk's terms, from the first one
  const T* zeros;         // chunk_channels of them
  bool weights_in_place;  // chunks of one tap: tiles read the weights where they lie
  int64_t length() const { return in_channels * lattice.count; }
  int64_t pixels() const { return images * lattice.rows * lattice.columns; }
};

// ---- Weights ---------------------------------------------------------------------------------------------------------
// Packed as [panel][chunk][term][width] (micro/panels.h), the terms ordered (channel, tap) for NCHW and (tap, channel) for
// channels_last, as PyTorch's formats order a filter's weights. A panel that begins at channel m lies at m * length; what is
// past the last channel is zero.

// Where a group's weights lie: of output channel m, input channel c, tap t at data[m * stride_m + c * stride_c + t.weight].
template <class T>
struct Weights {
  const T* data;
  int64_t stride_m, stride_c;
};

// packed[(t * channels + c) * width + m] = from[m * stride_m + c * taps + t]: eight rows of `from` are read from end to end.
template <class T>
void pack_by_tap(const T* from, int64_t stride_m, int64_t filled, int64_t channels, int64_t taps, compute_t<T>* packed,
                 int64_t width) {
  for (int64_t m = 0; m < filled; m += 8) {
    const int64_t rows = min64(8, filled - m);
    int64_t c = 0, t = 0;  // of the first column
    for (int64_t j = 0; j < channels * taps; j += 8) {
      const int64_t columns = min64(8, channels * taps - j);
      compute_t<T>* to[8];
      for (int64_t i = 0; i < columns; ++i) {
        to[i] = packed + (t * channels + c) * width + m;
        if (++t == taps) t = 0, ++c;
      }
      if constexpr (__is_same(T, float)) {
        if (rows == 8) {
          transpose_8x8(from + m * stride_m + j, stride_m, columns, [&](int64_t i) { return to[i]; });
          continue;
        }
      }
      for (int64_t i = 0; i < columns; ++i)
        for (int64_t k = 0; k < rows; ++k) to[i][k] = load_scalar(from[(m + k) * stride_m + j + i]);
    }
  }
}

// Channels [c0, c1) of the panels [first, last); panel i goes to place(i).
template <class T, class Place>
void pack_weights(const Problem<T>& g, const Weights<T>& from, const Panels<compute_t<T>>& panels, int64_t first,
                  int64_t last, int64_t c0, int64_t c1, const Place& place) {
  using C = compute_t<T>;
  const bool nchw = g.layout == Layout::nchw;
  const int64_t taps = g.lattice.count, channels = c1 - c0, terms = channels * taps;
  const int64_t stride_m = from.stride_m, stride_c = from.stride_c;
  bool neighbours = true;  // the taps follow each other in memory
  for (int64_t t = 0; t < taps; ++t) neighbours = neighbours && g.taps[t].weight == g.taps[0].weight + t;
  if (stride_m == 1) {
    // Panel after panel within a row of weights, not row after row within a panel: rows may lie pages apart.
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        const T* const row = from.data + (c0 + c) * stride_c + g.taps[t].weight;
        const int64_t term = nchw ? c * taps + t : t * channels + c;
        for (int64_t panel = first; panel < last; ++panel) {
          const int64_t m0 = panels.begin(panel), width = panels.width(panel);
          const int64_t filled = min64(width, g.out_channels - m0);
          C* const to = place(panel) + term * width;
          copy_run(to, row + m0, 1, filled);
          zero_run(to + filled, width - filled);
        }
      }
    return;
  }
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t m0 = panels.begin(panel), width = panels.width(panel), filled = min64(width, g.out_channels - m0);
    C* const packed = place(panel);
    const T* const weight = from.data + m0 * stride_m + c0 * stride_c;
    if (filled < width)
      for (int64_t i = 0; i < terms; ++i) zero_run(packed + i * width + filled, width - filled);
    if (nchw && neighbours && stride_c == taps) {  // one matrix: PyTorch's contiguous weights, forward
      transpose(weight + g.taps[0].weight, stride_m, filled, terms, packed, width);
    } else if (nchw && neighbours && taps > 1) {  // a matrix per channel: the same weights, input_grad
      for (int64_t c = 0; c < channels; ++c)
        transpose(weight + g.taps[0].weight + c * stride_c, stride_m, filled, taps, packed + c * taps * width, width);
    } else if (!nchw && neighbours && stride_c == taps && taps > 1) {  // contiguous weights, forward
      pack_by_tap(weight + g.taps[0].weight, stride_m, filled, channels, taps, packed, width);
    } else if (stride_c == 1 && (!nchw || taps == 1)) {  // a matrix per tap: channels_last weights, forward
      for (int64_t t = 0; t < taps; ++t)
        transpose(weight + g.taps[t].weight, stride_m, filled, channels, packed + t * channels * width, width);
    } else {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t)
          copy_run(packed + (nchw ? c * taps + t : t * channels + c) * width, weight + c * stride_c + g.taps[t].weight,
                   stride_m, filled);
    }
  }
}

// ---- Pixels ----------------------------------------------------------------------------------------------------------

// NCHW: panels of kTileColumns pixels, [panel][(channel, tap)][column]. Channel after channel, not panel after panel: a
// channel's rows are read from end to end.
template <class T>
void pack_pixels_nchw(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t pixels, int64_t c0, int64_t c1,
                      compute_t<T>* packed) {
  using C = compute_t<T>;
  constexpr int64_t kColumns = kTileColumns<C>;
  const int64_t channels = c1 - c0, taps = g.lattice.count, terms = channels * taps, step = g.lattice.isw;
  struct Piece {
    int64_t from, to;              // of channel c0's first pixel that is not padding; of the run's first
    int64_t before, count, after;  // zeros, pixels, zeros
  } pieces[kBlockPixels + kTileColumns<float>];
  for (int64_t t = 0; t < taps; ++t) {
    const Tap& tap = g.taps[t];
    bool whole = step == 1;  // every run fills a panel
    for (int64_t r = 0; r < run_count; ++r) {
      const Run& run = runs[r];
      const int64_t h = run.i * g.lattice.ish + tap.dh, w = run.j * step + tap.dw;
      Range valid = valid_range(run.length, step, w, g.in_w);
      if (h < 0 || h >= g.in_h) valid = {0, 0};
      // The last panel's unused columns are computed and thrown away; zeros keep them finite.
      const int64_t tail = run.dst + run.length == pixels ? round_up(pixels, kColumns) - pixels : 0;
      pieces[r] = {run.n * g.in.n + c0 * g.in.c + h * g.in.h + w + valid.first * step,
                   run.dst / kColumns * terms * kColumns + t * kColumns + run.dst % kColumns, valid.first,
                   valid.last - valid.first, run.length - valid.last + tail};
      whole = whole && pieces[r].count == kColumns;
    }
    const T* input = g.input;
    C* to = packed;
    for (int64_t c = 0; c < channels; ++c, input += g.in.c, to += taps * kColumns) {
      if (whole) {
        for (int64_t r = 0; r < run_count; ++r)
#pragma GCC unroll 4
          for (int64_t v = 0; v < kColumns; v += lanes<C>)
            store(to + pieces[r].to + v, load(input + pieces[r].from + v));
        continue;
      }
      for (int64_t r = 0; r < run_count; ++r) {
        const Piece& piece = pieces[r];
        C* const dst = to + piece.to;
        if (piece.before) zero_run(dst, piece.before);
        copy_run(dst + piece.before, input + piece.from, step, piece.count);
        if (piece.after) zero_run(dst + piece.before + piece.count, piece.after);
      }
    }
  }
}

// NCHW: the pixels of channels [c0, c1), as far as they are of the first run's image.
template <class T>
Ahead next_pixels(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t c0, int64_t c1) {
  const Lattice& l = g.lattice;
  const Run& first = runs[0];
  while (runs[run_count - 1].n != first.n) --run_count;
  const Run& last = runs[run_count - 1];
  int64_t begin = g.in_h * g.in_w, end = 0;  // in a channel
  for (int64_t t = 0; t < l.count; ++t) {
    begin = min64(begin, (first.i * l.ish + g.taps[t].dh) * g.in_w + first.j * l.isw + g.taps[t].dw);
    end = max64(end, (last.i * l.ish + g.taps[t].dh) * g.in_w + (last.j + last.length - 1) * l.isw + g.taps[t].dw + 1);
  }
  begin = max64(begin, 0), end = min64(end, g.in_h * g.in_w);
  const T* const pixels = g.input + first.n * g.in.n + c0 * g.in.c + begin;
  return {reinterpret_cast<const char*>(pixels), begin < end ? c1 - c0 : 0, g.in.c * static_cast<int64_t>(sizeof(T)),
          (end - begin) * static_cast<int64_t>(sizeof(T))};
}

// channels_last: [pixel][(tap, channel)].
template <class T>
void pack_pixels_nhwc(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t c0, int64_t c1,
                      compute_t<T>* packed) {
  const int64_t channels = c1 - c0, terms = channels * g.lattice.count;
  for (int64_t t = 0; t < g.lattice.count;) {
    const Tap& tap = g.taps[t];
    int64_t together = 1;  // taps whose pixels are neighbours in memory, as those of a filter's row are
    while (channels == g.in.w && t + together < g.lattice.count && g.taps[t + together].dh == tap.dh &&
           g.taps[t + together].dw == tap.dw + together)
      ++together;
    for (int64_t r = 0; r < run_count; ++r) {
      const Run& run = runs[r];
      const int64_t h = run.i * g.lattice.ish + tap.dh;
      const T* const row = g.input + run.n * g.in.n + h * g.in.h + c0;
      compute_t<T>* dst = packed + run.dst * terms + t * channels;
      for (int64_t j = 0; j < run.length; ++j, dst += terms) {
        const int64_t w = (run.j + j) * g.lattice.isw + tap.dw;
        Range valid = {max64(-w, 0), min64(together, g.in_w - w)};
        if (h < 0 || h >= g.in_h || valid.first >= valid.last) valid = {0, 0};
        if (valid.last - valid.first == together) {
          copy_run(dst, row + w * g.in.w, 1, together * channels);
          continue;
        }
        zero_run(dst, valid.first * channels);
        copy_run(dst + valid.first * channels, row + (w + valid.first) * g.in.w, 1,
                 (valid.last - valid.first) * channels);
        zero_run(dst + valid.last * channels, (together - valid.last) * channels);
      }
    }
    t += together;
  }
}

// channels_last, a filter of few channels: for each run the rows of the image that it sees, zero-padded, one after another;
// offset[i] is where the window of pixel i begins.
template <class T>
void pack_strips(const Problem<T>& g, const Run* runs, int64_t run_count, compute_t<T>* strip, int64_t* offset) {
  const Lattice& l = g.lattice;
  const int64_t channels = g.in_channels, filter_rows = l.count / g.filter_columns;
  int64_t at = 0;
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    for (int64_t j = 0; j < run.length; ++j) offset[run.dst + j] = at + j * l.isw * channels;
    const int64_t columns = (run.length - 1) * l.isw + g.filter_columns, w = run.j * l.isw + g.taps[0].dw;
    const Range valid = valid_range(columns, 1, w, g.in_w);
    for (int64_t i = 0; i < filter_rows; ++i, at += g.strip_pitch) {
      const int64_t h = run.i * l.ish + g.taps[i * g.filter_columns].dh;
      compute_t<T>* const to = strip + at;
      if (h < 0 || h >= g.in_h) {
        zero_run(to, columns * channels);
        continue;
      }
      zero_run(to, valid.first * channels);
      copy_run(to + valid.first * channels, g.input + run.n * g.in.n + h * g.in.h + (w + valid.first) * channels, 1,
               (valid.last - valid.first) * channels);
      zero_run(to + valid.last * channels, (columns - valid.last) * channels);
    }
  }
}

// channels_last, one tap: where each pixel of the block lies from `input`; outside the image, where zeros lie.
template <class T>
void find_pixels(const Problem<T>& g, const T* input, const Tap& tap, const Run* runs, int64_t run_count,
                 int64_t* offset) {
  const int64_t outside =
      (reinterpret_cast<intptr_t>(g.zeros) - reinterpret_cast<intptr_t>(input)) / static_cast<intptr_t>(sizeof(T));
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    const int64_t h = run.i * g.lattice.ish + tap.dh, row = run.n * g.in.n + h * g.in.h;
    for (int64_t j = 0; j < run.length; ++j) {
      const int64_t w = (run.j + j) * g.lattice.isw + tap.dw;
      offset[run.dst + j] = h >= 0 && h < g.in_h && w >= 0 && w < g.in_w ? row + w * g.in.w : outside;
    }
  }
}

// ---- The last step ---------------------------------------------------------------------------------------------------

// The lattice is the whole output, pixel after pixel.
template <class T>
bool covers_output(const Problem<T>& g) {
  const Lattice& l = g.lattice;
  return l.osh == 1 && l.osw == 1 && l.columns * l.rows * g.out.w == (g.layout == Layout::nchw ? g.out.c : g.out.n);
}

// Where pixel i of the lattice lies.
template <class T>
int64_t output_offset(const Problem<T>& g, int64_t i) {
  const Lattice& l = g.lattice;
  const int64_t line = i / l.columns, row = line % l.rows, column = i % l.columns;
  return line / l.rows * g.out.n + (l.oh0 + row * l.osh) * g.out.h + (l.ow0 + column * l.osw) * g.out.w;
}

template <class T>
void finish_block(const Problem<T>& g, int64_t begin, int64_t pixels, int64_t m0, int64_t m1, const compute_t<T>* sums,
                  int64_t pitch, Run* runs) {
  const Lattice& l = g.lattice;
  const bool whole_planes = covers_output(g);
  const int64_t rows = whole_planes ? 1 : l.rows, columns = whole_planes ? l.rows * l.columns : l.columns;
  const int64_t run_count = find_runs(rows, columns, begin, pixels, pixels, runs);
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    const int64_t at = run.n * g.out.n + (l.oh0 + run.i * l.osh) * g.out.h + (l.ow0 + run.j * l.osw) * g.out.w;
    if (g.layout == Layout::nchw) {
      for (int64_t m = m0; m < m1; ++m) {
        const int64_t to = at + m * g.out.c;
        finish_row<T>(sums + (m - m0) * pitch + run.dst, run.length, g.bias ? load_scalar(g.bias[m]) : 0, nullptr,
                      g.residual ? g.residual + to : nullptr, g.activation, g.output + to, l.osw, g.stream);
      }
    } else {
      for (int64_t j = 0; j < run.length; ++j) {
        const int64_t to = at + j * l.osw * g.out.w + m0;
        finish_row<T>(sums + (run.dst + j) * pitch, m1 - m0, 0, g.bias ? g.bias + m0 : nullptr,
                      g.residual ? g.residual + to : nullptr, g.activation, g.output + to, 1, g.stream);
      }
    }
  }
}

// ---- Tasks -----------------------------------------------------------------------------------------------------------

// Computes pixels [begin, begin + pixels) of these panels of output channels. `weights` are all of the group's, packed, or
// null: then each chunk is packed here, into `chunk_weights`.
template <class T>
void compute_block(const Problem<T>& g, const Panels<compute_t<T>>& panels, const Weights<T>& from,
                   const compute_t<T>* weights, int64_t begin, int64_t pixels, int64_t first_panel, int64_t last_panel,
                   compute_t<T>* packed, compute_t<T>* sums, compute_t<T>* chunk_weights) {
  using C = compute_t<T>;
  constexpr int64_t kColumns = kTileColumns<C>;
  const bool nchw = g.layout == Layout::nchw;
  const Lattice& l = g.lattice;
  const int64_t m0 = panels.begin(first_panel), m1 = min64(panels.begin(last_panel), g.out_channels);
  const int64_t length = g.length();
  const int64_t pitch = nchw ? round_up(pixels, kColumns) : panels.begin(last_panel) - m0;
  Run runs[kBlockPixels + kTileColumns<float>];
  int64_t offset[kBlockPixels + kTileColumns<float>];
  if (length == 0) {
    zero_run(sums, nchw ? (m1 - m0) * pitch : pixels * pitch);
    return finish_block(g, begin, pixels, m0, m1, sums, pitch, runs);
  }
  // channels_last finds the pixels of one tap as the tiles want them: row by row for a 1x1 convolution of step 1.
  const bool in_place = __is_same(T, C) && !nchw && g.chunk_taps == 1;
  const bool in_rows = in_place && l.count == 1 && l.ish == 1 && l.isw == 1 && g.taps[0].dh == 0 && g.taps[0].dw == 0 &&
                       l.columns == g.in_w && l.rows == g.in_h;
  // channels_last: tiles may leave their last sums in the output.
  const bool one_row = covers_output(g);  // otherwise tiles must not go from one row of the lattice to the next
  const bool direct = __is_same(T, C) && !nchw && !g.residual && g.activation == Activation::none &&
                      (one_row || l.columns % kTileRows == 0) && panels.begin(last_panel) == m1;
  const int64_t run_count = find_runs(l.rows, l.columns, begin, pixels, nchw ? kColumns : pixels, runs);
  bool add = false;
  for (int64_t c0 = 0; c0 < g.in_channels; c0 += g.chunk_channels) {
    const int64_t c1 = min64(c0 + g.chunk_channels, g.in_channels);
    if (!weights && !g.weights_in_place)
      pack_weights(g, from, panels, first_panel, last_panel, c0, c1,
                   [&](int64_t panel) { return chunk_weights + (panels.begin(panel) - m0) * (c1 - c0) * l.count; });
    for (int64_t t0 = 0; t0 < l.count; t0 += g.chunk_taps, add = true) {
      Problem<T> chunk = g;
      chunk.taps += t0;
      chunk.lattice.count = min64(g.chunk_taps, l.count - t0);
      const int64_t terms = (c1 - c0) * chunk.lattice.count;
      const bool last_chunk = c1 == g.in_channels && t0 + chunk.lattice.count == l.count;
      const auto panel_weights = [&](int64_t m, int64_t width) {
        return (weights ? weights + m * length + c0 * l.count * width
                        : chunk_weights + (m - m0) * (c1 - c0) * l.count) +
               t0 * (c1 - c0) * width;
      };
      if (nchw) {
        pack_pixels_nchw(chunk, runs, run_count, pixels, c0, c1, packed);
        const Ahead next = next_pixels(g, runs, run_count, c1, min64(c1 + g.chunk_channels, g.in_channels));
        int64_t tile = 0;
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const int64_t m = panels.begin(panel);
          const int row_count = static_cast<int>(min64(kTileRows, m1 - m));
          for (int64_t at = 0; at < pixels; at += kColumns, ++tile) {
            const int vecs = static_cast<int>(min64(kTileVecs, ceil_div(pixels - at, lanes<C>)));
            const auto multiply = [&](const auto& rows) {
              gemm_tile<C>(row_count, vecs, rows, packed + at * terms, kColumns, terms, 1, sums + (m - m0) * pitch + at,
                           pitch, add, kFlush);
            };
            if constexpr (__is_same(T, C)) {
              if (g.weights_in_place) {
                const C* const filters = from.data + m * from.stride_m + c0 * from.stride_c + g.taps[0].weight;
                if (from.stride_c == 1)
                  multiply(PitchedRows<C>{filters, from.stride_m});
                else
                  multiply(next.rows_of_tile(tile, terms, filters, from.stride_c));
                continue;
              }
            }
            multiply(next.rows_of_tile(tile, terms, panel_weights(m, kTileRows), kTileRows));
          }
        }
        continue;
      }
      if (g.filter_columns)
        pack_strips(chunk, runs, run_count, packed, offset);
      else if (!in_place)
        pack_pixels_nhwc(chunk, runs, run_count, c0, c1, packed);
      else if (!in_rows)
        find_pixels(g, g.input + c0, g.taps[t0], runs, run_count, offset);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t m = panels.begin(panel), width = panels.width(panel);
        const C* columns = nullptr;
        int64_t column_step = width;
        if (g.weights_in_place) {
          if constexpr (__is_same(T, C)) columns = from.data + m + c0 * from.stride_c + g.taps[t0].weight;
          column_step = from.stride_c;
        } else {
          columns = panel_weights(m, width);
        }
        // Weights that lie in memory are called to L2 a panel ahead.
        Ahead next;
        if constexpr (__is_same(T, C)) {
          if (g.weights_in_place && !last_chunk) {
            const bool more = panel + 1 < last_panel, more_taps = t0 + 1 < l.count;
            const int64_t next_panel = more ? panel + 1 : first_panel, next_t = more ? t0 : more_taps ? t0 + 1 : 0;
            const int64_t next_c = more || more_taps ? c0 : c1;
            const int64_t size = static_cast<int64_t>(sizeof(C));
            next = {reinterpret_cast<const char*>(from.data + panels.begin(next_panel) + next_c * from.stride_c +
                                                  g.taps[next_t].weight),
                    min64(g.chunk_channels, g.in_channels - next_c), from.stride_c * size,
                    panels.width(next_panel) * size};
          }
        }
        const int vecs = static_cast<int>(width / lanes<C>);
        for (int64_t at = 0; at < pixels; at += kTileRows) {
          const int row_count = static_cast<int>(min64(kTileRows, pixels - at));
          C* const sum = sums + at * pitch + (m - m0);
          TileSums<C> to{sum, pitch, add ? sum : nullptr, pitch};
          if constexpr (__is_same(T, C)) {
            if (direct && !add && g.bias) to.old = g.bias + m, to.old_pitch = 0;
            if (direct && last_chunk) {
              to.data = g.output + (one_row ? (begin + at) * g.out.w : output_offset(g, begin + at)) + m;
              to.pitch = l.osw * g.out.w;
              to.stream = g.stream;
            }
          }
          if (g.filter_columns) {
            const WindowRows<C> rows{packed, offset + at, g.window};
            gemm_tile<C>(row_count, vecs, rows, columns, column_step, terms, 1, to,
                         ceil_div(terms, ceil_div(terms, kFlushNhwc)));
            continue;
          }
          const auto multiply = [&](const auto& rows) {
            gemm_tile<C>(row_count, vecs, rows, columns, column_step, terms, 1, to, kFlushNhwc);
          };
          const PanelRows<C> ahead = next.rows_of_tile(at / kTileRows, terms, columns, 0);
          if constexpr (__is_same(T, C)) {
            if (in_place && !in_rows) {
              if (ahead.ahead_step)
                multiply(FetchingRows<C>{g.input + c0, offset + at, 1, 0, ahead.ahead, ahead.ahead_step});
              else
                multiply(OffsetRows<C>{g.input + c0, offset + at, 1, 0});
              continue;
            }
          }
          PitchedRows<C> rows{packed + at * terms, terms};
          if constexpr (__is_same(T, C)) {
            if (in_rows) rows = {g.input + (begin + at) * g.in.w + c0, g.in.w};
            if (in_rows && ahead.ahead_step) {
              multiply(LineRows<C>{rows.base, rows.pitch, ahead.ahead, ahead.ahead_step});
              continue;
            }
          }
          multiply(rows);
        }
      }
    }
  }
  if (!direct) finish_block(g, begin, pixels, m0, m1, sums, pitch, runs);
  if (g.stream) end_streaming();
}

// The columns of a filter whose windows lie in the image as rows of neighbours; 0 if they do not, or are all but skipped.
template <class T>
int64_t find_filter_columns(const Problem<T>& g) {
  const Lattice& l = g.lattice;
  if (g.in_channels == 0 || g.in_channels != g.in.w || l.count == 0) return 0;
  int64_t columns = 1;
  while (columns < l.count && g.taps[columns].dh == g.taps[0].dh) ++columns;
  if (l.count % columns != 0 || l.isw > columns) return 0;
  for (int64_t t = 0; t < l.count; ++t)
    if (g.taps[t].dw != g.taps[0].dw + t % columns || g.taps[t].dh != g.taps[t - t % columns].dh) return 0;
  return columns;
}

template <class T>
void run_lattice(const Conv2dParams& p, const Lattice& lattice, const Tap* taps, bool transposed) {
  using C = compute_t<T>;
  Problem<T> g{};
  g.layout = p.layout;
  g.lattice = lattice;
  g.taps = taps;
  g.images = p.n;
  g.in_channels = (transposed ? p.k : p.c) / p.groups;
  g.out_channels = (transposed ? p.c : p.k) / p.groups;
  g.in_h = transposed ? p.p : p.h, g.in_w = transposed ? p.q : p.w;
  g.in = strides_of(p.layout, transposed ? p.k : p.c, g.in_h, g.in_w);
  g.out = transposed ? strides_of(p.layout, p.c, p.h, p.w) : strides_of(p.layout, p.k, p.p, p.q);
  g.activation = p.activation;
  if (g.pixels() == 0 || g.out_channels == 0) return;
  join_rows(g, g.out);
  g.stream = (p.layout == Layout::nhwc || covers_output(g)) &&
             g.images * g.out.n * static_cast<int64_t>(sizeof(T)) >= kLargeProduct;
  const int64_t count = max64(lattice.count, 1);
  if (p.layout == Layout::nchw) {
    const int64_t chunks = ceil_div(max64(g.in_channels * count, 1), kChunk);
    g.chunk_channels = max64(1, ceil_div(g.in_channels, chunks));
    g.chunk_taps = count;
  } else {
    g.chunk_channels = max64(1, ceil_div(g.in_channels, ceil_div(max64(g.in_channels, 1), kChunkNhwc)));
    g.chunk_taps = g.chunk_channels >= kTapChannels ? 1 : min64(count, kChunk / g.chunk_channels);
    g.filter_columns = find_filter_columns(g);
    if (g.filter_columns && g.chunk_taps > 1) {
      const int64_t filter_rows = count / g.filter_columns;
      g.chunk_taps = ceil_div(filter_rows, ceil_div(count * g.in_channels, kChunkNhwc)) * g.filter_columns;
    } else {
      g.filter_columns = 0;
    }
  }
  const int64_t chunk_terms = g.chunk_channels * g.chunk_taps;
  Scratch<T> zeros(g.chunk_channels);
  for (int64_t i = 0; i < g.chunk_channels; ++i) store_scalar(zeros.data + i, C{0});
  g.zeros = zeros.data;

  const Panels<C> panels(p.layout, g.out_channels);
  const int64_t length = g.length(), group_weights = panels.channels() * length;
  const Weights<T> all_weights{static_cast<const T*>(p.weight), p.weight_stride[transposed ? 1 : 0],
                               p.weight_stride[transposed ? 0 : 1]};
  const int64_t group_stride = p.k / p.groups * p.weight_stride[0];

  // Blocks: as even as possible, and enough tasks to share out. They may depend on the number of threads: the order in which
  // an output's terms are added does not depend on the block that it lies in.
  const int64_t pixels = g.pixels();
  const int64_t wanted_tasks = p.threads == 1 ? 1 : (pixels > 4 * kBlockPixels ? 2 : 1) * kTasksPerThread * p.threads;
  const int64_t grain = p.layout == Layout::nchw ? kTileColumns<C> : kTileRows;
  const auto even = [](int64_t total, int64_t block, int64_t grain) {
    return round_up(ceil_div(total, ceil_div(total, block)), grain);
  };
  int64_t block_pixels = even(pixels, kBlockPixels, grain);
  int64_t pixel_blocks = ceil_div(pixels, block_pixels);
  int64_t filter_blocks = ceil_div(g.out_channels, kBlockFilters);
  const auto tasks = [&] { return pixel_blocks * filter_blocks * p.groups; };
  const auto split_filters = [&](int64_t least) {
    while (tasks() < wanted_tasks && g.out_channels / (filter_blocks + 1) >= least) ++filter_blocks;
  };
  const bool readable = __is_same(T, C) && lattice.count > 0 && g.chunk_taps == 1 &&
                        (p.layout == Layout::nchw ? all_weights.stride_m == 1 || all_weights.stride_c == 1
                                                  : all_weights.stride_m == 1 && g.out_channels % lanes<C> == 0);
  const bool small = p.layout == Layout::nhwc && g.in_channels * g.out_channels <= kSmallWeights;
  const auto few_blocks = [&] { return pixel_blocks <= (count > 1 ? 1 : small ? kSomeBlocks : kFewBlocks); };
  // 1x1 on few pixels of channels_last packs neither pixels nor weights: it may be cut into single panels. What threads share
  // is not written then, which takes from a core to another as long as some hundred products for each line of the cache.
  const bool pack_nothing = readable && p.layout == Layout::nhwc && count == 1 && few_blocks();
  if (pack_nothing)
    while (tasks() < wanted_tasks && filter_blocks < panels.count) ++filter_blocks;
  if (!pack_nothing || tasks() < p.threads) {
    split_filters(kMinFilters);
    for (int64_t want = pixel_blocks + 1; tasks() < wanted_tasks && pixels / want >= max64(kMinPixels, grain); ++want) {
      block_pixels = round_up(ceil_div(pixels, want), grain);
      pixel_blocks = ceil_div(pixels, block_pixels);
    }
    split_filters(kTileColumns<C>);
  }
  filter_blocks = min64(filter_blocks, panels.count);

  // Weights that few blocks of pixels share are packed by each task, chunk by chunk, and never leave its cache.
  const int64_t block_channels = ceil_div(panels.count, filter_blocks) * max64(kTileRows, kTileColumns<C>);
  const int64_t chunk_weights_size = round_up(block_channels * g.chunk_channels * count, 64);
  g.weights_in_place = readable && few_blocks();
  const bool pack_all = !g.weights_in_place && (pixel_blocks > kFewBlocks || chunk_weights_size > kChunkWeights);
  Scratch<C> packed_weights(pack_all ? group_weights * p.groups : 0);
  const int64_t pixel_columns = round_up(block_pixels, kTileColumns<C>);
  g.strip_pitch = ((min64(g.lattice.columns, block_pixels) - 1) * g.lattice.isw + g.filter_columns) * g.in_channels;
  const int64_t window_terms = g.filter_columns ? chunk_terms : 0;
  Scratch<int64_t> window(window_terms);
  for (int64_t i = 0, run = g.filter_columns * g.in_channels; i < window_terms; ++i)
    window.data[i] = i / run * g.strip_pitch + i % run;
  g.window = window.data;
  const int64_t runs = min64(ceil_div(block_pixels, g.lattice.columns) + 1, block_pixels);
  const int64_t packed_size = round_up(
      g.filter_columns ? runs * g.chunk_taps / g.filter_columns * g.strip_pitch : pixel_columns * chunk_terms, 64);
  const int64_t sums_size = round_up(pixel_columns * block_channels, 64);
  const int64_t thread_size = packed_size + sums_size + (pack_all ? 0 : chunk_weights_size);
  const int threads = p.threads;
  const int64_t pack_tasks = min64(panels.count, wanted_tasks);
  Scratch<C> scratch(thread_size * threads);
#pragma omp parallel num_threads(threads)
  {
    if (length > 0 && pack_all) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.groups * pack_tasks; ++i) {
        const int64_t group = i / pack_tasks, share = i % pack_tasks;
        Weights<T> from = all_weights;
        from.data += group * group_stride;
        for (int64_t c0 = 0; c0 < g.in_channels; c0 += g.chunk_channels)
          pack_weights(g, from, panels, panels.count * share / pack_tasks, panels.count * (share + 1) / pack_tasks, c0,
                       min64(c0 + g.chunk_channels, g.in_channels), [&](int64_t panel) {
                         return packed_weights.data + group * group_weights + panels.begin(panel) * length +
                                c0 * count * panels.width(panel);
                       });
      }
    }
    C* const packed = scratch.data + omp_get_thread_num() * thread_size;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks(); ++task) {
      const int64_t filter_block = task % filter_blocks, rest = task / filter_blocks;
      const int64_t group = rest % p.groups, begin = rest / p.groups * block_pixels;
      Problem<T> mine = g;
      mine.input = static_cast<const T*>(transposed ? p.y : p.x) + group * g.in_channels * g.in.c;
      const int64_t first_channel = group * g.out_channels;
      mine.output = static_cast<T*>(transposed ? p.x : p.y) + first_channel * g.out.c;
      mine.residual = p.residual ? static_cast<const T*>(p.residual) + first_channel * g.out.c : nullptr;
      mine.bias = p.bias ? static_cast<const T*>(p.bias) + first_channel : nullptr;
      Weights<T> from = all_weights;
      from.data += group * group_stride;
      compute_block(mine, panels, from, pack_all ? packed_weights.data + group * group_weights : nullptr, begin,
                    min64(block_pixels, pixels - begin), panels.count * filter_block / filter_blocks,
                    panels.count * (filter_block + 1) / filter_blocks, packed, packed + packed_size,
                    packed + packed_size + sums_size);
    }
  }
}

template <class T>
void forward(const Conv2dParams& p) {
  Scratch<Tap> taps(p.r * p.s);
  forward_lattice(p, taps.data, [&](const Lattice& l, const Tap* t) { run_lattice<T>(p, l, t, false); });
}

template <class T>
void input_grad(const Conv2dParams& p) {
  Scratch<Tap> taps(p.r * p.s);
  input_grad_lattices(p, taps.data, [&](const Lattice& l, const Tap* t) { run_lattice<T>(p, l, t, true); });
}

// ---- Gradient of the weights -----------------------------------------------------------------------------------------

constexpr int64_t kGradPixels = 128;   // pixels of a chunk, at least one row: a panel of dy, 24 KB, stays in L1
constexpr int64_t kGradFlush = 24;     // terms of a running sum in channels_last, as kFlush
constexpr int64_t kGradChannels = 64;  // input channels of a task
constexpr int64_t kGradFilters = 192;  // output channels of a task: with the chunk, 98 KB of dy
constexpr int64_t kMaxSlices = 32;
constexpr int64_t kFewTerms = 160, kCloseFilters = 128;   // channels_last: copying dy would cost more than it saves
constexpr int64_t kFinishRows = 64, kFinishFilters = 64;  // stored at a time

struct GradPlan {
  int64_t channels, filters;  // per task, at most
  int64_t channel_blocks, filter_blocks, slices;
  int64_t rows;    // output rows of a chunk
  int64_t chunks;  // of all images
  int64_t strip_rows, strip_columns;
  int64_t pixel_pitch;    // of a strip in channels_last
  int64_t terms;          // channels per group * taps
  int64_t filter_pitch;   // of a partial sum: output channels of a group, in whole vectors
  bool filters_in_place;  // tiles read dy where it lies
  bool tap_first;         // a block's terms are ordered (tap, channel), as in dw, and not (channel, tap)
};

template <class C>
GradPlan plan_weight_grad(const Conv2dParams& p, bool in_place) {
  GradPlan g{};
  const int64_t group_c = p.c / p.groups, group_k = p.k / p.groups;
  g.channel_blocks = ceil_div(group_c, kGradChannels);
  g.channels = ceil_div(group_c, g.channel_blocks);
  g.filter_pitch = round_up(group_k, lanes<C>);
  g.filter_blocks = ceil_div(g.filter_pitch, kGradFilters);
  g.filters = round_up(ceil_div(g.filter_pitch, g.filter_blocks), lanes<C>);
  g.filter_blocks = ceil_div(g.filter_pitch, g.filters);
  g.rows = min64(p.p, max64(1, kGradPixels / p.q));
  g.chunks = p.n * ceil_div(p.p, g.rows);
  g.strip_rows = (g.rows - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1;
  g.strip_columns = (p.q - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1;
  // An odd number of cache lines, where rows of pixels an even number apart would share few sets of L1.
  const bool aliases = g.channels * static_cast<int64_t>(sizeof(C)) % 128 == 0;
  g.pixel_pitch = g.channels + (aliases ? 64 / static_cast<int64_t>(sizeof(C)) : 0);
  g.terms = group_c * p.r * p.s;
  g.filters_in_place = in_place && p.layout == Layout::nhwc && p.groups == 1 && g.terms <= kFewTerms &&
                       p.k <= kCloseFilters && p.k % lanes<C> == 0;
  g.tap_first = p.weight_stride[1] == 1;
  const int64_t tasks = g.channel_blocks * g.filter_blocks * p.groups;
  g.slices = min64(min64(ceil_div(kWantedTasks, tasks), g.chunks), kMaxSlices);
  return g;
}

// Output rows [row, row + rows) of image n: the input they see, zero-padded, as [channel][strip row][strip column] (NCHW) or
// [strip row][strip column][channel].
template <class T>
void copy_strip(const Conv2dParams& p, const GradPlan& g, int64_t n, int64_t row, int64_t c0, int64_t channels,
                compute_t<T>* strip) {
  using C = compute_t<T>;
  const Strides in = strides_of(p.layout, p.c, p.h, p.w);
  const T* const image = static_cast<const T*>(p.x) + n * in.n + c0 * in.c;
  const int64_t h0 = row * p.stride_h - p.pad_h;
  const Range valid = valid_range(g.strip_columns, 1, -p.pad_w, p.w);
  if (p.layout == Layout::nchw) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < g.strip_rows; ++i, strip += g.strip_columns) {
        const int64_t h = h0 + i;
        if (h < 0 || h >= p.h) {
          zero_run(strip, g.strip_columns);
          continue;
        }
        zero_run(strip, valid.first);
        copy_run(strip + valid.first, image + c * in.c + h * in.h - p.pad_w + valid.first, 1, valid.last - valid.first);
        zero_run(strip + valid.last, g.strip_columns - valid.last);
      }
    return;
  }
  for (int64_t i = 0; i < g.strip_rows; ++i) {
    const int64_t h = h0 + i;
    if (channels == p.c && g.pixel_pitch == channels && h >= 0 && h < p.h) {  // the row as it lies
      zero_run(strip, valid.first * channels);
      copy_run(strip + valid.first * channels, image + h * in.h + (valid.first - p.pad_w) * in.w, 1,
               (valid.last - valid.first) * channels);
      zero_run(strip + valid.last * channels, (g.strip_columns - valid.last) * channels);
      strip += g.strip_columns * g.pixel_pitch;
      continue;
    }
    for (int64_t j = 0; j < g.strip_columns; ++j, strip += g.pixel_pitch) {
      if (h < 0 || h >= p.h || j < valid.first || j >= valid.last)
        zero_run<C>(strip, channels);
      else
        copy_run(strip, image + h * in.h + (j - p.pad_w) * in.w, 1, channels);
    }
  }
}

// dy of the same rows as [pixel][filter], filters up to a whole number of vectors with zeros.
template <class T>
void copy_filters(const Conv2dParams& p, int64_t n, int64_t row, int64_t rows, int64_t k0, int64_t filters,
                  int64_t pitch, compute_t<T>* out) {
  using C = compute_t<T>;
  const int64_t pixels = rows * p.q;
  const Strides dy = strides_of(p.layout, p.k, p.p, p.q);
  const T* const source = static_cast<const T*>(p.y) + n * dy.n + row * dy.h + k0 * dy.c;
  if (p.layout == Layout::nhwc) {
    for (int64_t i = 0; i < pixels; ++i, out += pitch) {
      copy_run(out, source + i * dy.w, 1, filters);
      zero_run<C>(out + filters, pitch - filters);
    }
    return;
  }
  transpose(source, dy.c, filters, pixels, out, pitch);
  if (filters < pitch)
    for (int64_t i = 0; i < pixels; ++i) zero_run<C>(out + i * pitch + filters, pitch - filters);
}

bool neighbours(const int64_t* offset, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    if (offset[i] != offset[0] + i) return false;
  return true;
}

// Terms [row, row + rows) of `count` filters of dw: a transposition wherever dw's order of terms is that of the sums.
template <class T>
void store_terms(const Conv2dParams& p, const GradPlan& g, int64_t row, int64_t rows, const compute_t<T>* sums,
                 int64_t count, T* dw) {
  const int64_t taps = p.r * p.s, block_terms = g.channels * taps;
  const auto place = [&](int64_t term) {  // of a term in a filter of dw
    const int64_t c0 = term / block_terms * g.channels, channels = min64(g.channels, g.terms / taps - c0);
    const int64_t i = term % block_terms;
    const int64_t c = c0 + (g.tap_first ? i % channels : i / taps), t = g.tap_first ? i / channels : i % taps;
    return c * p.weight_stride[1] + t / p.s * p.weight_stride[2] + t % p.s * p.weight_stride[3];
  };
  for (int64_t first = 0; first < rows;) {
    const int64_t at = place(row + first);
    int64_t last = first + 1;
    while (last < rows && place(row + last) == at + last - first) ++last;
    const compute_t<T>* const from = sums + first * g.filter_pitch;
    if constexpr (__is_same(T, compute_t<T>)) {
      transpose(from, g.filter_pitch, last - first, count, dw + at, p.weight_stride[0]);
    } else {
      for (int64_t k = 0; k < count; ++k)
        for (int64_t i = 0; i < last - first; ++i)
          store_scalar(dw + at + k * p.weight_stride[0] + i, from[i * g.filter_pitch + k]);
    }
    first = last;
  }
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  using C = compute_t<T>;
  const int64_t group_c = p.c / p.groups, group_k = p.k / p.groups, taps = p.r * p.s;
  T* const dw = static_cast<T*>(p.weight);
  if (group_c == 0 || group_k == 0) return;
  if (p.n * p.p * p.q == 0) {
    for (int64_t k = 0; k < p.k; ++k)
      for (int64_t c = 0; c < group_c; ++c)
        for (int64_t t = 0; t < taps; ++t)
          store_scalar(dw + k * p.weight_stride[0] + c * p.weight_stride[1] + t / p.s * p.weight_stride[2] +
                           t % p.s * p.weight_stride[3],
                       C{0});
    return;
  }
  const GradPlan g = plan_weight_grad<C>(p, __is_same(T, C));
  // Partial sums: [slice][group][term][filter].
  const int64_t group_size = g.terms * g.filter_pitch, slice_size = group_size * p.groups;
  Scratch<C> partial(g.slices * slice_size);
  const int64_t strip_size = round_up(g.strip_rows * g.strip_columns * g.pixel_pitch, 64);
  const int64_t filters_size = round_up(g.rows * p.q * kTileColumns<C>, 64);
  const int64_t offset_count = round_up(g.channels * taps, kTileRows);
  Scratch<C> scratch((strip_size + filters_size) * p.threads);
  Scratch<int64_t> offsets(offset_count * p.threads);
  const int64_t tasks = g.slices * p.groups * g.channel_blocks * g.filter_blocks;
  const int64_t row_chunks = ceil_div(p.p, g.rows);
#pragma omp parallel num_threads(p.threads)
  {
    C* const strip = scratch.data + omp_get_thread_num() * (strip_size + filters_size);
    C* const filters = strip + strip_size;
    int64_t* const offset = offsets.data + omp_get_thread_num() * offset_count;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      int64_t rest = task;
      const int64_t filter_block = rest % g.filter_blocks;
      rest /= g.filter_blocks;
      const int64_t channel_block = rest % g.channel_blocks;
      rest /= g.channel_blocks;
      const int64_t group = rest % p.groups, slice = rest / p.groups;
      const int64_t c0 = channel_block * g.channels, channels = min64(g.channels, group_c - c0);
      const int64_t k0 = filter_block * g.filters, pitch = min64(g.filters, g.filter_pitch - k0);
      const bool nchw = p.layout == Layout::nchw;
      const int64_t step_c = nchw ? g.strip_rows * g.strip_columns : 1;
      const int64_t step_w = nchw ? 1 : g.pixel_pitch, step_h = g.strip_columns * step_w;
      const int64_t terms = channels * taps, flush = nchw ? kNeverFlush : kGradFlush;
      for (int64_t i = 0; i < terms; ++i) {
        const int64_t c = g.tap_first ? i % channels : i / taps, t = g.tap_first ? i / channels : i % taps;
        offset[i] = c * step_c + t / p.s * p.dilation_h * step_h + t % p.s * p.dilation_w * step_w;
      }
      C* const sums = partial.data + slice * slice_size + group * group_size + c0 * taps * g.filter_pitch + k0;
      const int64_t first = g.chunks * slice / g.slices, last = g.chunks * (slice + 1) / g.slices;
      for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t n = chunk / row_chunks, row = chunk % row_chunks * g.rows, rows = min64(g.rows, p.p - row);
        copy_strip<T>(p, g, n, row, group * group_c + c0, channels, strip);
        constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(C));
        const int64_t vectors = pitch / lanes<C>, panels = ceil_div(vectors, kTileVecs);
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t k = vectors * panel / panels * lanes<C>;
          const int64_t width = vectors * (panel + 1) / panels * lanes<C> - k;
          const int vecs = static_cast<int>(width / lanes<C>);
          const C* columns = filters;
          int64_t column_step = width;
          if (g.filters_in_place) {
            if constexpr (__is_same(T, C))
              columns = static_cast<const T*>(p.y) + ((n * p.p + row) * p.q) * p.k + k0 + k;
            column_step = p.k;
          } else {
            copy_filters<T>(p, n, row, rows, group * group_k + k0 + k, min64(width, group_k - k0 - k), width, filters);
          }
          for (int64_t i = 0; i < terms; i += kTileRows) {
            const int tile_rows = static_cast<int>(min64(kTileRows, terms - i));
            C* const to = sums + i * g.filter_pitch + k;
            const int64_t step = p.stride_w * step_w, run = p.stride_h * step_h;
            const auto multiply = [&](const auto& tile) {
              gemm_tile<C>(tile_rows, vecs, tile, columns, column_step, p.q, rows, to, g.filter_pitch, chunk > first,
                           flush);
            };
            if (neighbours(offset + i, tile_rows))
              multiply(ColumnRows<C>{strip + offset[i], step, run});
            else if (g.filters_in_place)  // the next chunk's pixels, a line of the cache of each
              multiply(FetchingRows<C>{
                  strip, offset + i, step, run,
                  reinterpret_cast<const char*>(columns + rows * p.q * column_step + i / kTileRows * line % width),
                  column_step * static_cast<int64_t>(sizeof(C))});
            else
              multiply(OffsetRows<C>{strip, offset + i, step, run});
          }
        }
      }
    }
    // The slices, in order, and from [term][filter] to dw.
    const int64_t row_blocks = ceil_div(g.terms, kFinishRows), filter_blocks = ceil_div(group_k, kFinishFilters);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.groups * row_blocks * filter_blocks; ++i) {
      const int64_t group = i / filter_blocks / row_blocks, row = i / filter_blocks % row_blocks * kFinishRows;
      const int64_t k0 = i % filter_blocks * kFinishFilters, count = min64(kFinishFilters, group_k - k0);
      const int64_t rows = min64(kFinishRows, g.terms - row);
      C* const sums = partial.data + group * group_size + row * g.filter_pitch + k0;
      for (int64_t slice = 1; slice < g.slices; ++slice)
        for (int64_t j = 0; j < rows; ++j)
          for (int64_t k = 0; k < count; k += lanes<C>) {
            C* const at = sums + j * g.filter_pitch + k;
            const int part = static_cast<int>(min64(count - k, lanes<C>));
            store_n(at, load_n(at, part) + load_n(at + slice * slice_size, part), part);
          }
      T* const to = dw + (group * group_k + k0) * p.weight_stride[0];
      store_terms<T>(p, g, row, rows, sums, count, to);
    }
  }
}

// ---- Gradient of the bias --------------------------------------------------------------------------------------------

// Sums in float64: 16 images of 112x112 pixels are 200,000 terms.
template <class T>
void bias_grad(const Conv2dParams& p) {
  using C = compute_t<T>;
  const T* const dy = static_cast<const T*>(p.y);
  T* const db = static_cast<T*>(p.bias);
  const int64_t plane = p.p * p.q;
  if (p.layout == Layout::nchw) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t k = 0; k < p.k; ++k) {
      double total = 0;
      for (int64_t n = 0; n < p.n; ++n) {
        const T* const source = dy + (n * p.k + k) * plane;
        for (int64_t i0 = 0; i0 < plane; i0 += 64 * lanes<C>) {
          const int64_t i1 = min64(i0 + 64 * lanes<C>, plane);
          vec<C> sum = {};
          for (int64_t i = i0; i < i1; i += lanes<C>)
            sum += load_n(source + i, static_cast<int>(min64(i1 - i, lanes<C>)));
          for (int j = 0; j < lanes<C>; ++j) total += sum[j];
        }
      }
      store_scalar(db + k, static_cast<C>(total));
    }
    return;
  }
  // channels_last: slices of pixels, each of its own partial sums.
  const int64_t pixels = p.n * plane, slices = max64(1, min64(64, pixels / 64));
  Scratch<double> partial(slices * p.k);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t slice = 0; slice < slices; ++slice) {
      double* const total = partial.data + slice * p.k;
      for (int64_t k = 0; k < p.k; ++k) total[k] = 0;
      const int64_t last = pixels * (slice + 1) / slices;
      for (int64_t i0 = pixels * slice / slices; i0 < last; i0 += 64) {
        const int64_t i1 = min64(i0 + 64, last);
        for (int64_t k = 0; k < p.k; k += lanes<C>) {
          const int part = static_cast<int>(min64(p.k - k, lanes<C>));
          vec<C> sum = {};
          for (int64_t i = i0; i < i1; ++i) sum += load_n(dy + i * p.k + k, part);
          for (int j = 0; j < part; ++j) total[k + j] += sum[j];
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < p.k; ++k) {
      double total = 0;
      for (int64_t slice = 0; slice < slices; ++slice) total += partial.data[slice * p.k + k];
      store_scalar(db + k, static_cast<C>(total));
    }
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_weight_grad, Conv2dParams, weight_grad)
CNNOPS_EXPORT(conv2d_bias_grad, Conv2dParams, bias_grad)
