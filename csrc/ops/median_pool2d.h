// Median pooling: y[n,c,p,q] = the median of the cells of window (p, q) of ops/pool2d.h that lie inside the image: of m of
// them in ascending order the one at (m - 1) / 2, the lower middle of an even number (torch.median's).
//
// A NaN in the window gives NaN. The choice is the first cell in row-major order that equals the median, or the first NaN.
// A window without cells gives NaN. x, y: [N, C, H, W] and [N, C, P, Q]. The result is one of the elements: nothing is
// rounded.
#pragma once

#include "ops/pool2d.h"

namespace cnnops {

struct MedianPool2dParams : PickParams {};

}  // namespace cnnops
