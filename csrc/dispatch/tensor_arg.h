// Tensors from Python: through the DLPack C exchange API where the type offers it (torch >= 2.11), else through the
// buffer protocol (NumPy arrays, so that kernels can be tested without torch). Nothing is copied, nothing is owned.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <optional>

#include "common/check.h"
#include "common/tensor.h"
#include "dispatch/device.h"
#include "dispatch/kernel_table.h"

namespace cnnops {

namespace dlpack {
struct ExchangeApi;
}
// The exchange API of a type, null where it has none.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type);

Tensor tensor_from_python(PyObject* object);

// "[2, 3, 4]"
std::string shape_text(const Tensor& t);

// "the CPU" or "cuda:0"
std::string place_text(Place place);

// Checks that all tensors lie in one place, have 4 dimensions and `dtype`, and returns the layout they share.
struct NamedTensor {
  const char* name;
  const Tensor* tensor;
};
Layout common_layout(const char* op, DType dtype, std::initializer_list<NamedTensor> images);
// Checks that one more image, of another dtype, lies there in that layout.
void expect_layout(const char* op, const NamedTensor& image, DType dtype, Layout layout, Place place);
// Checks that a tensor lies there, has this dtype and shape, and is contiguous.
void expect_contiguous(const char* op, const NamedTensor& t, DType dtype, std::initializer_list<int64_t> shape,
                       Place place);
void expect_shape(const char* op, const NamedTensor& t, std::initializer_list<int64_t> shape);

// Selects and runs a kernel, without the GIL, in the dtype of `on` and where it lies.
template <class Params>
void run(std::span<const KernelRow<Params>> table, const char* pass, const Tensor& on, const Params& params, int row) {
  const auto& kernel = select(table, pass, on.dtype, params, on.place.device == Device::cuda, row);
  if (kernel.isa != Isa::cuda && kernel.isa != Isa::cuda_emulated) {
    pybind11::gil_scoped_release release;
    kernel.run(params);
    return;
  }
  Params launched = params;
  DeviceCall call(kernel.isa, on.place);
  launched.launch = &call;
  pybind11::gil_scoped_release release;
  kernel.run(launched);
}

}  // namespace cnnops

namespace pybind11::detail {

template <>
struct type_caster<cnnops::Tensor> {
  PYBIND11_TYPE_CASTER(cnnops::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    value = cnnops::tensor_from_python(source.ptr());
    return true;
  }
};

}  // namespace pybind11::detail
