// A convolution whose filters are not shared: every output position has its own.
//
//   y[n,k,p,q] = bias + sum over c,r,s of w[p,q,k,c,r,s] * x[n,c,h,w],
//   h = p*stride_h - pad_h + r*dilation_h,   w = q*stride_w - pad_w + s*dilation_w,   zero outside the image
//   dx[n,c,h,w] = sum of w[p,q,k,c,r,s] * dy[n,k,p,q] over all p,q,k,r,s that meet (h, w)
//   dw[p,q,k,c,r,s] = sum over n of dy[n,k,p,q] * x[n,c,h,w]
//
// x, dx: [N, C, H, W]; y, dy: [N, K, P, Q], in the same layout. w, dw: [P, Q, K, C, R, S], contiguous: a position's
// filters lie together, so that each weight, of which there are R S K times as many as elements of x, comes from memory
// once. bias: [K, P, Q], or [K] where bias_per_position is false, or null. Sums are in the compute type. Padding at the
// bottom and the right needs no parameter: it is what P and Q reach beyond H and W.
#pragma once

#include "common/arith.h"
#include "common/tensor.h"

namespace cnnops {

struct LocallyConnected2dParams {
  Layout layout;
  int64_t n, c, h, w, k, r, s, p, q;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool bias_per_position;
  const void *x, *weight, *bias, *dy;  // what the pass reads
  void *y, *dx, *dw;                   // what it writes
  void* workspace;                     // locally_connected2d_workspace_bytes(p); the references do without
  int threads;
  Launch* launch = nullptr;
};

// Images from which on no kernel gathers patches for forward and the weights' gradient.
constexpr int64_t kLocallyConnectedImages = 8;

static inline int64_t locally_connected2d_row(const LocallyConnected2dParams& p) {
  return round_up(p.c * p.r * p.s, 16);
}
static inline int64_t locally_connected2d_workspace_bytes(const LocallyConnected2dParams& p) {
  const int64_t row = locally_connected2d_row(p);
  const int64_t per_thread = min64(p.n, kLocallyConnectedImages) * (p.dw ? row + p.k : p.y ? row : 0);
  return static_cast<int64_t>(sizeof(double)) * per_thread * p.threads;
}

}  // namespace cnnops
