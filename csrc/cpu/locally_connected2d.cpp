// Locally connected layer: at each output position a small matrix product of its own filters [K, C R S] with the
// patches of the images below it, which are gathered into rows of the compute type. The filters are read once and
// decide the time; patches and results stay in L1 and L2. Work is cut by output position (and by channel where
// positions are few). The input's gradient is made of the patches' gradients, kept for all positions and then added up
// in a fixed order.
#include <omp.h>

#include "ops/locally_connected2d.h"

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

// The patch of image n below position (pp, qq), in the filters' order; `row` is zero from C R S on.
template <class T>
void gather(const Params& p, int64_t n, int64_t pp, int64_t qq, compute_t<T>* row) {
  const Strides step = strides(p.layout, p.c, p.h, p.w);
  const int64_t h0 = pp * p.stride_h - p.pad_h, w0 = qq * p.stride_w - p.pad_w;
  const T* const image = static_cast<const T*>(p.x) + n * step.n;
  const int64_t end = locally_connected2d_row(p);
  int64_t i = 0;
  if (h0 >= 0 && w0 >= 0 && h0 + (p.r - 1) * p.dilation_h < p.h && w0 + (p.s - 1) * p.dilation_w < p.w) {
    const T* const corner = image + h0 * step.h + w0 * step.w;
    const int64_t step_r = step.h * p.dilation_h, step_s = step.w * p.dilation_w;
    for (int64_t c = 0; c < p.c; ++c)
      for (int64_t r = 0; r < p.r; ++r)
        for (int64_t s = 0; s < p.s; ++s) row[i++] = load_scalar(corner[c * step.c + r * step_r + s * step_s]);
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
void forward(const Params& p) {
  using C = compute_t<T>;
  const int64_t length = p.c * p.r * p.s, row = locally_connected2d_row(p), positions = p.p * p.q;
  const int64_t filters = positions >= 64 ? p.k : 16, parts = ceil_div(p.k, filters);
  const int64_t group = min64(p.n, kLocallyConnectedImages);
  const Strides step = strides(p.layout, p.k, p.p, p.q);
  const T *const weight = static_cast<const T*>(p.weight), *const bias = static_cast<const T*>(p.bias);
  T* const y = static_cast<T*>(p.y);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < positions * parts; ++unit) {
    C* const patches = static_cast<C*>(p.workspace) + omp_get_thread_num() * group * row;
    const int64_t position = unit / parts, k0 = unit % parts * filters, k1 = min64(k0 + filters, p.k);
    const int64_t pp = position / p.q, qq = position % p.q;
    const T* const own = weight + position * p.k * length;
    const auto put = [&](int64_t n, int64_t k, C value) {
      if (bias) value += load_scalar(bias[p.bias_per_position ? k * positions + position : k]);
      store_scalar(&y[n * step.n + k * step.c + pp * step.h + qq * step.w], value);
    };
    const auto tile = [&]<int kFilters, int kImages>(int64_t n0, int64_t n, int64_t k) {
      C out[kFilters][kImages];
      products<kFilters, kImages, T>(own + k * length, length, patches + (n - n0) * row, row, out);
      for (int j = 0; j < kFilters; ++j)
        for (int i = 0; i < kImages; ++i) put(n + i, k + j, out[j][i]);
    };
    for (int64_t n0 = 0; n0 < p.n; n0 += group) {
      const int64_t n1 = min64(n0 + group, p.n);
      for (int64_t n = n0; n < n1; ++n) gather<T>(p, n, pp, qq, patches + (n - n0) * row);
      int64_t k = k0;
      for (; k + 2 <= k1; k += 2) {
        int64_t n = n0;
        for (; n + 4 <= n1; n += 4) tile.template operator()<2, 4>(n0, n, k);
        for (; n < n1; ++n) tile.template operator()<2, 1>(n0, n, k);
      }
      for (; k < k1; ++k)
        for (int64_t n = n0; n < n1; ++n) tile.template operator()<1, 1>(n0, n, k);
    }
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

template <class T>
void input_grad(const Params& p) {
  using C = compute_t<T>;
  const int64_t length = p.c * p.r * p.s, row = locally_connected2d_row(p), positions = p.p * p.q;
  const int64_t group = locally_connected2d_images(p);
  const Strides step = strides(p.layout, p.k, p.p, p.q), to = strides(p.layout, p.c, p.h, p.w);
  const T *const weight = static_cast<const T*>(p.weight), *const dy = static_cast<const T*>(p.dy);
  T* const dx = static_cast<T*>(p.dx);
  C* const patches = static_cast<C*>(p.workspace);  // [position][image of the group][row]
  for (int64_t n0 = 0; n0 < p.n; n0 += group) {
    const int64_t images = min64(group, p.n - n0);
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t position = 0; position < positions; ++position) {
      C* const own = patches + position * group * row;
      const T* const filters = weight + position * p.k * length;
      const T* const from = dy + n0 * step.n + position / p.q * step.h + position % p.q * step.w;
      std::memset(own, 0, sizeof(C) * images * row);
      int64_t k = 0;
      for (; k + 4 <= p.k; k += 4)
        for (int64_t n = 0; n < images; ++n) {
          C d[4];
          for (int j = 0; j < 4; ++j) d[j] = load_scalar(from[n * step.n + (k + j) * step.c]);
          add_filters<4, T>(filters + k * length, length, d, own + n * row);
        }
      for (; k < p.k; ++k)
        for (int64_t n = 0; n < images; ++n) {
          const C d = load_scalar(from[n * step.n + k * step.c]);
          add_filters<1, T>(filters + k * length, length, &d, own + n * row);
        }
    }
    const int64_t rows = images * p.h;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t at = 0; at < rows; ++at) {
      const int64_t n = at / p.h, h = at % p.h;
      for (int64_t w = 0; w < p.w; ++w)
        for (int64_t c = 0; c < p.c; ++c) {
          C sum = 0;
          for (int64_t r = 0; r < p.r; ++r) {
            const int64_t hh = h + p.pad_h - r * p.dilation_h;
            if (hh < 0 || hh % p.stride_h || hh / p.stride_h >= p.p) continue;
            for (int64_t s = 0; s < p.s; ++s) {
              const int64_t ww = w + p.pad_w - s * p.dilation_w;
              if (ww < 0 || ww % p.stride_w || ww / p.stride_w >= p.q) continue;
              const int64_t position = hh / p.stride_h * p.q + ww / p.stride_w;
              sum += patches[(position * group + n) * row + (c * p.r + r) * p.s + s];
            }
          }
          store_scalar(&dx[(n0 + n) * to.n + c * to.c + h * to.h + w * to.w], sum);
        }
    }
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
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < positions * parts; ++unit) {
    C* const patches = static_cast<C*>(p.workspace) + omp_get_thread_num() * p.n * (row + p.k);
    C* const own_dy = patches + p.n * row;
    const int64_t position = unit / parts, k0 = unit % parts * filters, k1 = min64(k0 + filters, p.k);
    const int64_t pp = position / p.q, qq = position % p.q;
    for (int64_t n = 0; n < p.n; ++n) {
      gather<T>(p, n, pp, qq, patches + n * row);
      for (int64_t k = k0; k < k1; ++k)
        own_dy[n * p.k + k] = load_scalar(dy[n * step.n + k * step.c + pp * step.h + qq * step.w]);
    }
    T* const out = dw + position * p.k * length;
    int64_t k = k0;
    for (; k + 4 <= k1; k += 4) filter_gradients<4, T>(patches, p.n, row, own_dy + k, p.k, length, out + k * length);
    for (; k < k1; ++k) filter_gradients<1, T>(patches, p.n, row, own_dy + k, p.k, length, out + k * length);
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(locally_connected2d_forward, LocallyConnected2dParams, forward)
CNNOPS_EXPORT(locally_connected2d_input_grad, LocallyConnected2dParams, input_grad)
CNNOPS_EXPORT(locally_connected2d_weight_grad, LocallyConnected2dParams, weight_grad)
