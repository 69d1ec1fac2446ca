// Dense and grouped convolution on instructions that multiply pairs of bfloat16 numbers (micro/dot_tile.h): forward and
// input_grad.
//
// The output of one lattice (conv2d_lattice.h), flattened over n, i, j, is cut into blocks of pixels and blocks of output
// channels; a block is one task. A task walks over the reduction in chunks of dot_chunk terms (tap, channel): it packs the
// chunk's pixels into scratch that fits L2 (padding, strides and splitting happen there, nowhere else) and runs tiles over it
// and the packed weights, adding to a float32 block that also fits L2.
//   NCHW           rows = output channels (weights), columns = pixels: two channels' pixels side by side make pairs
//   channels_last  rows = pixels, columns = output channels (weights)
// A panel of columns stays in L1 while all rows of the block pass. Weights are packed once per call, or by each task where few
// share them.
//
// float32 that does not split (micro/pairs.h) is found out while packing, and the direct kernel computes the call again. That
// and all cuts depend on data and shapes alone, so results have the same bits for any number of threads.
#include "cpu/conv2d_pairs.h"

#include <omp.h>

#include "common/scratch.h"
#include "cpu/conv2d_blocks.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kBlockPixels = 192;   // whole panels; with a chunk of 256: 98 KB of packed pixels
constexpr int64_t kBlockFilters = 256;  // with kBlockPixels: 196 KB of sums
constexpr int64_t kMinFilters = 64;     // smaller blocks would pack the same pixels too often
constexpr int64_t kFewBlocks = 2;       // of pixels: too few to pay for packing all weights to memory
static_assert(kBlockPixels % kDotColumns == 0 && kBlockPixels % kDotRows == 0);

// One group of one lattice.
template <class T>
struct Problem {
  Layout layout;
  Lattice lattice;
  const Tap* taps;
  int64_t images, in_channels, out_channels;  // channels per group
  int64_t in_h, in_w;
  Strides in;
  const T* input;
  const T* weight;  // of output channel m, input channel c, tap t: weight[m * stride_m + c * stride_c + t.weight]
  int64_t stride_m, stride_c;
  Output<T> out;

  int64_t chunk_channels, chunks;
  int64_t pixels() const { return images * lattice.rows * lattice.columns; }
  // Channels [c0, c1) of a chunk, and their terms with the zeros that fill up a grain.
  int64_t first(int64_t chunk) const { return min64(chunk * chunk_channels, in_channels); }
  int64_t terms(int64_t chunk) const { return (first(chunk + 1) - first(chunk)) * lattice.count; }
  int64_t padded_terms(int64_t chunk) const { return round_up(terms(chunk), kDotGrain); }
};

// ---- Weights ---------------------------------------------------------------------------------------------------------

constexpr int64_t kGather = 64;

// Rows of terms of `count` output channels from m0 on.
template <int kParts, class T>
void pack_weight_rows(const Problem<T>& g, int64_t m0, int64_t count, int64_t chunk, uint16_t* to, int64_t part,
                      Watch& watch) {
  const int64_t c0 = g.first(chunk), c1 = g.first(chunk + 1), channels = c1 - c0;
  const int64_t terms = g.terms(chunk), pitch = g.padded_terms(chunk);
  T buffer[kGather];
  for (int64_t m = 0; m < count; ++m) {
    uint16_t* const row = to + m * pitch;
    for (int64_t c = 0; c < channels; c += kGather) {
      const int64_t n = min64(kGather, channels - c);
      for (int64_t t = 0; t < g.lattice.count; ++t) {
        const T* const from = g.weight + (m0 + m) * g.stride_m + (c0 + c) * g.stride_c + g.taps[t].weight;
        pack_row<kParts>(gather(from, g.stride_c, n, buffer), n, row + t * channels + c, part, watch);
      }
    }
    zero_parts<kParts>(row + terms, part, pitch - terms);
  }
}

// A panel: `width` columns from m0 on. `rows` has room for as many rows of terms.
template <int kParts, class T>
void pack_weight_panel(const Problem<T>& g, int64_t m0, int64_t width, int64_t chunk, uint16_t* to, int64_t part,
                       uint16_t* rows, Watch& watch) {
  const int64_t c0 = g.first(chunk), c1 = g.first(chunk + 1), channels = c1 - c0;
  const int64_t filled = min64(width, g.out_channels - m0), pitch = g.padded_terms(chunk);
  if (g.stride_m == 1 && channels % 2 == 0) {
    if (filled < width || pitch > g.terms(chunk)) zero_parts<kParts>(to, part, width * pitch);
    for (int64_t t = 0; t < g.lattice.count; ++t)
      for (int64_t c = 0; c < channels; c += 2) {
        const T* const from = g.weight + m0 + (c0 + c) * g.stride_c + g.taps[t].weight;
        pack_pairs<kParts>(from, from + g.stride_c, filled, to + (t * channels + c) * width, part, watch);
      }
    return;
  }
  const int64_t rows_part = width * pitch;
  pack_weight_rows<kParts>(g, m0, filled, chunk, rows, rows_part, watch);
  for (int i = 0; i < kParts; ++i) {
    zero_bits(rows + i * rows_part + filled * pitch, (width - filled) * pitch);
    transpose_pairs(rows + i * rows_part, pitch / 2, width, pitch / 2, to + i * part, width);
  }
}

// ---- Pixels ----------------------------------------------------------------------------------------------------------

// channels_last: rows [pixel][(tap, channel)].
template <int kParts, class T>
void pack_pixels_nhwc(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t chunk, uint16_t* packed,
                      int64_t part, Watch& watch) {
  const int64_t c0 = g.first(chunk), c1 = g.first(chunk + 1), channels = c1 - c0, taps = g.lattice.count;
  const int64_t terms = g.terms(chunk), pitch = g.padded_terms(chunk);
  const bool whole = channels == g.in.w;  // then the taps of a row of a filter are neighbours
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    uint16_t* const rows = packed + run.dst * pitch;
    int64_t together;
    for (int64_t t = 0; t < taps; t += together) {
      const Tap& tap = g.taps[t];
      together = 1;
      if (whole)
        while (t + together < taps && g.taps[t + together].dh == tap.dh &&
               g.taps[t + together].dw == tap.dw + together)
          ++together;
      const int64_t h = run.i * g.lattice.ish + tap.dh;
      uint16_t* to = rows + t * channels;
      if (h < 0 || h >= g.in_h) {
        for (int64_t j = 0; j < run.length; ++j, to += pitch) zero_parts<kParts>(to, part, together * channels);
        continue;
      }
      const T* const line = g.input + run.n * g.in.n + h * g.in.h + c0;
      for (int64_t j = 0; j < run.length; ++j, to += pitch) {
        const int64_t w = (run.j + j) * g.lattice.isw + tap.dw;
        const int64_t first = min64(max64(-w, 0), together), last = max64(min64(g.in_w - w, together), first);
        if (first > 0) zero_parts<kParts>(to, part, first * channels);
        if (first < last)
          pack_row<kParts>(line + (w + first) * g.in.w, (last - first) * channels, to + first * channels, part, watch);
        if (last < together) zero_parts<kParts>(to + last * channels, part, (together - last) * channels);
      }
    }
    if (terms < pitch)
      for (int64_t j = 0; j < run.length; ++j) zero_parts<kParts>(rows + j * pitch + terms, part, pitch - terms);
  }
}

// NCHW: panels of kDotColumns pixels, the last one of as few vectors as hold the rest. Runs lie within panels.
template <int kParts, class T>
void pack_pixels_nchw(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t pixels, int64_t chunk,
                      uint16_t* packed, int64_t part, Watch& watch) {
  const int64_t c0 = g.first(chunk), c1 = g.first(chunk + 1), channels = c1 - c0;
  const int64_t terms = g.terms(chunk), pitch = g.padded_terms(chunk), step = g.lattice.isw;
  T even_buffer[kDotColumns], odd_buffer[kDotColumns];
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    const int64_t at = run.dst / kDotColumns * kDotColumns;
    const int64_t width = min64(kDotColumns, round_up(pixels - at, kDotLanes));
    uint16_t* const panel = packed + at * pitch + (run.dst - at) * 2;
    // The last panel's unused columns are computed and thrown away; zeros keep them finite.
    const int64_t tail = run.dst + run.length == pixels ? at + width - pixels : 0;
    for (int64_t t = 0; t < g.lattice.count; ++t) {
      const Tap& tap = g.taps[t];
      const int64_t h = run.i * g.lattice.ish + tap.dh, w = run.j * step + tap.dw;
      Range valid = valid_range(run.length, step, w, g.in_w);
      if (h < 0 || h >= g.in_h) valid = {0, 0};
      const int64_t n = valid.last - valid.first, all = run.length + tail;
      const T* from = g.input + run.n * g.in.n + c0 * g.in.c + h * g.in.h + w + valid.first * step;
      int64_t c = 0;
      const int64_t term = t * channels;
      if (term % 2 != 0) {
        // The tap before has left half a pair.
        add_odd<kParts>(gather(from, step, n, odd_buffer), n, panel + (term - 1) * width + 2 * valid.first, part,
                        watch);
        c = 1, from += g.in.c;
      }
      for (; c < channels; c += 2, from += 2 * g.in.c) {
        uint16_t* const to = panel + (term + c) * width;
        if (n < all) {
          zero_parts<kParts>(to, part, 2 * valid.first);
          zero_parts<kParts>(to + 2 * valid.last, part, 2 * (all - valid.last));
        }
        const T* const odd = c + 1 < channels ? gather(from + g.in.c, step, n, odd_buffer) : nullptr;
        pack_pairs<kParts>(gather(from, step, n, even_buffer), odd, n, to + 2 * valid.first, part, watch);
      }
    }
    for (int64_t term = round_up(terms, 2); term < pitch; term += 2)
      zero_parts<kParts>(panel + term * width, part, 2 * (run.length + tail));
  }
}

// ---- Tasks -----------------------------------------------------------------------------------------------------------

struct Workspace {
  uint16_t* pixels;
  uint16_t* weights;  // of a block and a chunk, where they are not shared
  uint16_t* rows;     // of a panel of weights, before it is turned
  float* sums;
};

// Computes pixels [begin, begin + pixels) of these panels of output channels. `shared` are all the group's weights, packed,
// chunk after chunk, `chunk_size` apart; or null.
template <int kProducts, class T>
void compute_block(const Problem<T>& g, const DotPanels& panels, const uint16_t* shared, int64_t chunk_size,
                   int64_t begin, int64_t pixels, int64_t first_panel, int64_t last_panel, const Workspace& work,
                   Watch& weight_watch, Watch& pixel_watch, bool& unfit) {
  constexpr int kParts = parts_for(kProducts);
  const bool nchw = g.layout == Layout::nchw;
  const Lattice& l = g.lattice;
  const int64_t m0 = panels.begin(first_panel), m1 = min64(panels.begin(last_panel), g.out_channels);
  const int64_t block_channels = panels.begin(last_panel) - m0;
  const int64_t pitch = nchw ? round_up(pixels, kDotLanes) : block_channels;
  Run runs[kBlockPixels];
  const int64_t run_count = find_runs(l.rows, l.columns, begin, pixels, nchw ? kDotColumns : pixels, runs);
  for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
    const int64_t terms = g.padded_terms(chunk);
    const bool add = chunk > 0;
    DotOperand weights;
    if (shared) {
      weights = {shared + chunk * chunk_size + m0 * terms, panels.channels() * terms};
    } else {
      weights = {work.weights, block_channels * terms};
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t m = panels.begin(panel), width = panels.width(panel);
        uint16_t* const to = work.weights + (m - m0) * terms;
        weight_watch = {};
        if (nchw)
          pack_weight_rows<kParts>(g, m, min64(width, g.out_channels - m), chunk, to, weights.part, weight_watch);
        else
          pack_weight_panel<kParts>(g, m, width, chunk, to, weights.part, work.rows, weight_watch);
        unfit |= !weight_watch.fits();
      }
    }
    const int64_t part = round_up(pixels, nchw ? kDotLanes : kDotRows) * terms;
    pixel_watch = {};
    if (nchw) {
      pack_pixels_nchw<kParts>(g, runs, run_count, pixels, chunk, work.pixels, part, pixel_watch);
      for (int64_t at = 0; at < pixels; at += kDotColumns) {
        const int64_t width = min64(kDotColumns, round_up(pixels - at, kDotLanes));
        for (int64_t m = m0; m < m1; m += kDotRows)
          dot_tile<kProducts>(static_cast<int>(min64(kDotRows, m1 - m)), static_cast<int>(width / kDotLanes),
                              {weights.data + (m - m0) * terms, weights.part}, terms,
                              {work.pixels + at * terms, part}, width, terms, work.sums + (m - m0) * pitch + at, pitch,
                              add);
      }
    } else {
      pack_pixels_nhwc<kParts>(g, runs, run_count, chunk, work.pixels, part, pixel_watch);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t m = panels.begin(panel), width = panels.width(panel);
        for (int64_t at = 0; at < pixels; at += kDotRows)
          dot_tile<kProducts>(static_cast<int>(min64(kDotRows, pixels - at)), static_cast<int>(width / kDotLanes),
                              {work.pixels + at * terms, part}, terms,
                              {weights.data + (m - m0) * terms, weights.part}, width, terms,
                              work.sums + at * pitch + (m - m0), pitch, add);
      }
    }
    unfit |= !pixel_watch.fits();
  }
  finish_block(g.out, begin, pixels, m0, m1, work.sums, pitch, runs);
}

// Whether the result is right; otherwise it must be computed without splitting.
template <int kProducts, class T>
bool run_lattice(const Conv2dParams& p, const Lattice& lattice, const Tap* taps, bool transposed) {
  constexpr int kParts = parts_for(kProducts);
  const bool nchw = p.layout == Layout::nchw;
  Problem<T> g{};
  g.layout = p.layout;
  g.lattice = lattice;
  g.taps = taps;
  g.images = p.n;
  g.in_channels = (transposed ? p.k : p.c) / p.groups;
  g.out_channels = (transposed ? p.c : p.k) / p.groups;
  g.in_h = transposed ? p.p : p.h, g.in_w = transposed ? p.q : p.w;
  g.in = strides_of(p.layout, transposed ? p.k : p.c, g.in_h, g.in_w);
  g.stride_m = p.weight_stride[transposed ? 1 : 0], g.stride_c = p.weight_stride[transposed ? 0 : 1];
  const Strides out = transposed ? strides_of(p.layout, p.c, p.h, p.w) : strides_of(p.layout, p.k, p.p, p.q);
  if (g.pixels() == 0 || g.out_channels == 0) return true;
  // Rows that follow each other without a gap in both images are one row.
  Tap flat;
  if (lattice.count == 1 && lattice.ish == 1 && lattice.isw == 1 && lattice.osh == 1 && lattice.osw == 1 &&
      taps[0].dh == 0 && taps[0].dw == 0 && lattice.rows == g.in_h && lattice.columns == g.in_w &&
      g.in_h * g.in_w * out.w == (nchw ? out.c : out.n)) {
    flat = taps[0];
    g.taps = &flat;
    g.lattice.columns *= g.lattice.rows;
    g.lattice.rows = 1;
    g.in_w *= g.in_h;
    g.in_h = 1;
  }
  g.out = {p.layout, g.lattice, out, nullptr, nullptr, nullptr, p.activation};
  const int64_t count = max64(lattice.count, 1);
  g.chunks = max64(1, ceil_div(g.in_channels * count, dot_chunk(kProducts)));
  g.chunk_channels = max64(1, ceil_div(g.in_channels, g.chunks));
  if (g.chunk_channels > 1) g.chunk_channels = round_up(g.chunk_channels, 2);
  g.chunks = max64(1, ceil_div(g.in_channels, g.chunk_channels));
  const int64_t chunk_terms = round_up(g.chunk_channels * count, kDotGrain);

  // Blocks: as even as possible, and enough tasks to share out.
  const DotPanels panels(!nchw, g.out_channels);
  const int64_t pixels = g.pixels();
  const int64_t grain = nchw ? kDotColumns : kDotRows;
  int64_t block_pixels = even_block(pixels, kBlockPixels, grain);
  int64_t pixel_blocks = ceil_div(pixels, block_pixels);
  int64_t filter_blocks = ceil_div(g.out_channels, kBlockFilters);
  while (pixel_blocks * filter_blocks * p.groups < kWantedTasks &&
         ceil_div(g.out_channels, filter_blocks + 1) >= kMinFilters)
    ++filter_blocks;
  while (pixel_blocks * filter_blocks * p.groups < kWantedTasks && block_pixels > grain) {
    block_pixels = round_up(block_pixels / 2, grain);
    pixel_blocks = ceil_div(pixels, block_pixels);
  }
  filter_blocks = min64(filter_blocks, panels.count);

  // Weights that few blocks of pixels share are packed by each task, chunk by chunk, and never leave its cache.
  const bool share = pixel_blocks > kFewBlocks;
  const int64_t chunk_size = kParts * panels.channels() * chunk_terms, group_size = chunk_size * g.chunks;
  const Scratch<uint16_t> all_weights(share ? group_size * p.groups : 0);
  const int64_t block_channels =
      ceil_div(panels.count, filter_blocks) * (nchw ? kDotRows : kDotColumns);
  const auto lay_out = [&](Arena arena, Workspace* work) {
    uint16_t* const pixel_data = arena.take<uint16_t>(kParts * block_pixels * chunk_terms);
    uint16_t* const weights = arena.take<uint16_t>(share ? 0 : kParts * block_channels * chunk_terms);
    uint16_t* const rows = arena.take<uint16_t>(nchw ? 0 : kParts * kDotColumns * chunk_terms);
    float* const sums = arena.take<float>(block_pixels * block_channels);
    if (work) *work = {pixel_data, weights, rows, sums};
    return arena.used;
  };
  const ScratchPieces pieces(p.threads, lay_out(Arena{nullptr}, nullptr));
  const auto group_of = [&](int64_t group) {
    Problem<T> mine = g;
    mine.input = static_cast<const T*>(transposed ? p.y : p.x) + group * g.in_channels * g.in.c;
    mine.weight = static_cast<const T*>(p.weight) + group * (p.k / p.groups) * p.weight_stride[0];
    const int64_t first_channel = group * g.out_channels;
    mine.out.data = static_cast<T*>(transposed ? p.x : p.y) + first_channel * out.c;
    mine.out.residual = p.residual ? static_cast<const T*>(p.residual) + first_channel * out.c : nullptr;
    mine.out.bias = p.bias ? static_cast<const T*>(p.bias) + first_channel : nullptr;
    return mine;
  };
  int any_unfit = 0;
#pragma omp parallel num_threads(p.threads) reduction(| : any_unfit)
  {
    Workspace work;
    lay_out(Arena{static_cast<char*>(pieces.piece(omp_get_thread_num()))}, &work);
    const DotUnit unit;
    bool unfit = false;
    Watch weight_watch, pixel_watch;
    if (share) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.groups * panels.count; ++i) {
        const Problem<T> mine = group_of(i / panels.count);
        const int64_t panel = i % panels.count, m0 = panels.begin(panel), width = panels.width(panel);
        for (int64_t chunk = 0; chunk < g.chunks; ++chunk) {
          const int64_t terms = g.padded_terms(chunk), part = panels.channels() * terms;
          uint16_t* const to = all_weights.data + i / panels.count * group_size + chunk * chunk_size + m0 * terms;
          weight_watch = {};
          if (nchw)
            pack_weight_rows<kParts>(mine, m0, min64(width, g.out_channels - m0), chunk, to, part, weight_watch);
          else
            pack_weight_panel<kParts>(mine, m0, width, chunk, to, part, work.rows, weight_watch);
          unfit |= !weight_watch.fits();
        }
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pixel_blocks * filter_blocks * p.groups; ++task) {
      if (unfit) continue;  // the output will be computed again
      const int64_t filter_block = task % filter_blocks, rest = task / filter_blocks, group = rest % p.groups;
      const int64_t begin = rest / p.groups * block_pixels;
      compute_block<kProducts>(group_of(group), panels, share ? all_weights.data + group * group_size : nullptr,
                               chunk_size, begin, min64(block_pixels, pixels - begin),
                               panels.count * filter_block / filter_blocks,
                               panels.count * (filter_block + 1) / filter_blocks, work, weight_watch, pixel_watch,
                               unfit);
    }
    any_unfit |= unfit;
  }
  return !any_unfit;
}

template <class T>
bool forward(const Conv2dParams& p) {
  Scratch<Tap> taps(p.r * p.s);
  bool right = true;
  forward_lattice(p, taps.data, [&](const Lattice& l, const Tap* t) {
    right = with_products<T>(p, [&](auto products) { return run_lattice<products.value, T>(p, l, t, false); });
  });
  return right;
}

template <class T>
bool input_grad(const Conv2dParams& p) {
  Scratch<Tap> taps(p.r * p.s);
  bool right = true;
  input_grad_lattices(p, taps.data, [&](const Lattice& l, const Tap* t) {
    right = right && with_products<T>(p, [&](auto products) { return run_lattice<products.value, T>(p, l, t, true); });
  });
  return right;
}

}  // namespace

void conv2d_pairs_forward_bf16(const Conv2dParams& p) { forward<::cnnops::bf16>(p); }
void conv2d_pairs_input_grad_bf16(const Conv2dParams& p) { input_grad<::cnnops::bf16>(p); }
#if !CNNOPS_ISA_avx512_bf16
void conv2d_pairs_forward_f32(const Conv2dParams& p) {
  if (!forward<float>(p)) CNNOPS_DIRECT_ISA::conv2d_forward_f32(p);
}
void conv2d_pairs_input_grad_f32(const Conv2dParams& p) {
  if (!input_grad<float>(p)) CNNOPS_DIRECT_ISA::conv2d_input_grad_f32(p);
}
#endif

}  // namespace cnnops::CNNOPS_ISA
