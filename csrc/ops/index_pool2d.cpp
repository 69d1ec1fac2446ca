#include "ops/index_pool2d.h"

#include "ops/pool2d_args.h"

namespace cnnops {

#define CNNOPS_OP "index_pool2d"
#define CNNOPS_PARAMS IndexPool2dParams
#define CNNOPS_TABLE "ops/index_pool2d.inc"
#include "dispatch/define_table.h"

namespace {

IndexPool2dParams validate(const char* op, const Tensor& in, const Tensor& out, const Tensor& dx, const Tensor& dy,
                           const Tensor& choice, std::optional<Pair> kernel, Pair stride, Pair padding, Pair dilation,
                           int threads) {
  IndexPool2dParams p{};
  p.layout = common_layout(op, dx.dtype, {{"dx", &dx}, {"dy", &dy}});
  p.n = dx.shape[0], p.c = dx.shape[1], p.h = dx.shape[2], p.w = dx.shape[3], p.p = dy.shape[2], p.q = dy.shape[3];
  expect_shape(op, {"dy", &dy}, {p.n, p.c, p.p, p.q});
  p.mode = choice_of(op, choice);
  expect_shape(op, {"choice", &choice}, {p.n, p.c, p.p, p.q});
  expect_layout(op, {"choice", &choice}, choice.dtype, p.layout, dx.place);
  p.adaptive = !kernel;
  if (p.adaptive) {
    CNNOPS_CHECK(p.mode == Choice::indices, std::invalid_argument, op, ": adaptive windows need int64 indices");
    if (p.h % p.p == 0 && p.w % p.q == 0) {  // equal windows, side by side
      p.adaptive = false;
      kernel = stride = {p.h / p.p, p.w / p.q};
      padding = {0, 0};
      dilation = {1, 1};
    } else {
      kernel = stride = dilation = {1, 1};  // not used
    }
  }
  p.windows = windows(op, *kernel, stride, padding, dilation, {p.h, p.w}, p.adaptive ? Pair{1, 1} : Pair{p.p, p.q});
  CNNOPS_CHECK(p.mode != Choice::offsets || p.windows.kernel_h * p.windows.kernel_w <= kNoOffset, std::invalid_argument,
               op, ": a kernel of ", p.windows.kernel_h, " x ", p.windows.kernel_w, " needs int64 indices");
  p.in = in.data, p.out = out.data, p.choice = choice.data, p.threads = threads_for(dx.numel(), threads);
  return p;
}

void index_pool2d_backward(const Tensor& dx, const Tensor& dy, const Tensor& choice, std::optional<Pair> kernel_size,
                           Pair stride, Pair padding, Pair dilation, int threads, int kernel) {
  run(table<IndexPool2dParams>(), "backward", dx,
      validate("index_pool2d_backward", dy, dx, dx, dy, choice, kernel_size, stride, padding, dilation, threads),
      kernel);
}

void index_pool2d_gather(const Tensor& dy, const Tensor& dx, const Tensor& choice, std::optional<Pair> kernel_size,
                         Pair stride, Pair padding, Pair dilation, int threads, int kernel) {
  run(table<IndexPool2dParams>(), "gather", dx,
      validate("index_pool2d_gather", dx, dy, dx, dy, choice, kernel_size, stride, padding, dilation, threads), kernel);
}

// -> dx, or None. The choice is one that a kernel made, or anything: it is checked as the long way does.
PyObject* index_pool2d_backward_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor dy, dx;
    int64_t h, w, threads;
    std::optional<Pair> kernel;
    Pair stride, padding, dilation;
    if (count != 9 || !direct::tensor(args[0], dy) || Py_TYPE(args[1]) != Py_TYPE(args[0]) ||
        !direct::integer(args[2], h) || !direct::integer(args[3], w) || !direct::pair(args[5], stride) ||
        !direct::pair(args[6], padding) || !direct::pair(args[7], dilation) || !direct::integer(args[8], threads))
      return nullptr;
    if (args[4] != Py_None && !direct::pair(args[4], kernel.emplace())) return nullptr;
    const Tensor choice = tensor_from_python(args[1]);
    if (choice.place.device != Device::cpu || choice.ndim != 4) return nullptr;
    const Layout layout = direct::suggested(choice);
    if (!direct::dense(choice, layout) || !direct::dense(dy, layout)) return nullptr;
    py::object made = direct::empty(args[0], {dy.shape[0], dy.shape[1], h, w}, dy.dtype, layout, dx);
    index_pool2d_backward(dx, dy, choice, kernel, stride, padding, dilation, static_cast<int>(threads), kSelect);
    return made.release().ptr();
  });
}

}  // namespace

// kernel_size None: adaptive windows.
void bind_index_pool2d(py::module_& m) {
  direct::define(m, "index_pool2d_backward_direct", &index_pool2d_backward_direct,
                 "index_pool2d_backward_direct(dy: torch.Tensor, choice: torch.Tensor, h: int, w: int, "
                 "kernel: Any, stride: Any, padding: Any, dilation: Any, threads: int) -> object");
  m.def("index_pool2d_backward", &index_pool2d_backward, "dx"_a, "dy"_a, "choice"_a, "kernel_size"_a, "stride"_a,
        "padding"_a, "dilation"_a, "threads"_a, "kernel"_a = kSelect);
  m.def("index_pool2d_gather", &index_pool2d_gather, "dy"_a, "dx"_a, "choice"_a, "kernel_size"_a, "stride"_a,
        "padding"_a, "dilation"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
