// Plain loops in float64, straight from the contract.
#include "ops/adaptive_avg_pool2d.h"

#include "reference/image.h"

namespace cnnops::reference {
namespace {

struct Cells {
  int64_t h0, h1, w0, w1;
  bool holds(int64_t h, int64_t w) const { return h >= h0 && h < h1 && w >= w0 && w < w1; }
  double count() const { return static_cast<double>((h1 - h0) * (w1 - w0)); }
};

Cells cells(const AdaptiveAvgPool2dParams& p, int64_t pp, int64_t qq) {
  return {adaptive_start(pp, p.h, p.p), adaptive_end(pp, p.h, p.p), adaptive_start(qq, p.w, p.q),
          adaptive_end(qq, p.w, p.q)};
}

template <class T>
void forward(const AdaptiveAvgPool2dParams& p) {
  const Image<const T> x(p.in, p.layout, p.c, p.h, p.w);
  Image<T> y(p.out, p.layout, p.c, p.p, p.q);
  for_each(p.n, p.c, p.p, p.q, [&](int64_t n, int64_t c, int64_t pp, int64_t qq) {
    const Cells v = cells(p, pp, qq);
    double sum = 0;
    for (int64_t h = v.h0; h < v.h1; ++h)
      for (int64_t w = v.w0; w < v.w1; ++w) sum += x.get(n, c, h, w);
    y.set(n, c, pp, qq, sum / v.count());
  });
}

template <class T>
void backward(const AdaptiveAvgPool2dParams& p) {
  const Image<const T> dy(p.in, p.layout, p.c, p.p, p.q);
  Image<T> dx(p.out, p.layout, p.c, p.h, p.w);
  for_each(p.n, p.c, p.h, p.w, [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    double sum = 0;
    for (int64_t pp = 0; pp < p.p; ++pp)
      for (int64_t qq = 0; qq < p.q; ++qq) {
        const Cells v = cells(p, pp, qq);
        if (v.holds(h, w)) sum += dy.get(n, c, pp, qq) / v.count();
      }
    dx.set(n, c, h, w, sum);
  });
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(adaptive_avg_pool2d_forward, AdaptiveAvgPool2dParams, forward)
CNNOPS_EXPORT(adaptive_avg_pool2d_backward, AdaptiveAvgPool2dParams, backward)
