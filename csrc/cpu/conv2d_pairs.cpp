// Dense and grouped convolution on instructions that multiply pairs of bfloat16 numbers (micro/dot_tile.h): forward and
// input_grad.
//
// The output of one lattice (conv2d_lattice.h), flattened over n, i, j, is cut into blocks of pixels and blocks of output
// channels; a block is one task. A task walks over the reduction in chunks of dot_chunk terms (tap, channel): it packs the
// chunk's pixels into scratch that fits L2 (padding, strides and splitting happen there, nowhere else) and runs tiles over it
// and the packed weights, adding to a float32 block that also fits L2.
//   NCHW           rows = output channels (weights), columns = pixels: two channels' pixels side by side make pairs
//   channels_last  rows = pixels, columns = output channels (weights)
// bfloat16 pixels in channels_last are rows as they lie, and not packed where the unit reads rows from anywhere. A panel of
// columns stays in L1 while all rows of the block pass. Weights are packed once per call, or by each task where none share them.
//
// float32 that does not split (micro/pairs.h) is found out while packing, and the direct kernel computes the call again. That
// and all cuts depend on data and shapes alone, so results have the same bits for any number of threads.
#include "cpu/conv2d_pairs.h"

#include <omp.h>

#include "common/scratch.h"
#include "cpu/conv2d_blocks.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kBlockPixels = 192;      // whole panels; with a chunk of 256: 98 KB of packed pixels
constexpr int64_t kShortBlockPixels = 96;  // NCHW with one chunk: sums go to the output while they are near
constexpr int64_t kBlockFilters = 256;     // with kBlockPixels: 196 KB of sums
constexpr int64_t kMinFilters = 64;        // smaller blocks would pack the same pixels too often
constexpr int64_t kLine = 64;              // bytes of a cache line
constexpr int64_t kLeastPixels = 64;       // smaller blocks would read the same weights too often
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

  // The reduction is cut into groups of channels, and for each into groups of taps: chunks of about dot_chunk terms.
  int64_t group_channels, channel_groups, tap_groups;
  int64_t chunks() const { return channel_groups * tap_groups; }
  int64_t pixels() const { return images * lattice.rows * lattice.columns; }
};

// A chunk: terms (tap, channel), in NCHW with a channel of zeros where their number is odd, then zeros up to a whole grain.
struct Chunk {
  int64_t c0, channels, t0, taps;
  int64_t tap_terms;      // of one tap
  int64_t filled, terms;  // without and with the zeros at the end
};
template <class T>
Chunk chunk_of(const Problem<T>& g, int64_t index) {
  Chunk out;
  const int64_t tap_group = index % g.tap_groups;
  out.c0 = index / g.tap_groups * g.group_channels;
  out.channels = min64(g.group_channels, g.in_channels - out.c0);
  out.t0 = g.lattice.count * tap_group / g.tap_groups;
  out.taps = g.lattice.count * (tap_group + 1) / g.tap_groups - out.t0;
  out.tap_terms = g.layout == Layout::nchw ? round_up(out.channels, 2) : out.channels;
  out.filled = out.taps * out.tap_terms;
  out.terms = round_up(out.filled, kDotGrain);
  return out;
}

// ---- Weights ---------------------------------------------------------------------------------------------------------

constexpr int64_t kGather = 64;

// Rows of terms of `count` output channels from m0 on, a tile's rows or columns at most.
template <int kParts, class T>
void pack_weight_rows(const Problem<T>& g, int64_t m0, int64_t count, const Chunk& chunk, uint16_t* to, int64_t part,
                      Watch& watch) {
  const auto weight = [&](int64_t m, int64_t c, int64_t t) {
    return g.weight + (m0 + m) * g.stride_m + (chunk.c0 + c) * g.stride_c + g.taps[chunk.t0 + t].weight;
  };
  if (g.stride_m < g.stride_c) {  // the channels of a row lie far apart: all rows' are read together
    constexpr int64_t kTogether = 16;
    T rows[kDotColumns > kDotRows ? kDotColumns : kDotRows][kTogether];
    for (int64_t c = 0; c < chunk.channels; c += kTogether)
      for (int64_t t = 0; t < chunk.taps; ++t) {
        const int64_t n = min64(kTogether, chunk.channels - c);
        const T* const from = weight(0, c, t);
        for (int64_t i = 0; i < n; ++i)
          for (int64_t m = 0; m < count; ++m) rows[m][i] = from[i * g.stride_c + m * g.stride_m];
        for (int64_t m = 0; m < count; ++m)
          pack_row<kParts>(rows[m], n, to + m * chunk.terms + t * chunk.tap_terms + c, part, watch);
      }
  } else {
    T buffer[kGather];
    for (int64_t m = 0; m < count; ++m)
      for (int64_t c = 0; c < chunk.channels; c += kGather)
        for (int64_t t = 0; t < chunk.taps; ++t) {
          const int64_t n = min64(kGather, chunk.channels - c);
          pack_row<kParts>(gather(weight(m, c, t), g.stride_c, n, buffer), n,
                           to + m * chunk.terms + t * chunk.tap_terms + c, part, watch);
        }
  }
  for (int64_t m = 0; m < count; ++m) {
    uint16_t* const row = to + m * chunk.terms;
    if (chunk.tap_terms > chunk.channels)
      for (int64_t t = 0; t < chunk.taps; ++t) zero_parts<kParts>(row + t * chunk.tap_terms + chunk.channels, part, 1);
    zero_parts<kParts>(row + chunk.filled, part, chunk.terms - chunk.filled);
  }
}

// A panel: `width` columns from m0 on. `rows` has room for as many rows of terms.
template <int kParts, class T>
void pack_weight_panel(const Problem<T>& g, int64_t m0, int64_t width, const Chunk& chunk, uint16_t* to, int64_t part,
                       uint16_t* rows, Watch& watch) {
  const int64_t filled = min64(width, g.out_channels - m0), pitch = chunk.terms;
  if (g.stride_m == 1 && chunk.tap_terms % 2 == 0) {
    if (filled < width || pitch > chunk.filled) zero_parts<kParts>(to, part, width * pitch);
    for (int64_t t = 0; t < chunk.taps; ++t)
      for (int64_t c = 0; c < chunk.channels; c += 2) {
        const T* const from = g.weight + m0 + (chunk.c0 + c) * g.stride_c + g.taps[chunk.t0 + t].weight;
        pack_pairs<kParts>(from, from + g.stride_c, filled, to + (t * chunk.tap_terms + c) * width, part, watch);
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

// The pixels that a block sees of a group of channels, split, with the zeros of the padding around them: what several taps
// share is prepared once, and no tap needs to look for borders.
//   NCHW           [pair of channels][phase][row][column][2]: pixels of every ish-th row and isw-th column are a phase, so
//                  that neighbours of the lattice are neighbours for every tap
//   channels_last  [row][column][channel]
struct Strip {
  uint16_t* data;
  int64_t part, rows, columns;  // NCHW: of a phase
  int64_t dh, dw;               // the least of the taps
  int64_t j0;                   // the lattice column of its first column
};

// How far the taps reach: the difference between the first and the last.
struct Reach {
  int64_t dh, dw, h, w;
};
Reach reach_of(const Tap* taps, int64_t count) {
  int64_t dh0 = 0, dh1 = 0, dw0 = 0, dw1 = 0;
  for (int64_t t = 0; t < count; ++t) {
    dh0 = t ? min64(dh0, taps[t].dh) : taps[t].dh, dh1 = t ? max64(dh1, taps[t].dh) : taps[t].dh;
    dw0 = t ? min64(dw0, taps[t].dw) : taps[t].dw, dw1 = t ? max64(dw1, taps[t].dw) : taps[t].dw;
  }
  return {dh0, dw0, dh1 - dh0, dw1 - dw0};
}

// Whether pixels go through a strip: where one tap reads them, or bfloat16 lies as rows want it, they are packed at once.
template <class T>
bool needs_strip(const Problem<T>& g) {
  return g.lattice.count > 1 && (g.layout == Layout::nchw || sizeof(T) > 2);
}

// Whether pixels are read where they lie: bfloat16 channels_last, in whole pairs, where rows need not be at even distances.
template <class T>
bool reads_in_place(const Problem<T>& g) {
  return kRowsAnywhere && sizeof(T) == 2 && g.layout == Layout::nhwc && g.in_channels % 2 == 0;
}

// Numbers of a part of a strip, at most, for blocks of `pixels`.
template <class T>
int64_t strip_size(const Problem<T>& g, int64_t pixels) {
  const Lattice& l = g.lattice;
  const Reach reach = reach_of(g.taps, l.count);
  const int64_t lines = min64(pixels / l.columns + 2, g.images * l.rows);
  const int64_t images = min64(lines / l.rows + 2, g.images);
  constexpr int64_t kPastEnd = 4 * kDotLanes;  // two vectors of pairs are read from anywhere on
  if (g.layout == Layout::nchw)
    return l.ish * l.isw * (lines + images * (reach.h / l.ish)) * (l.columns + reach.w / l.isw) *
               round_up(g.group_channels, 2) +
           kPastEnd;
  const int64_t rows = lines * l.ish + images * (reach.h + 1), columns = (l.columns - 1) * l.isw + reach.w + 1;
  return rows * columns * g.group_channels + kPastEnd;
}

// An image's rows in a strip.
struct Segment {
  int64_t n, i0, i1;  // lattice rows
};
Segment segment_of(const Lattice& l, const Run& front, const Run& back, int64_t n) {
  return {n, n == front.n ? front.i : 0, n == back.n ? back.i : l.rows - 1};
}

template <int kParts, class T>
void fill_strip_nchw(const Problem<T>& g, const Run& front, const Run& back, const Reach& reach, const Chunk& chunk,
                     Strip& strip, Watch& watch) {
  const Lattice& l = g.lattice;
  const int64_t plane = l.ish * l.isw * strip.rows * strip.columns;
  for (int64_t phase = 0; phase < l.ish * l.isw; ++phase) {
    const int64_t ph = phase / l.isw, pw = phase % l.isw;
    bool used = false;
    for (int64_t t = 0; t < l.count; ++t)
      used = used || ((g.taps[t].dh - reach.dh) % l.ish == ph && (g.taps[t].dw - reach.dw) % l.isw == pw);
    if (!used) continue;
    const int64_t w0 = strip.j0 * l.isw + reach.dw + pw;
    const Range valid = valid_range(strip.columns, l.isw, w0, g.in_w);
    int64_t row = phase * strip.rows;
    for (int64_t n = front.n; n <= back.n; ++n) {
      const Segment segment = segment_of(l, front, back, n);
      for (int64_t i = segment.i0; i <= segment.i1 + reach.h / l.ish; ++i, ++row) {
        const int64_t h = i * l.ish + reach.dh + ph;
        const bool inside = h >= 0 && h < g.in_h && valid.first < valid.last;
        const int64_t first = inside ? valid.first : 0, last = inside ? valid.last : 0;
        const T* from = g.input + n * g.in.n + chunk.c0 * g.in.c + h * g.in.h + w0;
        uint16_t* to = strip.data + row * strip.columns * 2;
        for (int64_t c = 0; c < chunk.channels; c += 2, from += 2 * g.in.c, to += 2 * plane) {
          const bool two = c + 1 < chunk.channels;
          if (first > 0) zero_parts<kParts>(to, strip.part, 2 * first);
          for (int64_t j = first; j < last; j += l.isw == 1 ? last : kMostStrided) {
            const int64_t count = l.isw == 1 ? last - j : min64(kMostStrided, last - j);
            const T* const at = from + j * l.isw;
            pack_strided_pairs<kParts>(at, two ? at + g.in.c : nullptr, l.isw, count, to + 2 * j, strip.part, watch);
          }
          if (last < strip.columns) zero_parts<kParts>(to + 2 * last, strip.part, 2 * (strip.columns - last));
        }
      }
    }
  }
}

template <int kParts, class T>
void fill_strip_nhwc(const Problem<T>& g, const Run& front, const Run& back, const Reach& reach, const Chunk& chunk,
                     Strip& strip, Watch& watch) {
  const Lattice& l = g.lattice;
  const Range valid = valid_range(strip.columns, 1, strip.j0 * l.isw + reach.dw, g.in_w);
  int64_t row = 0;
  for (int64_t n = front.n; n <= back.n; ++n) {
    const Segment segment = segment_of(l, front, back, n);
    for (int64_t k = 0; k < (segment.i1 - segment.i0) * l.ish + reach.h + 1; ++k, ++row) {
      const int64_t h = segment.i0 * l.ish + reach.dh + k;
      const bool inside = h >= 0 && h < g.in_h && valid.first < valid.last;
      const int64_t first = inside ? valid.first : 0, last = inside ? valid.last : 0;
      const T* from = g.input + n * g.in.n + chunk.c0 + h * g.in.h + (strip.j0 * l.isw + reach.dw + first) * g.in.w;
      uint16_t* to = strip.data + row * strip.columns * chunk.channels;
      zero_parts<kParts>(to, strip.part, first * chunk.channels);
      for (int64_t j = first; j < last; ++j, from += g.in.w)
        pack_row<kParts>(from, chunk.channels, to + j * chunk.channels, strip.part, watch);
      zero_parts<kParts>(to + last * chunk.channels, strip.part, (strip.columns - last) * chunk.channels);
    }
  }
}

// NCHW: how far a tap's pixel lies from the lattice's, in pairs.
int64_t tap_place(const Lattice& l, const Strip& strip, const Tap& tap) {
  const int64_t h = tap.dh - strip.dh, w = tap.dw - strip.dw;
  return ((h % l.ish * l.isw + w % l.isw) * strip.rows + h / l.ish) * strip.columns + w / l.isw;
}

// Fills the strip of a block whose runs these are.
template <int kParts, class T>
void fill_strip(const Problem<T>& g, const Run* runs, int64_t run_count, const Chunk& chunk, Strip& strip,
                Watch& watch) {
  const Lattice& l = g.lattice;
  const bool nchw = g.layout == Layout::nchw;
  const Reach reach = reach_of(g.taps, l.count);
  const Run &front = runs[0], &back = runs[run_count - 1];
  const bool one_line = front.n == back.n && front.i == back.i;
  strip.dh = reach.dh, strip.dw = reach.dw;
  strip.j0 = one_line ? front.j : 0;
  const int64_t lattice_columns = one_line ? back.j + back.length - front.j : l.columns;
  strip.columns = nchw ? lattice_columns + reach.w / l.isw : (lattice_columns - 1) * l.isw + reach.w + 1;
  strip.rows = 0;
  for (int64_t n = front.n; n <= back.n; ++n) {
    const Segment segment = segment_of(l, front, back, n);
    const int64_t lines = segment.i1 - segment.i0;
    strip.rows += nchw ? lines + reach.h / l.ish + 1 : lines * l.ish + reach.h + 1;
  }
  if (nchw)
    fill_strip_nchw<kParts>(g, front, back, reach, chunk, strip, watch);
  else
    fill_strip_nhwc<kParts>(g, front, back, reach, chunk, strip, watch);
}

// The strip's row of tap row 0 of each run.
template <class T>
void place_runs(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t* rows) {
  const bool nchw = g.layout == Layout::nchw;
  const int64_t reach = reach_of(g.taps, g.lattice.count).h, step = nchw ? 1 : g.lattice.ish;
  const int64_t between = nchw ? reach / g.lattice.ish + 1 : reach + 1;
  int64_t base = 0;
  for (int64_t r = 0; r < run_count; ++r) {
    if (r > 0 && runs[r].n != runs[r - 1].n) base = rows[r - 1] + between - runs[r].i * step;
    if (r == 0) base = -runs[0].i * step;
    rows[r] = base + runs[r].i * step;
  }
}

// n numbers (or pairs of them, as float), to neighbours.
inline void copy_bits(const uint16_t* from, int64_t n, uint16_t* to) {
#if CNNOPS_ISA_avx512
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
  if (i < n) {
    const uint32_t mask = (uint32_t{1} << (n - i)) - 1;
    _mm512_mask_storeu_epi16(to + i, mask, _mm512_maskz_loadu_epi16(mask, from + i));
  }
#else
  std::memcpy(to, from, static_cast<size_t>(n) * 2);
#endif
}
inline void copy_pairs(const uint16_t* from, int64_t n, uint16_t* to) {
  const auto* const in = reinterpret_cast<const float*>(from);
  auto* const out = reinterpret_cast<float*>(to);
  for (int64_t j = 0; j < n; j += lanes<float>) {
    const int count = static_cast<int>(min64(n - j, lanes<float>));
    store_n(out + j, load_n(in + j, count), count);
  }
}

// channels_last: rows [pixel][(tap, channel)]; `strip` may be null.
template <int kParts, class T>
void pack_pixels_nhwc(const Problem<T>& g, const Run* runs, const int64_t* strip_rows, int64_t run_count,
                      const Chunk& chunk, const Strip* strip, uint16_t* packed, int64_t part, Watch& watch) {
  const int64_t channels = chunk.channels, pitch = chunk.terms;
  const Tap* const taps = g.taps + chunk.t0;
  const bool whole = strip || channels == g.in.w;  // then the taps of a row of a filter are neighbours
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    uint16_t* const rows = packed + run.dst * pitch;
    int64_t together;
    for (int64_t t = 0; t < chunk.taps; t += together) {
      const Tap& tap = taps[t];
      together = 1;
      if (whole)
        while (t + together < chunk.taps && taps[t + together].dh == tap.dh &&
               taps[t + together].dw == tap.dw + together)
          ++together;
      uint16_t* to = rows + t * channels;
      if (strip) {
        const uint16_t* from = strip->data + ((strip_rows[r] + tap.dh - strip->dh) * strip->columns +
                                              (run.j - strip->j0) * g.lattice.isw + tap.dw - strip->dw) *
                                                 channels;
        for (int64_t j = 0; j < run.length; ++j, to += pitch, from += g.lattice.isw * channels)
          for (int i = 0; i < kParts; ++i) copy_bits(from + i * strip->part, together * channels, to + i * part);
        continue;
      }
      const int64_t h = run.i * g.lattice.ish + tap.dh;
      if (h < 0 || h >= g.in_h) {
        for (int64_t j = 0; j < run.length; ++j, to += pitch) zero_parts<kParts>(to, part, together * channels);
        continue;
      }
      const T* const line = g.input + run.n * g.in.n + h * g.in.h + chunk.c0;
      for (int64_t j = 0; j < run.length; ++j, to += pitch) {
        const int64_t w = (run.j + j) * g.lattice.isw + tap.dw;
        const int64_t first = min64(max64(-w, 0), together), last = max64(min64(g.in_w - w, together), first);
        if (first > 0) zero_parts<kParts>(to, part, first * channels);
        if (first < last) {
          const T* const from = line + (w + first) * g.in.w;
          if constexpr (sizeof(T) == 2) {
            copy_bits(reinterpret_cast<const uint16_t*>(from), (last - first) * channels, to + first * channels);
          } else {
            pack_row<kParts>(from, (last - first) * channels, to + first * channels, part, watch);
          }
        }
        if (last < together) zero_parts<kParts>(to + last * channels, part, (together - last) * channels);
      }
    }
    if (chunk.filled < pitch)
      for (int64_t j = 0; j < run.length; ++j)
        zero_parts<kParts>(rows + j * pitch + chunk.filled, part, pitch - chunk.filled);
  }
}

// Whether the pixels of a block are ordered (row, column, image): then those of a tile see the same taps, and taps that see
// nothing but padding are left out: 18% of a 3x3 filter's work on images of 7x7 pixels, 5% at 28x28.
template <class T>
bool images_innermost(const Problem<T>& g) {
  constexpr int64_t kMostPixels = 28 * 28;
  return reads_in_place(g) && g.lattice.count > 1 && g.images >= kDotRows &&
         g.lattice.rows * g.lattice.columns <= kMostPixels;
}

template <class T>
int64_t find_block_runs(const Problem<T>& g, int64_t begin, int64_t pixels, Run* runs) {
  const Lattice& l = g.lattice;
  if (!images_innermost(g))
    return find_runs(l.rows, l.columns, begin, pixels, g.layout == Layout::nchw ? kDotColumns : pixels, runs);
  int64_t n = begin % g.images, i = begin / g.images / l.columns, j = begin / g.images % l.columns;
  for (int64_t at = 0; at < pixels; ++at) {
    runs[at] = {n, i, j, 1, at};
    if (++n < g.images) continue;
    n = 0;
    if (++j < l.columns) continue;
    j = 0, ++i;
  }
  return pixels;
}

// channels_last, no splitting, rows anywhere: where the channels of each tap's pixel lie; outside of the image, at `zeros`. Notes
// the tiles that have nothing but zeros of a tap.
template <class T>
void find_pixels(const Problem<T>& g, const Run* runs, int64_t run_count, int64_t pixels, const Chunk& chunk,
                 const uint16_t* zeros, const uint16_t** pieces, uint8_t* zero_tiles) {
  const int64_t step = g.lattice.isw;
  for (int64_t t = 0; t < chunk.taps; ++t, pieces += kBlockPixels, zero_tiles += kBlockPixels / kDotRows) {
    const Tap& tap = g.taps[chunk.t0 + t];
    for (int64_t r = 0; r < run_count; ++r) {
      const Run& run = runs[r];
      const int64_t h = run.i * g.lattice.ish + tap.dh;
      const bool inside = h >= 0 && h < g.in_h;
      const auto* const from = reinterpret_cast<const uint16_t*>(g.input + run.n * g.in.n + h * g.in.h + chunk.c0);
      int64_t w = run.j * step + tap.dw;
      for (int64_t j = 0; j < run.length; ++j, w += step)
        pieces[run.dst + j] = inside && w >= 0 && w < g.in_w ? from + w * g.in.w : zeros;
    }
    for (int64_t at = 0; at < pixels; at += kDotRows) {
      bool zero = true;
      for (int64_t i = at; i < min64(at + kDotRows, pixels); ++i) zero = zero && pieces[i] == zeros;
      zero_tiles[at / kDotRows] = zero;
    }
  }
}

// NCHW: where a strip holds the pixels of a block, in pairs from the strip's first: for each vector of pixels a place from which
// two vectors reach all or its first ones, and if need be another for the rest. The same for every tap and pair of channels:
// rows of few pixels are put together by exchanging lanes, at two loads per vector, not row by row.
struct VectorSources {
  struct Source {
    int64_t at[2];
    alignas(64) int32_t lane[2][kDotLanes];
    unsigned second;  // lanes that take the other place
    bool plain;       // neighbours
  };
  Source vectors[kBlockPixels / kDotLanes];
  bool found = false;

  // `strip_rows`: of each run (place_runs).
  void find(const Run* runs, const int64_t* strip_rows, int64_t run_count, int64_t pixels, int64_t columns,
            int64_t j0) {
    found = false;
    int64_t place[kBlockPixels];
    for (int64_t r = 0; r < run_count; ++r)
      for (int64_t j = 0; j < runs[r].length; ++j)
        place[runs[r].dst + j] = strip_rows[r] * columns + runs[r].j + j - j0;
    for (int64_t i = pixels; i < round_up(pixels, kDotLanes); ++i) place[i] = place[pixels - 1];
    for (int64_t i = 0; i < pixels; i += kDotLanes) {
      Source& s = vectors[i / kDotLanes];
      s.at[0] = s.at[1] = place[i];
      s.second = 0;
      s.plain = true;
      for (int l = 0; l < kDotLanes; ++l) {
        const int64_t from = place[i + l];
        s.plain = s.plain && from == place[i] + l;
        if (!s.second && from - s.at[0] >= 2 * kDotLanes) s.at[1] = from;
        if (s.at[1] != s.at[0]) s.second |= 1u << l;
        if (from - s.at[1] >= 2 * kDotLanes) return;
        s.lane[0][l] = s.second ? 0 : static_cast<int32_t>(from - s.at[0]);
        s.lane[1][l] = s.second ? static_cast<int32_t>(from - s.at[1]) : 0;
      }
    }
    found = true;
  }
};

// Pairs of `count` planes, `from_pitch` numbers apart, to rows `to_pitch` apart.
inline void collect(const VectorSources::Source& s, const uint16_t* from, int64_t from_pitch, int64_t count,
                    uint16_t* to, int64_t to_pitch) {
#if CNNOPS_ISA_avx512
  const __m512i lane = _mm512_load_si512(s.lane[0]), other = _mm512_load_si512(s.lane[1]);
  const uint16_t* const far = from + 2 * s.at[1];
  from += 2 * s.at[0];
  for (int64_t c = 0; c < count; ++c) {
    const uint16_t *const near = from + c * from_pitch, *const rest = far + c * from_pitch;
    __m512i pairs = _mm512_loadu_si512(near);
    if (!s.plain) pairs = _mm512_permutex2var_epi32(pairs, lane, _mm512_loadu_si512(near + 2 * kDotLanes));
    if (s.second) {
      const __m512i more =
          _mm512_permutex2var_epi32(_mm512_loadu_si512(rest), other, _mm512_loadu_si512(rest + 2 * kDotLanes));
      pairs = _mm512_mask_mov_epi32(pairs, static_cast<__mmask16>(s.second), more);
    }
    _mm512_storeu_si512(to + c * to_pitch, pairs);
  }
#else
  for (int64_t c = 0; c < count; ++c) {
    const auto* const in = reinterpret_cast<const PairBits*>(from + c * from_pitch);
    auto* const out = reinterpret_cast<PairBits*>(to + c * to_pitch);
    for (int l = 0; l < kDotLanes; ++l) {
      const int which = s.second >> l & 1;
      out[l] = in[s.at[which] + s.lane[which][l]];
    }
  }
#endif
}

template <int kParts, class T>
void pack_vectors_nchw(const Problem<T>& g, const VectorSources& sources, int64_t pixels, const Chunk& chunk,
                       const Strip& strip, uint16_t* packed, int64_t part) {
  const Lattice& l = g.lattice;
  const int64_t plane = l.ish * l.isw * strip.rows * strip.columns;
  for (int64_t at = 0; at < pixels; at += kDotLanes) {
    const int64_t panel = at / kDotColumns * kDotColumns,
                  width = min64(kDotColumns, round_up(pixels - panel, kDotLanes));
    uint16_t* const column = packed + panel * chunk.terms + (at - panel) * 2;
    for (int64_t t = 0; t < chunk.taps; ++t) {
      const uint16_t* const from = strip.data + 2 * tap_place(l, strip, g.taps[chunk.t0 + t]);
      for (int i = 0; i < kParts; ++i)
        collect(sources.vectors[at / kDotLanes], from + i * strip.part, 2 * plane, chunk.tap_terms / 2,
                column + t * chunk.tap_terms * width + i * part, 2 * width);
    }
    for (int64_t term = chunk.filled; term < chunk.terms; term += 2)
      zero_parts<kParts>(column + term * width, part, 2 * kDotLanes);
  }
}

// NCHW: panels of kDotColumns pixels, the last one of as few vectors as hold the rest. Runs lie within panels.
template <int kParts, class T>
void pack_pixels_nchw(const Problem<T>& g, const Run* runs, const int64_t* strip_rows, int64_t run_count,
                      int64_t pixels, const Chunk& chunk, const Strip* strip, uint16_t* packed, int64_t part,
                      Watch& watch) {
  const int64_t step = g.lattice.isw;
  for (int64_t r = 0; r < run_count; ++r) {
    const Run& run = runs[r];
    const int64_t at = run.dst / kDotColumns * kDotColumns;
    const int64_t width = min64(kDotColumns, round_up(pixels - at, kDotLanes));
    uint16_t* const panel = packed + at * chunk.terms + (run.dst - at) * 2;
    // The last panel's unused columns are computed and thrown away; zeros keep them finite.
    const int64_t tail = run.dst + run.length == pixels ? at + width - pixels : 0;
    for (int64_t t = 0; t < chunk.taps; ++t) {
      const Tap& tap = g.taps[chunk.t0 + t];
      uint16_t* to = panel + t * chunk.tap_terms * width;
      if (strip) {
        const int64_t plane = g.lattice.ish * g.lattice.isw * strip->rows * strip->columns;
        const uint16_t* from =
            strip->data + 2 * (tap_place(g.lattice, *strip, tap) + strip_rows[r] * strip->columns + run.j - strip->j0);
        for (int64_t c = 0; c < chunk.channels; c += 2, to += 2 * width, from += 2 * plane)
          for (int i = 0; i < kParts; ++i) {
            copy_pairs(from + i * strip->part, run.length, to + i * part);
            if (tail > 0) zero_bits(to + i * part + 2 * run.length, 2 * tail);
          }
        continue;
      }
      const int64_t h = run.i * g.lattice.ish + tap.dh, w = run.j * step + tap.dw;
      Range valid = valid_range(run.length, step, w, g.in_w);
      if (h < 0 || h >= g.in_h) valid = {0, 0};
      const int64_t n = valid.last - valid.first, all = run.length + tail;
      const T* from = g.input + run.n * g.in.n + chunk.c0 * g.in.c + h * g.in.h + w + valid.first * step;
      for (int64_t c = 0; c < chunk.channels; c += 2, to += 2 * width, from += 2 * g.in.c) {
        if (n < all) {
          zero_parts<kParts>(to, part, 2 * valid.first);
          zero_parts<kParts>(to + 2 * valid.last, part, 2 * (all - valid.last));
        }
        pack_strided_pairs<kParts>(from, c + 1 < chunk.channels ? from + g.in.c : nullptr, step, n,
                                   to + 2 * valid.first, part, watch);
      }
    }
    for (int64_t term = chunk.filled; term < chunk.terms; term += 2)
      zero_parts<kParts>(panel + term * width, part, 2 * (run.length + tail));
  }
}

// ---- Tasks -----------------------------------------------------------------------------------------------------------

struct Workspace {
  uint16_t* pixels;
  uint16_t* weights;        // of a block and a chunk, where they are not shared
  uint16_t* rows;           // of a panel of weights, before it is turned
  uint16_t* zeros;          // a group of channels
  const uint16_t** pieces;  // [tap][kBlockPixels]
  uint8_t* zero_tiles;      // [tap][kBlockPixels / kDotRows]
  Strip strip;
  float* sums;
};

// Computes pixels [begin, begin + pixels) of these panels of output channels. `shared` are all the group's weights, packed,
// chunk after chunk, `chunk_size` apart; or null.
template <int kProducts, class T>
void compute_block(const Problem<T>& g, const DotPanels& panels, const uint16_t* shared, int64_t chunk_size,
                   int64_t begin, int64_t pixels, int64_t first_panel, int64_t last_panel, Workspace& work,
                   bool& unfit) {
  constexpr int kParts = parts_for(kProducts);
  const bool nchw = g.layout == Layout::nchw;
  const int64_t m0 = panels.begin(first_panel), m1 = min64(panels.begin(last_panel), g.out_channels);
  const int64_t block_channels = panels.begin(last_panel) - m0;
  const int64_t pitch = nchw ? round_up(pixels, kDotLanes) : block_channels;
  Run runs[kBlockPixels], out_runs[kBlockPixels];
  int64_t strip_rows[kBlockPixels], to[kBlockPixels];
  const int64_t run_count = find_block_runs(g, begin, pixels, runs);
  const int64_t out_run_count = nchw ? find_output_runs(g.out, begin, pixels, out_runs) : 0;
  find_targets(g.out, nchw ? out_runs : runs, nchw ? out_run_count : run_count, to);
  const Strip* const strip = needs_strip(g) ? &work.strip : nullptr;
  VectorSources sources;
  if (strip) place_runs(g, runs, run_count, strip_rows);
  for (int64_t index = 0; index < g.chunks(); ++index) {
    const Chunk chunk = chunk_of(g, index);
    const int64_t terms = chunk.terms;
    const bool add = index > 0, last = index + 1 == g.chunks();
    const bool only = last && !add;  // then sums live for a tile, all in one place
    DotOperand weights;
    if (shared) {
      weights = {shared + index * chunk_size + m0 * terms, panels.channels() * terms};
    } else {
      weights = {work.weights, block_channels * terms};
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t m = panels.begin(panel), width = panels.width(panel);
        uint16_t* const to = work.weights + (m - m0) * terms;
        Watch watch;
        if (nchw)
          pack_weight_rows<kParts>(g, m, min64(width, g.out_channels - m), chunk, to, weights.part, watch);
        else
          pack_weight_panel<kParts>(g, m, width, chunk, to, weights.part, work.rows, watch);
        unfit |= !watch.fits();
      }
    }
    const int64_t part = round_up(pixels, nchw ? kDotLanes : kDotRows) * terms;
    Watch watch;
    if (strip && chunk.t0 == 0) fill_strip<kParts>(g, runs, run_count, chunk, work.strip, watch);
    if (strip && nchw && index == 0) sources.find(runs, strip_rows, run_count, pixels, strip->columns, strip->j0);
    if (nchw) {
      if (strip && sources.found)
        pack_vectors_nchw<kParts>(g, sources, pixels, chunk, *strip, work.pixels, part);
      else
        pack_pixels_nchw<kParts>(g, runs, strip_rows, run_count, pixels, chunk, strip, work.pixels, part, watch);
      for (int64_t at = 0; at < pixels; at += kDotColumns) {
        const int64_t width = min64(kDotColumns, round_up(pixels - at, kDotLanes));
        for (int64_t m = m0; m < m1; m += kDotRows)
          dot_tile<kProducts>(static_cast<int>(min64(kDotRows, m1 - m)), static_cast<int>(width / kDotLanes),
                              {weights.data + (m - m0) * terms, weights.part}, terms, {work.pixels + at * terms, part},
                              width, terms, work.sums + (m - m0) * pitch + at, pitch, add);
      }
      // Not tile by tile: a channel's pixels are written in runs as long as the block.
      if (last) finish_channels(g.out, out_runs, out_run_count, to, m0, m1 - m0, work.sums, pitch);
    } else {
      const bool in_place = reads_in_place(g);
      if (in_place)
        find_pixels(g, runs, run_count, pixels, chunk, work.zeros, work.pieces, work.zero_tiles);
      else
        pack_pixels_nhwc<kParts>(g, runs, strip_rows, run_count, chunk, strip, work.pixels, part, watch);
      const auto tile = [&](int64_t panel, int64_t at) {
        const int64_t m = panels.begin(panel), width = panels.width(panel), filled = min64(width, g.out_channels - m);
        const int vecs = static_cast<int>(width / kDotLanes);
        const uint16_t* const columns = weights.data + (m - m0) * terms;
        const int64_t rows = min64(kDotRows, pixels - at), ldc = only ? width : pitch;
        float* const sums = only ? work.sums : work.sums + at * pitch + (m - m0);
        if (last)
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < filled; j += kLine / static_cast<int64_t>(sizeof(T)))
              __builtin_prefetch(g.out.data + to[at + i] + m + j, 1);
        if (in_place && chunk.taps == 1 && panel == first_panel && at + kDotRows < pixels)  // the next tile's pixels
          for (int64_t i = 0; i < min64(kDotRows, pixels - at - kDotRows); ++i)
            for (int64_t c = 0; c < chunk.channels; c += kLine / 2)
              __builtin_prefetch(work.pieces[at + kDotRows + i] + c);
        if (in_place)
          dot_tile_of_pieces(static_cast<int>(rows), vecs, work.pieces + at, kBlockPixels,
                             work.zero_tiles + at / kDotRows, kBlockPixels / kDotRows, chunk.taps, columns, width,
                             chunk.channels, sums, ldc, add);
        else
          dot_tile<kProducts>(static_cast<int>(rows), vecs, {work.pixels + at * terms, part}, terms,
                              {columns, weights.part}, width, terms, sums, ldc, add);
        if (last) finish_pixels(g.out, to + at, rows, m, filled, sums, ldc);
      };
      // Where the sums do not visit memory, the output is the larger stream: whole pixels of it then follow each other.
      if (only) {
        for (int64_t at = 0; at < pixels; at += kDotRows)
          for (int64_t panel = first_panel; panel < last_panel; ++panel) tile(panel, at);
      } else {
        for (int64_t panel = first_panel; panel < last_panel; ++panel)
          for (int64_t at = 0; at < pixels; at += kDotRows) tile(panel, at);
      }
    }
    unfit |= !watch.fits();
  }
  if (g.out.stream) end_streaming();
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
  join_rows(g, out);
  // channels_last gains nothing: half as large as float32's, the output is the smaller part of what is moved.
  const bool stream = nchw && g.lattice.rows * g.lattice.columns * out.w == out.c &&
                      g.images * out.n * static_cast<int64_t>(sizeof(T)) >= kLargeProduct;
  g.out = {p.layout, g.lattice, out, nullptr, nullptr, nullptr, p.activation, stream};
  constexpr int64_t kChunk = dot_chunk(kProducts);
  // Taps share what a strip holds, so several taps of fewer channels make a chunk.
  const int64_t most_channels = needs_strip(g) ? kChunk / 2 : kChunk;
  g.channel_groups = max64(1, ceil_div(g.in_channels, most_channels));
  g.group_channels = round_up(max64(1, ceil_div(g.in_channels, g.channel_groups)), 2);
  if (g.channel_groups == 1) g.group_channels = max64(1, g.in_channels);
  g.channel_groups = max64(1, ceil_div(g.in_channels, g.group_channels));
  g.tap_groups = max64(1, ceil_div(lattice.count * g.group_channels, kChunk));
  int64_t chunk_terms = 0;
  for (int64_t i = 0; i < g.chunks(); ++i) chunk_terms = max64(chunk_terms, chunk_of(g, i).terms);

  // Blocks: as even as possible, and enough tasks to share out.
  const DotPanels panels(!nchw, g.out_channels);
  const int64_t pixels = g.pixels();
  const int64_t grain = nchw ? kDotColumns : kDotRows;
  int64_t block_pixels = even_block(pixels, nchw && g.chunks() == 1 ? kShortBlockPixels : kBlockPixels, grain);
  int64_t pixel_blocks = ceil_div(pixels, block_pixels);
  int64_t filter_blocks = ceil_div(g.out_channels, kBlockFilters);
  while (pixel_blocks * filter_blocks * p.groups < kWantedTasks &&
         ceil_div(g.out_channels, filter_blocks + 1) >= kMinFilters)
    ++filter_blocks;
  while (pixel_blocks * filter_blocks * p.groups < kWantedTasks && block_pixels >= 2 * kLeastPixels) {
    block_pixels = round_up(block_pixels / 2, grain);
    pixel_blocks = ceil_div(pixels, block_pixels);
  }
  filter_blocks = min64(filter_blocks, panels.count);

  // Weights that are used once are packed by each task, chunk by chunk, and never leave its cache.
  const bool share = pixel_blocks > 1;
  const int64_t chunk_size = kParts * panels.channels() * chunk_terms, group_size = chunk_size * g.chunks();
  const Scratch<uint16_t> all_weights(share ? group_size * p.groups : 0);
  const int64_t block_channels = ceil_div(panels.count, filter_blocks) * (nchw ? kDotRows : kDotColumns);
  const int64_t strip_part = needs_strip(g) ? strip_size(g, block_pixels) : 0;
  const bool in_place = reads_in_place(g);
  const int64_t chunk_taps = ceil_div(lattice.count, g.tap_groups);
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    uint16_t* const pixel_data = arena.take<uint16_t>(in_place ? 0 : kParts * block_pixels * chunk_terms);
    uint16_t* const weights = arena.take<uint16_t>(share ? 0 : kParts * block_channels * chunk_terms);
    uint16_t* const rows = arena.take<uint16_t>(nchw ? 0 : kParts * kDotColumns * chunk_terms);
    uint16_t* const zeros = arena.take<uint16_t>(in_place ? g.group_channels : 0);
    const auto pieces = arena.take<const uint16_t*>(in_place ? kBlockPixels * chunk_taps : 0);
    const auto zero_tiles = arena.take<uint8_t>(in_place ? kBlockPixels / kDotRows * chunk_taps : 0);
    uint16_t* const strip = arena.take<uint16_t>(kParts * strip_part);
    float* const sums = arena.take<float>(block_pixels * block_channels);
    return Workspace{pixel_data, weights, rows, zeros, pieces, zero_tiles, Strip{strip, strip_part, 0, 0, 0, 0, 0},
                     sums};
  });
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
    Workspace work = scratch.mine();
    if (in_place) zero_bits(work.zeros, g.group_channels);
    [[maybe_unused]] const DotUnit unit;
    bool unfit = false;
    if (share) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.groups * panels.count; ++i) {
        const Problem<T> mine = group_of(i / panels.count);
        const int64_t panel = i % panels.count, m0 = panels.begin(panel), width = panels.width(panel);
        for (int64_t index = 0; index < g.chunks(); ++index) {
          const Chunk chunk = chunk_of(g, index);
          const int64_t part = panels.channels() * chunk.terms;
          uint16_t* const to = all_weights.data + i / panels.count * group_size + index * chunk_size + m0 * chunk.terms;
          Watch watch;
          if (nchw)
            pack_weight_rows<kParts>(mine, m0, min64(width, g.out_channels - m0), chunk, to, part, watch);
          else
            pack_weight_panel<kParts>(mine, m0, width, chunk, to, part, work.rows, watch);
          unfit |= !watch.fits();
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
                               panels.count * (filter_block + 1) / filter_blocks, work, unfit);
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
