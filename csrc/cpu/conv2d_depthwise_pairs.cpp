// Depthwise convolution of channels_last images in bfloat16, on vectors of channels (conv2d_channel_vectors.h) and products of
// pairs. Where the matrix unit is, its processors have the instructions for this too.
#if !CNNOPS_ISA_amx && !CNNOPS_ISA_amx_emulated
#include "cpu/conv2d_channel_vectors.h"

namespace cnnops::CNNOPS_ISA {
namespace {

void filter_pairs_of(const Conv2dParams& p, bool transposed) {
  if (p.n * p.c > 0) filter_nhwc<bf16, false>(p, transposed);
}

}  // namespace

void conv2d_depthwise_pairs_forward_bf16(const Conv2dParams& p) { filter_pairs_of(p, false); }
void conv2d_depthwise_pairs_input_grad_bf16(const Conv2dParams& p) { filter_pairs_of(p, true); }
void conv2d_depthwise_pairs_weight_grad_bf16(const Conv2dParams& p) { correlate_images<bf16, bf16, false>(p); }

}  // namespace cnnops::CNNOPS_ISA
#endif
