// Activations that kernels fuse, with PyTorch's default parameters.
#pragma once

#include <cstdint>

namespace cnnops {

enum class Activation : uint8_t {
  none,
  relu,        // max(z, 0)
  relu6,       // min(max(z, 0), 6)
  leaky_relu,  // z > 0 ? z : 0.01 z
  elu,         // z > 0 ? z : exp(z) - 1
  sigmoid,     // 1 / (1 + exp(-z))
  tanh,        // tanh(z)
  softplus,    // z > 20 ? z : log(1 + exp(z))
  silu,        // z * sigmoid(z)
  hardswish,   // z * min(max(z + 3, 0), 6) / 6
  gelu,        // z * (1 + erf(z / sqrt(2))) / 2
};

// In the enum's order: what Python calls them.
constexpr const char* kActivationNames[] = {"none", "relu",     "relu6", "leaky_relu", "elu", "sigmoid",
                                            "tanh", "softplus", "silu",  "hardswish",  "gelu"};
constexpr int kActivations = sizeof kActivationNames / sizeof kActivationNames[0];

// softplus(20): where its threshold lies in terms of its result.
constexpr double kSoftplusOf20 = 20.000000002061153;

}  // namespace cnnops
