// Convolution in groups of a few channels (conv2d_channel_vectors.h), channel multipliers among them: products of the
// input channels that output vectors pick. For instruction sets that permute lanes by an index.
#if CNNOPS_ISA_avx2 || CNNOPS_ISA_avx512
#include "cpu/conv2d_channel_vectors.h"

namespace cnnops::CNNOPS_ISA {
namespace {

template <class T>
void forward(const Conv2dParams& p) {
  filter<T, true>(p, false);
}

template <class T>
void input_grad(const Conv2dParams& p) {
  filter<T, true>(p, true);
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  correlate_all<T, true>(p);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_narrow_groups_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_narrow_groups_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_narrow_groups_weight_grad, Conv2dParams, weight_grad)
#endif
