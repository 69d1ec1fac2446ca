// Plain loops in float64, straight from the contract.
#include "ops/index_pool2d.h"

#include <algorithm>
#include <vector>

#include "reference/image.h"

namespace cnnops::reference {
namespace {

// The cell that window (pp, qq) chose as h * W + w, or -1.
int64_t chosen(const IndexPool2dParams& p, int64_t at, int64_t pp, int64_t qq) {
  if (p.mode == Choice::indices) return static_cast<const int64_t*>(p.choice)[at];
  const Windows& v = p.windows;
  const int64_t offset = static_cast<const uint8_t*>(p.choice)[at];
  if (offset >= v.kernel_h * v.kernel_w) return -1;
  const int64_t h = pp * v.stride_h - v.pad_h + offset / v.kernel_w * v.dilation_h;
  const int64_t w = qq * v.stride_w - v.pad_w + offset % v.kernel_w * v.dilation_w;
  return h < 0 || h >= p.h || w < 0 || w >= p.w ? -1 : h * p.w + w;
}

template <class T>
void backward(const IndexPool2dParams& p) {
  const Image<const T> dy(p.in, p.layout, p.c, p.p, p.q);
  Image<T> dx(p.out, p.layout, p.c, p.h, p.w);
  std::vector<double> sums(static_cast<size_t>(p.h * p.w));  // of a plane
  for_each(p.n, p.c, 1, 1, [&](int64_t n, int64_t c, int64_t, int64_t) {
    std::fill(sums.begin(), sums.end(), 0);
    for_each(1, 1, p.p, p.q, [&](int64_t, int64_t, int64_t pp, int64_t qq) {
      const int64_t at = chosen(p, dy.index(n, c, pp, qq), pp, qq);
      if (at >= 0 && at < p.h * p.w) sums[static_cast<size_t>(at)] += dy.get(n, c, pp, qq);
    });
    for_each(1, 1, p.h, p.w, [&](int64_t, int64_t, int64_t h, int64_t w) {
      dx.set(n, c, h, w, sums[static_cast<size_t>(h * p.w + w)]);
    });
  });
}

template <class T>
void gather(const IndexPool2dParams& p) {
  const Image<const T> dx(p.in, p.layout, p.c, p.h, p.w);
  Image<T> dy(p.out, p.layout, p.c, p.p, p.q);
  for_each(p.n, p.c, p.p, p.q, [&](int64_t n, int64_t c, int64_t pp, int64_t qq) {
    const int64_t at = chosen(p, dy.index(n, c, pp, qq), pp, qq);
    dy.set(n, c, pp, qq, at < 0 || at >= p.h * p.w ? 0 : dx.get(n, c, at / p.w, at % p.w));
  });
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(index_pool2d_backward, IndexPool2dParams, backward)
CNNOPS_EXPORT(index_pool2d_gather, IndexPool2dParams, gather)
