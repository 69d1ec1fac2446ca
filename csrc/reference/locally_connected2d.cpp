// Plain loops in float64, straight from the contract.
#include "ops/locally_connected2d.h"

#include "reference/image.h"

namespace cnnops::reference {
namespace {

using Params = LocallyConnected2dParams;

int64_t weight_index(const Params& p, int64_t pp, int64_t qq, int64_t k, int64_t c, int64_t r, int64_t s) {
  return ((((pp * p.q + qq) * p.k + k) * p.c + c) * p.r + r) * p.s + s;
}

template <class T>
double bias_of(const Params& p, int64_t k, int64_t pp, int64_t qq) {
  if (!p.bias) return 0;
  return load_scalar(static_cast<const T*>(p.bias)[p.bias_per_position ? (k * p.p + pp) * p.q + qq : k]);
}

template <class T>
void forward(const Params& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w);
  const T* const weight = static_cast<const T*>(p.weight);
  Image<T> y(p.y, p.layout, p.k, p.p, p.q);
  for_each(p.n, p.k, p.p, p.q, [&](int64_t n, int64_t k, int64_t pp, int64_t qq) {
    double sum = bias_of<T>(p, k, pp, qq);
    for_each(1, p.c, p.r, p.s, [&](int64_t, int64_t c, int64_t r, int64_t s) {
      const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h, w = qq * p.stride_w - p.pad_w + s * p.dilation_w;
      if (x.inside(h, w)) sum += load_scalar(weight[weight_index(p, pp, qq, k, c, r, s)]) * x.get(n, c, h, w);
    });
    y.set(n, k, pp, qq, sum);
  });
}

template <class T>
void input_grad(const Params& p) {
  const Image<const T> dy(p.dy, p.layout, p.k, p.p, p.q);
  const T* const weight = static_cast<const T*>(p.weight);
  Image<T> dx(p.dx, p.layout, p.c, p.h, p.w);
  for_each(p.n, p.c, p.h, p.w, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double sum = 0;
    for_each(p.p, p.q, p.r, p.s, [&](int64_t pp, int64_t qq, int64_t r, int64_t s) {
      if (pp * p.stride_h - p.pad_h + r * p.dilation_h != h || qq * p.stride_w - p.pad_w + s * p.dilation_w != w)
        return;
      for (int64_t k = 0; k < p.k; ++k)
        sum += load_scalar(weight[weight_index(p, pp, qq, k, c, r, s)]) * dy.get(n, k, pp, qq);
    });
    dx.set(n, c, h, w, sum);
  });
}

template <class T>
void weight_grad(const Params& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w), dy(p.dy, p.layout, p.k, p.p, p.q);
  T* const dw = static_cast<T*>(p.dw);
  for_each(p.p, p.q, p.k, p.c, [&](int64_t pp, int64_t qq, int64_t k, int64_t c) {
    for_each(1, 1, p.r, p.s, [&](int64_t, int64_t, int64_t r, int64_t s) {
      const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h, w = qq * p.stride_w - p.pad_w + s * p.dilation_w;
      double sum = 0;
      if (x.inside(h, w))
        for (int64_t n = 0; n < p.n; ++n) sum += dy.get(n, k, pp, qq) * x.get(n, c, h, w);
      store_scalar(&dw[weight_index(p, pp, qq, k, c, r, s)], static_cast<compute_t<T>>(sum));
    });
  });
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(locally_connected2d_forward, LocallyConnected2dParams, forward)
CNNOPS_EXPORT(locally_connected2d_input_grad, LocallyConnected2dParams, input_grad)
CNNOPS_EXPORT(locally_connected2d_weight_grad, LocallyConnected2dParams, weight_grad)
