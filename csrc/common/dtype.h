// Element types of the kernels. Everything here has internal linkage: these helpers are compiled into sources built for
// different instruction sets, and the linker must never hand one instruction set's copy to another.
#pragma once

#include <cstdint>
#include <cstring>

namespace cnnops {

enum class DType : uint8_t { f32, f64, bf16, f16, u8, i64, other };

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

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

static inline float load_scalar(float v) { return v; }
static inline double load_scalar(double v) { return v; }
static inline float load_scalar(f16 v) { return static_cast<float>(v); }
static inline float load_scalar(bf16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &wide, sizeof out);
  return out;
}

static inline void store_scalar(float* to, double v) { *to = static_cast<float>(v); }
static inline void store_scalar(double* to, double v) { *to = v; }
static inline void store_scalar(f16* to, float v) { *to = static_cast<f16>(v); }
// Rounds to nearest, ties to even; NaN keeps its sign and stays quiet.
static inline void store_scalar(bf16* to, float v) {
  uint32_t wide;
  std::memcpy(&wide, &v, sizeof wide);
  if ((wide & 0x7fffffffu) > 0x7f800000u) {
    to->bits = static_cast<uint16_t>((wide >> 16) | 0x40);
  } else {
    to->bits = static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
  }
}

}  // namespace cnnops
