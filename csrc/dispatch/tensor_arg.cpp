#include "dispatch/tensor_arg.h"

#include "dispatch/device.h"
#include "dispatch/dlpack.h"

namespace py = pybind11;

namespace cnnops {

const char* name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::u8: return "uint8";
    case DType::i64: return "int64";
    case DType::other: return "an unsupported dtype";
  }
  return "?";
}

std::string place_text(Place place) {
  return place.device == Device::cpu    ? "the CPU"
         : place.device == Device::cuda ? "cuda:" + std::to_string(place.id)
                                        : "an unsupported device";
}

namespace {

DType dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return DType::other;
  if (type.code == dlpack::kFloat) {
    if (type.bits == 32) return DType::f32;
    if (type.bits == 64) return DType::f64;
    if (type.bits == 16) return DType::f16;
  }
  if (type.code == dlpack::kBfloat && type.bits == 16) return DType::bf16;
  if (type.code == dlpack::kUint && type.bits == 8) return DType::u8;
  if (type.code == dlpack::kInt && type.bits == 64) return DType::i64;
  return DType::other;
}

Tensor from_buffer(PyObject* object) {
  Py_buffer view;
  if (PyObject_GetBuffer(object, &view, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE) != 0)
    throw py::error_already_set();
  Tensor out;
  out.data = view.buf;
  out.ndim = view.ndim;
  const std::string format = view.format ? view.format : "B";
  if (format == "f") out.dtype = DType::f32;
  if (format == "d") out.dtype = DType::f64;
  if (format == "e") out.dtype = DType::f16;
  if (format == "B") out.dtype = DType::u8;
  if (format == "l" || format == "q") out.dtype = DType::i64;
  const bool fits = view.ndim <= Tensor::kMaxDims;
  for (int i = 0; fits && i < view.ndim; ++i) {
    out.shape[i] = view.shape[i];
    out.stride[i] = view.strides[i] / view.itemsize;
  }
  PyBuffer_Release(&view);
  CNNOPS_CHECK(fits, std::invalid_argument, "a tensor of ", out.ndim, " dimensions is not supported");
  note_tensor(out);
  return out;
}

bool dense(const Tensor& t, Layout layout) {
  static constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (int d : kOrder[static_cast<int>(layout)]) {
    if (t.shape[d] != 1 && t.stride[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

void expect_on(const char* op, const NamedTensor& t, DType dtype, Place place) {
  CNNOPS_CHECK(place.device != Device::other, std::runtime_error, op, ": ", t.name,
               " is neither on the CPU nor on a CUDA device");
  CNNOPS_CHECK(t.tensor->place == place, std::runtime_error, op, ": expected ", t.name, " on ", place_text(place),
               ", but it is on ", place_text(t.tensor->place));
  CNNOPS_CHECK(t.tensor->dtype == dtype, std::runtime_error, op, ": expected ", t.name, " in ", name(dtype),
               ", but it is in ", name(t.tensor->dtype));
}

}  // namespace

// Kept for the first types seen: nearly every call passes torch.Tensor and Parameter.
const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  struct Known {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static Known known[4] = {};  // guarded by the GIL
  for (const Known& k : known)
    if (k.type == type) return k.api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!api) throw py::error_already_set();
  while (api && api->header.version.major != 1)
    api = reinterpret_cast<const dlpack::ExchangeApi*>(api->header.prev_api);
  CNNOPS_CHECK(api, TypeError, type->tp_name, " offers no DLPack C exchange API of major version 1");
  for (Known& k : known) {
    if (k.type) continue;
    Py_INCREF(type);  // a type kept here must not be replaced by another at its address
    k = {type, api};
    break;
  }
  return api;
}

Tensor tensor_from_python(PyObject* object) {
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object));
  if (!api) return from_buffer(object);
  dlpack::DLTensor source;
  if (api->dltensor_from_py_object_no_sync(object, &source) != 0) throw py::error_already_set();
  CNNOPS_CHECK(source.ndim <= Tensor::kMaxDims, std::invalid_argument, "a tensor of ", source.ndim,
               " dimensions is not supported");
  Tensor out;
  out.data = static_cast<char*>(source.data) + source.byte_offset;
  out.ndim = source.ndim;
  out.dtype = dtype_of(source.dtype);
  if (source.device.type == dlpack::kCuda) {
    out.place = {Device::cuda, source.device.id};
    note_device_api(api);
  } else if (source.device.type != dlpack::kCpu && source.device.type != dlpack::kCudaHost) {
    out.place = {Device::other, source.device.id};
  }
  int64_t dense_stride = 1;
  for (int i = source.ndim - 1; i >= 0; --i) {
    out.shape[i] = source.shape[i];
    out.stride[i] = source.strides ? source.strides[i] : dense_stride;
    dense_stride *= source.shape[i];
  }
  note_tensor(out);
  return out;
}

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + "]";
}

Layout common_layout(const char* op, DType dtype, std::initializer_list<NamedTensor> images) {
  bool nchw = true, nhwc = true;
  const Place place = images.begin()->tensor->place;
  for (const NamedTensor& image : images) {
    CNNOPS_CHECK(image.tensor->ndim == 4, std::invalid_argument, op, ": expected ", image.name,
                 " with 4 dimensions, but its shape is ", shape_text(*image.tensor));
    expect_on(op, image, dtype, place);
    for (int d = 1; d < 4; ++d)
      CNNOPS_CHECK(place.device == Device::cpu || image.tensor->shape[d] < int64_t{1} << 31, std::invalid_argument, op,
                   ": on a device, ", image.name, " must measure under 2^31 along each axis, but its shape is ",
                   shape_text(*image.tensor));
    nchw = nchw && dense(*image.tensor, Layout::nchw);
    nhwc = nhwc && dense(*image.tensor, Layout::nhwc);
  }
  CNNOPS_CHECK(nchw || nhwc, std::invalid_argument, op, ": the images must all be contiguous or all channels_last");
  return nchw ? Layout::nchw : Layout::nhwc;
}

void expect_layout(const char* op, const NamedTensor& image, DType dtype, Layout layout, Place place) {
  CNNOPS_CHECK(image.tensor->ndim == 4, std::invalid_argument, op, ": expected ", image.name,
               " with 4 dimensions, but its shape is ", shape_text(*image.tensor));
  expect_on(op, image, dtype, place);
  CNNOPS_CHECK(dense(*image.tensor, layout), std::invalid_argument, op, ": ", image.name,
               " must lie in the layout of the other images");
}

void expect_shape(const char* op, const NamedTensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.tensor->ndim == static_cast<int>(shape.size());
  int i = 0;
  std::string expected;
  for (int64_t size : shape) {
    expected += (i ? ", " : "") + std::to_string(size);
    same = same && t.tensor->shape[i] == size;
    ++i;
  }
  CNNOPS_CHECK(same, std::invalid_argument, op, ": expected ", t.name, " of shape [", expected, "], but it is ",
               shape_text(*t.tensor));
}

void expect_contiguous(const char* op, const NamedTensor& t, DType dtype, std::initializer_list<int64_t> shape,
                       Place place) {
  expect_on(op, t, dtype, place);
  expect_shape(op, t, shape);
  int64_t expected = 1;
  for (int d = t.tensor->ndim - 1; d >= 0; --d) {
    CNNOPS_CHECK(t.tensor->shape[d] == 1 || t.tensor->stride[d] == expected || t.tensor->numel() == 0,
                 std::invalid_argument, op, ": ", t.name, " must be contiguous");
    expected *= t.tensor->shape[d];
  }
}

}  // namespace cnnops
