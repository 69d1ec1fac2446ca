// Activations and their derivatives, one number at a time; at the kinks and for NaN as PyTorch has them. Which one is the
// same for all threads, so the switch does not diverge.
#pragma once

#include "common/activation.h"
#include "cuda/device.cuh"

namespace cnnops {
namespace {

__device__ __forceinline__ float exp_of(float v) { return expf(v); }
__device__ __forceinline__ double exp_of(double v) { return exp(v); }
__device__ __forceinline__ float expm1_of(float v) { return expm1f(v); }
__device__ __forceinline__ double expm1_of(double v) { return expm1(v); }
__device__ __forceinline__ float log1p_of(float v) { return log1pf(v); }
__device__ __forceinline__ double log1p_of(double v) { return log1p(v); }
__device__ __forceinline__ float tanh_of(float v) { return tanhf(v); }
__device__ __forceinline__ double tanh_of(double v) { return tanh(v); }
__device__ __forceinline__ float erf_of(float v) { return erff(v); }
__device__ __forceinline__ double erf_of(double v) { return erf(v); }

template <class A>
__device__ __forceinline__ A sigmoid(A z) {
  const A e = exp_of(z < 0 ? z : -z);  // never infinite: what is small stays more than zero
  return (z < 0 ? e : A(1)) / (1 + e);
}

template <class A>
__device__ __forceinline__ A clamp06(A z) {
  return z < 0 ? A(0) : z > 6 ? A(6) : z;
}

template <class A>
__device__ A activate(A z, Activation activation) {
  switch (activation) {
    case Activation::none: return z;
    case Activation::relu: return z < 0 ? A(0) : z;
    case Activation::relu6: return clamp06(z);
    case Activation::leaky_relu: return z > 0 ? z : A(0.01) * z;
    case Activation::elu: return z < 0 ? expm1_of(z) : z;
    case Activation::sigmoid: return sigmoid(z);
    case Activation::tanh: return tanh_of(z);
    case Activation::softplus: return z > 20 ? z : log1p_of(exp_of(z));
    case Activation::silu: return z * sigmoid(z);
    case Activation::hardswish: return z * clamp06(z + 3) / 6;
    case Activation::gelu: return z * (1 + erf_of(z * A(0.70710678118654752440))) / 2;
  }
  return z;
}

// activate() of each of a thread's numbers, which go round through the first place, so that its code is there once.
template <class A, int V>
__device__ __forceinline__ void activate_each(A (&v)[V], Activation activation) {
  if (activation == Activation::none) return;
#pragma unroll 1
  for (int i = 0; i < V; ++i) {
    const A first = activate(v[0], activation);
#pragma unroll
    for (int j = 1; j < V; ++j) v[j - 1] = v[j];
    v[V - 1] = first;
  }
}

// d activate(z) / dz
template <class A>
__device__ A derivative(A z, Activation activation) {
  switch (activation) {
    case Activation::none: return 1;
    case Activation::relu: return z <= 0 ? 0 : 1;
    case Activation::relu6: return z <= 0 || z >= 6 ? 0 : 1;
    case Activation::leaky_relu: return z > 0 ? A(1) : A(0.01);
    case Activation::elu: return z < 0 ? exp_of(z) : A(1);
    case Activation::sigmoid: return sigmoid(z) * sigmoid(-z);
    case Activation::tanh: return 1 - tanh_of(z) * tanh_of(z);
    case Activation::softplus: return z > 20 ? A(1) : sigmoid(z);
    case Activation::silu: return sigmoid(z) * (1 + z * sigmoid(-z));
    case Activation::hardswish: return z <= -3 ? A(0) : z < 3 ? z / 3 + A(0.5) : A(1);
    case Activation::gelu:
      return (1 + erf_of(z * A(0.70710678118654752440))) / 2 + z * exp_of(-z * z / 2) * A(0.39894228040143267794);
  }
  return 1;
}

// The same from y = activate(z), for all but silu, hardswish and gelu.
template <class A>
__device__ A derivative_of_output(A y, Activation activation) {
  switch (activation) {
    case Activation::elu: return y < 0 ? y + 1 : A(1);
    case Activation::sigmoid: return y * (1 - y);
    case Activation::tanh: return 1 - y * y;
    case Activation::softplus: return y > A(kSoftplusOf20) ? A(1) : -expm1_of(-y);
    default: return derivative(y, activation);
  }
}

// The activations of kernels that have many copies of them in their code.
static inline bool is_simple(Activation activation) {
  switch (activation) {
    case Activation::none:
    case Activation::relu:
    case Activation::relu6:
    case Activation::leaky_relu: return true;
    default: return false;
  }
}
template <bool simple, class A>
__device__ __forceinline__ A activate_if(A z, Activation activation) {
  if constexpr (!simple) {
    return activate(z, activation);
  } else {
    if (activation == Activation::none) return z;
    if (activation == Activation::leaky_relu) return z > 0 ? z : A(0.01) * z;
    return z < 0 ? A(0) : activation == Activation::relu6 && z > 6 ? A(6) : z;
  }
}
// A simple one of rows of numbers, chosen once.
template <class A, int rows, int V>
__device__ __forceinline__ void activate_simply(A (&v)[rows][V], Activation activation) {
  const auto each = [&](const auto& f) {
#pragma unroll
    for (int t = 0; t < rows; ++t)
#pragma unroll
      for (int i = 0; i < V; ++i) v[t][i] = f(v[t][i]);
  };
  if (activation == Activation::leaky_relu) {
    each([](A z) { return z > 0 ? z : A(0.01) * z; });
  } else if (activation != Activation::none) {
    const A top = activation == Activation::relu6 ? A(6) : A(INFINITY);
    each([top](A z) { return z < 0 ? A(0) : z > top ? top : z; });
  }
}
// The derivative of a simple one, which is the same at y as at z.
template <class A>
__device__ __forceinline__ A simple_derivative(A z, Activation activation) {
  if (activation == Activation::none) return 1;
  if (activation == Activation::leaky_relu) return z > 0 ? A(1) : A(0.01);
  return z <= 0 || (activation == Activation::relu6 && z >= 6) ? A(0) : A(1);
}

}  // namespace
}  // namespace cnnops
