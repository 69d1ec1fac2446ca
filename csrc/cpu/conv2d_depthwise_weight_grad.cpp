// The gradient of the weights of depthwise convolution, on vectors of channels (conv2d_channel_vectors.h).
#include "cpu/conv2d_channel_vectors.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
void weight_grad(const Conv2dParams& p) {
  correlate_all<T, false>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_depthwise_weight_grad, Conv2dParams, weight_grad)
