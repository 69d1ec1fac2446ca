// What the kernels on pairs of bfloat16 numbers (micro/dot_tile.h) share: float32 data that cannot be split goes to the direct
// kernels, conv2d.cpp.
#pragma once

#include "cpu/micro/pairs.h"
#include "ops/conv2d.h"

#if CNNOPS_ISA_amx_emulated
#define CNNOPS_DIRECT_ISA baseline
#else
#define CNNOPS_DIRECT_ISA avx512
#endif

namespace cnnops::CNNOPS_DIRECT_ISA {
void conv2d_forward_f32(const Conv2dParams&);
void conv2d_input_grad_f32(const Conv2dParams&);
void conv2d_weight_grad_f32(const Conv2dParams&);
}  // namespace cnnops::CNNOPS_DIRECT_ISA

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kWantedTasks = 16;  // enough to balance a few threads; fixed, so that cuts do not depend on threads

// As even as possible, in whole grains.
int64_t even_block(int64_t total, int64_t block, int64_t grain) {
  return round_up(ceil_div(total, ceil_div(total, block)), grain);
}

// How `channels` are cut into the panels of b, at most kDotVecs vectors wide, or into the tiles of rows of a.
struct DotPanels {
  bool columns;
  int64_t vectors, count;

  DotPanels(bool columns, int64_t channels)
      : columns(columns),
        vectors(ceil_div(channels, kDotLanes)),
        count(columns ? ceil_div(vectors, kDotVecs) : ceil_div(channels, kDotRows)) {}
  int64_t begin(int64_t panel) const { return columns ? panel * vectors / count * kDotLanes : panel * kDotRows; }
  int64_t width(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  int64_t channels() const { return begin(count); }
};

template <int kValue>
struct Products {
  static constexpr int value = kValue;
};

// Calls kernel(constant) with the number of products that the call asks for; bfloat16 takes one. Returns what it returns.
template <class T, class Kernel>
bool with_products([[maybe_unused]] const Conv2dParams& p, const Kernel& kernel) {
#if !CNNOPS_ISA_avx512_bf16
  if constexpr (sizeof(T) == 4) {
    if (p.precision == Precision::ieee) return kernel(Products<6>{});
    if (p.precision == Precision::tf32) return kernel(Products<3>{});
  }
#endif
  return kernel(Products<1>{});
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
