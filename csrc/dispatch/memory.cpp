// Results: tensors over pooled memory, handed to torch through the DLPack exchange API of its tensor type; and the pool's
// figures.
#include <cstdlib>
#include <new>

#include "common/arith.h"
#include "common/host_memory.h"
#include "dispatch/dlpack.h"
#include "dispatch/tensor_arg.h"

namespace py = pybind11;
using namespace py::literals;

namespace cnnops {
namespace {

struct Owned {
  dlpack::ManagedTensor managed;
  int64_t shape[Tensor::kMaxDims], stride[Tensor::kMaxDims];
  size_t bytes;  // 0: the data lie in the same block
};

constexpr size_t kAlignment = 64;  // a cache line

// Small data lie behind it: one block is as cheap as it gets, where aligned_alloc cuts one out of a larger.
Owned* acquire(size_t bytes) {
  const bool together = bytes < kPooledBytes;
  void* const block = std::malloc(sizeof(Owned) + (together ? bytes + kAlignment : 0));
  if (!block) throw std::bad_alloc();
  Owned* const owned = new (block) Owned;
  owned->bytes = together ? 0 : bytes;
  if (together) {
    const auto behind = reinterpret_cast<uintptr_t>(owned + 1);
    owned->managed.tensor.data = reinterpret_cast<void*>((behind + kAlignment - 1) / kAlignment * kAlignment);
    return owned;
  }
  try {
    owned->managed.tensor.data = memory_acquire(bytes);
  } catch (...) {
    std::free(owned);
    throw;
  }
  return owned;
}

void destroy(dlpack::ManagedTensor* self) {
  Owned* const owned = static_cast<Owned*>(self->manager_ctx);
  if (owned->bytes) memory_release(owned->managed.tensor.data, owned->bytes);
  std::free(owned);
}

}  // namespace

// An uninitialized CPU tensor of the dtype of `like`'s class and this shape, contiguous or (4 dimensions) channels_last;
// `data`: its memory.
py::object empty_tensor(PyObject* like, const int64_t* shape, int ndim, int code, int bits, bool channels_last,
                        void** data) {
  const dlpack::ExchangeApi* const api = exchange_api(Py_TYPE(like));
  CNNOPS_CHECK(api, TypeError, "expected a tensor with a DLPack C exchange API");
  CNNOPS_CHECK(ndim <= Tensor::kMaxDims && (!channels_last || ndim == 4), std::invalid_argument, "a result of ", ndim,
               " dimensions is not supported");
  size_t bytes = static_cast<size_t>(bits / 8);
  for (int i = 0; i < ndim; ++i)
    CNNOPS_CHECK(shape[i] >= 0 && !__builtin_mul_overflow(bytes, static_cast<size_t>(shape[i]), &bytes),
                 std::runtime_error, "the size of the result overflows");
  Owned* const owned = acquire(bytes);
  static constexpr int kContiguous[Tensor::kMaxDims] = {0, 1, 2, 3, 4, 5, 6, 7}, kChannelsLast[] = {0, 2, 3, 1};
  const int* const order = channels_last ? kChannelsLast : kContiguous;
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    owned->shape[order[i]] = shape[order[i]];
    owned->stride[order[i]] = stride;
    stride *= max64(owned->shape[order[i]], 1);
  }
  *data = owned->managed.tensor.data;
  owned->managed.version = {1, 0};
  owned->managed.manager_ctx = owned;
  owned->managed.deleter = &destroy;
  owned->managed.flags = 0;
  owned->managed.tensor.device = {dlpack::kCpu, 0};
  owned->managed.tensor.ndim = ndim;
  owned->managed.tensor.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  owned->managed.tensor.shape = owned->shape;
  owned->managed.tensor.strides = owned->stride;
  owned->managed.tensor.byte_offset = 0;
  void* out = nullptr;
  if (api->managed_tensor_to_py_object_no_sync(&owned->managed, &out) != 0) {
    destroy(&owned->managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(out));
}

namespace {

py::object empty(py::handle like, const std::vector<int64_t>& shape, int code, int bits, bool channels_last) {
  void* data;
  return empty_tensor(like.ptr(), shape.data(), static_cast<int>(shape.size()), code, bits, channels_last, &data);
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def("empty", &empty, "like"_a, "shape"_a, "code"_a, "bits"_a, "channels_last"_a,
        "An uninitialized tensor in pooled memory, of the class of `like`.");
  m.def("memory_stats", [] {
    const MemoryStats s = memory_stats();
    return py::dict("in_use"_a = s.in_use, "peak_in_use"_a = s.peak_in_use, "cached"_a = s.cached, "limit"_a = s.limit,
                    "hits"_a = s.hits, "misses"_a = s.misses);
  });
  m.def("memory_set_limit", &memory_set_limit, "bytes"_a);
  m.def("memory_empty_cache", &memory_empty_cache);
}

}  // namespace cnnops
