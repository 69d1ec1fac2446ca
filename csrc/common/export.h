// Exports one kernel template as four functions of the namespace of the instruction set being compiled, e.g.
// CNNOPS_EXPORT(avg_pool2d_forward, AvgPool2dParams, forward) defines avg_pool2d_forward_{f32,f64,bf16,f16} in
// cnnops::avx512 from `template <class T> void forward(const AvgPool2dParams&)`. Nothing else may leave such a source.
#pragma once

#include "common/dtype.h"

#ifndef CNNOPS_ISA
#error "CNNOPS_ISA names the namespace; cmake/cnnops.cmake defines it"
#endif

#if CNNOPS_ISA_avx512_bf16  // whose own is arithmetic on bfloat16 numbers
#define CNNOPS_EXPORT(name, Params, kernel) CNNOPS_EXPORT_FLOAT(name, Params, kernel)
#define CNNOPS_EXPORT_FLOAT(name, Params, kernel)                  \
  namespace cnnops::CNNOPS_ISA {                                   \
  void name##_bf16(const Params& p) { kernel<::cnnops::bf16>(p); } \
  }
#else
#define CNNOPS_EXPORT(name, Params, kernel)               \
  CNNOPS_EXPORT_FLOAT(name, Params, kernel)               \
  namespace cnnops::CNNOPS_ISA {                          \
  void name##_f64(const Params& p) { kernel<double>(p); } \
  }
// For kernels that compute in float32.
#define CNNOPS_EXPORT_FLOAT(name, Params, kernel)                  \
  namespace cnnops::CNNOPS_ISA {                                   \
  void name##_f32(const Params& p) { kernel<float>(p); }           \
  void name##_bf16(const Params& p) { kernel<::cnnops::bf16>(p); } \
  void name##_f16(const Params& p) { kernel<::cnnops::f16>(p); }   \
  }
#endif
