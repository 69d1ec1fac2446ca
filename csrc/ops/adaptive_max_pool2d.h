// Max pooling to a given output size.
//
//   y[n,c,p,q] = the largest x[n,c,h,w] with floor(p*H/P) <= h < ceil((p+1)*H/P), and columns alike;
//   indices[n,c,p,q] = h*W + w, where it was found
//
// Of equal values the first in row-major order is chosen, but the last NaN where there is one, as in max_pool2d.
// x: [N, C, H, W]; y and indices (int64): [N, C, P, Q], all of them at least 1; one layout.
#pragma once

#include "ops/pool2d.h"

namespace cnnops {

struct AdaptiveMaxPool2dParams {
  Layout layout;
  int64_t n, c, h, w, p, q;
  const void* x;
  void* y;
  int64_t* indices;
  int threads;
  Launch* launch = nullptr;
};

}  // namespace cnnops
