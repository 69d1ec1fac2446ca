// Plain loops, straight from the contract: the median is the value with the right number of smaller and equal ones.
#include "ops/median_pool2d.h"

#include "reference/pick.h"

namespace cnnops::reference {
namespace {

template <class T>
void forward(const MedianPool2dParams& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w);
  Image<T> y(p.y, p.layout, p.c, p.p, p.q);
  for_each(p.n, p.c, p.p, p.q, [&](int64_t n, int64_t c, int64_t pp, int64_t qq) {
    int64_t cells = 0;
    bool any_nan = false;
    const auto each = [&](const auto& function) { for_cells(p.windows, p.h, p.w, pp, qq, function); };
    each([&](int64_t, int64_t, int64_t h, int64_t w) {
      const double v = x.get(n, c, h, w);
      ++cells, any_nan = any_nan || v != v;
    });
    const int64_t rank = (cells - 1) / 2, at = y.index(n, c, pp, qq);
    bool found = false;
    each([&](int64_t r, int64_t s, int64_t h, int64_t w) {
      const double v = x.get(n, c, h, w);
      int64_t below = 0, equal = 0;
      each([&](int64_t, int64_t, int64_t h2, int64_t w2) {
        below += x.get(n, c, h2, w2) < v, equal += x.get(n, c, h2, w2) == v;
      });
      if (found || (any_nan ? v == v : rank < below || rank >= below + equal)) return;
      found = true;
      y.set(n, c, pp, qq, v);
      set_choice(p, at, r, s, h, w);
    });
    if (found) return;
    y.set(n, c, pp, qq, __builtin_nan(""));
    set_choice(p, at, -1, 0, 0, 0);
  });
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(median_pool2d_forward, MedianPool2dParams, forward)
