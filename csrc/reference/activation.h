// Activations of the references: one number, in float64, by libm.
#pragma once

#include "common/activation.h"
#include "common/export.h"

namespace cnnops::reference {
namespace {

double sigmoid(double z) { return 1 / (1 + __builtin_exp(-z)); }

double activate(double z, Activation a) {
  switch (a) {
    case Activation::none: return z;
    case Activation::relu: return z < 0 ? 0 : z;
    case Activation::relu6: return z < 0 ? 0 : z > 6 ? 6 : z;
    case Activation::leaky_relu: return z > 0 ? z : 0.01 * z;
    case Activation::elu: return z < 0 ? __builtin_expm1(z) : z;
    case Activation::sigmoid: return sigmoid(z);
    case Activation::tanh: return __builtin_tanh(z);
    case Activation::softplus: return z > 20 ? z : __builtin_log1p(__builtin_exp(z));
    case Activation::silu: return z * sigmoid(z);
    case Activation::hardswish: return z * activate(z + 3, Activation::relu6) / 6;
    case Activation::gelu: return z * (1 + __builtin_erf(z * 0.70710678118654752440)) / 2;
  }
  return z;
}

// d activate(z) / dz; at the kinks, and for NaN where it is constant on both sides, PyTorch's choice.
double derivative(double z, Activation a) {
  switch (a) {
    case Activation::none: return 1;
    case Activation::relu: return z <= 0 ? 0 : 1;
    case Activation::relu6: return z <= 0 || z >= 6 ? 0 : 1;
    case Activation::leaky_relu: return z > 0 ? 1 : 0.01;
    case Activation::elu: return z < 0 ? __builtin_exp(z) : 1;
    case Activation::sigmoid: return sigmoid(z) * sigmoid(-z);
    case Activation::tanh: return 1 - __builtin_tanh(z) * __builtin_tanh(z);
    case Activation::softplus: return z > 20 ? 1 : sigmoid(z);
    case Activation::silu: return sigmoid(z) * (1 + z * sigmoid(-z));
    case Activation::hardswish: return z <= -3 ? 0 : z < 3 ? z / 3 + 0.5 : 1;
    case Activation::gelu:
      return (1 + __builtin_erf(z * 0.70710678118654752440)) / 2 +
             z * __builtin_exp(-z * z / 2) * 0.39894228040143267794;
  }
  return 1;
}

// The same from y = activate(z), for all but silu, hardswish and gelu.
double derivative_of_output(double y, Activation a) {
  switch (a) {
    case Activation::elu: return y < 0 ? y + 1 : 1;
    case Activation::sigmoid: return y * (1 - y);
    case Activation::tanh: return 1 - y * y;
    case Activation::softplus: return y > kSoftplusOf20 ? 1 : -__builtin_expm1(-y);
    default: return derivative(y, a);
  }
}

}  // namespace
}  // namespace cnnops::reference
