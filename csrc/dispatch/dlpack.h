// The part of DLPack 1.3's C ABI that the extension uses (https://dmlc.github.io/dlpack/latest/c_api.html), declared
// here so that building needs no torch headers.
#pragma once

#include <cstdint>

namespace cnnops::dlpack {

struct Version {
  uint32_t major, minor;
};
struct DeviceOf {
  int32_t type, id;
};
constexpr int32_t kCpu = 1, kCuda = 2, kCudaHost = 3;
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
constexpr uint8_t kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4;

struct DLTensor {
  void* data;
  DeviceOf device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Version version;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  DLTensor tensor;
};

struct ExchangeApiHeader {
  Version version;
  ExchangeApiHeader* prev_api;
};

struct ExchangeApi {
  ExchangeApiHeader header;
  int (*managed_tensor_allocator)(DLTensor*, ManagedTensor**, void*, void (*)(void*, const char*, const char*));
  int (*managed_tensor_from_py_object_no_sync)(void*, ManagedTensor**);
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensor*, void**);
  int (*dltensor_from_py_object_no_sync)(void*, DLTensor*);
  int (*current_work_stream)(int32_t, int32_t, void**);
};

}  // namespace cnnops::dlpack
