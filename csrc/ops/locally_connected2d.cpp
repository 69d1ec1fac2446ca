#include "ops/locally_connected2d.h"

#include "common/scratch.h"
#include "dispatch/op_table.h"

namespace cnnops {

#define CNNOPS_OP "locally_connected2d"
#define CNNOPS_PARAMS LocallyConnected2dParams
#define CNNOPS_TABLE "ops/locally_connected2d.inc"
#include "dispatch/define_table.h"

namespace {

// `padding` is that at the top and the left.
LocallyConnected2dParams validate(const char* op, const Tensor& x, const Tensor& weight, const Tensor& y, Pair stride,
                                  Pair padding, Pair dilation, int threads) {
  LocallyConnected2dParams p{};
  p.layout = common_layout(op, x.dtype, {{"input", &x}, {"output", &y}});
  p.n = x.shape[0], p.c = x.shape[1], p.h = x.shape[2], p.w = x.shape[3];
  p.k = y.shape[1], p.p = y.shape[2], p.q = y.shape[3];
  CNNOPS_CHECK(weight.ndim == 6, std::invalid_argument, op, ": expected weight of shape [P, Q, K, C, R, S], but it is ",
               shape_text(weight));
  p.r = weight.shape[4], p.s = weight.shape[5];
  expect_shape(op, {"output", &y}, {p.n, p.k, p.p, p.q});
  expect_contiguous(op, {"weight", &weight}, x.dtype, {p.p, p.q, p.k, p.c, p.r, p.s}, x.place);
  p.stride_h = stride[0], p.stride_w = stride[1], p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  CNNOPS_CHECK(p.stride_h > 0 && p.stride_w > 0 && p.dilation_h > 0 && p.dilation_w > 0 && p.pad_h >= 0 && p.pad_w >= 0,
               std::invalid_argument, op, ": stride and dilation must be positive, and padding must not be negative");
  p.threads = threads_for(weight.numel() * max64(p.n, 4), threads);
  return p;
}

void run_with_workspace(const char* pass, const Tensor& on, LocallyConnected2dParams p, int kernel) {
  const Scratch<char> workspace(on.place.device == Device::cpu ? locally_connected2d_workspace_bytes(p) : 0);
  p.workspace = workspace.data;
  run(table<LocallyConnected2dParams>(), pass, on, p, kernel);
}

void locally_connected2d_forward(const Tensor& y, const Tensor& x, const Tensor& weight,
                                 const std::optional<Tensor>& bias, Pair stride, Pair padding, Pair dilation,
                                 int threads, int kernel) {
  static constexpr const char* kOp = "locally_connected2d";
  LocallyConnected2dParams p = validate(kOp, x, weight, y, stride, padding, dilation, threads);
  if (bias) {
    p.bias_per_position = bias->ndim == 3;
    if (p.bias_per_position) {
      expect_contiguous(kOp, {"bias", &*bias}, x.dtype, {p.k, p.p, p.q}, x.place);
    } else {
      expect_contiguous(kOp, {"bias", &*bias}, x.dtype, {p.k}, x.place);
    }
    p.bias = bias->data;
  }
  p.x = x.data, p.weight = weight.data, p.y = y.data;
  run_with_workspace("forward", x, p, kernel);
}

void locally_connected2d_input_grad(const Tensor& dx, const Tensor& dy, const Tensor& weight, Pair stride, Pair padding,
                                    Pair dilation, int threads, int kernel) {
  LocallyConnected2dParams p =
      validate("locally_connected2d_input_grad", dx, weight, dy, stride, padding, dilation, threads);
  p.dy = dy.data, p.weight = weight.data, p.dx = dx.data;
  run_with_workspace("input_grad", dx, p, kernel);
}

void locally_connected2d_weight_grad(const Tensor& dw, const Tensor& dy, const Tensor& x, Pair stride, Pair padding,
                                     Pair dilation, int threads, int kernel) {
  LocallyConnected2dParams p =
      validate("locally_connected2d_weight_grad", x, dw, dy, stride, padding, dilation, threads);
  p.dy = dy.data, p.x = x.data, p.dw = dw.data;
  run_with_workspace("weight_grad", x, p, kernel);
}

}  // namespace

void bind_locally_connected2d(py::module_& m) {
  m.def("locally_connected2d_forward", &locally_connected2d_forward, "y"_a, "x"_a, "weight"_a, "bias"_a, "stride"_a,
        "padding"_a, "dilation"_a, "threads"_a, "kernel"_a = kSelect);
  m.def("locally_connected2d_input_grad", &locally_connected2d_input_grad, "dx"_a, "dy"_a, "weight"_a, "stride"_a,
        "padding"_a, "dilation"_a, "threads"_a, "kernel"_a = kSelect);
  m.def("locally_connected2d_weight_grad", &locally_connected2d_weight_grad, "dw"_a, "dy"_a, "x"_a, "stride"_a,
        "padding"_a, "dilation"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
