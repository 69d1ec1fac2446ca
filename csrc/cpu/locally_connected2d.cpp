// Locally connected layer: at each output position a small matrix product of its own filters [K, C R S] with the
// patches of the images below it. The filters are read once and decide the time; patches and results stay in L1 and L2.
// Work is cut by output position (and by channel where positions are few).
//
// Few images: their patches are gathered into rows of the compute type, and vectors run along the filters. From kLeast
// images on, forward and the input's gradient turn the images first, so that the lanes of a vector are images: sums need
// no adding of lanes, patches no gathering.
#include <omp.h>

#include "ops/locally_connected2d.h"

#include "common/scratch.h"
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
    for (int k = 0; k < kFilters; ++k) sum = fma(load_n(filters + k * length + i, part), broadcast<vec<C>>(dy[k]), sum);
    store(patch + i, sum);
  }
}

// The gradients of kFilters filters: sums over the images.
template <int kFilters, class T>
[[gnu::always_inline]] inline void filter_gradients(const compute_t<T>* patches, int64_t images, int64_t row,
                                                    const compute_t<T>* dy, int64_t dy_row, int64_t length, T* out) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < length; i += lanes<C>) {
    vec<C> sum[kFilters] = {};
    for (int64_t n = 0; n < images; ++n) {
      const vec<C> v = load(patches + n * row + i);
      for (int k = 0; k < kFilters; ++k) sum[k] = fma(v, broadcast<vec<C>>(dy[n * dy_row + k]), sum[k]);
    }
    const int part = static_cast<int>(min64(length - i, lanes<C>));
    for (int k = 0; k < kFilters; ++k) store_n(out + k * length + i, sum[k], part);
  }
}

template <class T>
void weight_grad(const Params& p) {
  using C = compute_t<T>;
  const int64_t length = p.c * p.r * p.s, row = locally_connected2d_row(p), positions = p.p * p.q;
  const int64_t filters = positions >= 64 ? p.k : 16, parts = ceil_div(p.k, filters);
  const Strides step = strides(p.layout, p.k, p.p, p.q);
  const T* const dy = static_cast<const T*>(p.dy);
  T* const dw = static_cast<T*>(p.dw);
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
    for (; k + 4 <= k1; k += 4) filter_gradients<4, T>(patches, p.n, row, own_dy + k, p.k, length, out + k * length);
    for (; k < k1; ++k) filter_gradients<1, T>(patches, p.n, row, own_dy + k, p.k, length, out + k * length);
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

// [group of kLanes images][height][width][channel][lane], in the compute type, as far as the windows reach, with the
// padding.
template <class C, int kLanes>
struct Turned {
  const Params& p;
  int64_t groups, h, w;
  Scratch<C> all;

  explicit Turned(const Params& p)
      : p(p),
        groups(ceil_div(p.n, int64_t{kLanes})),
        h((p.p - 1) * p.stride_h + (p.r - 1) * p.dilation_h + 1),
        w((p.q - 1) * p.stride_w + (p.s - 1) * p.dilation_w + 1),
        all(groups * h * w * p.c * kLanes) {}
  Strides step() const { return {h * w * p.c * kLanes, kLanes, w * p.c * kLanes, p.c * kLanes}; }
  C* row(int64_t group, int64_t y) const { return all.data + (group * h + y) * w * p.c * kLanes; }
  // Calls f(element here, element of `images`) for a row; null for what lies outside of the image.
  template <class T, class Function>
  void for_row(T* images, int64_t group, int64_t y, const Function& f) const {
    const Strides from = strides(p.layout, p.c, p.h, p.w);
    C* to = row(group, y);
    const int64_t first = group * kLanes, count = min64(p.n - first, kLanes), ih = y - p.pad_h;
    for (int64_t x = 0; x < w; ++x) {
      const int64_t iw = x - p.pad_w;
      const bool inside = ih >= 0 && ih < p.h && iw >= 0 && iw < p.w;
      T* const pixel = inside ? images + first * from.n + ih * from.h + iw * from.w : nullptr;
      for (int64_t c = 0; c < p.c; ++c, to += kLanes)
        for (int lane = 0; lane < kLanes; ++lane)
          f(to[lane], pixel && lane < count ? pixel + lane * from.n + c * from.c : nullptr);
    }
  }
};

template <int kFilters, class T>
[[gnu::always_inline]] inline void sums_of_filters(const T* filters, int64_t length, const int64_t* offsets,
                                                   const compute_t<T>* corner, vec<compute_t<T>>* total) {
  using C = compute_t<T>;
  for (int k = 0; k < kFilters; ++k) total[k] = vec<C>{};
  for (int64_t begin = 0; begin < length; begin += kFlush) {
    vec<C> sum[kFilters] = {};
    for (int64_t line = begin; line < min64(begin + kFlush, length); line += kLine<T>) {
      for (int k = 0; k < kFilters; ++k) __builtin_prefetch(filters + (kFilters + k) * length + line);
      for (int64_t i = line; i < min64(line + kLine<T>, length); ++i) {
        const vec<C> v = load(corner + offsets[i]);
        for (int k = 0; k < kFilters; ++k)
          sum[k] = fma(broadcast<vec<C>>(static_cast<C>(load_scalar(filters[k * length + i]))), v, sum[k]);
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
  const Strides step = strides(p.layout, p.k, p.p, p.q);
  const T *const weight = static_cast<const T*>(p.weight), *const bias = static_cast<const T*>(p.bias);
  T* const y = static_cast<T*>(p.y);
  const Turned<C, lanes<C>> images(p);
  const Scratch<int64_t> offsets(length);
  list_offsets(p, images.step(), offsets.data);
#pragma omp parallel num_threads(p.threads)
  {
#pragma omp for schedule(static)
    for (int64_t at = 0; at < images.groups * images.h; ++at)
      images.for_row(static_cast<const T*>(p.x), at / images.h, at % images.h,
                     [](C& here, const T* there) { here = there ? static_cast<C>(load_scalar(*there)) : C(0); });
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < positions * parts; ++unit) {
      const int64_t position = unit / parts, k0 = unit % parts * filters, k1 = min64(k0 + filters, p.k);
      const int64_t pp = position / p.q, qq = position % p.q;
      const T* const own = weight + position * p.k * length;
      for (int64_t group = 0; group < images.groups; ++group) {
        const C* const corner = images.row(group, pp * p.stride_h) + qq * p.stride_w * p.c * lanes<C>;
        const int64_t first = group * lanes<C>, count = min64(p.n - first, lanes<C>);
        const auto put = [&](int64_t k, vec<C> total) {
          if (bias) total += static_cast<C>(load_scalar(bias[p.bias_per_position ? k * positions + position : k]));
          T* const to = y + first * step.n + k * step.c + pp * step.h + qq * step.w;
          for (int lane = 0; lane < count; ++lane) store_scalar(to + lane * step.n, total[lane]);
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
  }
}

// Of kCount elements of a patch: sums over the filters.
template <int kCount, class T>
[[gnu::always_inline]] inline void sums_over_filters(const T* filters, int64_t length, int64_t count,
                                                     const compute_t<T>* dy, vec<compute_t<T>>* total) {
  using C = compute_t<T>;
  for (int j = 0; j < kCount; ++j) total[j] = vec<C>{};
  for (int64_t begin = 0; begin < count; begin += kFlush) {
    vec<C> sum[kCount] = {};
    for (int64_t k = begin; k < min64(begin + kFlush, count); ++k) {
      const vec<C> v = load(dy + k * lanes<C>);
      for (int j = 0; j < kCount; ++j)
        sum[j] = fma(broadcast<vec<C>>(static_cast<C>(load_scalar(filters[k * length + j]))), v, sum[j]);
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
  const Strides step = strides(p.layout, p.k, p.p, p.q);
  const T *const weight = static_cast<const T*>(p.weight), *const dy = static_cast<const T*>(p.dy);
  const Turned<C, kLanes> images(p);
  const Scratch<int64_t> offsets(length);
  list_offsets(p, images.step(), offsets.data);
  const ScratchPieces scratch(p.threads, (p.k * kLanes + row) * static_cast<int64_t>(sizeof(C)));
  const int64_t rows = ceil_div(images.h, int64_t{p.threads});
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t band = 0; band < p.threads; ++band) {
    const int64_t h0 = band * rows, h1 = min64(h0 + rows, images.h), reach = (p.r - 1) * p.dilation_h;
    if (h0 >= h1) continue;
    C* const patch = static_cast<C*>(scratch.piece(omp_get_thread_num()));
    C* const own_dy = patch + row;
    for (int64_t group = 0; group < images.groups; ++group)
      std::memset(images.row(group, h0), 0, sizeof(C) * static_cast<size_t>((h1 - h0) * images.step().h));
    for (int64_t pp = ceil_div(max64(h0 - reach, 0), p.stride_h); pp < p.p && pp * p.stride_h < h1; ++pp) {
      const int64_t top = pp * p.stride_h;
      const bool whole = top >= h0 && top + reach < h1;
      for (int64_t position = pp * p.q; position < (pp + 1) * p.q; ++position) {
        const T* const own = weight + position * p.k * length;
        for (int64_t group = 0; group < images.groups; ++group) {
          const int64_t first = group * kLanes, count = min64(p.n - first, kLanes);
          const T* const from = dy + first * step.n + pp * step.h + position % p.q * step.w;
          for (int64_t k = 0; k < p.k; ++k)
            for (int lane = 0; lane < kLanes; ++lane)
              own_dy[k * kLanes + lane] =
                  lane < count ? static_cast<C>(load_scalar(from[lane * step.n + k * step.c])) : C(0);
          C* const corner = images.row(group, top) + position % p.q * p.stride_w * p.c * kLanes;
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
            int64_t i = 0;
            for (; i + kSums <= length; i += kSums) {
              sums_over_filters<kSums, T>(own + i, length, p.k, own_dy, total);
              for (int j = 0; j < kSums; ++j) add(i + j, total[j]);
            }
            for (; i < length; ++i) {
              sums_over_filters<1, T>(own + i, length, p.k, own_dy, total);
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
  for (int64_t at = 0; at < images.groups * images.h; ++at)
    images.for_row(static_cast<T*>(p.dx), at / images.h, at % images.h, [](C& here, T* there) {
      if (there) store_scalar(there, here);
    });
}

template <class T>
void forward(const Params& p) {
  p.n >= kLeast<compute_t<T>> ? forward_of_images<T>(p) : forward_of_patches<T>(p);
}
template <class T>
void input_grad(const Params& p) {
  p.n >= kLeast<compute_t<T>> ? input_grad_as<T, lanes<compute_t<T>>>(p) : input_grad_as<T, 1>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(locally_connected2d_forward, LocallyConnected2dParams, forward)
CNNOPS_EXPORT(locally_connected2d_input_grad, LocallyConnected2dParams, input_grad)
CNNOPS_EXPORT(locally_connected2d_weight_grad, LocallyConnected2dParams, weight_grad)
