#include "ops/avg_pool2d.h"

#include "ops/pool2d_args.h"

namespace cnnops {

#define CNNOPS_OP "avg_pool2d"
#define CNNOPS_PARAMS AvgPool2dParams
#define CNNOPS_TABLE "ops/avg_pool2d.inc"
#include "dispatch/define_table.h"

namespace {

AvgPool2dParams validate(const char* op, const Tensor& in, const Tensor& out, const Tensor& x, const Tensor& y,
                         Pair kernel, Pair stride, Pair padding, bool count_include_pad, int64_t divisor, int threads) {
  AvgPool2dParams p{};
  p.layout = common_layout(op, x.dtype, {{"input", &x}, {"output", &y}});
  p.n = x.shape[0], p.c = x.shape[1], p.h = x.shape[2], p.w = x.shape[3];
  p.p = y.shape[2], p.q = y.shape[3];
  expect_shape(op, {"output", &y}, {p.n, p.c, p.p, p.q});
  p.kernel_h = kernel[0], p.kernel_w = kernel[1], p.stride_h = stride[0], p.stride_w = stride[1];
  p.pad_h = padding[0], p.pad_w = padding[1];
  CNNOPS_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0, std::invalid_argument, op,
               ": kernel_size and stride must be positive");
  // Every window begins inside the image or its padding before it.
  CNNOPS_CHECK(
      p.pad_h >= 0 && p.pad_w >= 0 && (p.p - 1) * p.stride_h < p.h + p.pad_h && (p.q - 1) * p.stride_w < p.w + p.pad_w,
      std::invalid_argument, op, ": an output of ", p.p, " x ", p.q, " is too large for the input");
  p.count_include_pad = count_include_pad;
  p.divisor = divisor;
  p.in = in.data;
  p.out = out.data;
  p.threads = threads_for(x.numel(), threads);
  return p;
}

}  // namespace

void avg_pool2d_forward(const Tensor& y, const Tensor& x, Pair kernel, Pair stride, Pair padding,
                        bool count_include_pad, int64_t divisor, int threads, int row) {
  run(table<AvgPool2dParams>(), "forward", x,
      validate("avg_pool2d", x, y, x, y, kernel, stride, padding, count_include_pad, divisor, threads), row);
}

void avg_pool2d_backward(const Tensor& dx, const Tensor& dy, Pair kernel, Pair stride, Pair padding,
                         bool count_include_pad, int64_t divisor, int threads, int row) {
  run(table<AvgPool2dParams>(), "backward", dx,
      validate("avg_pool2d_backward", dy, dx, dx, dy, kernel, stride, padding, count_include_pad, divisor, threads),
      row);
}

namespace {

// -> y, `recorded` where a gradient is wanted, or None.
PyObject* avg_pool2d_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    DirectWindow w;
    int64_t threads;
    bool grad, count_include_pad;
    if (count != 8 || !w.read(args) || !direct::truth(args[4], w.ceil_mode) ||
        !direct::truth(args[5], count_include_pad) || !direct::integer(args[7], threads) || !w.measure())
      return nullptr;
    if (!direct::truth(args[6], grad)) return nullptr;
    Tensor y;
    py::object made = direct::empty(args[0], w.shape, w.x.dtype, w.layout, y);
    avg_pool2d_forward(y, w.x, w.kernel, w.stride, w.padding, count_include_pad, 0, static_cast<int>(threads), kSelect);
    if (!grad || !direct::requires_grad(args[0])) return made.release().ptr();
    return recorded(
        std::move(made), py::none(),
        py::make_tuple(w.x.shape[2], w.x.shape[3], pair_object(w.kernel), pair_object(w.stride), pair_object(w.padding),
                       w.ceil_mode, count_include_pad, 0, w.layout == Layout::nhwc));
  });
}

// -> dx, or None.
PyObject* avg_pool2d_backward_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor dy, dx;
    int64_t h, w, divisor, threads;
    Pair kernel, stride, padding;
    bool count_include_pad, channels_last;
    if (count != 11 || !direct::tensor(args[0], dy) || !direct::integer(args[1], h) || !direct::integer(args[2], w) ||
        !direct::pair(args[3], kernel) || !direct::pair(args[4], stride) || !direct::pair(args[5], padding) ||
        !direct::truth(args[7], count_include_pad) || !direct::integer(args[8], divisor) ||
        !direct::truth(args[9], channels_last) || !direct::integer(args[10], threads))
      return nullptr;
    const Layout layout = channels_last ? Layout::nhwc : Layout::nchw;
    if (!direct::dense(dy, layout)) return nullptr;
    py::object made = direct::empty(args[0], {dy.shape[0], dy.shape[1], h, w}, dy.dtype, layout, dx);
    avg_pool2d_backward(dx, dy, kernel, stride, padding, count_include_pad, divisor, static_cast<int>(threads),
                        kSelect);
    return made.release().ptr();
  });
}

}  // namespace

void bind_avg_pool2d(py::module_& m) {
  direct::define(m, "avg_pool2d_backward_direct", &avg_pool2d_backward_direct,
                 "avg_pool2d_backward_direct(dy: torch.Tensor, h: int, w: int, kernel: Any, stride: Any, "
                 "padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int, channels_last: bool, "
                 "threads: int) -> object");
  direct::define(m, "avg_pool2d_direct", &avg_pool2d_direct,
                 "avg_pool2d_direct(x: torch.Tensor, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, "
                 "count_include_pad: bool, grad: bool, threads: int) -> object");
  m.def("avg_pool2d_forward", &avg_pool2d_forward, "y"_a, "x"_a, "kernel_size"_a, "stride"_a, "padding"_a,
        "count_include_pad"_a, "divisor"_a, "threads"_a, "kernel"_a = kSelect);
  m.def("avg_pool2d_backward", &avg_pool2d_backward, "dx"_a, "dy"_a, "kernel_size"_a, "stride"_a, "padding"_a,
        "count_include_pad"_a, "divisor"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
