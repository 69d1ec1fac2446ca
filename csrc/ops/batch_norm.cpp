#include "ops/batch_norm.h"

#include "common/scratch.h"
#include "dispatch/direct.h"
#include "dispatch/op_table.h"

namespace cnnops {

#define CNNOPS_OP "batch_norm"
#define CNNOPS_PARAMS BatchNormParams
#define CNNOPS_TABLE "ops/batch_norm.inc"
#include "dispatch/define_table.h"

namespace {

using OptionalTensor = std::optional<Tensor>;

void* data(const OptionalTensor& t) { return t ? t->data : nullptr; }

// An image that may be missing; x in its place then, which passes every check.
NamedTensor image(const char* label, const OptionalTensor& t, const Tensor& x) { return {label, t ? &*t : &x}; }

// The dtype that the vectors given share: that of x, or float32 beside a 16-bit x.
DType affine_dtype(const char* op, const Tensor& x,
                   std::initializer_list<std::pair<const char*, const OptionalTensor*>> all) {
  DType dtype = x.dtype;
  for (const auto& [label, t] : all)
    if (*t) dtype = (*t)->dtype;
  CNNOPS_CHECK(dtype == x.dtype || (dtype == DType::f32 && (x.dtype == DType::bf16 || x.dtype == DType::f16)),
               std::runtime_error, op, ": weight and bias must be in ", name(x.dtype),
               " or, beside a 16-bit input, in float32, but are in ", name(dtype));
  for (const auto& [label, t] : all)
    if (*t) expect_contiguous(op, {label, &**t}, dtype, {x.shape[1]}, x.place);
  return dtype;
}

void expect_statistics(const char* op, const Tensor& mean, const Tensor& var, int64_t c, Place place) {
  CNNOPS_CHECK(mean.dtype != DType::other && mean.dtype != DType::u8 && mean.dtype != DType::i64, std::runtime_error,
               op, ": mean is in ", name(mean.dtype), ", which is not a floating-point dtype");
  expect_contiguous(op, {"mean", &mean}, mean.dtype, {c}, place);
  expect_contiguous(op, {"var", &var}, mean.dtype, {c}, place);
}

BatchNormParams parameters(const char* op, Layout layout, const Tensor& x, const Tensor& mean, const Tensor& var,
                           double eps, int activation, int threads) {
  expect_statistics(op, mean, var, x.shape[1], x.place);
  CNNOPS_CHECK(activation >= 0 && activation < kActivations, std::invalid_argument, op, ": activation ", activation,
               " is not one of the ", kActivations, " known");
  BatchNormParams p{};
  p.layout = layout;
  p.n = x.shape[0], p.c = x.shape[1], p.h = x.shape[2], p.w = x.shape[3];
  p.eps = eps;
  p.activation = static_cast<Activation>(activation);
  p.statistics = mean.dtype;
  p.x = x.data;
  p.mean = mean.data, p.var = var.data;
  // Two passes, of several tensors each; of rows, with threads waiting for one another in between.
  p.threads = threads_for((layout == Layout::nchw ? 8 : 4) * x.numel(), threads);
  return p;
}

void run_with_workspace(const char* pass, const Tensor& on, BatchNormParams p, int kernel) {
  const Scratch<char> workspace(on.place.device == Device::cpu ? batch_norm_workspace_bytes(p) : 0);
  p.workspace = workspace.data;
  run(table<BatchNormParams>(), pass, on, p, kernel);
}

void batch_norm_forward(const Tensor& y, const Tensor& mean, const Tensor& var, const Tensor& x,
                        const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                        bool training, double eps, int activation, int threads, int kernel) {
  static constexpr const char* kOp = "batch_norm";
  const Layout layout = common_layout(kOp, x.dtype, {{"input", &x}, {"output", &y}, image("residual", residual, x)});
  for (const NamedTensor& t : {NamedTensor{"output", &y}, image("residual", residual, x)})
    expect_shape(kOp, t, {x.shape[0], x.shape[1], x.shape[2], x.shape[3]});
  BatchNormParams p = parameters(kOp, layout, x, mean, var, eps, activation, threads);
  CNNOPS_CHECK(!training || mean.dtype == DType::f64, std::runtime_error, kOp, ": training writes float64 statistics");
  p.affine = affine_dtype(kOp, x, {{"weight", &weight}, {"bias", &bias}});
  p.training = training;
  p.weight = data(weight), p.bias = data(bias), p.residual = data(residual);
  p.y = y.data;
  run_with_workspace(training ? "training" : "evaluation", x, p, kernel);
}

void batch_norm_backward(const OptionalTensor& dx, const OptionalTensor& dweight, const OptionalTensor& dbias,
                         const OptionalTensor& dresidual, const Tensor& dy, const Tensor& x, const OptionalTensor& y,
                         const OptionalTensor& residual, const Tensor& mean, const Tensor& var,
                         const OptionalTensor& weight, const OptionalTensor& bias, bool training, double eps,
                         int activation, int threads, int kernel) {
  static constexpr const char* kOp = "batch_norm_backward";
  const std::initializer_list<NamedTensor> images = {{"input", &x},
                                                     {"output's gradient", &dy},
                                                     image("output", y, x),
                                                     image("residual", residual, x),
                                                     image("input's gradient", dx, x),
                                                     image("residual's gradient", dresidual, x)};
  const Layout layout = common_layout(kOp, x.dtype, images);
  for (const NamedTensor& t : images) expect_shape(kOp, t, {x.shape[0], x.shape[1], x.shape[2], x.shape[3]});
  BatchNormParams p = parameters(kOp, layout, x, mean, var, eps, activation, threads);
  p.affine = affine_dtype(
      kOp, x, {{"weight", &weight}, {"bias", &bias}, {"weight's gradient", &dweight}, {"bias's gradient", &dbias}});
  p.training = training;
  p.weight = data(weight), p.bias = data(bias), p.residual = data(residual);
  p.dy = dy.data, p.saved_y = data(y);
  p.dx = data(dx), p.dresidual = data(dresidual), p.dweight = data(dweight), p.dbias = data(dbias);
  run_with_workspace("backward", x, p, kernel);
}

// running = (1 - momentum) * running + momentum * observed, with the unbiased variance of `count` elements.
void update(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
            double momentum, int64_t count, int kernel) {
  static constexpr const char* kOp = "batch_norm";
  CNNOPS_CHECK(mean.ndim == 1 && mean.dtype == DType::f64, std::invalid_argument, kOp,
               ": mean must be a float64 vector");
  const int64_t c = mean.shape[0];
  expect_statistics(kOp, mean, var, c, mean.place);
  for (const NamedTensor& t : {NamedTensor{"running_mean", &running_mean}, {"running_var", &running_var}}) {
    expect_shape(kOp, t, {c});
    CNNOPS_CHECK(t.tensor->place == mean.place && (t.tensor->dtype == DType::f32 || t.tensor->dtype == DType::f64 ||
                                                   t.tensor->dtype == DType::bf16 || t.tensor->dtype == DType::f16),
                 std::runtime_error, kOp, ": ", t.name, " must be a floating-point tensor on ", place_text(mean.place));
  }
  if (mean.place.device == Device::cuda || kernel != kSelect) {
    CNNOPS_CHECK(running_mean.dtype == running_var.dtype, std::runtime_error, kOp,
                 ": running_mean and running_var must be of one dtype");
    BatchNormParams p{};
    p.c = c, p.count = count, p.momentum = momentum;
    p.mean = mean.data, p.var = var.data, p.statistics = DType::f64;
    p.running_mean = running_mean.data, p.running_mean_stride = running_mean.stride[0];
    p.running_var = running_var.data, p.running_var_stride = running_var.stride[0];
    run(table<BatchNormParams>(), "update", running_mean, p, kernel);
    return;
  }
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  if (running_mean.dtype == DType::f32 && running_var.dtype == DType::f32 && running_mean.stride[0] == 1 &&
      running_var.stride[0] == 1) {
    const auto mix = [c, momentum](void* running, const void* observed, double factor) {
      float* const to = static_cast<float*>(running);
      const double* const from = static_cast<const double*>(observed);
      for (int64_t i = 0; i < c; ++i)
        to[i] = static_cast<float>((1 - momentum) * static_cast<double>(to[i]) + momentum * (factor * from[i]));
    };
    mix(running_mean.data, mean.data, 1);
    mix(running_var.data, var.data, unbiased);
    return;
  }
  for (int64_t i = 0; i < c; ++i) {
    const int64_t m = i * running_mean.stride[0], v = i * running_var.stride[0];
    batch_norm_set(running_mean.data, running_mean.dtype, m,
                   (1 - momentum) * batch_norm_get(running_mean.data, running_mean.dtype, m) +
                       momentum * batch_norm_get(mean.data, mean.dtype, i));
    batch_norm_set(running_var.data, running_var.dtype, v,
                   (1 - momentum) * batch_norm_get(running_var.data, running_var.dtype, v) +
                       momentum * (unbiased * batch_norm_get(var.data, var.dtype, i)));
  }
}

bool like(const Tensor& t, const Tensor& x, Layout layout) {
  for (int i = 0; i < 4; ++i)
    if (t.shape[i] != x.shape[i]) return false;
  return t.dtype == x.dtype && direct::dense(t, layout);
}

OptionalTensor optional(const Tensor& t) { return t.data ? OptionalTensor(t) : std::nullopt; }

// -> y, (y, mean, var) in training, (y,) in evaluation where a gradient is wanted, or None; training updates the
// running statistics, if there are any.
PyObject* batch_norm_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor x, y, residual;
    Tensor vectors[4];  // running mean and variance, weight, bias
    bool training, grad;
    double momentum, eps;
    int64_t activation, threads;
    if (count != 12 || !direct::tensor(args[0], x) || !direct::optional_tensor(args[5], residual, 4) ||
        !direct::truth(args[6], training) || !direct::number(args[7], momentum) || !direct::number(args[8], eps) ||
        !direct::integer(args[9], activation) || !direct::truth(args[10], grad) || !direct::integer(args[11], threads))
      return nullptr;
    const int64_t c = x.shape[1];
    DType dtype = DType::other;
    for (int i = 0; i < 4; ++i) {
      Tensor& t = vectors[i];
      if (!direct::optional_tensor(args[1 + i], t, 1)) return nullptr;
      if (!t.data) continue;
      if (dtype == DType::other) dtype = t.dtype;
      if (t.shape[0] != c || (c > 1 && t.stride[0] != 1) || t.dtype != dtype) return nullptr;
      if (i < 2 && direct::requires_grad(args[1 + i])) return nullptr;
    }
    if (dtype != DType::other && dtype != x.dtype &&
        !(dtype == DType::f32 && (x.dtype == DType::bf16 || x.dtype == DType::f16)))
      return nullptr;
    if (!vectors[0].data != !vectors[1].data || (!training && !vectors[0].data) || !(eps > 0) ||
        (training && x.numel() == c))
      return nullptr;
    const Layout layout = direct::dense(x, Layout::nchw) ? Layout::nchw : direct::suggested(x);
    if (!direct::dense(x, layout) || (residual.data && !like(residual, x, layout))) return nullptr;
    py::object made = direct::empty(args[0], {x.shape[0], c, x.shape[2], x.shape[3]}, x.dtype, layout, y), mean, var;
    Tensor means = vectors[0], vars = vectors[1];
    if (training) {
      mean = direct::empty_vector(args[0], c, DType::f64, means);
      var = direct::empty_vector(args[0], c, DType::f64, vars);
    }
    batch_norm_forward(y, means, vars, x, optional(vectors[2]), optional(vectors[3]), optional(residual), training, eps,
                       static_cast<int>(activation), static_cast<int>(threads), kSelect);
    if (training) {
      if (vectors[0].data) update(vectors[0], vectors[1], means, vars, momentum, x.numel() / c, kSelect);
      return py::make_tuple(std::move(made), std::move(mean), std::move(var)).release().ptr();
    }
    for (const int i : {0, 3, 4, 5})
      if (grad && direct::requires_grad(args[i])) return py::make_tuple(std::move(made)).release().ptr();
    return made.release().ptr();
  });
}

// What backward_direct and gradients_direct are given, as they are.
struct Given {
  PyObject *dy, *x, *y, *residual, *vectors[4], *eps;  // vectors: mean, variance, weight, bias
  PyObject *training, *activation, *threads;
  bool wants[4];
};

// -> a tuple that begins with dx, dweight, dbias and dresidual, None where one is not wanted, and goes on with None; or
// null.
PyObject* gradients_of(const Given& given, size_t size) {
  Tensor dy, x, y, residual, made[4], vectors[4];
  bool training;
  double eps;
  int64_t activation, threads;
  if (!direct::tensor(given.dy, dy) || !direct::tensor(given.x, x) || !direct::optional_tensor(given.y, y, 4) ||
      !direct::optional_tensor(given.residual, residual, 4) || !direct::truth(given.training, training) ||
      !direct::number(given.eps, eps) || !direct::integer(given.activation, activation) ||
      !direct::integer(given.threads, threads))
    return nullptr;
  for (int i = 0; i < 4; ++i)
    if (!direct::optional_tensor(given.vectors[i], vectors[i], 1)) return nullptr;
  const Layout layout = direct::dense(x, Layout::nchw) ? Layout::nchw : direct::suggested(x);
  if (!direct::dense(x, layout) || !like(dy, x, layout) || (y.data && !like(y, x, layout)) ||
      (residual.data && !like(residual, x, layout)))
    return nullptr;
  const auto image = [&](bool want, Tensor& out) -> py::object {
    if (!want) return py::none();
    return direct::empty(given.x, {x.shape[0], x.shape[1], x.shape[2], x.shape[3]}, x.dtype, layout, out);
  };
  const auto vector = [&](bool want, const Tensor& like, Tensor& out) -> py::object {
    if (!want) return py::none();
    return direct::empty_vector(given.x, x.shape[1], like.data ? like.dtype : x.dtype, out);
  };
  const bool* const wants = given.wants;
  py::tuple all(size);
  all[0] = image(wants[0], made[0]);
  all[1] = vector(wants[1], vectors[2], made[1]);
  all[2] = vector(wants[2], vectors[3], made[2]);
  all[3] = image(wants[3], made[3]);
  for (size_t i = 4; i < size; ++i) all[i] = py::none();
  batch_norm_backward(optional(made[0]), optional(made[1]), optional(made[2]), optional(made[3]), dy, x, optional(y),
                      optional(residual), vectors[0], vectors[1], optional(vectors[2]), optional(vectors[3]), training,
                      eps, static_cast<int>(activation), static_cast<int>(threads), kSelect);
  return all.release().ptr();
}

// -> (dx, dweight, dbias, dresidual), or None.
PyObject* batch_norm_backward_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    if (count != 13 || !PyList_CheckExact(args[11]) || PyList_GET_SIZE(args[11]) != 4) return nullptr;
    Given given{args[0], args[1], args[2],  args[3],  {args[4], args[5], args[6], args[7]},
                args[9], args[8], args[10], args[12], {}};
    for (int i = 0; i < 4; ++i)
      if (!direct::truth(PyList_GET_ITEM(args[11], i), given.wants[i])) return nullptr;
    return gradients_of(given, 4);
  });
}

// The same from the context of autograd and its saved tensors, which may be read only once: what the backward function
// returns, or None.
PyObject* batch_norm_gradients_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  static PyObject* const needs_name = PyUnicode_InternFromString("needs_input_grad");
  static PyObject* const arguments_name = PyUnicode_InternFromString("arguments");
  return direct::attempt([&]() -> PyObject* {
    if (count != 4) return nullptr;
    const auto tuple = [](py::object value, Py_ssize_t size) {
      const bool fits = value && PyTuple_CheckExact(value.ptr()) && PyTuple_GET_SIZE(value.ptr()) == size;
      return fits ? value : py::object();
    };
    const auto attribute = [&](PyObject* name) {
      return py::reinterpret_steal<py::object>(PyObject_GetAttr(args[0], name));
    };
    const py::object saved = tuple(py::reinterpret_borrow<py::object>(args[2]), 7);
    const py::object needs = tuple(attribute(needs_name), 7), arguments = tuple(attribute(arguments_name), 3);
    if (!saved || !needs || !arguments) return nullptr;
    const auto at = [](const py::object& tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); };
    Given given{args[1],
                at(saved, 0),
                at(saved, 1),
                at(saved, 2),
                {at(saved, 3), at(saved, 4), at(saved, 5), at(saved, 6)},
                at(arguments, 1),
                at(arguments, 0),
                at(arguments, 2),
                args[3],
                {}};
    bool any = false;
    for (int i = 0; i < 4; ++i) any |= given.wants[i] = at(needs, i) == Py_True;
    int64_t activation;
    // Without an activation the residual's gradient is dy itself.
    if (!any || !direct::integer(given.activation, activation) || (given.wants[3] && activation == 0)) return nullptr;
    return gradients_of(given, 7);
  });
}

}  // namespace

void bind_batch_norm(py::module_& m) {
  direct::define(
      m, "batch_norm_direct", &batch_norm_direct,
      "batch_norm_direct(x: torch.Tensor, running_mean: torch.Tensor | None, running_var: torch.Tensor | None, "
      "weight: torch.Tensor | None, bias: torch.Tensor | None, residual: torch.Tensor | None, training: bool, "
      "momentum: float, eps: float, activation: int, grad: bool, threads: int) -> object");
  direct::define(m, "batch_norm_backward_direct", &batch_norm_backward_direct,
                 "batch_norm_backward_direct(dy: torch.Tensor, x: torch.Tensor, y: torch.Tensor | None, "
                 "residual: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, weight: torch.Tensor | None, "
                 "bias: torch.Tensor | None, training: bool, eps: float, activation: int, wants: list[bool], "
                 "threads: int) -> object");
  direct::define(
      m, "batch_norm_gradients_direct", &batch_norm_gradients_direct,
      "batch_norm_gradients_direct(context: object, dy: torch.Tensor, saved: tuple, threads: int) -> object");
  m.def("batch_norm_forward", &batch_norm_forward, "y"_a, "mean"_a, "var"_a, "x"_a, "weight"_a, "bias"_a, "residual"_a,
        "training"_a, "eps"_a, "activation"_a, "threads"_a, "kernel"_a = kSelect);
  m.def("batch_norm_backward", &batch_norm_backward, "dx"_a, "dweight"_a, "dbias"_a, "dresidual"_a, "dy"_a, "x"_a,
        "y"_a, "residual"_a, "mean"_a, "var"_a, "weight"_a, "bias"_a, "training"_a, "eps"_a, "activation"_a,
        "threads"_a, "kernel"_a = kSelect);
  m.def("batch_norm_update", &update, "running_mean"_a, "running_var"_a, "mean"_a, "var"_a, "momentum"_a, "count"_a,
        "kernel"_a = kSelect);
}

}  // namespace cnnops
