#include "ops/adaptive_avg_pool2d.h"

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
  p.in = in.data, p.out = out.data, p.threads = threads;
  return p;
}

void forward(const Tensor& y, const Tensor& x, int threads, int kernel) {
  run(table<AdaptiveAvgPool2dParams>(), "forward", x.dtype, validate("adaptive_avg_pool2d", x, y, x, y, threads),
      kernel);
}

void backward(const Tensor& dx, const Tensor& dy, int threads, int kernel) {
  run(table<AdaptiveAvgPool2dParams>(), "backward", dx.dtype,
      validate("adaptive_avg_pool2d_backward", dy, dx, dx, dy, threads), kernel);
}

}  // namespace

void bind_adaptive_avg_pool2d(py::module_& m) {
  m.def("adaptive_avg_pool2d_forward", &forward, "y"_a, "x"_a, "threads"_a, "kernel"_a = kSelect);
  m.def("adaptive_avg_pool2d_backward", &backward, "dx"_a, "dy"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
