// Depthwise convolution (conv2d_channel_vectors.h): groups = channels, one filter each.
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

template <class T>
void weight_grad(const Conv2dParams& p) {
  correlate_all<T, false>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_depthwise_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_depthwise_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_depthwise_weight_grad, Conv2dParams, weight_grad)
