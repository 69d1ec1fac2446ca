#include "ops/adaptive_max_pool2d.h"

#include "ops/pool2d_args.h"

namespace cnnops {

#define CNNOPS_OP "adaptive_max_pool2d"
#define CNNOPS_PARAMS AdaptiveMaxPool2dParams
#define CNNOPS_TABLE "ops/adaptive_max_pool2d.inc"
#include "dispatch/define_table.h"

namespace {

void forward(const Tensor& y, const Tensor& indices, const Tensor& x, int threads, int kernel) {
  const char* const op = "adaptive_max_pool2d";
  AdaptiveMaxPool2dParams p{};
  p.layout = common_layout(op, x.dtype, {{"x", &x}, {"y", &y}});
  p.n = x.shape[0], p.c = x.shape[1], p.h = x.shape[2], p.w = x.shape[3], p.p = y.shape[2], p.q = y.shape[3];
  expect_shape(op, {"y", &y}, {p.n, p.c, p.p, p.q});
  expect_shape(op, {"indices", &indices}, {p.n, p.c, p.p, p.q});
  expect_layout(op, {"indices", &indices}, DType::i64, p.layout, x.place);
  CNNOPS_CHECK(p.h > 0 && p.w > 0 && p.p > 0 && p.q > 0, std::invalid_argument, op, ": images must not be empty");
  CNNOPS_CHECK(p.h <= kMaxPlane / p.w, std::invalid_argument, op, ": images of ", p.h, " x ", p.w, " are too large");
  p.x = x.data, p.y = y.data, p.indices = static_cast<int64_t*>(indices.data), p.threads = threads;
  run(table<AdaptiveMaxPool2dParams>(), "forward", x, p, kernel);
}

}  // namespace

void bind_adaptive_max_pool2d(py::module_& m) {
  m.def("adaptive_max_pool2d_forward", &forward, "y"_a, "indices"_a, "x"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
