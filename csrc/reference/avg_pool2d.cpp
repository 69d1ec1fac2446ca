// Plain loops in float64, straight from the contract.
#include "ops/avg_pool2d.h"

#include "reference/image.h"

namespace cnnops::reference {
namespace {

double divisor(const AvgPool2dParams& p, int64_t h0, int64_t w0) {
  if (p.divisor != 0) return static_cast<double>(p.divisor);
  int64_t cells = 0;
  for (int64_t r = 0; r < p.kernel_h; ++r)
    for (int64_t s = 0; s < p.kernel_w; ++s) {
      const int64_t h = h0 + r, w = w0 + s;
      const int64_t margin_h = p.count_include_pad ? p.pad_h : 0, margin_w = p.count_include_pad ? p.pad_w : 0;
      cells += h >= -margin_h && h < p.h + margin_h && w >= -margin_w && w < p.w + margin_w;
    }
  return static_cast<double>(cells);
}

template <class T>
void forward(const AvgPool2dParams& p) {
  const Image<const T> x(p.in, p.layout, p.c, p.h, p.w);
  Image<T> y(p.out, p.layout, p.c, p.p, p.q);
  for_each(p.n, p.c, p.p, p.q, [&](int64_t n, int64_t c, int64_t pp, int64_t qq) {
    const int64_t h0 = pp * p.stride_h - p.pad_h, w0 = qq * p.stride_w - p.pad_w;
    double sum = 0;
    for (int64_t r = 0; r < p.kernel_h; ++r)
      for (int64_t s = 0; s < p.kernel_w; ++s)
        if (x.inside(h0 + r, w0 + s)) sum += x.get(n, c, h0 + r, w0 + s);
    y.set(n, c, pp, qq, sum / divisor(p, h0, w0));
  });
}

template <class T>
void backward(const AvgPool2dParams& p) {
  const Image<const T> dy(p.in, p.layout, p.c, p.p, p.q);
  Image<T> dx(p.out, p.layout, p.c, p.h, p.w);
  for_each(p.n, p.c, p.h, p.w, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double sum = 0;
    for (int64_t pp = 0; pp < p.p; ++pp)
      for (int64_t qq = 0; qq < p.q; ++qq) {
        const int64_t h0 = pp * p.stride_h - p.pad_h, w0 = qq * p.stride_w - p.pad_w;
        if (h >= h0 && h < h0 + p.kernel_h && w >= w0 && w < w0 + p.kernel_w)
          sum += dy.get(n, c, pp, qq) / divisor(p, h0, w0);
      }
    dx.set(n, c, h, w, sum);
  });
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(avg_pool2d_forward, AvgPool2dParams, forward)
CNNOPS_EXPORT(avg_pool2d_backward, AvgPool2dParams, backward)
