// What forward and input_grad have in common: a sum over taps from one image onto a lattice of another.
//
//   out[n, m, oh0 + i*osh, ow0 + j*osw] = sum over taps t and channels c of w[m, c, t] * in[n, c, i*ish + dh[t], j*isw + dw[t]]
//
// forward is one lattice of step 1 with ish = stride; input_grad with stride s is s*s lattices of step s (one per phase of
// h and w modulo s) with ish = 1, each with the taps that reach it.
#pragma once

#include "common/arith.h"
#include "common/scratch.h"
#include "ops/conv2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

struct Strides {
  int64_t n, c, h, w;
};
Strides strides_of(Layout layout, int64_t c, int64_t h, int64_t w) {
  if (layout == Layout::nchw) return {c * h * w, h * w, w, 1};
  return {h * w * c, 1, w * c, c};
}

struct Tap {
  int64_t dh, dw;
  int64_t weight;  // offset of its weight
};

struct Lattice {
  int64_t oh0, ow0, osh, osw;  // where it lies in the output
  int64_t rows, columns;       // i < rows, j < columns
  int64_t ish, isw;
  int64_t count;  // taps
};

// Calls visit(lattice, taps) for the one lattice of forward or for each phase of input_grad. `taps` has room for R*S.
template <class Visit>
void forward_lattice(const Conv2dParams& p, Tap* taps, const Visit& visit) {
  int64_t count = 0;
  for (int64_t r = 0; r < p.r; ++r)
    for (int64_t s = 0; s < p.s; ++s)
      taps[count++] = {r * p.dilation_h - p.pad_h, s * p.dilation_w - p.pad_w,
                       r * p.weight_stride[2] + s * p.weight_stride[3]};
  visit(Lattice{0, 0, 1, 1, p.p, p.q, p.stride_h, p.stride_w, count}, taps);
}

template <class Visit>
void input_grad_lattices(const Conv2dParams& p, Tap* taps, const Visit& visit) {
  for (int64_t h0 = 0; h0 < min64(p.stride_h, p.h); ++h0)
    for (int64_t w0 = 0; w0 < min64(p.stride_w, p.w); ++w0) {
      int64_t count = 0;
      for (int64_t r = 0; r < p.r; ++r)
        for (int64_t s = 0; s < p.s; ++s) {
          const int64_t dh = h0 + p.pad_h - r * p.dilation_h, dw = w0 + p.pad_w - s * p.dilation_w;
          if (dh % p.stride_h || dw % p.stride_w) continue;
          taps[count++] = {dh / p.stride_h, dw / p.stride_w, r * p.weight_stride[2] + s * p.weight_stride[3]};
        }
      visit(Lattice{h0, w0, p.stride_h, p.stride_w, ceil_div(p.h - h0, p.stride_h), ceil_div(p.w - w0, p.stride_w), 1,
                    1, count},
            taps);
    }
}

// The j in [0, n) for which j*step + offset lies in [0, size): [first, last).
struct Range {
  int64_t first, last;
};
Range valid_range(int64_t n, int64_t step, int64_t offset, int64_t size) {
  const int64_t first = offset >= 0 ? 0 : ceil_div(-offset, step);
  const int64_t last = offset >= size ? 0 : (size - 1 - offset) / step + 1;
  return {min64(first, n), max64(min64(last, n), min64(first, n))};
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
