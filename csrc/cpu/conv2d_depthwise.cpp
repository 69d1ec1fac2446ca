// Depthwise convolution: groups = channels, one filter each. On AVX-512, NCHW images with the usual filters on vectors
// of pixels (depthwise_planes.h), all else on vectors of channels (conv2d_channel_vectors.h).
#include "cpu/depthwise_planes.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// With narrower vectors, and parts of them taken element by element, vectors of channels are as fast or faster.
constexpr bool kHasPlanes = CNNOPS_ISA_HAS_MASKS;

template <class T>
void forward(const Conv2dParams& p) {
  if constexpr (kHasPlanes) {
    if (has_plane_rows<T>(p, false)) return filter_planes<T>(p, false);
  }
  filter<T, false>(p, false);
}

template <class T>
void input_grad(const Conv2dParams& p) {
  if constexpr (kHasPlanes) {
    // 5 x 5 with stride 2 takes 1.2 times as long so as on vectors of channels.
    if (has_plane_rows<T>(p, false) && (p.stride_w == 1 || p.r == 3)) return filter_planes<T>(p, true);
  }
  filter<T, false>(p, true);
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  if constexpr (kHasPlanes) {
    if (has_plane_rows<T>(p, true)) return correlate_planes<T>(p);
  }
  correlate_all<T, false>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_depthwise_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_depthwise_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_depthwise_weight_grad, Conv2dParams, weight_grad)
