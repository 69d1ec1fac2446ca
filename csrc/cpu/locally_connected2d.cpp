// Locally connected layer: at each output position a small matrix product of its own filters [K, C R S] with the
// patches of the images below it. The filters are read once and decide the time; patches and results stay in L1 and L2.
// Work is cut by output position (and by channel where positions are few).
//
// Few images: their patches are gathered into rows of the compute type, and vectors run along the filters. From kLeast
// images on, the images are turned first, so that the lanes of a vector are images: sums need no adding of lanes, patches
// no gathering. Of 16 images in float32, arithmetic takes as long as the weights take from memory.
#include <omp.h>

#include "ops/locally_connected2d.h"

#include "common/scratch.h"
#include "cpu/simd/stream.h"
#include "cpu/simd/vec.h"

namespace cnnops::CNNOPS_ISA {
namespace {

using Params = LocallyConnected2dParams;

struct Strides {
  int64_t n, c, h, w;
};
Strides strides(Layout layout, int64_t c, int64_t h, int64_t w) {
  if (layout == Layout::nchw) return {c * h * w, h * w, w, 1};
  return {c * h * w, 1, w * c, c};
}

// Where the elements of a patch lie, from its first one, in the filters' order.
void list_offsets(const Params& p, const Strides& step, int64_t* offsets) {
  for (int64_t c = 0; c < p.c; ++c)
    for (int64_t r = 0; r < p.r; ++r)
      for (int64_t s = 0; s < p.s; ++s) *offsets++ = c * step.c + r * p.dilation_h * step.h + s * p.dilation_w * step.w;
}

// The patch of image n below position (pp, qq), in the filters' order; `row` is zero from C R S on.
template <class T>
void gather(const Params& p, const int64_t* offsets, int64_t n, int64_t pp, int64_t qq, compute_t<T>* row) {
  const Strides step = strides(p.layout, p.c, p.h, p.w);
  const int64_t h0 = pp * p.stride_h - p.pad_h, w0 = qq * p.stride_w - p.pad_w;
  const T* const image = static_cast<const T*>(p.x) + n * step.n;
  const int64_t end = locally_connected2d_row(p);
  int64_t i = 0;
  if (h0 >= 0 && w0 >= 0 && h0 + (p.r - 1) * p.dilation_h < p.h && w0 + (p.s - 1) * p.dilation_w < p.w) {
    const T* const corner = image + h0 * step.h + w0 * step.w;
    for (const int64_t length = p.c * p.r * p.s; i < length; ++i) row[i] = load_scalar(corner[offsets[i]]);
  } else {
    for (int64_t c = 0; c < p.c; ++c)
      for (int64_t r = 0; r < p.r; ++r)
        for (int64_t s = 0; s < p.s; ++s) {
          const int64_t h = h0 + r * p.dilation_h, w = w0 + s * p.dilation_w;
          const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
          row[i++] = inside ? load_scalar(image[c * step.c + h * step.h + w * step.w]) : compute_t<T>(0);
        }
  }
  for (; i < end; ++i) row[i] = 0;
}

// Products of kFilters filters with kImages patches.
template <int kFilters, int kImages, class T>
[[gnu::always_inline]] inline void products(const T* filters, int64_t length, const compute_t<T>* patches, int64_t row,
                                            compute_t<T> (*out)[kImages]) {
  using C = compute_t<T>;
  vec<C> sum[kFilters][kImages] = {};
  const auto add = [&](int64_t i, int part) __attribute__((always_inline)) {
    vec<C> f[kFilters];
    for (int k = 0; k < kFilters; ++k) f[k] = load_n(filters + k * length + i, part);
    for (int n = 0; n < kImages; ++n) {
      const vec<C> v = load(patches + n * row + i);
      for (int k = 0; k < kFilters; ++k) sum[k][n] = fma(f[k], v, sum[k][n]);
    }
  };
  int64_t i = 0;
  for (; i + lanes<C> <= length; i += lanes<C>) add(i, lanes<C>);
  if (i < length) add(i, static_cast<int>(length - i));
  for (int k = 0; k < kFilters; ++k)
    for (int n = 0; n < kImages; ++n) out[k][n] = sum_lanes<C>(sum[k][n]);
}

template <class T>
void forward_of_patches(const Params& p) {
  using C = compute_t<T>;
  const int64_t length = p.c * p.r * p.s, row = locally_connected2d_row(p), positions = p.p * p.q;
  const int64_t filters = positions >= 64 ? p.k : 16, parts = ceil_div(p.k, filters);
  const Strides step = strides(p.layout, p.k, p.p, p.q);
  const T *const weight = static_cast<const T*>(p.weight), *const bias = static_cast<const T*>(p.bias);
  T* const y = static_cast<T*>(p.y);
  const Scratch<int64_t> offsets(length);
  list_offsets(p, strides(p.layout, p.c, p.h, p.w), offsets.data);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < positions * parts; ++unit) {
    C* const patches = static_cast<C*>(p.workspace) + omp_get_thread_num() * p.n * row;
    const int64_t position = unit / parts, k0 = unit % parts * filters, k1 = min64(k0 + filters, p.k);
    const int64_t pp = position / p.q, qq = position % p.q;
    const T* const own = weight + position * p.k * length;
    const auto put = [&](int64_t n, int64_t k, C value) {
      if (bias) value += load_scalar(bias[p.bias_per_position ? k * positions + position : k]);
      store_scalar(&y[n * step.n + k * step.c + pp * step.h + qq * step.w], value);
    };
    const auto tile = [&]<int kFilters, int kImages>(int64_t n, int64_t k) {
      C out[kFilters][kImages];
      products<kFilters, kImages, T>(own + k * length, length, patches + n * row, row, out);
      for (int j = 0; j < kFilters; ++j)
        for (int i = 0; i < kImages; ++i) put(n + i, k + j, out[j][i]);
    };
    for (int64_t n = 0; n < p.n; ++n) gather<T>(p, offsets.data, n, pp, qq, patches + n * row);
    int64_t k = k0;
    for (; k + 2 <= k1; k += 2) {
      int64_t n = 0;
      for (; n + 4 <= p.n; n += 4) tile.template operator()<2, 4>(n, k);
      for (; n < p.n; ++n) tile.template operator()<2, 1>(n, k);
    }
    for (; k < k1; ++k)
      for (int64_t n = 0; n < p.n; ++n) tile.template operator()<1, 1>(n, k);
  }
}

// Adds kFilters filters, each times its gradient of y, to the gradient of a patch.
template <int kFilters, class T>
[[gnu::always_inline]] inline void add_filters(const T* filters, int64_t length, const compute_t<T>* dy,
                                               compute_t<T>* patch) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < length; i += lanes<C>) {
    const int part = static_cast<int>(min64(length - i, lanes<C>));
    vec<C> sum = load(patch + i);
    for (int k = 0; k < kFilters; ++k) sum = fma(load_n(filters + k * length + i, part), set1(dy[k]), sum);
    store(patch + i, sum);
  }
}

// The gradients of kFilters filters: sums over the images.
template <int kFilters, class T>
[[gnu::always_inline]] inline void filter_gradients(const compute_t<T>* patches, int64_t images, int64_t row,
                                                    const compute_t<T>* dy, int64_t dy_row, int64_t length, T* out,
                                                    bool stream) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < length; i += lanes<C>) {
    vec<C> sum[kFilters] = {};
    for (int64_t n = 0; n < images; ++n) {
      const vec<C> v = load(patches + n * row + i);
      for (int k = 0; k < kFilters; ++k) sum[k] = fma(v, set1(dy[n * dy_row + k]), sum[k]);
    }
    const int part = static_cast<int>(min64(length - i, lanes<C>));
    for (int k = 0; k < kFilters; ++k) store_output(out + k * length + i, sum[k], part, stream);
  }
}

template <class T>
void weight_grad_of_patches(const Params& p) {
  using C = compute_t<T>;
  const int64_t length = p.c * p.r * p.s, row = locally_connected2d_row(p), positions = p.p * p.q;
  const int64_t filters = positions >= 64 ? p.k : 16, parts = ceil_div(p.k, filters);
  const Strides step = strides(p.layout, p.k, p.p, p.q);
  const T* const dy = static_cast<const T*>(p.dy);
  T* const dw = static_cast<T*>(p.dw);
  const bool stream = positions * p.k * length * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
  const Scratch<int64_t> offsets(length);
  list_offsets(p, strides(p.layout, p.c, p.h, p.w), offsets.data);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < positions * parts; ++unit) {
    C* const patches = static_cast<C*>(p.workspace) + omp_get_thread_num() * p.n * (row + p.k);
    C* const own_dy = patches + p.n * row;
    const int64_t position = unit / parts, k0 = unit % parts * filters, k1 = min64(k0 + filters, p.k);
    const int64_t pp = position / p.q, qq = position % p.q;
    for (int64_t n = 0; n < p.n; ++n) {
      gather<T>(p, offsets.data, n, pp, qq, patches + n * row);
      for (int64_t k = k0; k < k1; ++k)
        own_dy[n * p.k + k] = load_scalar(dy[n * step.n + k * step.c + pp * step.h + qq * step.w]);
    }
    T* const out = dw + position * p.k * length;
    int64_t k = k0;
    for (; k + 4 <= k1; k += 4)
      filter_gradients<4, T>(patches, p.n, row, own_dy + k, p.k, length, out + k * length, stream);
    for (; k < k1; ++k) filter_gradients<1, T>(patches, p.n, row, own_dy + k, p.k, length, out + k * length, stream);
    if (stream) end_streaming();
  }
}

// ------------------------------------------------------------------------------------------- the lanes are the images

// Images from which on most lanes of a vector are used.
template <class C>
constexpr int64_t kLeast = lanes<C> / 2;
static_assert(kLeast<float> <= kLocallyConnectedImages);
// Terms that are added in a register before the sum is added to the sums before it.
constexpr int64_t kFlush = 256;
// Elements of a cache line.
template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
// Sums in registers.
constexpr int kSums = lanes<float> >= 16 ? 16 : 8;

// rows[i][j] <-> rows[j][i]: as many rounds of zipping the halves of the rows as the number of lanes has bits.
template <class C>
[[gnu::always_inline]] inline void transpose_square(vec<C>* rows) {
  constexpr int kHalf = lanes<C> / 2;
#pragma GCC unroll 4
  for (int round = 1; round <= kHalf; round *= 2) {
    vec<C> next[2 * kHalf];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = zip_low(rows[i], rows[i + kHalf]);
      next[2 * i + 1] = zip_high(rows[i], rows[i + kHalf]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 2 * kHalf; ++i) rows[i] = next[i];
  }
}

// [group of kLanes images][height][width][channel][lane], in the compute type, of images with a margin of zeros.
template <class C, int kLanes>
struct Turned {
  Strides from;
  Layout layout;
  int64_t n, c, image_h, image_w, pad_h, pad_w, h, w, groups;
  Scratch<C> all;

  Turned(Layout layout, int64_t n, int64_t c, int64_t image_h, int64_t image_w, int64_t pad_h, int64_t pad_w, int64_t h,
         int64_t w)
      : from(strides(layout, c, image_h, image_w)),
        layout(layout),
        n(n),
        c(c),
        image_h(image_h),
        image_w(image_w),
        pad_h(pad_h),
        pad_w(pad_w),
        h(h),
        w(w),
        groups(ceil_div(n, int64_t{kLanes})),
        all(groups * h * w * c * kLanes) {}
  // Of x, as far as the windows reach; of y.
  static Turned input(const Params& p) {
    return Turned(p.layout, p.n, p.c, p.h, p.w, p.pad_h, p.pad_w, (p.p - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1,
                  (p.q - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1);
  }
  static Turned output(const Params& p) { return Turned(p.layout, p.n, p.k, p.p, p.q, 0, 0, p.p, p.q); }

  Strides step() const { return {h * w * c * kLanes, kLanes, w * c * kLanes, c * kLanes}; }
  int64_t rows() const { return groups * h; }
  C* row(int64_t group, int64_t y) const { return all.data + (group * h + y) * w * c * kLanes; }
  C* pixel(int64_t group, int64_t y, int64_t x) const { return row(group, y) + x * c * kLanes; }

  // Row `at` of rows() from the images.
  template <class T>
  void take(const T* images, int64_t at) const {
    C* const to = row(0, at);
    std::memset(static_cast<void*>(to), 0, sizeof(C) * static_cast<size_t>(step().h));
    for_blocks(at, [&](int64_t there, int count, int part, int64_t here, int64_t pitch) __attribute__((always_inline)) {
      if constexpr (kLanes == 1) {
        to[here] = static_cast<C>(load_scalar(images[there]));
      } else {
        vec<C> block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = i < count ? load_n(images + there + i * from.n, part) : vec<C>{};
        transpose_square<C>(block);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j)
          if (j < part) store(to + here + j * pitch, block[j]);
      }
    });
  }
  // And back.
  template <class T>
  void give(T* images, int64_t at) const {
    const C* const turned = row(0, at);
    for_blocks(at, [&](int64_t there, int count, int part, int64_t here, int64_t pitch) __attribute__((always_inline)) {
      if constexpr (kLanes == 1) {
        store_scalar(&images[there], turned[here]);
      } else {
        vec<C> block[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) block[j] = j < part ? load(turned + here + j * pitch) : vec<C>{};
        transpose_square<C>(block);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          if (i < count) store_n(images + there + i * from.n, block[i], part);
      }
    });
  }

 private:
  // Calls f(element of the first image, images, elements side by side there, element of the row here, how far apart they
  // are here).
  template <class Function>
  void for_blocks(int64_t at, const Function& f) const {
    const int64_t first = at / h * kLanes, ih = at % h - pad_h;
    if (ih < 0 || ih >= image_h) return;
    const int count = static_cast<int>(min64(n - first, kLanes));
    const int64_t x0 = min64(pad_w, w), x1 = min64(pad_w + image_w, w), corner = first * from.n + ih * from.h;
    if (layout == Layout::nchw) {
      for (int64_t k = 0; k < c; ++k)
        for (int64_t x = x0; x < x1; x += kLanes)
          f(corner + k * from.c + (x - pad_w), count, static_cast<int>(min64(x1 - x, kLanes)), (x * c + k) * kLanes,
            c * kLanes);
    } else {
      for (int64_t x = x0; x < x1; ++x)
        for (int64_t k = 0; k < c; k += kLanes)
          f(corner + (x - pad_w) * from.w + k, count, static_cast<int>(min64(c - k, kLanes)), (x * c + k) * kLanes,
            kLanes);
    }
  }
};

// Weights as the compute type has them: in place, or copies of a few.
template <class T>
constexpr bool kCopiesWeights = !std::is_same_v<T, compute_t<T>>;

// Sums of kFilters filters, over the patch of a vector of images at `corner`; the next filters are fetched meanwhile.
template <int kFilters, class T>
[[gnu::always_inline]] inline void sums_of_filters(const T* filters, int64_t length, const int64_t* offsets,
                                                   const compute_t<T>* corner, vec<compute_t<T>>* total) {
  using C = compute_t<T>;
  constexpr int64_t kPiece = 32;
  for (int k = 0; k < kFilters; ++k) total[k] = vec<C>{};
  for (int64_t begin = 0; begin < length; begin += kFlush) {
    vec<C> sum[kFilters] = {};
    for (int64_t at = begin, end; at < min64(begin + kFlush, length); at = end) {
      end = min64(at + kPiece, length);
      for (int k = 0; k < kFilters; ++k)
        for (int64_t i = at; i < end; i += kLine<T>) __builtin_prefetch(filters + (kFilters + k) * length + i);
      const C* piece;
      int64_t pitch = length;
      C copy[kCopiesWeights<T> ? kFilters * kPiece : 1];
      if constexpr (kCopiesWeights<T>) {
        for (int k = 0; k < kFilters; ++k)
          for (int64_t i = at; i < end; i += lanes<C>)
            store(copy + k * kPiece + (i - at),
                  load_n(filters + k * length + i, static_cast<int>(min64(end - i, lanes<C>))));
        piece = copy, pitch = kPiece;
      } else {
        piece = filters + at;
      }
#pragma GCC unroll 2
      for (int64_t i = 0; i < end - at; ++i) {
        const vec<C> v = load(corner + offsets[at + i]);
#pragma GCC unroll 16
        for (int k = 0; k < kFilters; ++k) sum[k] = fma(set1(piece[k * pitch + i]), v, sum[k]);
      }
    }
    for (int k = 0; k < kFilters; ++k) total[k] += sum[k];
  }
}

template <class T>
void forward_of_images(const Params& p) {
  using C = compute_t<T>;
  constexpr int kFilters = 8;
  const int64_t length = p.c * p.r * p.s, positions = p.p * p.q;
  const int64_t filters = positions >= 64 ? p.k : 16, parts = ceil_div(p.k, filters);
  const T *const weight = static_cast<const T*>(p.weight), *const bias = static_cast<const T*>(p.bias);
  const auto images = Turned<C, lanes<C>>::input(p), results = Turned<C, lanes<C>>::output(p);
  const Scratch<int64_t> offsets(length);
  list_offsets(p, images.step(), offsets.data);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t at = 0; at < images.rows(); ++at) images.take(static_cast<const T*>(p.x), at);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < positions * parts; ++unit) {
      const int64_t position = unit / parts, k0 = unit % parts * filters, k1 = min64(k0 + filters, p.k);
      const int64_t pp = position / p.q, qq = position % p.q;
      const T* const own = weight + position * p.k * length;
      for (int64_t group = 0; group < images.groups; ++group) {
        const C* const corner = images.pixel(group, pp * p.stride_h, qq * p.stride_w);
        C* const to = results.pixel(group, pp, qq);
        const auto put = [&](int64_t k, vec<C> total) {
          if (bias) total += static_cast<C>(load_scalar(bias[p.bias_per_position ? k * positions + position : k]));
          store(to + k * lanes<C>, total);
        };
        vec<C> total[kFilters];
        int64_t k = k0;
        for (; k + kFilters <= k1; k += kFilters) {
          sums_of_filters<kFilters, T>(own + k * length, length, offsets.data, corner, total);
          for (int j = 0; j < kFilters; ++j) put(k + j, total[j]);
        }
        for (; k < k1; ++k) {
          sums_of_filters<1, T>(own + k * length, length, offsets.data, corner, total);
          put(k, total[0]);
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t at = 0; at < results.rows(); ++at) results.give(static_cast<T*>(p.y), at);
  }
}

// Of kCount elements of a patch: sums over the filters. What the next position's filters have for each step is fetched: here
// every line is of another filter, which the processor does not foresee.
template <int kCount, class T>
[[gnu::always_inline]] inline void sums_over_filters(const T* filters, int64_t length, int64_t count,
                                                     const compute_t<T>* dy, const T* next, vec<compute_t<T>>* total) {
  using C = compute_t<T>;
  constexpr int64_t kPiece = 32;
  for (int j = 0; j < kCount; ++j) total[j] = vec<C>{};
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    vec<C> sum[kCount] = {};
    for (int64_t at = begin, end; at < min64(begin + kFlush, count); at = end) {
      end = min64(at + kPiece, count);
      const C* piece;
      int64_t pitch = length;
      C copy[kCopiesWeights<T> ? kCount * kPiece : 1];
      if constexpr (kCopiesWeights<T>) {
        for (int64_t k = at; k < end; ++k)
#pragma GCC unroll 4
          for (int j = 0; j < kCount; j += lanes<C>) {
            const int part = kCount - j < lanes<C> ? kCount - j : lanes<C>;
            store_n(copy + (k - at) * kCount + j, load_n(filters + k * length + j, part), part);
          }
        piece = copy, pitch = kCount;
      } else {
        piece = filters + at * length;
      }
      for (int64_t k = 0; k < end - at; ++k) {
        __builtin_prefetch(next + (at + k) * kCount, 0, 2);
        const vec<C> v = load(dy + (at + k) * lanes<C>);
#pragma GCC unroll 16
        for (int j = 0; j < kCount; ++j) sum[j] = fma(set1(piece[k * pitch + j]), v, sum[j]);
      }
    }
    for (int j = 0; j < kCount; ++j) total[j] += sum[j];
  }
}

// A thread has rows of the input to itself. Positions on the border between two threads are worked out by both, each for
// its own rows: whatever the number of threads, an element is the sum over the same positions in the same order.
// kLanes is 1, and vectors run along the filters, or lanes<C>.
template <class T, int kLanes>
void input_grad_as(const Params& p) {
  using C = compute_t<T>;
  const int64_t length = p.c * p.r * p.s, row = locally_connected2d_row(p);
  const T* const weight = static_cast<const T*>(p.weight);
  const auto images = Turned<C, kLanes>::input(p), gradients = Turned<C, kLanes>::output(p);
  const Scratch<int64_t> offsets(length);
  list_offsets(p, images.step(), offsets.data);
  const ScratchPieces scratch(p.threads, row * static_cast<int64_t>(sizeof(C)));
  const int64_t rows = ceil_div(images.h, int64_t{p.threads});
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t at = 0; at < gradients.rows(); ++at) gradients.take(static_cast<const T*>(p.dy), at);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t band = 0; band < p.threads; ++band) {
    const int64_t h0 = band * rows, h1 = min64(h0 + rows, images.h), reach = (p.r - 1) * p.dilation_h;
    if (h0 >= h1) continue;
    C* const patch = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    for (int64_t group = 0; group < images.groups; ++group)
      std::memset(images.row(group, h0), 0, sizeof(C) * static_cast<size_t>((h1 - h0) * images.step().h));
    for (int64_t pp = ceil_div(max64(h0 - reach, 0), p.stride_h); pp < p.p && pp * p.stride_h < h1; ++pp) {
      const int64_t top = pp * p.stride_h;
      const bool whole = top >= h0 && top + reach < h1;
      for (int64_t position = pp * p.q; position < (pp + 1) * p.q; ++position) {
        const T* const own = weight + position * p.k * length;
        for (int64_t group = 0; group < images.groups; ++group) {
          const C* const own_dy = gradients.pixel(group, pp, position % p.q);
          C* const corner = images.pixel(group, top, position % p.q * p.stride_w);
          const auto mine = [&](int64_t i) {
            const int64_t h = top + i / p.s % p.r * p.dilation_h;
            return whole || (h >= h0 && h < h1);
          };
          if constexpr (kLanes == 1) {
            std::memset(patch, 0, sizeof(C) * static_cast<size_t>(row));
            int64_t k = 0;
            for (; k + 4 <= p.k; k += 4) add_filters<4, T>(own + k * length, length, own_dy + k, patch);
            for (; k < p.k; ++k) add_filters<1, T>(own + k * length, length, own_dy + k, patch);
            for (int64_t i = 0; i < length; ++i)
              if (mine(i)) corner[offsets.data[i]] += patch[i];
          } else {
            const auto add = [&](int64_t i, vec<C> sum) {
              C* const to = corner + offsets.data[i];
              if (mine(i)) store(to, load(to) + sum);
            };
            vec<C> total[kSums];
            const T* const next = own + p.k * length;
            int64_t i = 0;
            for (; i + kSums <= length; i += kSums) {
              sums_over_filters<kSums, T>(own + i, length, p.k, own_dy, next + i * p.k, total);
              for (int j = 0; j < kSums; ++j) add(i + j, total[j]);
            }
            for (; i < length; ++i) {
              sums_over_filters<1, T>(own + i, length, p.k, own_dy, next + i * p.k, total);
              add(i, total[0]);
            }
          }
        }
      }
    }
  }
  if (images.h < p.pad_h + p.h || images.w < p.pad_w + p.w)  // what no window reaches
    std::memset(p.dx, 0, sizeof(T) * static_cast<size_t>(p.n * p.c * p.h * p.w));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t at = 0; at < images.rows(); ++at) images.give(static_cast<T*>(p.dx), at);
}

// A line's worth of elements (the last of a filter may be fewer), around the caches if `stream`.
template <class T>
[[gnu::always_inline]] inline void put_line(T* to, const T* from, int64_t count, bool stream) {
#if CNNOPS_ISA_avx512
  if (count == kLine<T>) {
    const __m512i line = _mm512_loadu_si512(from);
    if (stream && reinterpret_cast<uintptr_t>(to) % 64 == 0)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
    else
      _mm512_storeu_si512(to, line);
    return;
  }
#endif
  for (int64_t i = 0; i < count; i += lanes<compute_t<T>>) {
    const int part = static_cast<int>(min64(count - i, lanes<compute_t<T>>));
    store_output(to + i, load_n(from + i, part), part, stream);
  }
}

// Of all images, for kLine<T> elements of the patches at `corner` and a vector of filters at a time: products of the filters'
// gradients, by vectors of filters, with single elements of patches. Turned, these are pieces of a filter.
template <class T>
void weight_grad_of_images(const Params& p) {
  using C = compute_t<T>;
  constexpr int kLanes = lanes<C>;
  constexpr int64_t kWidth = kLine<T>;
  const int64_t length = p.c * p.r * p.s, positions = p.p * p.q, blocks = ceil_div(length, kWidth);
  const int64_t parts = positions >= 64 ? 1 : min64(blocks, 16), vectors = ceil_div(p.k, int64_t{kLanes});
  T* const dw = static_cast<T*>(p.dw);
  const bool stream = positions * p.k * length * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
  const auto images = Turned<C, kLanes>::input(p), gradients = Turned<C, kLanes>::output(p);
  const int64_t groups = images.groups;
  const Scratch<int64_t> offsets(length);
  list_offsets(p, images.step(), offsets.data);
  struct Piece {
    C *dy, *patch;  // [vector of filters][image][filter]; [group of images][element][image]
    T* rows;        // [filter][element]
  };
  const ThreadScratch scratch(p.threads, [&](Arena& arena) {
    Piece s;
    s.dy = arena.take<C>(vectors * groups * kLanes * kLanes);
    s.patch = arena.take<C>(groups * kWidth * kLanes);
    s.rows = arena.take<T>(kLanes * kWidth);
    return s;
  });
#pragma omp parallel num_threads(p.threads)
  {
    const Piece s = scratch.mine();
#pragma omp for schedule(static)
    for (int64_t at = 0; at < images.rows(); ++at) images.take(static_cast<const T*>(p.x), at);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < gradients.rows(); ++at) gradients.take(static_cast<const T*>(p.dy), at);
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < positions * parts; ++unit) {
      const int64_t position = unit / parts, pp = position / p.q, qq = position % p.q;
      const int64_t begin = unit % parts * blocks / parts, end = (unit % parts + 1) * blocks / parts;
      for (int64_t vector = 0; vector < vectors; ++vector)
        for (int64_t group = 0; group < groups; ++group) {
          const C* const from = gradients.pixel(group, pp, qq) + vector * kLanes * kLanes;
          vec<C> block[kLanes];
#pragma GCC unroll 16
          for (int k = 0; k < kLanes; ++k) block[k] = vector * kLanes + k < p.k ? load(from + k * kLanes) : vec<C>{};
          transpose_square<C>(block);
#pragma GCC unroll 16
          for (int n = 0; n < kLanes; ++n) store(s.dy + ((vector * groups + group) * kLanes + n) * kLanes, block[n]);
        }
      for (int64_t i = begin * kWidth; i < min64(end * kWidth, length); i += kWidth) {
        const int64_t width = min64(length - i, kWidth);
        for (int64_t group = 0; group < groups; ++group) {
          const C* const corner = images.pixel(group, pp * p.stride_h, qq * p.stride_w);
          for (int64_t j = 0; j < kWidth; ++j)
            store(s.patch + (group * kWidth + j) * kLanes, j < width ? load(corner + offsets.data[i + j]) : vec<C>{});
        }
        for (int64_t vector = 0; vector < vectors; ++vector) {
          for (int64_t j0 = 0; j0 < kWidth; j0 += kLanes) {
            vec<C> total[kLanes] = {};
            for (int64_t group = 0; group < groups; ++group) {
              const C* const own_dy = s.dy + (vector * groups + group) * kLanes * kLanes;
              const C* const patch = s.patch + (group * kWidth + j0) * kLanes;
              for (int64_t n = 0; n < min64(p.n - group * kLanes, kLanes); ++n) {
                const vec<C> g = load(own_dy + n * kLanes);
#pragma GCC unroll 16
                for (int j = 0; j < kLanes; ++j) total[j] = fma(set1(patch[j * kLanes + n]), g, total[j]);
              }
            }
            transpose_square<C>(total);
#pragma GCC unroll 16
            for (int k = 0; k < kLanes; ++k) store(s.rows + k * kWidth + j0, total[k]);
          }
          for (int64_t k = 0; k < min64(p.k - vector * kLanes, kLanes); ++k)
            put_line(dw + (position * p.k + vector * kLanes + k) * length + i, s.rows + k * kWidth, width, stream);
        }
      }
      if (stream) end_streaming();
    }
  }
}

template <class T>
void forward(const Params& p) {
  p.n >= kLeast<compute_t<T>> ? forward_of_images<T>(p) : forward_of_patches<T>(p);
}
template <class T>
void input_grad(const Params& p) {
  p.n >= kLeast<compute_t<T>> ? input_grad_as<T, lanes<compute_t<T>>>(p) : input_grad_as<T, 1>(p);
}
template <class T>
void weight_grad(const Params& p) {
  p.n >= kLeast<compute_t<T>> ? weight_grad_of_images<T>(p) : weight_grad_of_patches<T>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(locally_connected2d_forward, LocallyConnected2dParams, forward)
CNNOPS_EXPORT(locally_connected2d_input_grad, LocallyConnected2dParams, input_grad)
CNNOPS_EXPORT(locally_connected2d_weight_grad, LocallyConnected2dParams, weight_grad)
