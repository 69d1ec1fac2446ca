// What a kernel of a device is given beside its problem.
#pragma once

#include <cstdint>

namespace cnnops {

struct Launch {
  void* stream = nullptr;  // cudaStream_t: where the work goes
  // Memory of the device that stays while work now put on the stream needs it. Throws where none is left.
  virtual void* allocate(int64_t bytes) = 0;

 protected:
  ~Launch() = default;
};

}  // namespace cnnops
