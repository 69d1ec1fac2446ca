#include "dispatch/device.h"

#include "common/check.h"
#include "common/scratch.h"
#include "dispatch/dlpack.h"
#if CNNOPS_CUDA
#include "cuda/runtime.h"
#endif
#if CNNOPS_EMULATION
#include "cuda/emulation/memory.h"
#endif

namespace cnnops {
namespace {

const dlpack::ExchangeApi* device_api = nullptr;  // guarded by the GIL

void keep_message(void* to, const char*, const char* message) { *static_cast<std::string*>(to) = message; }

#if CNNOPS_EMULATION
// Enough for the tensors of any call; those of a call that failed its checks are forgotten with the next one.
struct {
  emulation::Range ranges[64];
  int count = 0;
} noted;
#endif

}  // namespace

int device_count() {
#if CNNOPS_CUDA
  static const int count = cuda::device_count();
  return count;
#else
  return 0;
#endif
}

void note_device_api(const dlpack::ExchangeApi* api) { device_api = api; }

#if CNNOPS_EMULATION
void note_tensor(const Tensor& t) {
  int64_t last = 0;
  for (int i = 0; i < t.ndim; ++i) last += (t.shape[i] - 1) * t.stride[i];
  const int64_t element = t.dtype == DType::f64 || t.dtype == DType::i64    ? 8
                          : t.dtype == DType::f32                           ? 4
                          : t.dtype == DType::bf16 || t.dtype == DType::f16 ? 2
                                                                            : 1;
  if (t.numel() > 0) noted.ranges[noted.count++ % 64] = {t.data, (last + 1) * element};
}
#endif

DeviceCall::DeviceCall(Isa isa, Place place) : isa_(isa), place_(place) {
#if CNNOPS_EMULATION
  if (isa_ == Isa::cuda_emulated) {
    emulation::begin(noted.ranges, noted.count < 64 ? noted.count : 64);
    noted.count = 0;
    return;
  }
#endif
  CNNOPS_CHECK(device_api, std::runtime_error, "no framework of a device's tensors is known");
  CNNOPS_CHECK(device_api->current_work_stream(dlpack::kCuda, place.id, &stream) == 0, std::runtime_error,
               "cannot find the current stream of cuda:", place.id);
#if CNNOPS_CUDA
  previous_ = cuda::use_device(place.id);
#endif
}

DeviceCall::~DeviceCall() {
#if CNNOPS_EMULATION
  if (isa_ == Isa::cuda_emulated) {
    emulation::end();
    return;
  }
#endif
  for (dlpack::ManagedTensor* tensor : held_) tensor->deleter(tensor);
#if CNNOPS_CUDA
  if (previous_ != place_.id) cuda::restore_device(previous_);
#endif
}

void* DeviceCall::allocate(int64_t bytes) {
#if CNNOPS_EMULATION
  if (isa_ == Isa::cuda_emulated) return emulation::allocate(bytes);
#endif
  int64_t shape[1] = {max64(bytes, 1)}, stride[1] = {1};
  dlpack::DLTensor prototype{};
  prototype.device = {dlpack::kCuda, place_.id};
  prototype.ndim = 1;
  prototype.dtype = {dlpack::kUint, 8, 1};
  prototype.shape = shape;
  prototype.strides = stride;
  dlpack::ManagedTensor* out = nullptr;
  std::string error = "out of memory";
  CNNOPS_CHECK(device_api->managed_tensor_allocator(&prototype, &out, &error, &keep_message) == 0 && out,
               std::runtime_error, "cannot allocate ", bytes, " bytes on cuda:", place_.id, ": ", error);
  held_.push_back(out);
  return static_cast<char*>(out->tensor.data) + out->tensor.byte_offset;
}

}  // namespace cnnops
