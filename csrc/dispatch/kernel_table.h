// The kernel table of an op: one row per instruction set (or device), dtype and pass, best first. csrc/ops/<op>.inc
// lists the rows; the first row that the CPU, the user's limit, the dtype and the problem allow is run. Python sees
// every row (cnnops._C.kernels()) and can name one by its index, which is how tests and benchmarks reach all of them.
#pragma once

#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"
#include "dispatch/device.h"
#include "dispatch/isa.h"

// In an .inc file: CNNOPS_KERNEL(pass, isa, dtype, function, accepts), where `accepts` is a predicate on the Params,
// and CNNOPS_KERNELS(pass, isa, function, accepts) for the four dtypes at once.
#define CNNOPS_KERNELS(pass, isa, function, accepts)       \
  CNNOPS_KERNEL(pass, isa, f32, function##_f32, accepts)   \
  CNNOPS_KERNEL(pass, isa, f64, function##_f64, accepts)   \
  CNNOPS_KERNEL(pass, isa, bf16, function##_bf16, accepts) \
  CNNOPS_KERNEL(pass, isa, f16, function##_f16, accepts)
#if CNNOPS_X86
#define CNNOPS_KERNELS_X86(pass, isa, function, accepts) CNNOPS_KERNELS(pass, isa, function, accepts)
#else
#define CNNOPS_KERNELS_X86(pass, isa, function, accepts)
#endif
// The kernel for CUDA devices, and the same source compiled for the host's emulator.
#if CNNOPS_CUDA
#define CNNOPS_KERNEL_CUDA(pass, dtype, function, accepts) CNNOPS_KERNEL(pass, cuda, dtype, function, accepts)
#define CNNOPS_KERNELS_CUDA(pass, function, accepts) CNNOPS_KERNELS(pass, cuda, function, accepts)
#else
#define CNNOPS_KERNEL_CUDA(pass, dtype, function, accepts)
#define CNNOPS_KERNELS_CUDA(pass, function, accepts)
#endif
#if CNNOPS_EMULATION
#define CNNOPS_KERNEL_CUDA_EMULATED(pass, dtype, function, accepts) \
  CNNOPS_KERNEL(pass, cuda_emulated, dtype, function, accepts)
#define CNNOPS_KERNELS_CUDA_EMULATED(pass, function, accepts) CNNOPS_KERNELS(pass, cuda_emulated, function, accepts)
#else
#define CNNOPS_KERNEL_CUDA_EMULATED(pass, dtype, function, accepts)
#define CNNOPS_KERNELS_CUDA_EMULATED(pass, function, accepts)
#endif
#define CNNOPS_KERNEL_DEVICE(pass, dtype, function, accepts) \
  CNNOPS_KERNEL_CUDA(pass, dtype, function, accepts)         \
  CNNOPS_KERNEL_CUDA_EMULATED(pass, dtype, function, accepts)
#define CNNOPS_KERNELS_DEVICE(pass, function, accepts) \
  CNNOPS_KERNELS_CUDA(pass, function, accepts)         \
  CNNOPS_KERNELS_CUDA_EMULATED(pass, function, accepts)
// A kernel at every level; a generic one also has its reference.
#define CNNOPS_KERNELS_CPU(pass, function, accepts)   \
  CNNOPS_KERNELS_X86(pass, avx512, function, accepts) \
  CNNOPS_KERNELS_X86(pass, avx2, function, accepts)   \
  CNNOPS_KERNELS(pass, baseline, function, accepts)
#define CNNOPS_KERNELS_ALL(pass, function, accepts) \
  CNNOPS_KERNELS_CPU(pass, function, accepts)       \
  CNNOPS_KERNELS(pass, reference, function, accepts)
// A kernel at every level that computes in float32: not for float64.
#define CNNOPS_KERNELS_FLOAT(pass, isa, function, accepts) \
  CNNOPS_KERNEL(pass, isa, f32, function##_f32, accepts)   \
  CNNOPS_KERNEL(pass, isa, bf16, function##_bf16, accepts) \
  CNNOPS_KERNEL(pass, isa, f16, function##_f16, accepts)
#if CNNOPS_X86
#define CNNOPS_KERNELS_FLOAT_X86(pass, isa, function, accepts) CNNOPS_KERNELS_FLOAT(pass, isa, function, accepts)
#define CNNOPS_KERNELS_FLOAT_CPU(pass, function, accepts) \
  CNNOPS_KERNELS_FLOAT(pass, avx512, function, accepts)   \
  CNNOPS_KERNELS_FLOAT(pass, avx2, function, accepts)     \
  CNNOPS_KERNELS_FLOAT(pass, baseline, function, accepts)
#else
#define CNNOPS_KERNELS_FLOAT_X86(pass, isa, function, accepts)
#define CNNOPS_KERNELS_FLOAT_CPU(pass, function, accepts) CNNOPS_KERNELS_FLOAT(pass, baseline, function, accepts)
#endif
// A kernel at every level, for float32 alone.
#define CNNOPS_KERNELS_F32_CPU(pass, function, accepts)  \
  CNNOPS_KERNEL_F32_X86(pass, avx512, function, accepts) \
  CNNOPS_KERNEL_F32_X86(pass, avx2, function, accepts)   \
  CNNOPS_KERNEL(pass, baseline, f32, function##_f32, accepts)
#if CNNOPS_X86
#define CNNOPS_KERNEL_F32_X86(pass, isa, function, accepts) CNNOPS_KERNEL(pass, isa, f32, function##_f32, accepts)
#else
#define CNNOPS_KERNEL_F32_X86(pass, isa, function, accepts)
#endif
// A kernel of sources that cmake/cnnops.cmake compiles for the instructions on pairs of bfloat16 numbers alone. The emulated level
// computes as amx does, in plain loops.
#if CNNOPS_PAIRS
#define CNNOPS_KERNEL_PAIRS(pass, isa, dtype, function, accepts) CNNOPS_KERNEL(pass, isa, dtype, function, accepts)
#define CNNOPS_KERNELS_PAIRS(pass, function, accepts)      \
  CNNOPS_KERNEL(pass, amx, f32, function##_f32, accepts)   \
  CNNOPS_KERNEL(pass, amx, bf16, function##_bf16, accepts) \
  CNNOPS_KERNEL(pass, avx512_bf16, bf16, function##_bf16, accepts)
// The same source as at avx512, compiled again with the instructions that round to bfloat16.
#define CNNOPS_KERNEL_BF16(pass, function, accepts) CNNOPS_KERNEL(pass, avx512_bf16, bf16, function##_bf16, accepts)
#else
#define CNNOPS_KERNEL_BF16(pass, function, accepts)
#define CNNOPS_KERNEL_PAIRS(pass, isa, dtype, function, accepts)
#define CNNOPS_KERNELS_PAIRS(pass, function, accepts)
#endif
#define CNNOPS_KERNELS_EMULATED(pass, function, accepts)          \
  CNNOPS_KERNEL(pass, amx_emulated, f32, function##_f32, accepts) \
  CNNOPS_KERNEL(pass, amx_emulated, bf16, function##_bf16, accepts)

namespace cnnops {

const char* name(DType dtype);

template <class Params>
struct KernelRow {
  const char* pass;
  Isa isa;
  DType dtype;
  const char* function;
  void (*run)(const Params&);
  bool (*accepts)(const Params&);
};

// The accepts of a kernel that takes every problem its op's contract allows.
template <class Params>
bool any(const Params&) {
  return true;
}

inline bool usable(Isa isa) { return isa == Isa::cuda ? device_count() > 0 : for_tests(isa) || isa <= isa_limit(); }
// Whether rows of this kind are chosen without being named, for tensors on a device or for tensors on the CPU.
inline bool chosen_by_itself(Isa isa, bool on_device) { return !for_tests(isa) && (isa == Isa::cuda) == on_device; }

// What Python is shown of a row.
struct KernelInfo {
  std::string op, pass, isa, dtype, function;
  int row;
  bool usable;    // built, supported by this CPU and within the limit
  bool selected;  // the first usable row of its pass, dtype and device that takes every problem
};

constexpr int kSelect = -1;

// A row was named that does not take the problem.
struct NotApplicable : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class Params>
const KernelRow<Params>& select(std::span<const KernelRow<Params>> table, const char* pass, DType dtype,
                                const Params& params, bool on_device = false, int row = kSelect) {
  if (row != kSelect) {
    CNNOPS_CHECK(row >= 0 && row < static_cast<int>(table.size()), std::invalid_argument, "kernel: row ", row,
                 " is not in the table, which has ", table.size(), " rows");
    const auto& chosen = table[row];
    CNNOPS_CHECK(std::strcmp(chosen.pass, pass) == 0 && chosen.dtype == dtype, std::invalid_argument, "kernel: row ",
                 row, " is ", chosen.function, " for ", chosen.pass, " in ", name(chosen.dtype), ", not for ", pass,
                 " in ", name(dtype));
    CNNOPS_CHECK((chosen.isa == Isa::cuda) == on_device, std::invalid_argument, "kernel: row ", row, " is for tensors ",
                 on_device ? "on the CPU" : "on a CUDA device");
    CNNOPS_CHECK(usable(chosen.isa), std::runtime_error, "kernel: row ", row, " needs ", name(chosen.isa),
                 ", which cannot be used here");
    CNNOPS_CHECK(chosen.accepts(params), NotApplicable, "kernel: ", chosen.function, " does not take this problem");
    return chosen;
  }
  for (const auto& candidate : table)
    if (candidate.dtype == dtype && std::strcmp(candidate.pass, pass) == 0 &&
        chosen_by_itself(candidate.isa, on_device) && usable(candidate.isa) && candidate.accepts(params))
      return candidate;
  throw std::runtime_error(message("no kernel for ", pass, " in ", name(dtype), on_device ? " on a CUDA device" : ""));
}

template <class Params>
std::vector<KernelInfo> describe(const char* op, std::span<const KernelRow<Params>> table) {
  std::vector<KernelInfo> rows;
  for (size_t i = 0; i < table.size(); ++i) {
    const auto& row = table[i];
    const bool on_device = row.isa == Isa::cuda;
    bool selected = chosen_by_itself(row.isa, on_device) && usable(row.isa) && row.accepts == &any<Params>;
    for (size_t j = 0; j < i && selected; ++j)
      selected = !(rows[j].selected && rows[j].pass == row.pass && rows[j].dtype == name(row.dtype) &&
                   (table[j].isa == Isa::cuda) == on_device);
    rows.push_back(
        {op, row.pass, name(row.isa), name(row.dtype), row.function, static_cast<int>(i), usable(row.isa), selected});
  }
  return rows;
}

}  // namespace cnnops
