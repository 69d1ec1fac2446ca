// What the rest of the extension asks of the CUDA runtime, without its headers.
#pragma once

#include <string>

namespace cnnops::cuda {

int device_count();      // 0 where there is no driver
int use_device(int id);  // returns the one that was current
void restore_device(int id);
std::string capabilities();      // that there is machine code for, "80,89,90a"
std::string compiler_version();  // "nvcc 13.0"

}  // namespace cnnops::cuda
