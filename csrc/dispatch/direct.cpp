#include "dispatch/direct.h"

#include "dispatch/dlpack.h"

namespace py = pybind11;

namespace cnnops {

// csrc/dispatch/memory.cpp
py::object empty_tensor(PyObject* like, const int64_t* shape, int ndim, int code, int bits, bool channels_last,
                        void** data);

namespace direct {
namespace {

PyObject *plain_types[2] = {}, *is_neg_name, *requires_grad_name;
std::vector<PyObject*> watched;  // guarded by the GIL

struct Code {
  int code, bits;
};
Code code_of(DType dtype) {
  static constexpr Code kCodes[] = {{dlpack::kFloat, 32}, {dlpack::kFloat, 64}, {dlpack::kBfloat, 16},
                                    {dlpack::kFloat, 16}, {dlpack::kUint, 8},   {dlpack::kInt, 64}};
  return kCodes[static_cast<int>(dtype)];
}

// Whether nothing that set_watched named answers with something true.
PyObject* undisturbed(PyObject*, PyObject* const*, Py_ssize_t) {
  for (PyObject* const question : watched) {
    PyObject* const answer = PyObject_CallNoArgs(question);
    if (!answer) return nullptr;
    const int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (truth < 0) return nullptr;
    if (truth) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// The gradient that `function`, one of those that end in _direct, computes of dy, the tensors saved for it, its further
// arguments and threads: -> (dx, None), which autograd wants of a function of two arguments, or None where it refuses.
PyObject* gradient(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return attempt([&]() -> PyObject* {
    constexpr Py_ssize_t kMost = 16;
    if (count != 5) return nullptr;
    PyObject* all[kMost] = {args[1]};
    Py_ssize_t size = 1;
    for (PyObject* const tuple : {args[2], args[3]}) {
      if (!PyTuple_CheckExact(tuple) || size + PyTuple_GET_SIZE(tuple) >= kMost) return nullptr;
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) all[size++] = PyTuple_GET_ITEM(tuple, i);
    }
    all[size++] = args[4];
    const auto made =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(args[0], all, static_cast<size_t>(size), nullptr));
    if (!made || made.is_none()) return nullptr;
    return PyTuple_Pack(2, made.ptr(), Py_None);
  });
}

}  // namespace

bool tensor(PyObject* object, Tensor& out, int ndim) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != plain_types[0] && type != plain_types[1]) return false;
  out = tensor_from_python(object);  // throws for what has no memory to point to
  if (out.place.device != Device::cpu || out.ndim != ndim || out.dtype > DType::f16 || !out.data || out.numel() == 0)
    return false;
  PyObject* const negative = PyObject_CallMethodNoArgs(object, is_neg_name);
  Py_XDECREF(negative);
  return negative == Py_False;
}

bool optional_tensor(PyObject* object, Tensor& out, int ndim) {
  if (object == Py_None) return true;
  return tensor(object, out, ndim);
}

bool requires_grad(PyObject* tensor) {
  if (tensor == Py_None) return false;
  PyObject* const value = PyObject_GetAttr(tensor, requires_grad_name);
  Py_XDECREF(value);
  return value == Py_True;
}

bool integer(PyObject* object, int64_t& out) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow && out >= 0 && out < (int64_t{1} << 31);
}

bool pair(PyObject* object, std::array<int64_t, 2>& out) {
  if (PyLong_CheckExact(object)) {
    if (!integer(object, out[0])) return false;
    out[1] = out[0];
    return true;
  }
  if (PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 2)
    return integer(PyTuple_GET_ITEM(object, 0), out[0]) && integer(PyTuple_GET_ITEM(object, 1), out[1]);
  if (PyList_CheckExact(object) && PyList_GET_SIZE(object) == 2)
    return integer(PyList_GET_ITEM(object, 0), out[0]) && integer(PyList_GET_ITEM(object, 1), out[1]);
  return false;
}

Layout suggested(const Tensor& t) {
  if (t.stride[3] == 1 && t.stride[1] != 1) return Layout::nchw;
  int64_t smallest = 0;
  for (int d : {1, 3, 2, 0}) {
    if (t.shape[d] == 0 || t.stride[d] < smallest || (d == 0 && smallest == t.stride[1])) return Layout::nchw;
    smallest = t.stride[d] * (t.shape[d] > 1 ? t.shape[d] : 1);
  }
  return Layout::nhwc;
}

bool dense(const Tensor& t, Layout layout) {
  static constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (int d : kOrder[static_cast<int>(layout)]) {
    if (t.shape[d] != 1 && t.stride[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

py::object empty(PyObject* like, std::array<int64_t, 4> shape, DType dtype, Layout layout, Tensor& out) {
  const Code code = code_of(dtype);
  const bool channels_last = layout == Layout::nhwc;
  py::object made = empty_tensor(like, shape.data(), 4, code.code, code.bits, channels_last, &out.data);
  out.ndim = 4;
  out.dtype = dtype;
  int64_t stride = 1;
  for (int i = 3; i >= 0; --i) {
    static constexpr int kOrder[2][4] = {{0, 1, 2, 3}, {0, 2, 3, 1}};
    const int d = kOrder[channels_last][i];
    out.shape[d] = shape[static_cast<size_t>(d)];
    out.stride[d] = stride;
    stride *= out.shape[d];
  }
  return made;
}

py::object empty_vector(PyObject* like, int64_t size, DType dtype, Tensor& out) {
  const Code code = code_of(dtype);
  py::object made = empty_tensor(like, &size, 1, code.code, code.bits, false, &out.data);
  out.ndim = 1;
  out.dtype = dtype;
  out.shape[0] = size;
  out.stride[0] = 1;
  return made;
}

bool number(PyObject* object, double& out) {
  if (!PyFloat_CheckExact(object)) return false;
  out = PyFloat_AS_DOUBLE(object);
  return true;
}

bool truth(PyObject* object, bool& out) {
  out = object == Py_True;
  return PyBool_Check(object);
}

void define(py::module_& m, const char* name, Function function, const char* doc) {
  auto* const methods = new PyMethodDef[2]{
      {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, doc}, {}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace direct

void bind_direct(py::module_& m) {
  direct::is_neg_name = PyUnicode_InternFromString("is_neg");
  direct::requires_grad_name = PyUnicode_InternFromString("requires_grad");
  m.def(
      "set_plain_types",
      [](py::object tensor, py::object parameter) {
        direct::plain_types[0] = tensor.release().ptr();
        direct::plain_types[1] = parameter.release().ptr();
      },
      py::arg("tensor"), py::arg("parameter"), "The classes whose objects the functions ending in _direct take.");
  m.def(
      "set_watched",
      [](const std::vector<py::object>& questions) {
        for (const py::object& question : questions) direct::watched.push_back(question.inc_ref().ptr());
      },
      py::arg("questions"), "The functions without arguments that undisturbed() asks.");
  direct::define(m, "undisturbed", &direct::undisturbed, "undisturbed() -> bool");
  direct::define(
      m, "gradient_direct", &direct::gradient,
      "gradient_direct(function: object, dy: torch.Tensor, saved: tuple, arguments: tuple, threads: int) -> object");
}

}  // namespace cnnops
