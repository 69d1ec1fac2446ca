// Max pooling: y[n,c,p,q] = the largest x[n,c,h,w] of window (p, q) of ops/pool2d.h.
//
// The choice is the first of the largest in row-major order, but the last NaN where there is one, as PyTorch has it: a
// NaN replaces whatever was found before it. A window without cells gives -Inf. x, y: [N, C, H, W] and [N, C, P, Q]. The
// result is one of the elements: nothing is rounded.
#pragma once

#include "ops/pool2d.h"

namespace cnnops {

struct MaxPool2dParams : PickParams {};

}  // namespace cnnops
