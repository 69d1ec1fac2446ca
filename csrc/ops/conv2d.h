// 2-D convolution (cross-correlation, as in PyTorch) and its gradients.
//
//   forward      y[n,k,p,q] = act( bias[k] + sum over c,r,s of x[n,c,h,w] * weight[k,c,r,s]  + residual[n,k,p,q] )
//   input_grad   dx[n,c,h,w] = bias[c] + sum over k,r,s and the p,q with (h,w) below of dy[n,k,p,q] * weight[k,c,r,s]
//   weight_grad  dw[k,c,r,s] = sum over n,p,q of dy[n,k,p,q] * x[n,c,h,w]
//   bias_grad    db[k]       = sum over n,p,q of dy[n,k,p,q]
//
// with h = p*stride_h - pad_h + r*dilation_h, w = q*stride_w - pad_w + s*dilation_w; pixels outside the image are zero.
// Padding is what lies before the image; how much lies after it follows from P and Q. Channels fall into G groups: filter k
// of group g = k / (K/G) sees input channels g*C/G .. (g+1)*C/G - 1, and the c of weight[k,c,r,s] counts from the first.
// The bias of input_grad is there because a transposed convolution's forward is this pass.
//
// x, dx: [N, C, H, W]; y, dy, residual: [N, K, P, Q]; all in one layout. weight, dw: [K, C/G, R, S] with any strides.
// Products and sums are in the compute type (float32 for bfloat16 and float16), rounded to the dtype once, at the end.
// NaN and Inf flow by IEEE arithmetic (a zero of the padding times an infinite weight is left out, not NaN, as the
// reference does; kernels that compute it multiply by zero and give NaN: weights are expected to be finite).
#pragma once

#include "common/activation.h"
#include "common/tensor.h"

namespace cnnops {

// How exact products of float32 numbers must be on instructions that multiply bfloat16 ones: as float32, as 16 bits, as 8 bits
// of significand. Other instructions compute them in float32 always.
enum class Precision : uint8_t { ieee, tf32, bf16 };

struct Conv2dParams {
  Layout layout;
  int64_t n, c, h, w;
  int64_t k, r, s, p, q;
  int64_t groups;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t weight_stride[4];  // of weight or dw, in elements, in the order k, c, r, s
  void* x;                   // dx in input_grad
  void* weight;              // dw in weight_grad
  void* y;                   // dy in the gradients
  void* bias;                // [K]; [C] in input_grad; db in bias_grad; may be null
  const void* residual;      // may be null
  Activation activation;
  Precision precision;
  int threads;
};

}  // namespace cnnops
