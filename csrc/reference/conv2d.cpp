// Plain loops in float64, straight from the contract.
#include "ops/conv2d.h"

#include "reference/activation.h"
#include "reference/image.h"

namespace cnnops::reference {
namespace {

template <class T>
double weight_at(const Conv2dParams& p, int64_t k, int64_t c, int64_t r, int64_t s) {
  const int64_t* const stride = p.weight_stride;
  return load_scalar(static_cast<const T*>(p.weight)[k * stride[0] + c * stride[1] + r * stride[2] + s * stride[3]]);
}

template <class T>
void forward(const Conv2dParams& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w);
  const Image<const T> residual(p.residual, p.layout, p.k, p.p, p.q);
  Image<T> y(p.y, p.layout, p.k, p.p, p.q);
  const int64_t group_c = p.c / p.groups, group_k = p.k / p.groups;
  for_each(p.n, p.k, p.p, p.q, [&](int64_t n, int64_t k, int64_t pp, int64_t qq) {
    double sum = p.bias ? load_scalar(static_cast<const T*>(p.bias)[k]) : 0;
    for (int64_t c = 0; c < group_c; ++c)
      for (int64_t r = 0; r < p.r; ++r)
        for (int64_t s = 0; s < p.s; ++s) {
          const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h;
          const int64_t w = qq * p.stride_w - p.pad_w + s * p.dilation_w;
          if (x.inside(h, w)) sum += x.get(n, k / group_k * group_c + c, h, w) * weight_at<T>(p, k, c, r, s);
        }
    if (p.residual) sum += residual.get(n, k, pp, qq);
    y.set(n, k, pp, qq, activate(sum, p.activation));
  });
}

template <class T>
void input_grad(const Conv2dParams& p) {
  const Image<const T> dy(p.y, p.layout, p.k, p.p, p.q);
  Image<T> dx(p.x, p.layout, p.c, p.h, p.w);
  const int64_t group_c = p.c / p.groups, group_k = p.k / p.groups;
  for_each(p.n, p.c, p.h, p.w, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double sum = p.bias ? load_scalar(static_cast<const T*>(p.bias)[c]) : 0;
    for (int64_t k = c / group_c * group_k; k < (c / group_c + 1) * group_k; ++k)
      for (int64_t r = 0; r < p.r; ++r)
        for (int64_t s = 0; s < p.s; ++s) {
          const int64_t row = h + p.pad_h - r * p.dilation_h, column = w + p.pad_w - s * p.dilation_w;
          if (row % p.stride_h == 0 && column % p.stride_w == 0 && dy.inside(row / p.stride_h, column / p.stride_w))
            sum += dy.get(n, k, row / p.stride_h, column / p.stride_w) * weight_at<T>(p, k, c % group_c, r, s);
        }
    dx.set(n, c, h, w, sum);
  });
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w);
  const Image<const T> dy(p.y, p.layout, p.k, p.p, p.q);
  const int64_t group_c = p.c / p.groups, group_k = p.k / p.groups;
  const int64_t* const stride = p.weight_stride;
  for_each(p.k, group_c, p.r, p.s, [&](int64_t k, int64_t c, int64_t r, int64_t s) {
    double sum = 0;
    for_each(p.n, 1, p.p, p.q, [&](int64_t n, int64_t, int64_t pp, int64_t qq) {
      const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h;
      const int64_t w = qq * p.stride_w - p.pad_w + s * p.dilation_w;
      if (x.inside(h, w)) sum += dy.get(n, k, pp, qq) * x.get(n, k / group_k * group_c + c, h, w);
    });
    store_scalar(static_cast<T*>(p.weight) + k * stride[0] + c * stride[1] + r * stride[2] + s * stride[3],
                 static_cast<compute_t<T>>(sum));
  });
}

template <class T>
void bias_grad(const Conv2dParams& p) {
  const Image<const T> dy(p.y, p.layout, p.k, p.p, p.q);
  for (int64_t k = 0; k < p.k; ++k) {
    double sum = 0;
    for_each(p.n, 1, p.p, p.q, [&](int64_t n, int64_t, int64_t pp, int64_t qq) { sum += dy.get(n, k, pp, qq); });
    store_scalar(static_cast<T*>(p.bias) + k, static_cast<compute_t<T>>(sum));
  }
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(conv2d_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_weight_grad, Conv2dParams, weight_grad)
CNNOPS_EXPORT(conv2d_bias_grad, Conv2dParams, bias_grad)
