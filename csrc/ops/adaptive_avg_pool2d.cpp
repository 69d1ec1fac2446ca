#include "ops/adaptive_avg_pool2d.h"

#include "dispatch/direct.h"
#include "dispatch/op_table.h"

namespace cnnops {
namespace {

bool one_window(const AdaptiveAvgPool2dParams& p) { return p.p == 1 && p.q == 1; }

}  // namespace

#define CNNOPS_OP "adaptive_avg_pool2d"
#define CNNOPS_PARAMS AdaptiveAvgPool2dParams
#define CNNOPS_TABLE "ops/adaptive_avg_pool2d.inc"
#include "dispatch/define_table.h"

namespace {

AdaptiveAvgPool2dParams validate(const char* op, const Tensor& in, const Tensor& out, const Tensor& x, const Tensor& y,
                                 int threads) {
  AdaptiveAvgPool2dParams p{};
  p.layout = common_layout(op, x.dtype, {{"x", &x}, {"y", &y}});
  p.n = x.shape[0], p.c = x.shape[1], p.h = x.shape[2], p.w = x.shape[3], p.p = y.shape[2], p.q = y.shape[3];
  expect_shape(op, {"y", &y}, {p.n, p.c, p.p, p.q});
  CNNOPS_CHECK(p.h > 0 && p.w > 0 && p.p > 0 && p.q > 0, std::invalid_argument, op, ": images must not be empty");
  p.in = in.data, p.out = out.data, p.threads = threads_for(x.numel(), threads);
  return p;
}

void forward(const Tensor& y, const Tensor& x, int threads, int kernel) {
  run(table<AdaptiveAvgPool2dParams>(), "forward", x, validate("adaptive_avg_pool2d", x, y, x, y, threads), kernel);
}

void backward(const Tensor& dx, const Tensor& dy, int threads, int kernel) {
  run(table<AdaptiveAvgPool2dParams>(), "backward", dx,
      validate("adaptive_avg_pool2d_backward", dy, dx, dx, dy, threads), kernel);
}

// Short equal windows side by side in NCHW are for avg_pool2d's kernels, and each cell's own mean is a copy.
bool for_others(const Tensor& x, const std::array<int64_t, 2>& size, Layout layout) {
  const int64_t h = x.shape[2], w = x.shape[3];
  if (size[0] == h && size[1] == w) return true;
  return layout == Layout::nchw && h % size[0] == 0 && w % size[1] == 0 && size[0] * size[1] > 1 && w / size[1] < 8;
}

// -> y, (y,) where a gradient is wanted, or None.
PyObject* forward_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor x, y;
    std::array<int64_t, 2> size;
    int64_t threads;
    bool grad;
    if (count != 4 || !direct::pair(args[1], size) || size[0] < 1 || size[1] < 1 || !direct::tensor(args[0], x) ||
        !direct::truth(args[2], grad) || !direct::integer(args[3], threads))
      return nullptr;
    const Layout layout = direct::suggested(x);
    if (!direct::dense(x, layout) || for_others(x, size, layout)) return nullptr;
    py::object made = direct::empty(args[0], {x.shape[0], x.shape[1], size[0], size[1]}, x.dtype, layout, y);
    forward(y, x, static_cast<int>(threads), kSelect);
    if (grad && direct::requires_grad(args[0])) return py::make_tuple(std::move(made)).release().ptr();
    return made.release().ptr();
  });
}

}  // namespace

void bind_adaptive_avg_pool2d(py::module_& m) {
  direct::define(m, "adaptive_avg_pool2d_direct", &forward_direct,
                 "adaptive_avg_pool2d_direct(x: torch.Tensor, output_size: Any, grad: bool, threads: int) -> object");
  m.def("adaptive_avg_pool2d_forward", &forward, "y"_a, "x"_a, "threads"_a, "kernel"_a = kSelect);
  m.def("adaptive_avg_pool2d_backward", &backward, "dx"_a, "dy"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
