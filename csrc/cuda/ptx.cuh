// Every PTX instruction that kernels use, each behind a function with a body for the host, by the instruction's
// documentation (PTX ISA, "Warp-level matrix instructions" and "Asynchronous copy"). Also the intrinsics and conversions that
// the host has under other names.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/portable.h"
#if CNNOPS_EMULATED
#include "cuda/emulation/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace cnnops {
namespace {

template <class To, class From>
CNNOPS_HD inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

namespace ptx {

#if CNNOPS_EMULATED
inline float from_f16(uint16_t v) { return static_cast<float>(bits_as<_Float16>(v)); }
inline uint16_t to_f16(float v) { return bits_as<uint16_t>(static_cast<_Float16>(v)); }
inline uint16_t to_bf16(float v) {
  bf16 out;
  ::cnnops::store_scalar(&out, v);
  return out.bits;
}
#else
// Also for functions of both sides (CNNOPS_HD), of which kernels use the device's alone.
CNNOPS_HD __forceinline__ float from_f16([[maybe_unused]] uint16_t v) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v));
  return out;
#else
  __builtin_trap();
#endif
}
CNNOPS_HD __forceinline__ uint16_t to_f16([[maybe_unused]] float v) {
#if defined(__CUDA_ARCH__)
  uint16_t out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(v));
  return out;
#else
  __builtin_trap();
#endif
}
__device__ __forceinline__ uint16_t to_bf16(float v) {
  uint16_t out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(v));
  return out;
}
#endif

// ---- Asynchronous copies: 16 bytes from global to shared memory, of which the first `from_bytes` (0 or 16) are read and the
// others are zeros. Groups end in order; after wait<n> all but the thread's last n groups are there, for this thread.

#if CNNOPS_EMULATED
inline void copy_async_16(void* to, const void* from, int from_bytes) {
  emulation::copy_later(to, from, 16, from_bytes);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int groups>
inline void wait_for_copies() {
  emulation::wait_for_copies(groups);
}
#else
__device__ __forceinline__ void copy_async_16(void* to, const void* from, int from_bytes) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(from_bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}
#endif

// ---- Matrix fragments. Lane l of a warp, with g = l / 4 and t = l % 4, holds of 16-bit operands two elements a register:
//   A (16 x 16): a[0]: (g, 2t), (g, 2t+1)   a[1]: row g+8   a[2]: columns 2t+8, 2t+9   a[3]: both
//   B (16 x 8):  b[0]: (2t, g), (2t+1, g)   b[1]: rows 2t+8, 2t+9
//   D (16 x 8), float32:  d[0], d[1]: (g, 2t), (g, 2t+1)   d[2], d[3]: row g+8

#if CNNOPS_EMULATED
// What a warp does together is not checked: its lanes have checked what they bring.
#define CNNOPS_UNCHECKED __attribute__((no_sanitize("thread")))
struct Mma {
  float* d;
  const uint32_t *a, *b;
};
inline float half_of(uint32_t pair, int which, bool is_bf16) {
  const uint16_t bits = static_cast<uint16_t>(which ? pair >> 16 : pair);
  return is_bf16 ? bits_as<float>(static_cast<uint32_t>(bits) << 16) : from_f16(bits);
}
typedef float Row8 __attribute__((vector_size(8 * sizeof(float))));
template <bool is_bf16>
CNNOPS_UNCHECKED void mma_of_warp(void** lanes) {
  float a[16][16];
  Row8 b[16], d[16];
  for (int l = 0; l < 32; ++l) {
    const auto* const lane = static_cast<Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 2; ++j) a[g + (i & 1) * 8][2 * t + (i >> 1) * 8 + j] = half_of(lane->a[i], j, is_bf16);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 2; ++j) b[2 * t + i * 8 + j][g] = half_of(lane->b[i], j, is_bf16);
  }
  for (int row = 0; row < 16; ++row) {
    d[row] = Row8{};
    for (int k = 0; k < 16; ++k) d[row] += a[row][k] * b[k];
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) static_cast<Mma*>(lanes[l])->d[i] += d[l / 4 + (i >> 1) * 8][l % 4 * 2 + (i & 1)];
}
#endif

// d += a * b
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool is_bf16 = sizeof(T) != 2 || !__is_same(T, f16);
#if CNNOPS_EMULATED
  Mma mine{d, a, b};
  emulation::collective("mma", &mine, &mma_of_warp<is_bf16>);
#else
  if constexpr (is_bf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Of TF32 numbers, whose last 13 bits do not count, one a register:
//   A (16 x 8): a[0]: (g, t)   a[1]: row g+8   a[2]: column t+4   a[3]: both
//   B (8 x 8):  b[0]: (t, g)   b[1]: row t+4
// and D as above. d += a * b
#if CNNOPS_EMULATED
CNNOPS_UNCHECKED inline void mma_tf32_of_warp(void** lanes) {
  float a[16][8];
  Row8 b[8], d[16];
  const auto number = [](uint32_t bits) { return bits_as<float>(bits & ~0x1fffu); };
  for (int l = 0; l < 32; ++l) {
    const auto* const lane = static_cast<Mma*>(lanes[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) a[g + (i & 1) * 8][t + (i >> 1) * 4] = number(lane->a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = number(lane->b[i]);
  }
  for (int row = 0; row < 16; ++row) {
    d[row] = Row8{};
    for (int k = 0; k < 8; ++k) d[row] += a[row][k] * b[k];
  }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) static_cast<Mma*>(lanes[l])->d[i] += d[l / 4 + (i >> 1) * 8][l % 4 * 2 + (i & 1)];
}
#endif
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if CNNOPS_EMULATED
  Mma mine{d, a, b};
  emulation::collective("mma", &mine, &mma_tf32_of_warp);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l / 8, 16 bytes.
// Register i gets of matrix i the elements (l / 4, 2 (l % 4)) and its right neighbour; transposed, (2 (l % 4), l / 4) and
// the one below.
#if CNNOPS_EMULATED
struct LoadMatrix {
  const void* row;
  uint32_t* out;
};
template <bool transposed>
CNNOPS_UNCHECKED void load_matrix_of_warp(void** lanes) {
  uint16_t m[32][8];
  for (int l = 0; l < 32; ++l) std::memcpy(m[l], static_cast<LoadMatrix*>(lanes[l])->row, 16);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const int r = l / 4, c = l % 4 * 2;
      const uint32_t low = transposed ? m[8 * i + c][r] : m[8 * i + r][c];
      const uint32_t high = transposed ? m[8 * i + c + 1][r] : m[8 * i + r][c + 1];
      static_cast<LoadMatrix*>(lanes[l])->out[i] = low | high << 16;
    }
}
#endif
template <bool transposed>
__device__ __forceinline__ void load_matrix_x4(uint32_t (&out)[4], const void* row) {
#if CNNOPS_EMULATED
  emulation::check(row, 16, false);
  LoadMatrix mine{row, out};
  emulation::collective("ldmatrix", &mine, &load_matrix_of_warp<transposed>);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

}  // namespace ptx
}  // namespace

CNNOPS_HD static inline float load_scalar(f16 v) { return ptx::from_f16(v.bits); }
CNNOPS_HD static inline void store_scalar(f16* to, float v) { to->bits = ptx::to_f16(v); }

}  // namespace cnnops
