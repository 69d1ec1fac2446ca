// The instructions of Intel's matrix unit (AMX), each behind a function: eight tile registers of 16 rows of 64 bytes. Sources
// compiled for another level get plain loops in their place, so that the kernels around them run, and are tested, on any CPU.
//
// The instruction itself flushes denormal operands and results to zero; the loops do not.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/export.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int kTileSide = 16;                              // rows; columns of 4 bytes
constexpr int64_t kTileTerms = 32;                         // bfloat16 numbers in a row
constexpr int64_t kTileBytes = 4 * kTileSide * kTileSide;  // of a register

#if CNNOPS_ISA_amx

// All eight registers at their full size. A thread that holds tiles is slower to switch away from: release them.
inline void tile_configure() {
  struct [[gnu::packed]] {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kTileSide;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int kTile>
[[gnu::always_inline]] inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows `pitch` bytes apart.
template <int kTile>
[[gnu::always_inline]] inline void tile_load(const void* from, int64_t pitch) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(pitch), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void tile_store(void* to, int64_t pitch) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(pitch), "i"(kTile) : "memory");
}
// kSum[i][j] += sum over t of kA[i][t] * kB[t][j], kA [16][32] bfloat16, kB [16 pairs][16 columns][2], kSum float32.
template <int kSum, int kA, int kB>
[[gnu::always_inline]] inline void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

#else

thread_local char tile_registers[8][kTileBytes];

inline void tile_configure() { std::memset(tile_registers, 0, sizeof tile_registers); }
inline void tile_release() {}

template <int kTile>
inline void tile_zero() {
  std::memset(tile_registers[kTile], 0, kTileBytes);
}
template <int kTile>
inline void tile_load(const void* from, int64_t pitch) {
  for (int i = 0; i < kTileSide; ++i)
    std::memcpy(tile_registers[kTile] + i * 64, static_cast<const char*>(from) + i * pitch, 64);
}
template <int kTile>
inline void tile_store(void* to, int64_t pitch) {
  for (int i = 0; i < kTileSide; ++i)
    std::memcpy(static_cast<char*>(to) + i * pitch, tile_registers[kTile] + i * 64, 64);
}
template <int kSum, int kA, int kB>
inline void tile_dot() {
  float sum[kTileSide][kTileSide];
  ::cnnops::bf16 a[kTileSide][kTileTerms], b[kTileSide][kTileSide][2];
  std::memcpy(sum, tile_registers[kSum], kTileBytes);
  std::memcpy(a, tile_registers[kA], kTileBytes);
  std::memcpy(b, tile_registers[kB], kTileBytes);
  for (int i = 0; i < kTileSide; ++i)
    for (int t = 0; t < kTileTerms; ++t)
      for (int j = 0; j < kTileSide; ++j) sum[i][j] += load_scalar(a[i][t]) * load_scalar(b[t / 2][j][t % 2]);
  std::memcpy(tile_registers[kSum], sum, kTileBytes);
}

#endif

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
