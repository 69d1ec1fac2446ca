// Plain loops, straight from the contract.
#include "ops/max_pool2d.h"

#include "reference/pick.h"

namespace cnnops::reference {
namespace {

template <class T>
void forward(const MaxPool2dParams& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w);
  Image<T> y(p.y, p.layout, p.c, p.p, p.q);
  for_each(p.n, p.c, p.p, p.q, [&](int64_t n, int64_t c, int64_t pp, int64_t qq) {
    double best = -__builtin_inf();
    int64_t best_r = -1, best_s = 0, best_h = 0, best_w = 0;
    for_cells(p.windows, p.h, p.w, pp, qq, [&](int64_t r, int64_t s, int64_t h, int64_t w) {
      const double v = x.get(n, c, h, w);
      if (best_r < 0 || v > best || v != v) best = v, best_r = r, best_s = s, best_h = h, best_w = w;
    });
    y.set(n, c, pp, qq, best);
    set_choice(p, y.index(n, c, pp, qq), best_r, best_s, best_h, best_w);
  });
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(max_pool2d_forward, MaxPool2dParams, forward)
