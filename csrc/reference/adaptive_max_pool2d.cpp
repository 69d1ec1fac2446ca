// Plain loops, straight from the contract.
#include "ops/adaptive_max_pool2d.h"

#include "reference/image.h"

namespace cnnops::reference {
namespace {

template <class T>
void forward(const AdaptiveMaxPool2dParams& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w);
  Image<T> y(p.y, p.layout, p.c, p.p, p.q);
  for_each(p.n, p.c, p.p, p.q, [&](int64_t n, int64_t c, int64_t pp, int64_t qq) {
    double best = 0;
    int64_t index = -1;
    for (int64_t h = adaptive_start(pp, p.h, p.p); h < adaptive_end(pp, p.h, p.p); ++h)
      for (int64_t w = adaptive_start(qq, p.w, p.q); w < adaptive_end(qq, p.w, p.q); ++w) {
        const double v = x.get(n, c, h, w);
        if (index < 0 || v > best || v != v) best = v, index = h * p.w + w;
      }
    y.set(n, c, pp, qq, best);
    p.indices[y.index(n, c, pp, qq)] = index;
  });
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(adaptive_max_pool2d_forward, AdaptiveMaxPool2dParams, forward)
