// Depthwise convolution (groups = channels, one filter each): a few products per pixel, so the speed of memory is the bound.
//
// Everything is computed on vectors of channels (depthwise_rows.h). channels_last images are read and written where they
// lie. NCHW images go through scratch in cache, vectors of channels at a time: a strip of rows of lanes<C> planes is
// transposed to [row][column][lane], and the output back; that costs about four cycles a vector each way, but every vector is
// full, whatever the size of the image, and no load crosses a cache line.
//
// forward and input_grad go by output rows; a row of input_grad with stride s is made of s phases (conv2d_lattice.h) that
// have their own taps. The innermost loops are over the pixels of a row, then over the vectors of a block of channels that is
// so narrow that the input rows under a filter stay in the L1 cache.
//
// Tasks are image x strip of rows x block of channels (weight_grad: slice of the images and rows x block of channels, the
// slices' partial sums being added in order): cut by shape alone.
#include <omp.h>

#include "cpu/depthwise_rows.h"
#include "cpu/simd/transpose.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kBlockBytes = 24 << 10;  // of input rows under a filter, for the channels of a block: most of L1
constexpr int64_t kStripBytes = 96 << 10;  // of an NCHW strip in scratch
constexpr int64_t kWantedTasks = 16;   // enough to balance a few threads; fixed, so that cuts do not depend on threads
constexpr int64_t kGroupPixels = 256;  // output pixels that are transposed back together

// The channels as vectors; where C is no multiple of the lanes, the last vector overlaps the one before it.
struct Vectors {
  int64_t channels, width, count, part;
  Vectors(int64_t c, int64_t lanes) : channels(c), width(lanes), count(ceil_div(c, lanes)), part(min64(c, lanes)) {}
  int64_t start(int64_t v) const { return max64(0, min64(v * width, channels - width)); }
  // Channels of vector v that belong to the vector before it too.
  int64_t shared(int64_t v) const { return v * width - start(v); }
};

// Below some work a second thread is not worth waking.
int threads_of(const Conv2dParams& p) {
  return threads_for(p.n * p.c * (p.h * p.w + p.p * p.q * (1 + p.r * p.s / 4)), p.threads);
}

// n things in `parts` parts as equal as can be; the last is none of the smaller ones.
struct Cut {
  int64_t n, parts;
  int64_t begin(int64_t i) const { return n * i / parts; }
  int64_t end(int64_t i) const { return n * (i + 1) / parts; }
};

// A lattice's taps as runs, and the kernels for them.
template <class X>
struct Phase {
  Lattice lattice;
  int64_t taps;  // of a run
  const Run* runs;
  int64_t run_count;
  int64_t packed;  // the vectors of filters before its own
  FilterKernels<X> kernels;
};

// What forward and input_grad do with every image, and in which order they want the filters. X: what the kernels read and
// write.
template <class X>
struct Plan {
  using C = compute_t<X>;
  Vectors vectors;
  int64_t in_h, in_w, out_h, out_w;
  int64_t osh, osw, phases_w;
  Scratch<Phase<X>> phases;  // [h0][w0]
  Scratch<Run> runs;
  Scratch<Tap> order;
  int64_t count = 0;  // of the taps
  int64_t min_dh = 0, max_dh = 0, ish = 1;

  // in_place: images are read where they lie.
  Plan(const Conv2dParams& p, bool transposed, bool in_place)
      : vectors(p.c, lanes<C>),
        in_h(transposed ? p.p : p.h),
        in_w(transposed ? p.q : p.w),
        out_h(transposed ? p.h : p.p),
        out_w(transposed ? p.w : p.q),
        osh(transposed ? p.stride_h : 1),
        osw(transposed ? p.stride_w : 1),
        phases_w(min64(osw, out_w)),
        phases(min64(osh, out_h) * phases_w),
        runs(p.r * p.s),
        order(p.r * p.s) {
    Scratch<Tap> taps(p.r * p.s);
    Phase<X>* phase = phases.data;
    Run* run = runs.data;
    const auto add = [&](const Lattice& l, const Tap* t) {
      Tap* const sorted = order.data + count;  // by dh, then dw
      for (int64_t i = 0; i < l.count; ++i) sorted[i] = t[transposed ? l.count - 1 - i : i];
      int64_t width = 0;
      while (width < l.count && sorted[width].dh == sorted[0].dh) ++width;
      const bool narrow = in_place && vectors.part < lanes<C>;
      const bool adjacent = !narrow && width > 1 && sorted[1].dw == sorted[0].dw + 1;
      phase->lattice = l;
      phase->taps = adjacent ? side_by_side(width, l.isw) : 1;
      phase->kernels.choose(phase->taps, l.isw, narrow);
      phase->runs = run;
      phase->packed = count;
      for (int64_t i = 0; i < l.count; i += phase->taps) {
        const Tap& tap = sorted[i];
        const Range pixels = valid_range(l.columns, l.isw, tap.dw, in_w);
        *run++ = phase->taps > 1 ? Run{tap.dh, tap.dw, -tap.dw, in_w - tap.dw}
                                 : Run{tap.dh, tap.dw, pixels.first, pixels.last};
        min_dh = min64(min_dh, tap.dh), max_dh = max64(max_dh, tap.dh);
      }
      phase->run_count = run - phase->runs;
      count += l.count;
      ish = l.ish;
      ++phase;
    };
    if (transposed)
      input_grad_lattices(p, taps.data, add);
    else
      forward_lattice(p, taps.data, add);
  }
  // Input rows [first_input(y0), last_input(y1)) are all that output rows [y0, y1) read.
  int64_t first_input(int64_t y0) const { return max64(0, min64(in_h, y0 / osh * ish + min_dh)); }
  int64_t last_input(int64_t y1) const { return max64(0, min64(in_h, (y1 - 1) / osh * ish + max_dh + 1)); }
  // Input rows that one output row may read.
  int64_t reach() const { return max_dh - min_dh + 1; }
};

// For every vector of channels its biases, and its filters as [tap][lane] in the plan's order.
template <class T, class X>
struct Packed {
  using C = compute_t<T>;
  int64_t size;  // of a vector's
  Scratch<C> all;
  ScratchPieces buffers;

  Packed(const Conv2dParams& p, const Plan<X>& plan)
      : size((1 + plan.count) * lanes<C>),
        all(plan.vectors.count * size),
        buffers(p.threads, p.r * p.s * kVectorBytes) {}
  const C* vector(int64_t v) const { return all.data + v * size; }

  // By all threads of a parallel region.
  void fill(const Conv2dParams& p, const Plan<X>& plan) {
    const T *const weight = static_cast<const T*>(p.weight), *const bias = static_cast<const T*>(p.bias);
    const int64_t taps = p.r * p.s, part = plan.vectors.part;
    const int64_t* const stride = p.weight_stride;
    const bool contiguous = stride[0] == taps && stride[2] == p.s && stride[3] == 1;
    C* const buffer = static_cast<C*>(buffers.piece(omp_get_thread_num()));
#pragma omp for schedule(static)
    for (int64_t v = 0; v < plan.vectors.count; ++v) {
      const int64_t c0 = plan.vectors.start(v);
      C* to = all.data + v * size;
      store(to, bias ? load_n(bias + c0, static_cast<int>(part)) : vec<C>{});
      to += lanes<C>;
      const T* const from = weight + c0 * stride[0];
      if (contiguous && part == lanes<C>) {
        transpose(from, taps, part, taps, buffer, lanes<C>);
        for (int64_t t = 0; t < plan.count; ++t)
          store(to + t * lanes<C>, load(buffer + plan.order.data[t].weight * lanes<C>));
      } else {
        for (int64_t t = 0; t < plan.count; ++t)
          for (int64_t l = 0; l < lanes<C>; ++l)
            to[t * lanes<C> + l] = l < part ? load_scalar(from[l * stride[0] + plan.order.data[t].weight]) : C{0};
      }
    }
  }
};

// Output row y for the vectors of channels [v0, v1). `in`: where input row 0 lies or would lie; `out`, `residual`: the output
// row; all at the first channel of v0. Fetches what comes next meanwhile.
template <class X, class P>
void filter_row(const Plan<X>& plan, int64_t y, int64_t v0, int64_t v1, const X* in, const P& packed, X* out,
                const X* residual, FilterBlock<X> b, const Ahead& input, const Ahead& output) {
  using C = compute_t<X>;
  const int64_t i = y / plan.osh, top = i * plan.ish, out_pixel = b.out_pixel / plan.osw;
  const Phase<X>* phase = plan.phases.data + y % plan.osh * plan.phases_w;
  for (int64_t w = 0; w < plan.phases_w; ++w, ++phase) {
    const Lattice& l = phase->lattice;
    const Run *first = phase->runs, *last = first + phase->run_count;
    while (first < last && first->dh < -top) ++first;
    while (last > first && last[-1].dh >= plan.in_h - top) --last;
    b.runs = first;
    b.count = last - first;
    b.column = phase->taps > 1 ? b.pixel : b.pixel * l.isw;
    const int64_t filters = (1 + phase->packed + (first - phase->runs) * phase->taps) * lanes<C>;
    const int64_t width = ceil_div(l.columns, ceil_div(l.columns, kMostPixels));
    const int64_t origin_step = phase->taps > 1 ? l.isw : 1;
    const X* const under = in + top * b.row;
    int kind = 0;
    while (kWidths[kind] < width) ++kind;
    const auto kernel = phase->kernels.of[kind];
    for (int64_t v = v0; v < v1; ++v) {
      if (w == 0) {
        input.fetch(v - v0, v1 - v0);
        output.fetch(v - v0, v1 - v0);
      }
      const int64_t c0 = plan.vectors.start(v) - plan.vectors.start(v0);
      b.bias = packed.vector(v);
      b.filters = b.bias + filters;
      for (int64_t j = 0; j < l.columns; j += width) {
        const int64_t to = (l.ow0 + j * l.osw) * out_pixel + c0;
        b.in = under + j * l.isw * b.pixel + c0;
        b.origin = j * origin_step;
        b.live = static_cast<int>(min64(width, l.columns - j));
        b.out = out + to;
        b.residual = residual ? residual + to : nullptr;
        kernel(b);
      }
    }
  }
}

// n things in about `wanted` parts of at most `most`, none below `least`.
Cut cut(int64_t n, int64_t wanted, int64_t least, int64_t most) {
  return {n, max64(min64(wanted, max64(1, n / least)), ceil_div(n, max64(most, 1)))};
}

template <class T>
void filter_nhwc(const Conv2dParams& p, bool transposed) {
  using C = compute_t<T>;
  const int threads = threads_of(p);
  const Plan<T> plan(p, transposed, true);
  const bool stream = p.n * p.c * plan.out_h * plan.out_w * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
  const Vectors& vectors = plan.vectors;
  Packed<T, T> packed(p, plan);
  const T* const in = static_cast<const T*>(transposed ? p.y : p.x);
  T* const out = static_cast<T*>(transposed ? p.x : p.y);
  const T* const residual = static_cast<const T*>(p.residual);
  constexpr int64_t kSize = sizeof(T);
  const Cut rows = cut(plan.out_h, ceil_div(kWantedTasks, p.n), 8, plan.out_h);
  const int64_t under = plan.reach() * plan.in_w * lanes<C> * kSize;
  const Cut blocks = cut(vectors.count, ceil_div(kWantedTasks, p.n * rows.parts), 4, max64(4, kBlockBytes / under));
  const int64_t tasks = p.n * rows.parts * blocks.parts;
  const int64_t in_row = plan.in_w * p.c, out_row = plan.out_w * p.c;
#pragma omp parallel num_threads(threads)
  {
    packed.fill(p, plan);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t b = task % blocks.parts, strip = task / blocks.parts % rows.parts;
      const int64_t n = task / blocks.parts / rows.parts;
      const int64_t v0 = blocks.begin(b), v1 = blocks.end(b), y1 = rows.end(strip), c0 = vectors.start(v0);
      const int64_t bytes = (vectors.start(v1 - 1) + vectors.part - c0) * kSize;
      FilterBlock<T> block{};
      block.row = in_row;
      block.pixel = p.c;
      block.out_pixel = plan.osw * p.c;
      block.activation = p.activation;
      block.stream = stream;
      block.part = static_cast<int>(vectors.part);
      for (int64_t y = rows.begin(strip); y < y1; ++y) {
        // What the next row reads that this one does not, and where it goes; the next task's first row follows the last.
        Ahead input, output;
        if (y + 1 < y1) {
          const int64_t h0 = plan.last_input(y + 1), h1 = plan.last_input(y + 2);
          input = {in + (n * plan.in_h + h0) * in_row + c0, (h1 - h0) * plan.in_w, p.c * kSize, bytes};
          output = {out + (n * plan.out_h + y + 1) * out_row + c0, plan.out_w, p.c * kSize, bytes};
        } else if (task + 1 < tasks) {
          const int64_t later = task + 1, first = rows.begin(later / blocks.parts % rows.parts);
          const int64_t image = later / blocks.parts / rows.parts;
          const int64_t h0 = plan.first_input(first), h1 = plan.last_input(first + 1);
          const int64_t c = vectors.start(blocks.begin(later % blocks.parts));
          input = {in + (image * plan.in_h + h0) * in_row + c, (h1 - h0) * plan.in_w, p.c * kSize, bytes};
          output = {out + (image * plan.out_h + first) * out_row + c, plan.out_w, p.c * kSize, bytes};
        }
        const int64_t to = (n * plan.out_h + y) * out_row + c0;
        filter_row(plan, y, v0, v1, in + n * plan.in_h * in_row + c0, packed, out + to,
                   residual ? residual + to : nullptr, block, input, stream ? Ahead{} : output);
      }
      if (stream) end_streaming();
    }
  }
}

// ---- NCHW ------------------------------------------------------------------------------------------------------------

// Pixels [first, last) of `part` planes as [pixel][lane].
template <class T>
void gather_planes(const T* planes, int64_t size, int64_t first, int64_t last, int64_t part, compute_t<T>* to) {
  transpose(planes + first, size, part, last - first, to, lanes<compute_t<T>>);
}

// The way back, with the last step of the convolution. `row` has room for the pixels of one plane.
template <class T>
void scatter_planes(const compute_t<T>* from, int64_t count, int64_t first, int64_t skip, int64_t part, T* planes,
                    const T* residual, int64_t size, Activation activation, compute_t<T>* rows) {
  using C = compute_t<T>;
  if constexpr (__is_same(T, C)) {
    if (!residual && activation == Activation::none) {
      transpose(from + skip, lanes<C>, count, part - skip, planes + skip * size + first, size);
      return;
    }
  }
  const int64_t pitch = round_up(count, lanes<C>);
  transpose(from + skip, lanes<C>, count, part - skip, rows, pitch);
  for (int64_t c = skip; c < part; ++c, rows += pitch) {
    const int64_t to = c * size + first;
    for (int64_t i = 0; i < count; i += lanes<C>) {
      const int now = static_cast<int>(min64(count - i, lanes<C>));
      vec<C> z = load(rows + i);
      if (residual) z += load_n(residual + to + i, now);
      if (activation != Activation::none) z = activate<C>(z, activation);
      store_n(planes + to + i, z, now);
    }
  }
}

template <class T>
void filter_nchw(const Conv2dParams& p, bool transposed) {
  using C = compute_t<T>;
  const int threads = threads_of(p);
  const Plan<C> plan(p, transposed, false);
  const Vectors& vectors = plan.vectors;
  Packed<T, C> packed(p, plan);
  const T* const in = static_cast<const T*>(transposed ? p.y : p.x);
  T* const out = static_cast<T*>(transposed ? p.x : p.y);
  const T* const residual = static_cast<const T*>(p.residual);
  const int64_t in_plane = plan.in_h * plan.in_w, out_plane = plan.out_h * plan.out_w;
  // Output rows whose input, beside the rows that they share with the next ones, fills a strip.
  const int64_t rows_held = max64(plan.reach(), kStripBytes / kVectorBytes / plan.in_w - plan.reach());
  const int64_t most = max64(plan.osh, rows_held / plan.ish * plan.osh);
  const Cut rows = cut(plan.out_h, ceil_div(kWantedTasks, p.n * vectors.count), 4, most);
  const int64_t group = max64(1, min64(kGroupPixels / plan.out_w, plan.out_h));
  const int64_t in_rows =
      min64(plan.in_h, ceil_div(ceil_div(plan.out_h, rows.parts), plan.osh) * plan.ish + plan.reach());

  const int64_t tasks = p.n * vectors.count * rows.parts;
  constexpr int64_t kSize = sizeof(T);
  const int64_t in_size = in_rows * plan.in_w * lanes<C>, pixels = round_up(group * plan.out_w, lanes<C>);
  const ScratchPieces scratch(p.threads, (in_size + 2 * pixels * lanes<C>)*static_cast<int64_t>(sizeof(C)));
#pragma omp parallel num_threads(threads)
  {
    packed.fill(p, plan);
    C* const held = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    C *const made = held + in_size, *const turned = made + pixels * lanes<C>;
    FilterBlock<C> block{};
    block.row = plan.in_w * lanes<C>;
    block.pixel = lanes<C>;
    block.out_pixel = plan.osw * lanes<C>;
    block.activation = Activation::none;
    block.part = static_cast<int>(lanes<C>);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t strip = task % rows.parts, v = task / rows.parts % vectors.count;
      const int64_t n = task / rows.parts / vectors.count;
      const int64_t plane = n * p.c + vectors.start(v);
      const int64_t y0 = rows.begin(strip), y1 = rows.end(strip);
      const int64_t h0 = plan.first_input(y0), h1 = max64(h0, plan.last_input(y1));
      gather_planes(in + plane * in_plane, in_plane, h0 * plan.in_w, h1 * plan.in_w, vectors.part, held);
      // The next strip of these planes, or the first of the next ones.
      Ahead ahead;
      if (task + 1 < tasks) {
        const bool last = strip + 1 == rows.parts;
        const int64_t next = last ? 0 : strip + 1, width = plan.in_w * kSize;
        const int64_t g0 = last ? 0 : h1, g1 = plan.last_input(rows.end(next));
        ahead = {in + (plane + (last ? vectors.part : 0)) * in_plane + g0 * plan.in_w,
                 min64(vectors.part, p.n * p.c - plane - vectors.part), in_plane * kSize, (g1 - g0) * width};
      }
      for (int64_t from = y0; from < y1; from += group) {
        const int64_t count = min64(group, y1 - from);
        const Ahead output{out + plane * out_plane + from * plan.out_w, vectors.part, out_plane * kSize,
                           count * plan.out_w * kSize};
        for (int64_t y = from; y < from + count; ++y) {
          ahead.fetch(y - y0, y1 - y0);
          output.fetch(y - from, count);
          filter_row<C>(plan, y, v, v + 1, held - h0 * block.row, packed, made + (y - from) * plan.out_w * lanes<C>,
                        nullptr, block, Ahead(), Ahead());
        }
        scatter_planes(made, count * plan.out_w, from * plan.out_w, vectors.shared(v), vectors.part,
                       out + plane * out_plane, residual ? residual + plane * out_plane : nullptr, out_plane,
                       p.activation, turned);
      }
    }
  }
}

// ---- Weight gradient -------------------------------------------------------------------------------------------------

constexpr int64_t kFlushPixels = 192;  // of one tap, added up in the compute type before they go to a float64 sum
constexpr int64_t kCorrelateBytes = 24 << 10;  // of x and dy: most of L1

// The forward lattice's taps as runs, and how the images are cut.
template <class X>
struct GradPlan {
  using C = compute_t<X>;
  Vectors vectors;
  Scratch<GradRun> runs;
  int64_t taps, together, run_count = 0;  // taps of a run, runs of a call
  CorrelateKernel<X> kernel;
  int64_t reach;
  Cut rows;       // of dy's rows, into strips
  Cut slices;     // of the strips of all images
  int64_t flush;  // strips

  GradPlan(const Conv2dParams& p)
      : vectors(p.c, lanes<C>), runs(p.r * p.s), reach((p.r - 1) * p.dilation_h + 1), rows{}, slices{} {
    const bool narrow = p.layout == Layout::nhwc && vectors.part < lanes<C>;
    taps = p.dilation_w == 1 && !narrow ? side_by_side(p.s, p.stride_w) : 1;
    together = taps == 3 && p.s == 3 && p.r == 3 ? 3 : 1;
    kernel = correlate_kernel<X>(taps, p.stride_w, together, narrow);
    for (int64_t r = 0; r < p.r; ++r)
      for (int64_t s = 0; s < p.s; s += taps) {
        const int64_t dw = s * p.dilation_w - p.pad_w;
        const Range pixels = valid_range(p.q, p.stride_w, dw, p.w);
        const int64_t dh = r * p.dilation_h - p.pad_h;
        runs.data[run_count++] = {taps > 1 ? Run{dh, dw, -dw, p.w - dw} : Run{dh, dw, pixels.first, pixels.last},
                                  valid_range(p.p, p.stride_h, dh, p.h)};
      }
    const int64_t x_row = p.w * kVectorBytes, dy_row = p.q * kVectorBytes;
    const int64_t fit = (kCorrelateBytes - reach * x_row) / (p.stride_h * x_row + dy_row);
    rows = {p.p, ceil_div(p.p, max64(fit, min64(p.p, 4)))};
    const int64_t all = p.n * rows.parts;
    slices = {all, max64(1, min64(all, min64(ceil_div(kWantedTasks, vectors.count), p.n * p.p * p.q / kFlushPixels)))};
    flush = max64(1, kFlushPixels / max64(1, p.p * p.q / rows.parts));
  }
  // What rows [p0, p1) of dy meet.
  Range input_rows(const Conv2dParams& p, int64_t p0, int64_t p1) const {
    const int64_t first = max64(0, min64(p.h, p0 * p.stride_h - p.pad_h));
    return {first, max64(first, min64(p.h, (p1 - 1) * p.stride_h - p.pad_h + reach))};
  }
};

// For one vector of channels: `sums` of all taps over one strip of one image. It is step `now` of
// `steps` in which x and dy are fetched.
template <class X>
void correlate_strip(const GradPlan<X>& plan, int64_t p0, int64_t p1, Correlation<X>& b, compute_t<X>* sums,
                     int64_t now, int64_t steps) {
  const int64_t calls = plan.run_count / plan.together, size = plan.together * plan.taps * lanes<compute_t<X>>;
  b.first_row = p0, b.last_row = p1;
  b.steps = steps * calls;
  for (int64_t i = 0; i < calls; ++i, sums += size) {
    b.now = now * calls + i;
    plan.kernel(b, plan.runs.data + i * plan.together, sums);
  }
}

template <class T, class X>
void weight_grad(const Conv2dParams& p, bool nchw) {
  using C = compute_t<T>;
  const int threads = threads_of(p);
  const GradPlan<X> plan(p);
  const Vectors& vectors = plan.vectors;
  const int64_t taps = p.r * p.s, size = taps * lanes<C>;
  const int64_t block = nchw ? 1 : 4;
  const Cut blocks{vectors.count, ceil_div(vectors.count, block)};
  const int64_t slices = plan.slices.parts, most_rows = ceil_div(p.p, plan.rows.parts);
  Scratch<double> totals(slices * vectors.count * size);
  const int64_t x_size = nchw ? min64(p.h, (most_rows - 1) * p.stride_h + plan.reach) * p.w * lanes<C> : 0;
  const int64_t dy_size = nchw ? most_rows * p.q * lanes<C> : 0;
  const ScratchPieces scratch(p.threads, (block * size + x_size + dy_size) * static_cast<int64_t>(sizeof(C)));
  const int64_t x_plane = p.h * p.w, dy_plane = p.p * p.q;
  constexpr int64_t kSize = sizeof(T);
#pragma omp parallel num_threads(threads)
  {
    C* const sums = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    C *const x_held = sums + block * size, *const dy_held = x_held + x_size;
    Correlation<X> b{};
    b.x_pixel = b.dy_pixel = nchw ? lanes<C> : p.c;
    b.x_row = p.w * b.x_pixel, b.dy_row = p.q * b.dy_pixel;
    b.x_column = plan.taps > 1 ? b.x_pixel : b.x_pixel * p.stride_w;
    b.x_step = b.x_row * p.stride_h;
    b.columns = p.q;
    b.part = static_cast<int>(vectors.part);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < slices * blocks.parts; ++task) {
      const int64_t slice = task / blocks.parts, v0 = blocks.begin(task % blocks.parts);
      const int64_t v1 = blocks.end(task % blocks.parts), first = plan.slices.begin(slice),
                    last = plan.slices.end(slice);
      double* const total = totals.data + (slice * vectors.count + v0) * size;
      const int64_t count = (v1 - v0) * size;
      for (int64_t i = 0; i < count; ++i) total[i] = 0, sums[i] = 0;
      int64_t pending = 0;
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t n = unit / plan.rows.parts, p0 = plan.rows.begin(unit % plan.rows.parts);
        const int64_t p1 = plan.rows.end(unit % plan.rows.parts);
        // The same channels of the next strip.
        b.next_x = b.next_dy = {};
        if (const int64_t later = unit + 1; later < last) {
          const int64_t image = later / plan.rows.parts, q0 = plan.rows.begin(later % plan.rows.parts);
          const int64_t q1 = plan.rows.end(later % plan.rows.parts), from = vectors.start(v0);
          const Range rows = plan.input_rows(p, q0, q1);
          if (nchw) {
            b.next_x = {static_cast<const T*>(p.x) + (image * p.c + from) * x_plane + rows.first * p.w, vectors.part,
                        x_plane * kSize, (rows.last - rows.first) * p.w * kSize};
            b.next_dy = {static_cast<const T*>(p.y) + (image * p.c + from) * dy_plane + q0 * p.q, vectors.part,
                         dy_plane * kSize, (q1 - q0) * p.q * kSize};
          } else {
            const int64_t bytes = (vectors.start(v1 - 1) + vectors.part - from) * kSize;
            b.next_x = {static_cast<const T*>(p.x) + (image * x_plane + rows.first * p.w) * p.c + from,
                        (rows.last - rows.first) * p.w, p.c * kSize, bytes};
            b.next_dy = {static_cast<const T*>(p.y) + (image * dy_plane + q0 * p.q) * p.c + from, (q1 - q0) * p.q,
                         p.c * kSize, bytes};
          }
        }
        for (int64_t v = v0; v < v1; ++v) {
          const int64_t c0 = vectors.start(v);
          if constexpr (__is_same(X, C)) {
            if (nchw) {
              const auto [h0, h1] = plan.input_rows(p, p0, p1);
              const int64_t plane = n * p.c + c0;
              gather_planes(static_cast<const T*>(p.x) + plane * x_plane, x_plane, h0 * p.w, h1 * p.w, vectors.part,
                            x_held);
              gather_planes(static_cast<const T*>(p.y) + plane * dy_plane, dy_plane, p0 * p.q, p1 * p.q, vectors.part,
                            dy_held);
              b.x = x_held - h0 * b.x_row, b.dy = dy_held - p0 * b.dy_row;
            }
          }
          if (!nchw) {
            b.x = static_cast<const X*>(p.x) + n * x_plane * p.c + c0;
            b.dy = static_cast<const X*>(p.y) + n * dy_plane * p.c + c0;
          }
          correlate_strip(plan, p0, p1, b, sums + (v - v0) * size, v - v0, v1 - v0);
        }
        if (++pending == plan.flush || unit + 1 == last) {
          pending = 0;
          for (int64_t i = 0; i < count; ++i) total[i] += sums[i], sums[i] = 0;
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t v = 0; v < vectors.count; ++v) {
      const int64_t c0 = vectors.start(v);
      const double* const total = totals.data + v * size;
      for (int64_t slice = 1; slice < slices; ++slice) {
        const double* const more = total + slice * vectors.count * size;
        for (int64_t i = 0; i < size; ++i) totals.data[v * size + i] += more[i];
      }
      T* const dw = static_cast<T*>(p.weight) + c0 * p.weight_stride[0];
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t l = vectors.shared(v); l < vectors.part; ++l)
          store_scalar(dw + l * p.weight_stride[0] + t / p.s * p.weight_stride[2] + t % p.s * p.weight_stride[3],
                       static_cast<C>(total[t * lanes<C> + l]));
    }
  }
}

// ---- Passes ----------------------------------------------------------------------------------------------------------

template <class T>
void filter(const Conv2dParams& p, bool transposed) {
  if (p.n * p.c == 0) return;
  if (p.layout == Layout::nchw) return filter_nchw<T>(p, transposed);
  filter_nhwc<T>(p, transposed);
}

template <class T>
void forward(const Conv2dParams& p) {
  filter<T>(p, false);
}

template <class T>
void input_grad(const Conv2dParams& p) {
  filter<T>(p, true);
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  if (p.layout == Layout::nchw) return weight_grad<T, compute_t<T>>(p, true);
  weight_grad<T, T>(p, false);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_depthwise_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_depthwise_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_depthwise_weight_grad, Conv2dParams, weight_grad)
