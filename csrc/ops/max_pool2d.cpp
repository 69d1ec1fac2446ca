#include "ops/max_pool2d.h"

#include "ops/pool2d_args.h"

namespace cnnops {

#define CNNOPS_OP "max_pool2d"
#define CNNOPS_PARAMS MaxPool2dParams
#define CNNOPS_TABLE "ops/max_pool2d.inc"
#include "dispatch/define_table.h"

namespace {

void forward(const Tensor& y, const std::optional<Tensor>& choice, const Tensor& x, Pair kernel_size, Pair stride,
             Pair padding, Pair dilation, int threads, int kernel) {
  const MaxPool2dParams p{pick_params("max_pool2d", y, choice, x, kernel_size, stride, padding, dilation, threads)};
  run(table<MaxPool2dParams>(), "forward", x.dtype, p, kernel);
}

}  // namespace

void bind_max_pool2d(py::module_& m) {
  m.def("max_pool2d_forward", &forward, "y"_a, "choice"_a, "x"_a, "kernel_size"_a, "stride"_a, "padding"_a,
        "dilation"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
