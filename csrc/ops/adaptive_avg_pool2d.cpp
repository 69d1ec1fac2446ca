#include "ops/adaptive_avg_pool2d.h"

#include <cstring>

#include "ops/pool2d_args.h"

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

void adaptive_avg_pool2d_forward(const Tensor& y, const Tensor& x, int threads, int kernel) {
  run(table<AdaptiveAvgPool2dParams>(), "forward", x, validate("adaptive_avg_pool2d", x, y, x, y, threads), kernel);
}

void adaptive_avg_pool2d_backward(const Tensor& dx, const Tensor& dy, int threads, int kernel) {
  run(table<AdaptiveAvgPool2dParams>(), "backward", dx,
      validate("adaptive_avg_pool2d_backward", dy, dx, dx, dy, threads), kernel);
}

// Where each cell is its own mean. Large images take the long way, where several threads copy them.
constexpr int64_t kLargestCopy = int64_t{1} << 18;  // elements

void copy(const Tensor& to, const Tensor& from) {
  static constexpr int64_t kBytes[] = {4, 8, 2, 2};
  std::memcpy(to.data, from.data, static_cast<size_t>(from.numel() * kBytes[static_cast<int>(from.dtype)]));
}

// -> y, `recorded` where a gradient is wanted, or None.
PyObject* adaptive_avg_pool2d_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor x, y;
    Pair size, kernel;
    int64_t threads;
    bool grad;
    if (count != 4 || !direct::pair(args[1], size) || size[0] < 1 || size[1] < 1 || !direct::tensor(args[0], x) ||
        !direct::truth(args[2], grad) || !direct::integer(args[3], threads))
      return nullptr;
    const Layout layout = direct::suggested(x);
    if (!direct::dense(x, layout)) return nullptr;
    const bool same = size[0] == x.shape[2] && size[1] == x.shape[3];
    if (same && x.numel() > kLargestCopy) return nullptr;
    py::object made = direct::empty(args[0], {x.shape[0], x.shape[1], size[0], size[1]}, x.dtype, layout, y);
    const int most = static_cast<int>(threads);
    if (same) {
      copy(y, x);
    } else if (even_windows({x.shape[2], x.shape[3]}, size, kernel) && layout == Layout::nchw && kernel[1] < 8) {
      avg_pool2d_forward(y, x, kernel, kernel, {0, 0}, false, 0, most, kSelect);
    } else {
      adaptive_avg_pool2d_forward(y, x, most, kSelect);
    }
    if (!grad || !direct::requires_grad(args[0])) return made.release().ptr();
    return recorded(std::move(made), py::none(), py::make_tuple(x.shape[2], x.shape[3], layout == Layout::nhwc));
  });
}

// -> dx, or None.
PyObject* adaptive_avg_pool2d_backward_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor dy, dx;
    int64_t h, w, threads;
    bool channels_last;
    Pair kernel;
    if (count != 5 || !direct::tensor(args[0], dy) || !direct::integer(args[1], h) || !direct::integer(args[2], w) ||
        !direct::truth(args[3], channels_last) || !direct::integer(args[4], threads))
      return nullptr;
    const Layout layout = channels_last ? Layout::nhwc : Layout::nchw;
    if (!direct::dense(dy, layout)) return nullptr;
    py::object made = direct::empty(args[0], {dy.shape[0], dy.shape[1], h, w}, dy.dtype, layout, dx);
    const int most = static_cast<int>(threads);
    if (dy.shape[2] == h && dy.shape[3] == w && dy.numel() <= kLargestCopy) {
      copy(dx, dy);
    } else if (even_windows({h, w}, {dy.shape[2], dy.shape[3]}, kernel)) {
      avg_pool2d_backward(dx, dy, kernel, kernel, {0, 0}, false, 0, most, kSelect);
    } else {
      adaptive_avg_pool2d_backward(dx, dy, most, kSelect);
    }
    return made.release().ptr();
  });
}

}  // namespace

void bind_adaptive_avg_pool2d(py::module_& m) {
  direct::define(m, "adaptive_avg_pool2d_direct", &adaptive_avg_pool2d_direct,
                 "adaptive_avg_pool2d_direct(x: torch.Tensor, output_size: Any, grad: bool, threads: int) -> object");
  direct::define(m, "adaptive_avg_pool2d_backward_direct", &adaptive_avg_pool2d_backward_direct,
                 "adaptive_avg_pool2d_backward_direct(dy: torch.Tensor, h: int, w: int, channels_last: bool, "
                 "threads: int) -> object");
  m.def("adaptive_avg_pool2d_forward", &adaptive_avg_pool2d_forward, "y"_a, "x"_a, "threads"_a, "kernel"_a = kSelect);
  m.def("adaptive_avg_pool2d_backward", &adaptive_avg_pool2d_backward, "dx"_a, "dy"_a, "threads"_a,
        "kernel"_a = kSelect);
}

}  // namespace cnnops
