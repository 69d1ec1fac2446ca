// The memory that emulated kernels may touch: tensors of the call, and what they allocate.
#pragma once

#include <cstdint>

namespace cnnops::emulation {

struct Range {
  void* begin;
  int64_t bytes;
};

void begin(const Range* tensors, int count);
void* allocate(int64_t bytes);  // filled with 0xff: NaN in every floating-point type
void end();                     // frees what was allocated

}  // namespace cnnops::emulation
