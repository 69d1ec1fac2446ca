// Convolution where few channels meet, on vectors of output channels (depthwise_rows.h): what depthwise convolution (groups =
// channels, one filter each) and that in wider groups have in common. A few products per pixel, so the speed of memory is the
// bound, or near.
//
// channels_last images are read and written where they lie. NCHW images go through scratch in cache, vectors of output channels
// at a time: a strip of rows of the planes that they see is transposed to [row][column][lane], and the output back; that costs
// about four cycles a vector each way, but every vector is full, whatever the size of the image, and depthwise no load crosses
// a cache line. Wider groups read their pixels many times: there channels_last images are copied to such strips too for the
// gradient of the weights, whose two images would push each other out of the few sets of the cache that pixels far apart fall
// into, and where the elements are not in the compute type.
//
// A vector of output channels may begin and end inside of groups. Its lanes' input channels lie next to each other, in one
// or two vectors of them, unless groups have far more input channels than output channels; then fewer lanes are used.
//
// forward and input_grad go by output rows; a row of input_grad with stride s is made of s phases (conv2d_lattice.h) that
// have their own taps. The innermost loops are over the pixels of a row, then over the vectors of a block of channels that is
// so narrow that the input rows under a filter stay in the L1 cache.
//
// Tasks are image x strip of rows x block of channels (weight_grad: slice of the images and rows x block of channels, the
// slices' partial sums being added in order): cut by shape alone.
#pragma once

#include <omp.h>

#include "cpu/depthwise_rows.h"
#include "cpu/simd/transpose.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kBlockBytes = 24 << 10;  // of input rows under a filter, for the channels of a block: most of L1
constexpr int64_t kStripBytes = 96 << 10;  // of an NCHW strip in scratch
constexpr int64_t kWantedTasks = 16;  // enough to balance a few threads; fixed, so that cuts do not depend on threads
constexpr int64_t kNearImages = 8 << 20, kFarImages = 24 << 20;  // bytes of x and y: in L2 or near, beyond L3
constexpr int64_t kGroupPixels = 256;                            // output pixels that are transposed back together

// The channels as vectors; where C is no multiple of the lanes, the last vector overlaps the one before it.
struct Vectors {
  int64_t channels, width, count, part;
  Vectors(int64_t c, int64_t lanes) : channels(c), width(lanes), count(ceil_div(c, lanes)), part(min64(c, lanes)) {}
  int64_t start(int64_t v) const { return max64(0, min64(v * width, channels - width)); }
  // Channels of vector v that belong to the vector before it too.
  int64_t shared(int64_t v) const { return v * width - start(v); }
};

// The input channels that the lanes of vectors of output channels meet; `per_filter` of them each.
struct Inputs {
  int64_t channels;               // of the input
  int64_t per_filter, per_group;  // input and output channels of a group

  Inputs(int64_t in, int64_t out, int64_t groups) : channels(in), per_filter(in / groups), per_group(out / groups) {}
  int64_t first(const Vectors& vectors, int64_t v) const { return vectors.start(v) / per_group * per_filter; }
  int64_t last(const Vectors& vectors, int64_t v) const {
    return ceil_div(vectors.start(v) + vectors.part, per_group) * per_filter;
  }
  // Of all vectors, the most that one sees.
  int64_t span(const Vectors& vectors) const {
    int64_t most = 0;
    for (int64_t v = 0; v < vectors.count; ++v) most = max64(most, last(vectors, v) - first(vectors, v));
    return most;
  }
  // Output channels for each of which any one input channel can be picked from two vectors.
  int64_t lanes_of(int64_t all) const {
    const int64_t offset = all % per_group == 0 ? 0 : per_group - 1;  // of a vector's first channel in its group
    const int64_t others = (offset + all - 1) / per_group;            // groups after it
    if (others <= 1 || others * per_filter < 2 * all) return all;
    return per_group * min64(all / per_group, (2 * all - 1) / per_filter + 1);
  }
};

// The picks of all vectors, from images where they lie, or (not in_place) from scratch that holds `pitch` channels of a pixel,
// the vector's first input channel first.
template <class C>
struct Picks {
  Scratch<Pick<C>> all;  // [vector][input]
  int64_t per_vector;
  bool two = false;

  Picks(const Inputs& inputs, const Vectors& vectors, bool in_place, int64_t pitch)
      : all(vectors.count * inputs.per_filter), per_vector(inputs.per_filter) {
    constexpr int64_t kLanes = lanes<C>;
    for (int64_t v = 0; v < vectors.count; ++v) {
      const int64_t first = inputs.first(vectors, v), start = vectors.start(v);
      const int64_t lowest = in_place ? -first : 0;
      const int64_t highest = max64(0, (in_place ? inputs.channels : pitch) - kLanes) + lowest;
      const int64_t span = inputs.last(vectors, v) - first;
      for (int64_t j = 0; j < per_vector; ++j) {
        const auto channel = [&](int64_t lane) {
          return (start + lane) / inputs.per_group * inputs.per_filter + j - first;
        };
        const int64_t low = channel(0), high = channel(vectors.part - 1);
        const bool one = span <= kLanes || high - low < kLanes, apart = high >= 2 * kLanes;
        Pick<C>& pick = all.data[v * per_vector + j];
        pick.first = max64(lowest, min64(highest, (one && span > kLanes) || apart ? low : 0));
        pick.second = one ? pick.first : max64(lowest, min64(highest, apart ? high - kLanes + 1 : kLanes));
        two = two || !one;
        for (int64_t l = 0; l < kLanes; ++l) {
          const int64_t c = channel(min64(l, vectors.part - 1));
          pick.index[l] = static_cast<int_t<C>>(c < pick.first + kLanes ? c - pick.first : kLanes + c - pick.second);
        }
      }
    }
  }
  const Pick<C>* vector(int64_t v) const { return all.data + v * per_vector; }
};

// Below some work a second thread is not worth waking.
int threads_of(const Conv2dParams& p) {
  const int64_t taps = p.r * p.s * (p.c / p.groups);
  return threads_for(p.n * (p.c * p.h * p.w + p.k * p.p * p.q * (1 + taps / 4)), p.threads);
}

template <class T>
int64_t image_bytes(const Conv2dParams& p) {
  return p.n * (p.c * p.h * p.w + p.k * p.p * p.q) * static_cast<int64_t>(sizeof(T));
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
  int64_t width;   // of its blocks of pixels
  typename FilterKernels<X>::Kernel kernel;
};

// A filter's weight of one of its inputs; of pairs, the second one's too, where there is one.
struct Term {
  int64_t input, weight, second = -1;
};

// What forward and input_grad do with every image, and in which order they want the filters. X: what the kernels read and
// write; kGroups: of more channels than one.
template <class X, bool kGroups>
struct Plan {
  using C = compute_t<X>;
  Inputs inputs;
  int64_t out_channels;
  Vectors vectors;
  int64_t span, pitch;  // input channels of a vector, in scratch
  Picks<C> picks;
  bool part;
  int64_t in_h, in_w, out_h, out_w;
  int64_t osh, osw, phases_w;
  Scratch<Phase<X>> phases;  // [h0][w0]
  Scratch<Run> runs;
  Scratch<Term> order;
  int64_t count = 0;  // of the terms
  int64_t min_dh = 0, max_dh = 0, ish = 1;

  // in_place: images are read where they lie.
  Plan(const Conv2dParams& p, bool transposed, bool in_place)
      : inputs(transposed ? p.k : p.c, transposed ? p.c : p.k, p.groups),
        out_channels(transposed ? p.c : p.k),
        vectors(out_channels, inputs.lanes_of(lanes<C>)),
        span(inputs.span(vectors)),
        pitch(round_up(span, lanes<C>)),
        picks(inputs, vectors, in_place, pitch),
        part(in_place && (vectors.part < lanes<C> || inputs.channels < lanes<C>)),
        in_h(transposed ? p.p : p.h),
        in_w(transposed ? p.q : p.w),
        out_h(transposed ? p.h : p.p),
        out_w(transposed ? p.w : p.q),
        osh(transposed ? p.stride_h : 1),
        osw(transposed ? p.stride_w : 1),
        phases_w(min64(osw, out_w)),
        phases(min64(osh, out_h) * phases_w),
        runs(p.r * p.s * inputs.per_filter),
        order(p.r * p.s * inputs.per_filter) {
    Scratch<Tap> taps(p.r * p.s), by_row(p.r * p.s);
    Phase<X>* phase = phases.data;
    Run* run = runs.data;
    const auto add = [&](const Lattice& l, const Tap* t) {
      Tap* const sorted = by_row.data;  // by dh, then dw
      for (int64_t i = 0; i < l.count; ++i) sorted[i] = t[transposed ? l.count - 1 - i : i];
      int64_t width = 0;
      while (width < l.count && sorted[width].dh == sorted[0].dh) ++width;
      const bool adjacent = !part && width > 1 && sorted[1].dw == sorted[0].dw + 1;
      phase->lattice = l;
      phase->taps = adjacent ? side_by_side<C>(width, l.isw) : 1;
      // Depthwise, blocks of about one size; where inputs are picked, as wide as can be.
      phase->width = max64(
          kGroups ? min64(l.columns, kMostPixels) : ceil_div(l.columns, max64(ceil_div(l.columns, kMostPixels), 1)), 1);
      phase->kernel = choose_kernel(*phase);
      phase->runs = run;
      phase->packed = count;
      for (int64_t i = 0; i < l.count; i += phase->taps) {
        const Tap& tap = sorted[i];
        const Range pixels = valid_range(l.columns, l.isw, tap.dw, in_w);
        if constexpr (kPairs<X>) {
          if (i / width % 2) continue;  // the second row of a run before
          const bool two = i + width < l.count;
          const int64_t below = two ? sorted[i + width].dh - tap.dh : 0;
          *run++ = phase->taps > 1 ? Run{tap.dh, tap.dw, -tap.dw, in_w - tap.dw, 0, below}
                                   : Run{tap.dh, tap.dw, pixels.first, pixels.last, 0, below};
          for (int64_t t = i; t < i + phase->taps; ++t)
            order.data[count++] = {0, sorted[t].weight, two ? sorted[t + width].weight : -1};
          min_dh = min64(min_dh, tap.dh), max_dh = max64(max_dh, tap.dh + below);
          continue;
        }
        for (int64_t j = 0; j < inputs.per_filter; ++j) {
          *run++ = phase->taps > 1 ? Run{tap.dh, tap.dw, -tap.dw, in_w - tap.dw, j}
                                   : Run{tap.dh, tap.dw, pixels.first, pixels.last, j};
          for (int64_t t = i; t < i + phase->taps; ++t) order.data[count++] = {j, sorted[t].weight};
        }
        min_dh = min64(min_dh, tap.dh), max_dh = max64(max_dh, tap.dh);
      }
      phase->run_count = run - phase->runs;
      ish = l.ish;
      ++phase;
    };
    if (transposed)
      input_grad_lattices(p, taps.data, add);
    else
      forward_lattice(p, taps.data, add);
  }
  auto choose_kernel(const Phase<X>& phase) const {
    FilterKernels<X> kernels;
    const int64_t taps = phase.taps, step = phase.lattice.isw;
    if constexpr (kGroups) {
      if (part) {
        kernels.template choose<Load::picked_part>(taps, step);
      } else if (kFewKernels<C> || picks.two) {
        kernels.template choose<Load::picked_two>(taps, step);
      } else {
        if constexpr (!kFewKernels<C>) kernels.template choose<Load::picked>(taps, step);
      }
    } else if (part) {
      kernels.template choose<Load::part>(1, 1);
    } else {
      kernels.template choose<Load::whole>(taps, step);
    }
    int kind = 0;
    while (kWidths[kind] < phase.width) ++kind;
    return kernels.of[kind];
  }
  int64_t first_channel(int64_t v) const { return kGroups ? inputs.first(vectors, v) : vectors.start(v); }
  int64_t last_channel(int64_t v) const { return inputs.last(vectors, v); }
  // Input rows [first_input(y0), last_input(y1)) are all that output rows [y0, y1) read.
  int64_t first_input(int64_t y0) const { return max64(0, min64(in_h, y0 / osh * ish + min_dh)); }
  int64_t last_input(int64_t y1) const { return max64(0, min64(in_h, (y1 - 1) / osh * ish + max_dh + 1)); }
  // Input rows that one output row may read.
  int64_t reach() const { return max_dh - min_dh + 1; }
};

// Weights that are bfloat16 numbers, as pairs of these.
template <class C>
[[gnu::always_inline]] inline vec<C> in_pairs(vec<C> first, vec<C> second) {
  if constexpr (sizeof(C) == 4) {
    const u32v low = reinterpret_cast<u32v>(first) >> 16, high = reinterpret_cast<u32v>(second) & 0xffff0000u;
    return reinterpret_cast<vec<C>>(low | high);
  } else {
    return first;
  }
}

// For every vector of channels its biases, and its filters as [term][lane] in the plan's order.
template <class T, class X, bool kGroups>
struct Packed {
  using C = compute_t<T>;
  int64_t size;  // of a vector's
  Scratch<C> all;
  ScratchPieces buffers;

  Packed(const Conv2dParams& p, const Plan<X, kGroups>& plan)
      : size((1 + plan.count) * lanes<C>),
        all(plan.vectors.count * size),
        buffers(p.threads, p.r * p.s * plan.inputs.per_filter * kVectorBytes) {}
  const C* vector(int64_t v) const { return all.data + v * size; }

  // By all threads of a parallel region.
  void fill(const Conv2dParams& p, const Plan<X, kGroups>& plan, bool transposed) {
    const T *const weight = static_cast<const T*>(p.weight), *const bias = static_cast<const T*>(p.bias);
    const int64_t taps = p.r * p.s, part = plan.vectors.part, terms = taps * plan.inputs.per_filter;
    const int64_t* const stride = p.weight_stride;
    const bool contiguous = !(transposed && kGroups) && stride[0] == terms &&
                            (stride[1] == taps || stride[0] == taps) && stride[2] == p.s &&
                            stride[3] == 1;  // [channel][term]
    C* const buffer = static_cast<C*>(buffers.piece(omp_get_thread_num()));
#pragma omp for schedule(static)
    for (int64_t v = 0; v < plan.vectors.count; ++v) {
      const int64_t c0 = plan.vectors.start(v);
      C* to = all.data + v * size;
      store(to, bias ? load_n(bias + c0, static_cast<int>(part)) : vec<C>{});
      to += lanes<C>;
      if (contiguous && part == lanes<C>) {
        transpose(weight + c0 * terms, terms, part, terms, buffer, lanes<C>);
        for (int64_t t = 0; t < plan.count; ++t) {
          const Term& term = plan.order.data[t];
          const vec<C> first = load(buffer + (term.input * taps + term.weight) * lanes<C>);
          const vec<C> second = term.second < 0 ? vec<C>{} : load(buffer + term.second * lanes<C>);
          store(to + t * lanes<C>, kPairs<X> ? in_pairs<C>(first, second) : first);
        }
        continue;
      }
      for (int64_t l = 0; l < lanes<C>; ++l) {
        // A filter's, or (transposed) those of all filters of the group for one channel.
        const int64_t c = c0 + min64(l, part - 1), g = c / plan.inputs.per_group;
        const T* const from =
            transposed ? weight + g * plan.inputs.per_filter * stride[0] + (c - g * plan.inputs.per_group) * stride[1]
                       : weight + c * stride[0];
        const int64_t step = stride[transposed ? 0 : 1];
        for (int64_t t = 0; t < plan.count; ++t) {
          const Term& term = plan.order.data[t];
          C weight = l < part ? load_scalar(from[term.input * step + term.weight]) : C{0};
          if constexpr (kPairs<X>) {
            const C second = l < part && term.second >= 0 ? load_scalar(from[term.second]) : C{0};
            weight = in_pairs<C>(set1(weight), set1(second))[0];
          }
          to[t * lanes<C> + l] = weight;
        }
      }
    }
  }
};

// Output row y for the vectors of channels [v0, v1). `in`: where input row 0 lies or would lie; `out`, `residual`: the output
// row; both at the first channel of v0. Fetches what comes next meanwhile, `input` and `output` in pieces.
template <class X, bool kGroups, class P>
void filter_row(const Plan<X, kGroups>& plan, int64_t y, int64_t v0, int64_t v1, const X* in, const P& packed, X* out,
                const X* residual, FilterBlock<X> b, const Ahead& next_input, const Ahead& next_output,
                PixelsAhead next) {
  using C = compute_t<X>;
  const int64_t i = y / plan.osh, top = i * plan.ish, out_pixel = b.out_pixel / plan.osw;
  const Phase<X>* phase = plan.phases.data + y % plan.osh * plan.phases_w;
  AheadSteps input(next_input, v1 - v0), output(next_output, v1 - v0);
  for (int64_t w = 0; w < plan.phases_w; ++w, ++phase) {
    const Lattice& l = phase->lattice;
    const Run *first = phase->runs, *last = first + phase->run_count;
    while (first < last && first->dh + first->below < -top) ++first;
    while (last > first && last[-1].dh >= plan.in_h - top) --last;
    b.top = -top, b.bottom = plan.in_h - top;
    b.runs = first;
    b.count = last - first;
    b.column = phase->taps > 1 ? b.pixel : b.pixel * l.isw;
    const int64_t filters = (1 + phase->packed + (first - phase->runs) * phase->taps) * lanes<C>;
    const int64_t width = phase->width;
    const int64_t origin_step = phase->taps > 1 ? l.isw : 1;
    const X* const under = in + top * b.row;
    const auto kernel = phase->kernel;
    for (int64_t v = v0; v < v1; ++v) {
      if (w == 0) input.fetch(), output.fetch();
      const int64_t c0 = plan.vectors.start(v) - plan.vectors.start(v0);
      const X* const from = under + plan.first_channel(v) - plan.first_channel(v0);
      b.picks = plan.picks.vector(v);
      b.bias = packed.vector(v);
      b.filters = b.bias + filters;
      for (int64_t j = 0; j < l.columns; j += width) {
        const int64_t to = (l.ow0 + j * l.osw) * out_pixel + c0;
        b.in = from + j * l.isw * b.pixel;
        b.origin = j * origin_step;
        b.live = static_cast<int>(min64(width, l.columns - j));
        b.out = out + to;
        b.residual = residual ? residual + to : nullptr;
        if (w == 0) next.fetch();
        kernel(b);
      }
    }
  }
}

// n things in about `wanted` parts of at most `most`, none below `least`.
Cut cut(int64_t n, int64_t wanted, int64_t least, int64_t most) {
  return {n, max64(min64(wanted, max64(1, n / least)), ceil_div(n, max64(most, 1)))};
}

template <class T, bool kGroups>
void filter_nhwc(const Conv2dParams& p, bool transposed) {
  using C = compute_t<T>;
  const int threads = threads_of(p);
  const Plan<T, kGroups> plan(p, transposed, true);
  // Around the caches only whole lines: halves would each be written on their own.
  const bool stream =
      lanes<C> * sizeof(T) >= 64 &&
      p.n * plan.out_channels * plan.out_h * plan.out_w * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
  const bool far = image_bytes<T>(p) >= kFarImages;
  const Vectors& vectors = plan.vectors;
  Packed<T, T, kGroups> packed(p, plan);
  const T* const in = static_cast<const T*>(transposed ? p.y : p.x);
  T* const out = static_cast<T*>(transposed ? p.x : p.y);
  const T* const residual = static_cast<const T*>(p.residual);
  constexpr int64_t kSize = sizeof(T);
  const Cut rows = cut(plan.out_h, ceil_div(kWantedTasks, p.n), 8, plan.out_h);
  const int64_t under = plan.reach() * plan.in_w * plan.span * kSize;
  const bool whole = far && plan.inputs.channels * kSize == 512;  // half pixels would share half of the caches' sets
  const Cut blocks =
      cut(vectors.count, ceil_div(kWantedTasks, p.n * rows.parts), 4, max64(whole ? 8 : 4, kBlockBytes / under));
  const int64_t tasks = p.n * rows.parts * blocks.parts;
  const int64_t in_c = plan.inputs.channels, out_c = plan.out_channels;
  const int64_t in_row = plan.in_w * in_c, out_row = plan.out_w * out_c;
#pragma omp parallel num_threads(threads)
  {
    packed.fill(p, plan, transposed);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t b = task % blocks.parts, strip = task / blocks.parts % rows.parts;
      const int64_t n = task / blocks.parts / rows.parts;
      const int64_t v0 = blocks.begin(b), v1 = blocks.end(b), y1 = rows.end(strip), c0 = vectors.start(v0);
      const int64_t in_c0 = plan.first_channel(v0), in_bytes = (plan.last_channel(v1 - 1) - in_c0) * kSize;
      const int64_t out_bytes = (vectors.start(v1 - 1) + vectors.part - c0) * kSize;
      FilterBlock<T> block{};
      block.row = in_row;
      block.pixel = in_c;
      block.out_pixel = plan.osw * out_c;
      block.activation = p.activation;
      block.stream = stream;
      block.part = static_cast<int>(vectors.part);
      block.in_part = static_cast<int>(min64(in_c, lanes<C>));
      for (int64_t y = rows.begin(strip); y < y1; ++y) {
        // What the next row reads that this one does not, and where it goes; the next task's first row follows the last.
        Ahead input, output;
        PixelsAhead next;
        if (y + 1 < y1) {
          const int64_t h0 = plan.last_input(y + 1), h1 = plan.last_input(y + 2);
          input = {in + (n * plan.in_h + h0) * in_row + in_c0, (h1 - h0) * plan.in_w, in_c * kSize, in_bytes};
          output = {out + (n * plan.out_h + y + 1) * out_row + c0, plan.out_w, out_c * kSize, out_bytes};
          if (far) {
            const int64_t calls = (v1 - v0) * ceil_div(plan.out_w / plan.phases_w, kMostPixels);
            next = {input, calls};
            input = {};
          }
        } else if (task + 1 < tasks) {
          const int64_t later = task + 1, first = rows.begin(later / blocks.parts % rows.parts);
          const int64_t image = later / blocks.parts / rows.parts;
          const int64_t h0 = plan.first_input(first), h1 = plan.last_input(first + 1);
          const int64_t next = blocks.begin(later % blocks.parts), in_c1 = plan.first_channel(next);
          const int64_t c1 = vectors.start(next);
          input = {in + (image * plan.in_h + h0) * in_row + in_c1, (h1 - h0) * plan.in_w, in_c * kSize, in_bytes};
          output = {out + (image * plan.out_h + first) * out_row + c1, plan.out_w, out_c * kSize, out_bytes};
        }
        const int64_t to = (n * plan.out_h + y) * out_row + c0;
        filter_row(plan, y, v0, v1, in + n * plan.in_h * in_row + in_c0, packed, out + to,
                   residual ? residual + to : nullptr, block, input, stream ? Ahead{} : output, next);
      }
      if (stream) end_streaming();
    }
  }
}

// ---- Through scratch -------------------------------------------------------------------------------------------------

// Pixels [first, last) of some planes as [pixel][plane]. `more` planes may be read in the place of a partial block of them,
// which takes transpose longer.
template <class T>
void gather_planes(const T* planes, int64_t size, int64_t first, int64_t last, int64_t count, int64_t more,
                   compute_t<T>* to, int64_t pitch) {
  transpose(planes + first, size, min64(round_up(count, 8), min64(more, pitch)), last - first, to, pitch);
}

// The same from pixels of `channels` channels.
template <class T>
void gather_channels(const T* pixels, int64_t channels, int64_t first, int64_t last, int64_t count, int64_t more,
                     compute_t<T>* to, int64_t pitch) {
  constexpr int64_t kLanes = lanes<compute_t<T>>;
  pixels += first * channels;
  for (int64_t i = first; i < last; ++i, pixels += channels, to += pitch)
    for (int64_t c = 0; c < count; c += kLanes)
      store(to + c, load_n(pixels + c, static_cast<int>(min64(more - c, kLanes))));
}

// The way back, with the last step of the convolution, to pixels and to planes.
template <class T>
void scatter_channels(const compute_t<T>* from, int64_t count, int part, T* pixels, const T* residual, int64_t channels,
                      Activation activation) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < count; ++i, from += lanes<C>, pixels += channels) {
    vec<C> z = load(from);
    if (residual) z += load_n(residual + i * channels, part);
    if (activation != Activation::none) z = activate<C>(z, activation);
    store_n(pixels, z, part);
  }
}

// To planes: `row` has room for the pixels of one plane.
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

// Strips of the input, each held for one vector of output channels.
template <class T, bool kGroups>
void filter_held(const Conv2dParams& p, bool transposed) {
  using C = compute_t<T>;
  const int threads = threads_of(p);
  const Plan<C, kGroups> plan(p, transposed, false);
  const Vectors& vectors = plan.vectors;
  Packed<T, C, kGroups> packed(p, plan);
  const T* const in = static_cast<const T*>(transposed ? p.y : p.x);
  T* const out = static_cast<T*>(transposed ? p.x : p.y);
  const T* const residual = static_cast<const T*>(p.residual);
  const bool nchw = p.layout == Layout::nchw;
  const int64_t in_c = plan.inputs.channels, out_c = plan.out_channels;
  const int64_t in_plane = plan.in_h * plan.in_w, out_plane = plan.out_h * plan.out_w;
  // Output rows whose input, beside the rows that they share with the next ones, fills a strip.
  const int64_t rows_held =
      max64(plan.reach(), kStripBytes / (plan.pitch * static_cast<int64_t>(sizeof(C))) / plan.in_w - plan.reach());
  const int64_t most = max64(plan.osh, rows_held / plan.ish * plan.osh);
  const Cut rows = cut(plan.out_h, ceil_div(kWantedTasks, p.n * vectors.count), 4, most);
  const int64_t group = max64(1, min64(kGroupPixels / plan.out_w, plan.out_h));
  const int64_t in_rows =
      min64(plan.in_h, ceil_div(ceil_div(plan.out_h, rows.parts), plan.osh) * plan.ish + plan.reach());

  const int64_t tasks = p.n * vectors.count * rows.parts;
  constexpr int64_t kSize = sizeof(T);
  const int64_t in_size = in_rows * plan.in_w * plan.pitch, pixels = round_up(group * plan.out_w, lanes<C>);
  const ScratchPieces scratch(p.threads, (in_size + 2 * pixels * lanes<C>)*static_cast<int64_t>(sizeof(C)));
#pragma omp parallel num_threads(threads)
  {
    packed.fill(p, plan, transposed);
    C* const held = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    C *const made = held + in_size, *const turned = made + pixels * lanes<C>;
    FilterBlock<C> block{};
    block.row = plan.in_w * plan.pitch;
    block.pixel = plan.pitch;
    block.out_pixel = plan.osw * lanes<C>;
    block.activation = Activation::none;
    block.part = static_cast<int>(lanes<C>);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      // Neighbours share what they read: NCHW rows, channels_last cache lines.
      const int64_t strip = (nchw ? task : task / vectors.count) % rows.parts;
      const int64_t v = (nchw ? task / rows.parts : task) % vectors.count, n = task / rows.parts / vectors.count;
      const int64_t plane = n * out_c + vectors.start(v);
      const int64_t c0 = plan.first_channel(v), c1 = plan.last_channel(v), in_first = n * in_c + c0;
      const int64_t y0 = rows.begin(strip), y1 = rows.end(strip);
      const int64_t h0 = plan.first_input(y0), h1 = max64(h0, plan.last_input(y1));
      const T* const image = in + n * in_plane * in_c + c0;  // channels_last
      Ahead ahead;
      if (nchw) {
        gather_planes(in + in_first * in_plane, in_plane, h0 * plan.in_w, h1 * plan.in_w, c1 - c0, in_c - c0, held,
                      plan.pitch);
        // The next strip of these planes, or the first of the next ones.
        if (task + 1 < tasks) {
          const bool last = strip + 1 == rows.parts;
          const int64_t next = last ? 0 : strip + 1, width = plan.in_w * kSize;
          const int64_t g0 = last ? 0 : h1, g1 = plan.last_input(rows.end(next));
          const int64_t from = in_first + (last ? c1 - c0 : 0);
          ahead = {in + from * in_plane + g0 * plan.in_w, min64(c1 - c0, p.n * in_c - from), in_plane * kSize,
                   (g1 - g0) * width};
        }
      } else {
        gather_channels(image, in_c, h0 * plan.in_w, h1 * plan.in_w, c1 - c0, in_c - c0, held, plan.pitch);
        if (v + 1 < vectors.count)
          ahead = {image + h0 * plan.in_w * in_c + c1 - c0, (h1 - h0) * plan.in_w, in_c * kSize,
                   min64(c1 - c0, in_c - c1) * kSize};
      }
      for (int64_t from = y0; from < y1; from += group) {
        const int64_t count = min64(group, y1 - from);
        const int64_t to = ((n * plan.out_h + from) * plan.out_w) * out_c + vectors.start(v);  // channels_last
        const Ahead output = nchw ? Ahead{out + plane * out_plane + from * plan.out_w, vectors.part, out_plane * kSize,
                                          count * plan.out_w * kSize}
                                  : Ahead{out + to, count * plan.out_w, out_c * kSize, vectors.part * kSize};
        for (int64_t y = from; y < from + count; ++y) {
          ahead.fetch(y - y0, y1 - y0);
          output.fetch(y - from, count);
          filter_row<C>(plan, y, v, v + 1, held - h0 * block.row, packed, made + (y - from) * plan.out_w * lanes<C>,
                        nullptr, block, Ahead(), Ahead(), PixelsAhead());
        }
        if (!nchw) {
          scatter_channels(made, count * plan.out_w, static_cast<int>(vectors.part), out + to,
                           residual ? residual + to : nullptr, out_c, p.activation);
          continue;
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
constexpr int64_t kSumsBytes = 16 << 10;       // of a block's taps
constexpr int64_t kFarPixels = 2048;           // bytes between pixels that leave few sets of L1 to a vector of channels

// The vectors of a block of channels_last images, whose taps have `size` sums: 256 or 512 neighbouring bytes of a pixel. With
// half of that, 3 x 3 took up to 1.2 times as long, most where pixels are far apart, and with half of pixels of 512 bytes 1.5
// times, as these share half of the sets of the caches.
template <class T>
int64_t channel_block(int64_t channels, int64_t size) {
  constexpr int64_t kSize = sizeof(T), kBytes = lanes<compute_t<T>> * kSize, kSum = sizeof(compute_t<T>);
  const bool whole = kFetchesPixels && channels * kSize == 512;
  const int64_t bytes = channels * kSize < kFarPixels * 3 / 8 && !whole ? 256 : 512;
  return max64(4, min64(bytes / kBytes, kSumsBytes / (size * kSum)));
}

// The forward lattice's taps as runs, and how the images are cut.
template <class X, bool kGroups>
struct GradPlan {
  using C = compute_t<X>;
  Inputs inputs;
  Vectors vectors;
  int64_t span, pitch;  // input channels of a vector, in scratch
  bool in_place;
  Picks<C> picks;
  Scratch<GradRun> runs;
  int64_t taps, together, run_count = 0;  // taps of a run, runs of a call
  CorrelateKernel<X> kernel;
  int64_t reach;
  bool fetches, fetches_pixels;  // what comes next; pixel by pixel, not in pieces of a strip
  Cut rows;                      // of dy's rows, into strips
  Cut slices;                    // of the strips of all images
  int64_t flush;                 // strips

  // Whether channels_last images are read where they lie.
  static bool reads_in_place(const Conv2dParams& p, bool converts) {
    if (p.layout != Layout::nhwc || converts) return false;
    const int64_t all = lanes<C>;
    return !kGroups || (p.c >= all && p.k >= all && Inputs(p.c, p.k, p.groups).lanes_of(all) == all &&
                        p.c * static_cast<int64_t>(sizeof(C)) < kFarPixels);
  }
  GradPlan(const Conv2dParams& p, bool converts)
      : inputs(p.c, p.k, p.groups),
        vectors(p.k, inputs.lanes_of(lanes<C>)),
        span(inputs.span(vectors)),
        pitch(round_up(span, lanes<C>)),
        in_place(reads_in_place(p, converts)),
        picks(inputs, vectors, in_place, pitch),
        runs(p.r * p.s * inputs.per_filter),
        reach((p.r - 1) * p.dilation_h + 1),
        rows{},
        slices{} {
    const bool part = in_place && vectors.part < lanes<C>;
    taps = p.dilation_w == 1 && !part ? side_by_side<C>(p.s, p.stride_w) : 1;
    together = !kFewKernels<C> && taps == 3 && p.s == 3 && p.r == 3 ? 3 : 1;
    const int64_t bytes = image_bytes<X>(p);
    fetches_pixels = kFetchesPixels && !kGroups && in_place && together > 1 && bytes >= kFarImages;
    fetches = !in_place || bytes >= kNearImages;
    if constexpr (kGroups) {
      kernel = correlate_kernel<X, Load::picked_two>(taps, p.stride_w, together);
      if constexpr (!kFewKernels<C>) {
        if (!picks.two) kernel = correlate_kernel<X, Load::picked>(taps, p.stride_w, together);
      }
    } else {
      kernel = part ? correlate_kernel<X, Load::part>(taps, p.stride_w, together)
                    : correlate_kernel<X, Load::whole>(taps, p.stride_w, together);
    }
    for (int64_t j = 0; j < inputs.per_filter; ++j)
      for (int64_t r = 0; r < p.r; ++r)
        for (int64_t s = 0; s < p.s; s += taps) {
          const int64_t dw = s * p.dilation_w - p.pad_w;
          const Range pixels = valid_range(p.q, p.stride_w, dw, p.w);
          const int64_t dh = r * p.dilation_h - p.pad_h;
          runs.data[run_count++] = {
              taps > 1 ? Run{dh, dw, -dw, p.w - dw, j} : Run{dh, dw, pixels.first, pixels.last, j},
              valid_range(p.p, p.stride_h, dh, p.h)};
        }
    const int64_t x_row = p.w * span * static_cast<int64_t>(sizeof(C)), dy_row = p.q * kVectorBytes;
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
template <class X, bool kGroups>
void correlate_strip(const GradPlan<X, kGroups>& plan, int64_t p0, int64_t p1, Correlation<X>& b, compute_t<X>* sums,
                     int64_t now, int64_t steps) {
  const int64_t calls = plan.run_count / plan.together, size = plan.together * plan.taps * lanes<compute_t<X>>;
  b.first_row = p0, b.last_row = p1;
  b.steps = steps * calls;
  for (int64_t i = 0; i < calls; ++i, sums += size) {
    b.now = now * calls + i;
    plan.kernel(b, plan.runs.data + i * plan.together, sums);
  }
}

template <class T, class X, bool kGroups>
void correlate_images(const Conv2dParams& p) {
  using C = compute_t<T>;
  const int threads = threads_of(p);
  const bool nchw = p.layout == Layout::nchw;
  const GradPlan<X, kGroups> plan(p, !__is_same(T, X));
  const Vectors& vectors = plan.vectors;
  const int64_t taps = p.r * p.s, per_filter = plan.inputs.per_filter, size = per_filter * taps * lanes<C>;
  const int64_t block = nchw ? 1 : channel_block<T>(p.c, size);
  const Cut blocks{vectors.count, ceil_div(vectors.count, block)};
  const int64_t slices = plan.slices.parts, most_rows = ceil_div(p.p, plan.rows.parts);
  Scratch<double> totals(slices * vectors.count * size);
  const int64_t most_x_rows = min64(p.h, (most_rows - 1) * p.stride_h + plan.reach);
  const int64_t x_size = plan.in_place ? 0 : most_x_rows * p.w * plan.pitch;
  const int64_t dy_size = plan.in_place ? 0 : most_rows * p.q * lanes<C>;
  const ScratchPieces scratch(p.threads, (block * size + x_size + dy_size) * static_cast<int64_t>(sizeof(C)));
  const int64_t x_plane = p.h * p.w, dy_plane = p.p * p.q;
  constexpr int64_t kSize = sizeof(T);
#pragma omp parallel num_threads(threads)
  {
    C* const sums = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    C *const x_held = sums + block * size, *const dy_held = x_held + x_size;
    Correlation<X> b{};
    b.x_pixel = plan.in_place ? p.c : plan.pitch, b.dy_pixel = plan.in_place ? p.k : lanes<C>;
    b.x_row = p.w * b.x_pixel, b.dy_row = p.q * b.dy_pixel;
    b.x_column = plan.taps > 1 ? b.x_pixel : b.x_pixel * p.stride_w;
    b.x_step = b.x_row * p.stride_h;
    b.columns = p.q;
    b.part = static_cast<int>(vectors.part);
    b.in_part = static_cast<int>(min64(p.c, lanes<C>));
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
        b.pixels_x = b.pixels_dy = {};
        if (const int64_t later = unit + 1; later < last && plan.fetches) {
          const int64_t image = later / plan.rows.parts, q0 = plan.rows.begin(later % plan.rows.parts);
          const int64_t q1 = plan.rows.end(later % plan.rows.parts);
          const int64_t from = plan.inputs.first(vectors, v0), to = plan.inputs.last(vectors, v1 - 1);
          const int64_t k0 = vectors.start(v0), k1 = vectors.start(v1 - 1) + vectors.part;
          Range rows = plan.input_rows(p, q0, q1);
          if (plan.fetches_pixels && image == n)
            rows.first = max64(rows.first, min64(rows.last, plan.input_rows(p, p0, p1).last));
          if (nchw) {
            b.next_x = {static_cast<const T*>(p.x) + (image * p.c + from) * x_plane + rows.first * p.w, to - from,
                        x_plane * kSize, (rows.last - rows.first) * p.w * kSize};
            b.next_dy = {static_cast<const T*>(p.y) + (image * p.k + k0) * dy_plane + q0 * p.q, k1 - k0,
                         dy_plane * kSize, (q1 - q0) * p.q * kSize};
          } else {
            b.next_x = {static_cast<const T*>(p.x) + (image * x_plane + rows.first * p.w) * p.c + from,
                        (rows.last - rows.first) * p.w, p.c * kSize, (to - from) * kSize};
            b.next_dy = {static_cast<const T*>(p.y) + (image * dy_plane + q0 * p.q) * p.k + k0, (q1 - q0) * p.q,
                         p.k * kSize, (k1 - k0) * kSize};
          }
          if (plan.fetches_pixels) {
            const int64_t calls = (v1 - v0) * (p1 - p0) * ceil_div(p.q, kMostPixels);
            b.pixels_x = {b.next_x, calls}, b.pixels_dy = {b.next_dy, calls};
            b.next_x = b.next_dy = {};
          }
        }
        for (int64_t v = v0; v < v1; ++v) {
          const int64_t c0 = plan.inputs.first(vectors, v), k0 = vectors.start(v);
          const T* const x = static_cast<const T*>(p.x) + n * x_plane * p.c;
          const T* const dy = static_cast<const T*>(p.y) + n * dy_plane * p.k;
          if constexpr (__is_same(X, C)) {
            if (!plan.in_place) {
              const auto [h0, h1] = plan.input_rows(p, p0, p1);
              const int64_t x0 = h0 * p.w, x1 = h1 * p.w, span = plan.inputs.last(vectors, v) - c0;
              if (nchw) {
                gather_planes(x + c0 * x_plane, x_plane, x0, x1, span, p.c - c0, x_held, plan.pitch);
                gather_planes(dy + k0 * dy_plane, dy_plane, p0 * p.q, p1 * p.q, vectors.part, p.k - k0, dy_held,
                              lanes<C>);
              } else {
                gather_channels(x + c0, p.c, x0, x1, span, p.c - c0, x_held, plan.pitch);
                gather_channels(dy + k0, p.k, p0 * p.q, p1 * p.q, vectors.part, p.k - k0, dy_held, lanes<C>);
              }
              b.x = x_held - h0 * b.x_row, b.dy = dy_held - p0 * b.dy_row;
            }
          }
          if constexpr (__is_same(X, T)) {
            if (plan.in_place) b.x = x + c0, b.dy = dy + k0;
          }
          b.picks = plan.picks.vector(v);
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
      const double* const total = totals.data + v * size;
      for (int64_t slice = 1; slice < slices; ++slice) {
        const double* const more = total + slice * vectors.count * size;
        for (int64_t i = 0; i < size; ++i) totals.data[v * size + i] += more[i];
      }
      T* const dw = static_cast<T*>(p.weight) + vectors.start(v) * p.weight_stride[0];
      for (int64_t t = 0; t < per_filter * taps; ++t) {
        T* const to =
            dw + t / taps * p.weight_stride[1] + t % taps / p.s * p.weight_stride[2] + t % p.s * p.weight_stride[3];
        for (int64_t l = vectors.shared(v); l < vectors.part; ++l)
          store_scalar(to + l * p.weight_stride[0], static_cast<C>(total[t * lanes<C> + l]));
      }
    }
  }
}

// ---- Passes ----------------------------------------------------------------------------------------------------------

// Whether channels_last images may be read where they lie. What wider groups read many times is converted once, and the
// portable level has no kernels for the other types.
template <class T, bool kGroups>
constexpr bool kReadsInPlace = __is_same(T, compute_t<T>) || !(kGroups || kFewKernels<compute_t<T>>);

// kGroups: any groups. Without, for depthwise convolution.
template <class T, bool kGroups>
void filter(const Conv2dParams& p, bool transposed) {
  if (p.n * p.c * p.k == 0) return;
  if constexpr (kReadsInPlace<T, kGroups>) {
    if (p.layout == Layout::nhwc) return filter_nhwc<T, kGroups>(p, transposed);
  }
  filter_held<T, kGroups>(p, transposed);
}

template <class T, bool kGroups>
void correlate_all(const Conv2dParams& p) {
  if constexpr (kReadsInPlace<T, kGroups>) {
    if (p.layout == Layout::nhwc) return correlate_images<T, T, kGroups>(p);
  }
  correlate_images<T, compute_t<T>, kGroups>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
