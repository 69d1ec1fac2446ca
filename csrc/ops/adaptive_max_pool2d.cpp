#include "ops/adaptive_max_pool2d.h"

#include "common/scratch.h"
#include "ops/pool2d_args.h"

namespace cnnops {

#define CNNOPS_OP "adaptive_max_pool2d"
#define CNNOPS_PARAMS AdaptiveMaxPool2dParams
#define CNNOPS_TABLE "ops/adaptive_max_pool2d.inc"
#include "dispatch/define_table.h"

namespace {

void adaptive_max_pool2d_forward(const Tensor& y, const Tensor& indices, const Tensor& x, int threads, int kernel) {
  const char* const op = "adaptive_max_pool2d";
  AdaptiveMaxPool2dParams p{};
  p.layout = common_layout(op, x.dtype, {{"x", &x}, {"y", &y}});
  p.n = x.shape[0], p.c = x.shape[1], p.h = x.shape[2], p.w = x.shape[3], p.p = y.shape[2], p.q = y.shape[3];
  expect_shape(op, {"y", &y}, {p.n, p.c, p.p, p.q});
  expect_shape(op, {"indices", &indices}, {p.n, p.c, p.p, p.q});
  expect_layout(op, {"indices", &indices}, DType::i64, p.layout, x.place);
  CNNOPS_CHECK(p.h > 0 && p.w > 0 && p.p > 0 && p.q > 0, std::invalid_argument, op, ": images must not be empty");
  CNNOPS_CHECK(p.h <= kMaxPlane / p.w, std::invalid_argument, op, ": images of ", p.h, " x ", p.w, " are too large");
  p.x = x.data, p.y = y.data, p.indices = static_cast<int64_t*>(indices.data);
  p.threads = threads_for(x.numel(), threads);
  run(table<AdaptiveMaxPool2dParams>(), "forward", x, p, kernel);
}

// -> y; `recorded_pick` where a gradient or the indices are wanted; or None.
PyObject* adaptive_max_pool2d_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor x, y;
    Pair size, kernel;
    int64_t threads;
    bool indices, grad;
    if (count != 5 || !direct::pair(args[1], size) || size[0] < 1 || size[1] < 1 || !direct::tensor(args[0], x) ||
        !direct::truth(args[2], indices) || !direct::truth(args[3], grad) || !direct::integer(args[4], threads))
      return nullptr;
    const Layout layout = direct::suggested(x);
    if (!direct::dense(x, layout)) return nullptr;
    grad = grad && direct::requires_grad(args[0]);
    const std::array<int64_t, 4> shape = {x.shape[0], x.shape[1], size[0], size[1]};
    py::object made = direct::empty(args[0], shape, x.dtype, layout, y), chosen;
    std::optional<Tensor> choice;
    const auto choose = [&](DType dtype) { chosen = direct::empty(args[0], shape, dtype, layout, choice.emplace()); };
    const bool even = even_windows({x.shape[2], x.shape[3]}, size, kernel);
    if (even) {
      const bool narrow = !indices && kernel[0] * kernel[1] <= kNoOffset;
      if (grad || indices) choose(narrow ? DType::u8 : DType::i64);
      max_pool2d_forward(y, choice, x, kernel, kernel, {0, 0}, {1, 1}, static_cast<int>(threads), kSelect);
    } else if (grad || indices) {
      choose(DType::i64);
      adaptive_max_pool2d_forward(y, *choice, x, static_cast<int>(threads), kSelect);
    } else {  // the kernels write indices in any case
      const Scratch<int64_t> memory(y.numel());
      Tensor unwanted = y;
      unwanted.dtype = DType::i64;
      unwanted.data = memory.data;
      adaptive_max_pool2d_forward(y, unwanted, x, static_cast<int>(threads), kSelect);
    }
    if (!grad && !indices) return made.release().ptr();
    const std::optional<Pair> windows = even ? std::optional(kernel) : std::nullopt;
    return recorded_pick(std::move(made), std::move(chosen), grad, x, windows, even ? kernel : Pair{1, 1}, {0, 0},
                         {1, 1});
  });
}

}  // namespace

void bind_adaptive_max_pool2d(py::module_& m) {
  direct::define(m, "adaptive_max_pool2d_direct", &adaptive_max_pool2d_direct,
                 "adaptive_max_pool2d_direct(x: torch.Tensor, output_size: Any, return_indices: bool, grad: bool, "
                 "threads: int) -> object");
  m.def("adaptive_max_pool2d_forward", &adaptive_max_pool2d_forward, "y"_a, "indices"_a, "x"_a, "threads"_a,
        "kernel"_a = kSelect);
}

}  // namespace cnnops
