#include "ops/median_pool2d.h"

#include "ops/pool2d_args.h"

namespace cnnops {

#define CNNOPS_OP "median_pool2d"
#define CNNOPS_PARAMS MedianPool2dParams
#define CNNOPS_TABLE "ops/median_pool2d.inc"
#include "dispatch/define_table.h"

namespace {

void median_pool2d_forward(const Tensor& y, const std::optional<Tensor>& choice, const Tensor& x, Pair kernel_size,
                           Pair stride, Pair padding, Pair dilation, int threads, int kernel) {
  const MedianPool2dParams p{
      pick_params("median_pool2d", y, choice, x, kernel_size, stride, padding, dilation, threads)};
  run(table<MedianPool2dParams>(), "forward", x, p, kernel);
}

}  // namespace

void bind_median_pool2d(py::module_& m) {
  m.def("median_pool2d_forward", &median_pool2d_forward, "y"_a, "choice"_a, "x"_a, "kernel_size"_a, "stride"_a,
        "padding"_a, "dilation"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
