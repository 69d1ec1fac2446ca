// What the pooling operators share: windows, and how an operator that picks one element of each window says which.
//
// Window (p, q) holds the cells h = p*stride_h - pad_h + r*dilation_h, w = q*stride_w - pad_w + s*dilation_w with
// 0 <= r < kernel_h, 0 <= s < kernel_w that lie inside the image; every window begins before its end. Cells outside take no
// part. Where the dilation exceeds the image, a window may hold no cell at all.
//
// The choice of a window, in an array of the output's shape and layout, is one of
//   offsets  uint8, r*kernel_w + s; 255 for a window without cells; needs kernel_h*kernel_w <= 255
//   indices  int64, h*W + w, PyTorch's; -1 for a window without cells
#pragma once

#include "common/arith.h"
#include "common/tensor.h"

namespace cnnops {

struct Windows {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

enum class Choice : uint8_t { none, offsets, indices };
constexpr uint8_t kNoOffset = 255;
constexpr int64_t kNoIndex = -1;

// The window that begins at cell `begin` of an axis of `size` cells has its taps [first, last) inside.
CNNOPS_HD static inline int64_t first_tap(int64_t begin, int64_t dilation) {
  return begin >= 0 ? 0 : ceil_div(-begin, dilation);
}
CNNOPS_HD static inline int64_t last_tap(int64_t begin, int64_t kernel, int64_t dilation, int64_t size) {
  return begin >= size ? 0 : min64(kernel, ceil_div(size - begin, dilation));
}
// The windows of an axis that reach over cell `at`: [first, last). Between its taps a dilated window may miss the cell.
CNNOPS_HD static inline int64_t first_window(int64_t at, int64_t pad, int64_t reach, int64_t stride) {
  const int64_t past = at + pad - reach;
  return past < 0 ? 0 : divided(past, stride) + 1;
}
CNNOPS_HD static inline int64_t last_window(int64_t at, int64_t pad, int64_t stride, int64_t count) {
  return min64(divided(at + pad, stride) + 1, count);
}

// Adaptive windows: [start, end) of output i of `outputs`, and the outputs [first, last) that hold cell `at`.
CNNOPS_HD static inline int64_t adaptive_start(int64_t i, int64_t size, int64_t outputs) {
  return divided(i * size, outputs);
}
CNNOPS_HD static inline int64_t adaptive_end(int64_t i, int64_t size, int64_t outputs) {
  return ceil_div((i + 1) * size, outputs);
}
CNNOPS_HD static inline int64_t adaptive_first(int64_t at, int64_t size, int64_t outputs) {
  return divided(at * outputs, size);
}
CNNOPS_HD static inline int64_t adaptive_last(int64_t at, int64_t size, int64_t outputs) {
  return ceil_div((at + 1) * outputs, size);
}

// Forward of a pooling that picks: x [N, C, H, W] -> y and choice [N, C, P, Q], all in one layout.
struct PickParams {
  Layout layout;
  int64_t n, c, h, w, p, q;
  Windows windows;
  Choice mode;
  const void* x;
  void* y;
  void* choice;  // null in mode none
  int threads;
  Launch* launch = nullptr;
};

}  // namespace cnnops
