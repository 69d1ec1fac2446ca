// What crosses the boundary: a pointer, a shape, strides, a dtype and a device. Kernels see less: an Image's layout is
// one of two, and its sizes.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/launch.h"

namespace cnnops {

enum class Device : uint8_t { cpu, cuda, other };

struct Place {
  Device device = Device::cpu;
  int id = 0;
  bool operator==(const Place&) const = default;
};

struct Tensor {
  static constexpr int kMaxDims = 8;
  void* data = nullptr;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  int ndim = 0;
  DType dtype = DType::other;
  Place place;

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }
};

enum class Layout : uint8_t {
  nchw,  // [N, C, H, W], contiguous
  nhwc,  // [N, H, W, C] in memory: PyTorch's channels_last
};

}  // namespace cnnops
