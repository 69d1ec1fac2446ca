#include "ops/peak.h"

#include "dispatch/op_table.h"

namespace cnnops {

#define CNNOPS_OP "peak"
#define CNNOPS_PARAMS PeakParams
#define CNNOPS_TABLE "ops/peak.inc"
#include "dispatch/define_table.h"

namespace {

void peak_fma(const Tensor& y, const Tensor& x, double a, double b, int64_t iterations, int threads, int kernel) {
  CNNOPS_CHECK(threads > 0 && iterations >= 0, std::invalid_argument, "peak: threads must be positive, but got ",
               threads, ", and iterations must not be negative, but got ", iterations);
  expect_contiguous("peak", {"x", &x}, x.dtype, {threads, PeakParams::kWidth}, x.place);
  expect_contiguous("peak", {"y", &y}, x.dtype, {threads, PeakParams::kWidth}, x.place);
  run(table<PeakParams>(), "fma", x, PeakParams{x.data, y.data, a, b, iterations, threads}, kernel);
}

}  // namespace

void bind_peak(py::module_& m) {
  m.def("peak_fma", &peak_fma, "y"_a, "x"_a, "a"_a, "b"_a, "iterations"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
