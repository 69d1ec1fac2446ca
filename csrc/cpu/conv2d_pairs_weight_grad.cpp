// Gradient of the weights on instructions that multiply pairs of bfloat16 numbers (micro/dot_tile.h):
//
//   dw[filter][term] = sum over pixels of dy[filter][pixel] * x[term][pixel],        term = (channel, tap)
//
// one product of two matrices whose reduction runs over the output's pixels, so that pairs are two pixels side by side.
//   channels_last  rows = filters, columns = terms: two pixels' channels side by side make pairs
//   NCHW           rows = terms, columns = filters: a row of terms is a run of the image
// so that x, which every tap reads, is packed as it lies, and only dy is turned. Tasks are blocks of rows times blocks of columns
// times slices of the pixels. A task packs dot_chunk pixels of both and adds their product to its float32 block Z; a panel of
// columns stays in L1 while all rows pass. The slices' Z are added in order.
//
// float32 that does not split (micro/pairs.h) is found out while packing, and the direct kernel computes the call again. That
// and all cuts depend on data and shapes alone, so results have the same bits for any number of threads.
#include <omp.h>

#include "common/scratch.h"
#include "cpu/conv2d_blocks.h"
#include "cpu/conv2d_pairs.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kBlockRows = 256, kBlockColumns = 288;  // 295 KB of Z; with 256 pixels 131 KB and 147 KB of operands
constexpr int64_t kLeastRows = 64;                        // smaller blocks would pack the columns too often
constexpr int64_t kMaxSlices = 32;
constexpr int64_t kTurn = 64;  // filters turned at a time: 32 KB
static_assert(kBlockRows % kDotRows == 0 && kBlockColumns % kDotColumns == 0);

struct Plan {
  bool nchw;
  int64_t group_c, group_k, taps, terms;
  int64_t rows, columns;  // of a block, at most, in whole tiles
  int64_t row_blocks, column_blocks, slices;
  int64_t image_rows, image_columns;  // of dy, rows without a gap taken as one
  int64_t pixels, chunk;
  int64_t all_rows() const { return nchw ? terms : group_k; }
  int64_t all_columns() const { return nchw ? group_k : terms; }
};

Plan plan_of(const Conv2dParams& p, int64_t chunk) {
  Plan g{};
  g.nchw = p.layout == Layout::nchw;
  g.group_c = p.c / p.groups, g.group_k = p.k / p.groups, g.taps = p.r * p.s, g.terms = g.group_c * g.taps;
  const bool gapless =
      g.taps == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0 && p.p == p.h && p.q == p.w;
  g.image_rows = gapless ? 1 : p.p, g.image_columns = gapless ? p.p * p.q : p.q;
  g.pixels = p.n * p.p * p.q;
  g.chunk = round_up(min64(chunk, g.pixels), kDotGrain);
  g.columns = even_block(g.all_columns(), kBlockColumns, kDotLanes);
  g.column_blocks = ceil_div(g.all_columns(), g.columns);
  g.row_blocks = ceil_div(g.all_rows(), kBlockRows);
  const int64_t most_slices = min64(kMaxSlices, max64(1, g.pixels / (2 * g.chunk)));
  while (g.row_blocks * g.column_blocks * p.groups * most_slices < kWantedTasks &&
         ceil_div(g.all_rows(), g.row_blocks + 1) >= kLeastRows)
    ++g.row_blocks;
  g.rows = round_up(ceil_div(g.all_rows(), g.row_blocks), kDotRows);
  g.row_blocks = ceil_div(g.all_rows(), g.rows);
  g.slices = min64(ceil_div(kWantedTasks, g.row_blocks * g.column_blocks * p.groups), most_slices);
  return g;
}

struct Workspace {
  uint16_t* a;
  uint16_t* b;
  uint16_t* turned;
};

// One task's share of one group.
template <class T, int kProducts>
struct Task {
  static constexpr int kParts = parts_for(kProducts);
  const Conv2dParams& p;
  const Plan& g;
  const T *x, *dy;  // of the group
  int64_t row0, rows, column0, columns;
  const Workspace& work;
  Strides in, out;
  Run runs[dot_chunk(1)];
  int64_t run_count = 0;
  Watch watch{};

  // ---- NCHW: rows are terms (channel, tap), columns filters ----

  // Runs of x as rows.
  void pack_terms_nchw(int64_t count, int64_t pitch, int64_t part) {
    T buffer[dot_chunk(1)];
    const int64_t width = g.image_rows == p.p ? p.w : p.h * p.w;
    for (int64_t tap = 0; tap < g.taps; ++tap) {
      const int64_t dh = tap / p.s * p.dilation_h - p.pad_h, dw = tap % p.s * p.dilation_w - p.pad_w;
      const int64_t c0 = ceil_div(max64(row0 - tap, 0), g.taps), c1 = ceil_div(max64(row0 + rows - tap, 0), g.taps);
      for (int64_t r = 0; r < run_count; ++r) {
        const Run& run = runs[r];
        const int64_t h = run.i * p.stride_h + dh, w = run.j * p.stride_w + dw;
        Range valid = valid_range(run.length, p.stride_w, w, width);
        if (h < 0 || h >= p.h) valid = {0, 0};
        const int64_t n = valid.last - valid.first;
        const T* from = x + run.n * in.n + c0 * in.c + h * in.h + w + valid.first * p.stride_w;
        uint16_t* to = work.a + (c0 * g.taps + tap - row0) * pitch + run.dst;
        for (int64_t c = c0; c < c1; ++c, from += in.c, to += g.taps * pitch) {
          if (n < run.length) {
            zero_parts<kParts>(to, part, valid.first);
            zero_parts<kParts>(to + valid.last, part, run.length - valid.last);
          }
          if (sizeof(T) == 2 && p.stride_w > 1)  // nothing to split: these are the bits
            gather(from, p.stride_w, n, reinterpret_cast<T*>(to + valid.first));
          else
            pack_row<kParts>(gather(from, p.stride_w, n, buffer), n, to + valid.first, part, watch);
        }
      }
    }
    if (count < pitch)
      for (int64_t i = 0; i < rows; ++i) zero_parts<kParts>(work.a + i * pitch + count, part, pitch - count);
  }

  // dy as rows of pixels, turned into panels of filters.
  void pack_filters_nchw(int64_t count, int64_t pitch, int64_t part) {
    for (int64_t k = 0; k < columns; k += kDotColumns) {
      const int64_t width = panel_width(k), filled = min64(width, columns - k), rows_part = width * pitch;
      for (int64_t i = 0; i < filled; ++i) {
        uint16_t* const row = work.turned + i * pitch;
        for (int64_t r = 0; r < run_count; ++r) {
          const Run& run = runs[r];
          pack_row<kParts>(dy + run.n * out.n + (column0 + k + i) * out.c + run.i * out.h + run.j, run.length,
                           row + run.dst, rows_part, watch);
        }
        zero_parts<kParts>(row + count, rows_part, pitch - count);
      }
      for (int j = 0; j < kParts; ++j) {
        uint16_t* const from = work.turned + j * rows_part;
        zero_bits(from + filled * pitch, (width - filled) * pitch);
        transpose_pairs(from, pitch / 2, width, pitch / 2, work.b + j * part + k * pitch, width);
      }
    }
  }

  // ---- channels_last: rows are filters, columns terms (tap, channel) ----

  // dy's pixels in pairs, turned into rows of pixels.
  void pack_filters_nhwc(int64_t count, int64_t pitch, int64_t part) {
    const T* pixel[dot_chunk(1)];
    for (int64_t r = 0; r < run_count; ++r)
      for (int64_t j = 0; j < runs[r].length; ++j)
        pixel[runs[r].dst + j] = dy + runs[r].n * out.n + runs[r].i * out.h + (runs[r].j + j) * out.w + row0;
    const int64_t turned_part = kTurn * pitch;
    for (int64_t k = 0; k < rows; k += kTurn) {
      const int64_t width = min64(kTurn, rows - k);
      for (int64_t i = 0; i < pitch; i += 2) {
        uint16_t* const to = work.turned + i * kTurn;
        if (i < count)
          pack_pairs<kParts>(pixel[i] + k, i + 1 < count ? pixel[i + 1] + k : nullptr, width, to, turned_part, watch);
        else
          zero_parts<kParts>(to, turned_part, 2 * width);
      }
      for (int j = 0; j < kParts; ++j)
        transpose_pairs(work.turned + j * turned_part, kTurn, pitch / 2, width, work.a + j * part + k * pitch,
                        pitch / 2);
    }
  }

  // x's pixels in pairs. Taps of a row of the filter are neighbours in memory where the group has all channels and nothing
  // lies between them.
  void pack_terms_nhwc(int64_t count, int64_t pitch, int64_t part) {
    const bool merged = p.groups == 1 && p.dilation_w == 1;
    const int64_t together = merged ? p.s : 1, length = together * g.group_c;
    int64_t image[dot_chunk(1)], top[dot_chunk(1)], left[dot_chunk(1)];
    for (int64_t r = 0; r < run_count; ++r)
      for (int64_t j = 0; j < runs[r].length; ++j) {
        const int64_t at = runs[r].dst + j;
        image[at] = runs[r].n * in.n, top[at] = runs[r].i * p.stride_h, left[at] = (runs[r].j + j) * p.stride_w;
      }
    const int64_t image_width = g.image_rows == p.p ? p.w : p.h * p.w;
    T buffer[2][kDotColumns];
    const T* inside[dot_chunk(1)];  // where a pixel's run of terms lies, if all of it lies in the image
    for (int64_t j = 0; j < columns;) {
      const int64_t run = (column0 + j) / length, run_end = min64((run + 1) * length - column0, columns);
      const int64_t tap = run * together, begin = run * length - column0;
      const int64_t dh = tap / p.s * p.dilation_h - p.pad_h, dw = tap % p.s * p.dilation_w - p.pad_w;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t h = top[i] + dh, w = left[i] + dw;
        const bool whole = h >= 0 && h < p.h && w >= 0 && w + together <= image_width;
        inside[i] = whole ? x + image[i] + h * in.h + w * in.w : nullptr;
      }
      while (j < run_end) {  // pieces within a panel
        const int64_t n = min64(run_end - j, kDotColumns - j % kDotColumns), e = j - begin;
        const auto fetch = [&](int64_t i, T* space) -> const T* {
          if (inside[i]) return inside[i] + e;
          const int64_t h = top[i] + dh, w = left[i] + dw;
          const T* const from = x + image[i] + h * in.h + w * in.w + e;
          // Elements [first, last) of the piece lie in the image.
          const int64_t first = min64(max64(-w * g.group_c - e, 0), n);
          const int64_t last = h >= 0 && h < p.h ? max64(min64((image_width - w) * g.group_c - e, n), first) : first;
          const T zero{};
          for (int64_t l = 0; l < n; ++l) space[l] = l >= first && l < last ? from[l] : zero;
          return space;
        };
        const int64_t panel = j / kDotColumns * kDotColumns, width = panel_width(panel);
        uint16_t* to = work.b + panel * pitch + (j - panel) * 2;
        int64_t i = 0;
        if (n == kDotColumns)  // the same, but of a length that is known
          for (; i + 2 <= count; i += 2, to += 2 * width)
            pack_pairs<kParts>(fetch(i, buffer[0]), fetch(i + 1, buffer[1]), kDotColumns, to, part, watch);
        for (; i < pitch; i += 2, to += 2 * width) {
          if (i < count)
            pack_pairs<kParts>(fetch(i, buffer[0]), i + 1 < count ? fetch(i + 1, buffer[1]) : nullptr, n, to, part,
                               watch);
          else
            zero_parts<kParts>(to, part, 2 * n);
        }
        j += n;
      }
    }
    const int64_t panel = (columns - 1) / kDotColumns * kDotColumns, width = panel_width(panel);
    for (int64_t i = 0; i < pitch && columns < panel + width; i += 2)
      zero_parts<kParts>(work.b + panel * pitch + i * width + (columns - panel) * 2, part,
                         2 * (panel + width - columns));
  }

  int64_t panel_width(int64_t at) const { return min64(kDotColumns, round_up(columns - at, kDotLanes)); }

  // Adds up pixels [first, last) into z. Returns whether they could be split.
  bool run(int64_t first, int64_t last, float* z) {
    bool fits = true;
    for (int64_t begin = first; begin < last; begin += g.chunk) {
      const int64_t count = min64(g.chunk, last - begin), pitch = round_up(count, kDotGrain);
      const int64_t a_part = g.rows * pitch, b_part = g.columns * pitch;
      run_count = find_runs(g.image_rows, g.image_columns, begin, count, count, runs);
      watch = {};
      g.nchw ? pack_terms_nchw(count, pitch, a_part) : pack_terms_nhwc(count, pitch, b_part);
      fits = fits && watch.fits();
      watch = {};
      g.nchw ? pack_filters_nchw(count, pitch, b_part) : pack_filters_nhwc(count, pitch, a_part);
      fits = fits && watch.fits();
      for (int64_t at = 0; at < columns; at += kDotColumns) {
        const int64_t width = panel_width(at);
        for (int64_t i = 0; i < rows; i += kDotRows)
          dot_tile<kProducts>(static_cast<int>(min64(kDotRows, rows - i)), static_cast<int>(width / kDotLanes),
                              {work.a + i * pitch, a_part}, pitch, {work.b + at * pitch, b_part}, width, pitch,
                              z + i * g.columns + at, g.columns, begin > first);
      }
    }
    return fits;
  }
};

// ---- To dw -----------------------------------------------------------------------------------------------------------

constexpr int64_t kFinish = 64;

// A block's rows [i0, i0 + count) of `width` columns from j0 on, summed over the slices, to [row][kFinish].
void add_slices(const Plan& g, const float* z, int64_t z_size, int64_t i0, int64_t count, int64_t j0, int64_t width,
                float* sums) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; j += lanes<float>) {
      const int part = static_cast<int>(min64(width - j, lanes<float>));
      const float* const from = z + (i0 + i) * g.columns + j0 + j;
      f32v sum = load_n(from, part);
      for (int64_t slice = 1; slice < g.slices; ++slice) sum += load_n(from + slice * z_size, part);
      store_n(sums + i * kFinish + j, sum, part);
    }
}

// `filters` of `count` terms from `term` on; sums: [filter][pitch].
template <class T>
void store_terms(const Conv2dParams& p, const Plan& g, const float* sums, int64_t pitch, int64_t filters, int64_t term,
                 int64_t count, T* dw) {
  const auto place = [&](int64_t i) {
    const int64_t c = g.nchw ? i / g.taps : i % g.group_c, tap = g.nchw ? i % g.taps : i / g.group_c;
    return c * p.weight_stride[1] + tap / p.s * p.weight_stride[2] + tap % p.s * p.weight_stride[3];
  };
  for (int64_t first = 0; first < count;) {
    const int64_t at = place(term + first);
    int64_t last = first + 1;
    while (last < count && place(term + last) == at + last - first) ++last;
    for (int64_t k = 0; k < filters; ++k)
      for (int64_t i = first; i < last; i += lanes<float>) {
        const int part = static_cast<int>(min64(last - i, lanes<float>));
        store_output(dw + k * p.weight_stride[0] + at + i - first, load_n(sums + k * pitch + i, part), part, false);
      }
    first = last;
  }
}

template <class T, int kProducts>
bool weight_grad(const Conv2dParams& p) {
  constexpr int kParts = parts_for(kProducts);
  T* const dw = static_cast<T*>(p.weight);
  if (p.c == 0 || p.k == 0) return true;
  if (p.n * p.p * p.q == 0) {
    for (int64_t i = 0; i < p.k * (p.c / p.groups) * p.r * p.s; ++i) {
      const int64_t s = i % p.s, r = i / p.s % p.r, c = i / p.s / p.r % (p.c / p.groups);
      const int64_t k = i / p.s / p.r / (p.c / p.groups);
      dw[k * p.weight_stride[0] + c * p.weight_stride[1] + r * p.weight_stride[2] + s * p.weight_stride[3]] = T{};
    }
    return true;
  }
  const Plan g = plan_of(p, dot_chunk(kProducts));
  const int64_t blocks = p.groups * g.row_blocks * g.column_blocks, z_size = round_up(g.rows * g.columns, 64);
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    uint16_t* const a = arena.take<uint16_t>(kParts * g.rows * g.chunk);
    uint16_t* const b = arena.take<uint16_t>(kParts * g.columns * g.chunk);
    uint16_t* const turned = arena.take<uint16_t>(kParts * max64(kTurn, kDotColumns) * g.chunk);
    return Workspace{a, b, turned};
  });
  const Scratch<float> partial(blocks * g.slices * z_size);
  int any_unfit = 0;
#pragma omp parallel num_threads(p.threads) reduction(| : any_unfit)
  {
    const Workspace work = scratch.mine();
    [[maybe_unused]] const DotUnit unit;
    bool unfit = false;
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < blocks * g.slices; ++index) {
      if (unfit) continue;
      const int64_t block = index / g.slices, slice = index % g.slices;
      const int64_t column0 = block % g.column_blocks * g.columns;
      const int64_t row0 = block / g.column_blocks % g.row_blocks * g.rows;
      const int64_t group = block / g.column_blocks / g.row_blocks;
      const Strides in = strides_of(p.layout, p.c, p.h, p.w), out = strides_of(p.layout, p.k, p.p, p.q);
      Task<T, kProducts> task{p,
                              g,
                              static_cast<const T*>(p.x) + group * g.group_c * in.c,
                              static_cast<const T*>(p.y) + group * g.group_k * out.c,
                              row0,
                              min64(g.rows, g.all_rows() - row0),
                              column0,
                              min64(g.columns, g.all_columns() - column0),
                              work,
                              in,
                              out,
                              {}};
      unfit |= !task.run(g.pixels * slice / g.slices, g.pixels * (slice + 1) / g.slices, partial.data + index * z_size);
    }
    any_unfit |= unfit;
    const int64_t row_steps = ceil_div(g.rows, kFinish), column_steps = ceil_div(g.columns, kFinish);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * row_steps * column_steps; ++i) {
      const int64_t block = i / column_steps / row_steps;
      const int64_t column0 = block % g.column_blocks * g.columns;
      const int64_t row0 = block / g.column_blocks % g.row_blocks * g.rows;
      const int64_t group = block / g.column_blocks / g.row_blocks;
      const int64_t i0 = i / column_steps % row_steps * kFinish, j0 = i % column_steps * kFinish;
      const int64_t count = min64(min64(kFinish, g.rows - i0), g.all_rows() - row0 - i0);
      const int64_t width = min64(min64(kFinish, g.columns - j0), g.all_columns() - column0 - j0);
      if (count <= 0 || width <= 0) continue;
      float sums[kFinish * kFinish], turned[kFinish * kFinish];
      add_slices(g, partial.data + block * g.slices * z_size, z_size, i0, count, j0, width, sums);
      T* const to = dw + group * g.group_k * p.weight_stride[0];
      if (g.nchw) {
        transpose(sums, kFinish, count, width, turned, kFinish);
        store_terms(p, g, turned, kFinish, width, row0 + i0, count, to + (column0 + j0) * p.weight_stride[0]);
      } else {
        store_terms(p, g, sums, kFinish, count, column0 + j0, width, to + (row0 + i0) * p.weight_stride[0]);
      }
    }
  }
  return !any_unfit;
}

}  // namespace

void conv2d_pairs_weight_grad_bf16(const Conv2dParams& p) { weight_grad<::cnnops::bf16, 1>(p); }
#if !CNNOPS_ISA_avx512_bf16
void conv2d_pairs_weight_grad_f32(const Conv2dParams& p) {
  if (!with_products<float>(p, [&](auto products) { return weight_grad<float, products.value>(p); }))
    CNNOPS_DIRECT_ISA::conv2d_weight_grad_f32(p);
}
#endif

}  // namespace cnnops::CNNOPS_ISA
