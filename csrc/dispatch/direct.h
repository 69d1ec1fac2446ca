// Short cuts for calls on tiny tensors, where Python's part of a call costs more than the kernel's: one C function checks
// plain arguments, allocates the result and runs the kernel. Whatever is not plain (a subclass, a dtype or layout that would
// need a copy, arguments that are wrong) is refused with None, and the caller takes the long way, which knows all cases and
// errors. What only Python knows (autocast, transforms, modes) it has asked before.
#pragma once

#include <array>

#include "dispatch/tensor_arg.h"

namespace cnnops::direct {

// A torch.Tensor or Parameter on the CPU, strided, of a kernel's dtype, 4-D or of `ndim` dimensions, that is not empty.
bool tensor(PyObject* object, Tensor& out, int ndim = 4);
// The same or None, which gives null data.
bool optional_tensor(PyObject* object, Tensor& out, int ndim);
bool requires_grad(PyObject* tensor);

// An int, or a tuple or list of two.
bool pair(PyObject* object, std::array<int64_t, 2>& out);
bool integer(PyObject* object, int64_t& out);

// PyTorch's suggest_memory_format, and whether a tensor lies in a format without gaps.
Layout suggested(const Tensor& t);
bool dense(const Tensor& t, Layout layout);

// A new tensor like one that `tensor` took, and its description.
pybind11::object empty(PyObject* like, std::array<int64_t, 4> shape, DType dtype, Layout layout, Tensor& out);
pybind11::object empty_vector(PyObject* like, int64_t size, DType dtype, Tensor& out);

// A float, or a truth value.
bool number(PyObject* object, double& out);
bool truth(PyObject* object, bool& out);

// Runs `call`, which returns a new reference or null for a refusal; an exception is a refusal too: the long way will meet
// what caused it and say it better.
template <class Call>
PyObject* attempt(const Call& call) {
  PyObject* result = nullptr;
  try {
    result = call();
  } catch (pybind11::error_already_set&) {
  } catch (const std::exception&) {
  }
  if (result) return result;
  PyErr_Clear();
  Py_RETURN_NONE;
}

using Function = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t count);
// Adds a function of positional arguments; doc begins with its signature.
void define(pybind11::module_& m, const char* name, Function function, const char* doc);

}  // namespace cnnops::direct
