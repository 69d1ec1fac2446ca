// Mean pooling to a given output size.
//
//   y[n,c,p,q] = mean of x[n,c,h,w] over floor(p*H/P) <= h < ceil((p+1)*H/P), and columns alike
// Backward: dx[n,c,h,w] = sum over the windows (p,q) that hold (h,w) of dy[n,c,p,q] / (the window's cells).
//
// x, dx: [N, C, H, W]; y, dy: [N, C, P, Q], all of them at least 1; one layout. Sums are in the compute type, in an order
// given by the shape and the layout. The whole plane's mean (P = Q = 1) is summed in float64 after at most 64 terms a lane,
// so that its error does not grow with the plane.
#pragma once

#include "ops/pool2d.h"

namespace cnnops {

struct AdaptiveAvgPool2dParams {
  Layout layout;
  int64_t n, c, h, w, p, q;
  const void* in;  // x in forward, dy in backward
  void* out;       // y in forward, dx in backward
  int threads;
  Launch* launch = nullptr;
};

}  // namespace cnnops
