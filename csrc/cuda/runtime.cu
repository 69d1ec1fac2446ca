#include "cuda/runtime.h"

#include <cuda_runtime.h>

#include "common/check.h"

namespace cnnops::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // or the next launch would report it
    return 0;
  }
  return count;
}

int use_device(int id) {
  int previous = id;
  cudaError_t status = cudaGetDevice(&previous);
  if (status == cudaSuccess && previous != id) status = cudaSetDevice(id);
  CNNOPS_CHECK(status == cudaSuccess, std::runtime_error, "cannot use cuda:", id, ": ", cudaGetErrorString(status));
  return previous;
}

void restore_device(int id) { cudaSetDevice(id); }

std::string capabilities() { return CNNOPS_CUDA_CAPABILITIES; }

std::string compiler_version() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

}  // namespace cnnops::cuda
