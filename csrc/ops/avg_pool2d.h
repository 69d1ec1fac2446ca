// Mean pooling.
//
//   y[n,c,p,q] = (1 / D) * sum over the window of x[n,c,h,w],   h = p*stride_h - pad_h + r, w = q*stride_w - pad_w + s
//
// with 0 <= r < kernel_h, 0 <= s < kernel_w; cells outside the image count as zero. D is `divisor` where it is not 0; else
// the number of the window's cells inside the image, or, with count_include_pad, inside the image extended by its padding
// (a window that ceil_mode lets run past that extension is cut there). Every window begins before the image ends.
// Backward: dx[n,c,h,w] = sum over the windows (p,q) that hold (h,w) of dy[n,c,p,q] / D(p,q).
//
// x, dx: [N, C, H, W]; y, dy: [N, C, P, Q]; all in one layout. Sums are in the compute type, in an order given by the shape
// and the layout. NaN and Inf flow by IEEE arithmetic.
#pragma once

#include "common/tensor.h"

namespace cnnops {

struct AvgPool2dParams {
  Layout layout;
  int64_t n, c, h, w, p, q;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  bool count_include_pad;
  int64_t divisor;  // 0: count cells
  const void* in;   // x in forward, dy in backward
  void* out;        // y in forward, dx in backward
  int threads;
  Launch* launch = nullptr;
};

}  // namespace cnnops
