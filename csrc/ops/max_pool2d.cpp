#include "ops/max_pool2d.h"

#include "ops/pool2d_args.h"

namespace cnnops {

#define CNNOPS_OP "max_pool2d"
#define CNNOPS_PARAMS MaxPool2dParams
#define CNNOPS_TABLE "ops/max_pool2d.inc"
#include "dispatch/define_table.h"

void max_pool2d_forward(const Tensor& y, const std::optional<Tensor>& choice, const Tensor& x, Pair kernel, Pair stride,
                        Pair padding, Pair dilation, int threads, int row) {
  const MaxPool2dParams p{pick_params("max_pool2d", y, choice, x, kernel, stride, padding, dilation, threads)};
  run(table<MaxPool2dParams>(), "forward", x, p, row);
}

namespace {

// -> y; `recorded_pick` where a gradient or the indices are wanted; or None.
PyObject* max_pool2d_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    DirectWindow w;
    int64_t threads;
    bool indices, grad;
    if (count != 9 || !w.read(args) || !direct::pair(args[4], w.dilation) || !direct::truth(args[5], w.ceil_mode) ||
        !direct::truth(args[6], indices) || !direct::truth(args[7], grad) || !direct::integer(args[8], threads) ||
        !w.measure())
      return nullptr;
    Tensor y;
    std::optional<Tensor> choice;
    py::object made = direct::empty(args[0], w.shape, w.x.dtype, w.layout, y), chosen;
    grad = grad && direct::requires_grad(args[0]);
    if (grad || indices) {
      const bool narrow = !indices && w.kernel[0] * w.kernel[1] <= kNoOffset;
      chosen = direct::empty(args[0], w.shape, narrow ? DType::u8 : DType::i64, w.layout, choice.emplace());
    }
    max_pool2d_forward(y, choice, w.x, w.kernel, w.stride, w.padding, w.dilation, static_cast<int>(threads), kSelect);
    if (!choice) return made.release().ptr();
    return recorded_pick(std::move(made), std::move(chosen), grad, w.x, w.kernel, w.stride, w.padding, w.dilation);
  });
}

}  // namespace

void bind_max_pool2d(py::module_& m) {
  direct::define(m, "max_pool2d_direct", &max_pool2d_direct,
                 "max_pool2d_direct(x: torch.Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, "
                 "ceil_mode: bool, return_indices: bool, grad: bool, threads: int) -> object");
  m.def("max_pool2d_forward", &max_pool2d_forward, "y"_a, "choice"_a, "x"_a, "kernel_size"_a, "stride"_a, "padding"_a,
        "dilation"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
