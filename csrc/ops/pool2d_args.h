// Checks of the pooling operators' arguments, for csrc/ops/*.cpp.
#pragma once

#include "dispatch/direct.h"
#include "dispatch/op_table.h"
#include "ops/pool2d.h"

namespace cnnops {

// Planes are indexed with 32 bits in the kernels' lanes; larger ones (8 GiB and up) are left to PyTorch.
constexpr int64_t kMaxPlane = (int64_t{1} << 31) - 1;

inline Windows windows(const char* op, Pair kernel, Pair stride, Pair padding, Pair dilation, Pair size, Pair outputs) {
  for (int i = 0; i < 2; ++i) {
    CNNOPS_CHECK(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0, std::invalid_argument, op,
                 ": kernel_size, stride and dilation must be positive and padding not negative");
    CNNOPS_CHECK(
        kernel[i] <= kMaxPlane && stride[i] <= kMaxPlane && dilation[i] <= kMaxPlane && padding[i] <= kMaxPlane,
        std::invalid_argument, op, ": kernel_size, stride, dilation and padding must be below 2^31");
    CNNOPS_CHECK(size[i] <= kMaxPlane, std::invalid_argument, op, ": a side of ", size[i], " cells is too large");
    CNNOPS_CHECK((outputs[i] - 1) * stride[i] < size[i] + padding[i], std::invalid_argument, op, ": an output of ",
                 outputs[i], " is too large for an input of ", size[i]);
  }
  CNNOPS_CHECK((size[0] + 2 * padding[0]) * (size[1] + 2 * padding[1]) <= kMaxPlane, std::invalid_argument, op,
               ": images of ", size[0], " x ", size[1], " are too large");
  return {kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

inline Choice choice_of(const char* op, const Tensor& choice) {
  CNNOPS_CHECK(choice.dtype == DType::u8 || choice.dtype == DType::i64, std::invalid_argument, op,
               ": choice must be of uint8 (offsets) or int64 (indices)");
  return choice.dtype == DType::u8 ? Choice::offsets : Choice::indices;
}

inline PickParams pick_params(const char* op, const Tensor& y, const std::optional<Tensor>& choice, const Tensor& x,
                              Pair kernel, Pair stride, Pair padding, Pair dilation, int threads) {
  PickParams p{};
  p.layout = common_layout(op, x.dtype, {{"x", &x}, {"y", &y}});
  p.n = x.shape[0], p.c = x.shape[1], p.h = x.shape[2], p.w = x.shape[3], p.p = y.shape[2], p.q = y.shape[3];
  expect_shape(op, {"y", &y}, {p.n, p.c, p.p, p.q});
  p.windows = windows(op, kernel, stride, padding, dilation, {p.h, p.w}, {p.p, p.q});
  p.mode = choice ? choice_of(op, *choice) : Choice::none;
  CNNOPS_CHECK(p.mode != Choice::offsets || kernel[0] * kernel[1] <= kNoOffset, std::invalid_argument, op,
               ": a kernel of ", kernel[0], " x ", kernel[1], " needs int64 indices");
  if (choice) {
    expect_shape(op, {"choice", &*choice}, {p.n, p.c, p.p, p.q});
    expect_layout(op, {"choice", &*choice}, choice->dtype, p.layout, x.place);
    p.choice = choice->data;
  }
  p.x = x.data, p.y = y.data, p.threads = threads_for(x.numel(), threads);
  return p;
}

// The operators' functions that adaptive pooling calls where its windows are equal and side by side.
void avg_pool2d_forward(const Tensor& y, const Tensor& x, Pair kernel, Pair stride, Pair padding,
                        bool count_include_pad, int64_t divisor, int threads, int row);
void avg_pool2d_backward(const Tensor& dx, const Tensor& dy, Pair kernel, Pair stride, Pair padding,
                         bool count_include_pad, int64_t divisor, int threads, int row);
void max_pool2d_forward(const Tensor& y, const std::optional<Tensor>& choice, const Tensor& x, Pair kernel, Pair stride,
                        Pair padding, Pair dilation, int threads, int row);

// Whether adaptive windows are equal, side by side and several; their size then.
inline bool even_windows(Pair size, Pair outputs, Pair& kernel) {
  kernel = {size[0] / outputs[0], size[1] / outputs[1]};
  return size[0] % outputs[0] == 0 && size[1] % outputs[1] == 0 && outputs[0] * outputs[1] > 1;
}

inline py::tuple pair_object(Pair pair) { return py::make_tuple(pair[0], pair[1]); }

// What a direct call of a pooling returns where a gradient is wanted, for Python's `recorder`: the result, what to save for
// the gradient (or None), and the further arguments of the operator that computes it.
inline PyObject* recorded(py::object y, py::object saved, py::object arguments) {
  return py::make_tuple(std::move(y), std::move(saved), std::move(arguments)).release().ptr();
}

// The same of a pooling that picks, whose gradient is index_pool2d_backward. With `indices` the choice is a result, too, and
// the arguments are None where no gradient is wanted.
inline PyObject* recorded_pick(py::object y, py::object choice, bool grad, const Tensor& x, std::optional<Pair> kernel,
                               Pair stride, Pair padding, Pair dilation) {
  if (!grad) return recorded(std::move(y), std::move(choice), py::none());
  py::object size = kernel ? py::object(pair_object(*kernel)) : py::object(py::none());
  return recorded(std::move(y), std::move(choice),
                  py::make_tuple(x.shape[2], x.shape[3], std::move(size), pair_object(stride), pair_object(padding),
                                 pair_object(dilation)));
}

// The arguments (input, kernel_size, stride or None, padding) of a direct call.
struct DirectWindow {
  Tensor x;
  Pair kernel, stride, padding, dilation = {1, 1};
  bool ceil_mode;
  Layout layout;
  std::array<int64_t, 4> shape;  // of the output

  bool read(PyObject* const* args) {
    if (!direct::tensor(args[0], x) || !direct::pair(args[1], kernel) || !direct::pair(args[3], padding)) return false;
    stride = kernel;
    layout = direct::suggested(x);
    return (args[2] == Py_None || direct::pair(args[2], stride)) && direct::dense(x, layout);
  }
  // False where a value or the output's size is an error.
  bool measure() {
    shape = {x.shape[0], x.shape[1], 0, 0};
    for (int i = 0; i < 2; ++i) {
      if (kernel[i] == 0 || stride[i] == 0 || dilation[i] == 0 || padding[i] > kernel[i] / 2) return false;
      const int64_t size = x.shape[2 + i];
      const int64_t room = size + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1 + (ceil_mode ? stride[i] - 1 : 0);
      if (room < 0) return false;
      int64_t out = room / stride[i] + 1;
      if (ceil_mode && (out - 1) * stride[i] >= size + padding[i]) --out;
      if (out < 1) return false;
      shape[2 + i] = out;
    }
    return true;
  }
};

}  // namespace cnnops
