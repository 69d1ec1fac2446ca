// Depthwise convolution, groups = channels, one filter each, on vectors of channels (conv2d_channel_vectors.h): forward and
// the gradient of the input.
#include "cpu/conv2d_channel_vectors.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
void forward(const Conv2dParams& p) {
  filter<T, false>(p, false);
}

template <class T>
void input_grad(const Conv2dParams& p) {
  filter<T, false>(p, true);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_depthwise_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_depthwise_input_grad, Conv2dParams, input_grad)
