// Calls of kernels for CUDA devices: their stream, memory and device, all of them those of the tensors' framework, through
// the DLPack exchange API; and, in builds with emulation, calls of the same kernels on the CPU.
#pragma once

#include <vector>

#include "common/launch.h"
#include "common/tensor.h"
#include "dispatch/isa.h"

namespace cnnops {

namespace dlpack {
struct ExchangeApi;
struct ManagedTensor;
}  // namespace dlpack

// CUDA devices that this process sees; 0 where the build has no CUDA kernels or the machine no driver.
int device_count();

// The framework whose tensor was seen last on a device: it is asked for the stream and for memory.
void note_device_api(const dlpack::ExchangeApi* api);

#if CNNOPS_EMULATION
// Emulated kernels may touch the tensors seen since the last call, and nothing else.
void note_tensor(const Tensor& tensor);
#else
inline void note_tensor(const Tensor&) {}
#endif

// One call of a kernel: makes its device the current one, and gives it memory that is the framework's again afterwards (in
// the order of the stream, so that nothing waits).
class DeviceCall final : public Launch {
 public:
  DeviceCall(Isa isa, Place place);
  ~DeviceCall();
  DeviceCall(const DeviceCall&) = delete;
  DeviceCall& operator=(const DeviceCall&) = delete;
  void* allocate(int64_t bytes) override;

 private:
  const Isa isa_;
  const Place place_;
  int previous_ = 0;
  std::vector<dlpack::ManagedTensor*> held_;
};

}  // namespace cnnops
