// Element types of the kernels. Everything here has internal linkage: these helpers are compiled into sources built for
// different instruction sets, and the linker must never hand one instruction set's copy to another.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/portable.h"

namespace cnnops {

enum class DType : uint8_t { f32, f64, bf16, f16, u8, i64, other };

struct bf16 {
  uint16_t bits;
};
#if CNNOPS_DEVICE_SOURCE
struct f16 {  // device compilers know no _Float16
  uint16_t bits;
};
#else
using f16 = _Float16;
#endif

// The type a kernel computes in: float64 for float64, float32 for everything else.
template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using compute_t = typename ComputeType<T>::type;

CNNOPS_HD static inline float load_scalar(float v) { return v; }
CNNOPS_HD static inline double load_scalar(double v) { return v; }
CNNOPS_HD static inline float load_scalar(bf16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

CNNOPS_HD static inline void store_scalar(float* to, double v) { *to = static_cast<float>(v); }
CNNOPS_HD static inline void store_scalar(double* to, double v) { *to = v; }
// Rounds to nearest, ties to even; NaN keeps its sign and stays quiet.
CNNOPS_HD static inline void store_scalar(bf16* to, float v) {
  uint32_t wide;
  std::memcpy(&wide, &v, sizeof wide);
  if ((wide & 0x7fffffffu) > 0x7f800000u) {
    to->bits = static_cast<uint16_t>((wide >> 16) | 0x40);
  } else {
    to->bits = static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
  }
}

#if CNNOPS_DEVICE_SOURCE
CNNOPS_HD static inline float load_scalar(f16 v);  // cuda/ptx.cuh
CNNOPS_HD static inline void store_scalar(f16* to, float v);
#else
static inline float load_scalar(f16 v) { return static_cast<float>(v); }
static inline void store_scalar(f16* to, float v) { *to = static_cast<f16>(v); }
#endif

}  // namespace cnnops
