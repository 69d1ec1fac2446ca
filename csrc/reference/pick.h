// Window walks and choices for the references of poolings that pick an element.
#pragma once

#include "ops/pool2d.h"
#include "reference/image.h"

namespace cnnops::reference {
namespace {

// function(r, s, h, w) for the cells of a window inside the image, in row-major order.
template <class Function>
void for_cells(const Windows& v, int64_t height, int64_t width, int64_t p, int64_t q, const Function& function) {
  for (int64_t r = 0; r < v.kernel_h; ++r)
    for (int64_t s = 0; s < v.kernel_w; ++s) {
      const int64_t h = p * v.stride_h - v.pad_h + r * v.dilation_h, w = q * v.stride_w - v.pad_w + s * v.dilation_w;
      if (h >= 0 && h < height && w >= 0 && w < width) function(r, s, h, w);
    }
}

// Writes the choice (r, s) at cell (h, w); r < 0: no cell.
inline void set_choice(const PickParams& p, int64_t at, int64_t r, int64_t s, int64_t h, int64_t w) {
  if (p.mode == Choice::offsets)
    static_cast<uint8_t*>(p.choice)[at] = r < 0 ? kNoOffset : static_cast<uint8_t>(r * p.windows.kernel_w + s);
  if (p.mode == Choice::indices) static_cast<int64_t*>(p.choice)[at] = r < 0 ? kNoIndex : h * p.w + w;
}

}  // namespace
}  // namespace cnnops::reference
