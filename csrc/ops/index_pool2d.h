// The derivatives of poolings that pick one element of each window (ops/pool2d.h says how the choice is written).
//
// backward: dx[n,c,h,w] = sum over the windows (p, q), in row-major order, whose choice is (h, w) of dy[n,c,p,q]
// gather, its adjoint: dy[n,c,p,q] = dx[n,c,h,w] at the choice (h, w) of window (p, q); 0 where there is none
//
// With `adaptive`, window (p, q) is rows floor(p*H/P) to ceil((p+1)*H/P) and columns alike, and the choice is indices.
// A choice outside the image, or outside of its window, counts as none. dx: [N, C, H, W]; dy, choice: [N, C, P, Q]; sums
// in the compute type.
#pragma once

#include "ops/pool2d.h"

namespace cnnops {

struct IndexPool2dParams {
  Layout layout;
  int64_t n, c, h, w, p, q;
  bool adaptive;
  Windows windows;  // unless adaptive
  Choice mode;      // offsets or indices
  const void* in;   // dy in backward, dx in gather
  const void* choice;
  void* out;
  int threads;
  Launch* launch = nullptr;
};

}  // namespace cnnops
