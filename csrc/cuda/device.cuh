// What every .cu begins with: threads and launches, elements and packs of them, and images.
//
// Sources are compiled twice: by nvcc, and by the host's compiler over the emulator (emulation/emulator.h). So kernels are
// launched by launch(), use one dimension of threads, take shared memory from shared<T>(), and instructions without a C++
// name from ptx.cuh. All but the exported functions has internal linkage.
#pragma once

#include "common/arith.h"
#include "common/check.h"
#include "common/export.h"
#include "common/tensor.h"
#include "cuda/ptx.cuh"

namespace cnnops {
namespace {

// Kernels name their threads, and some the blocks on a multiprocessor: without the latter ptxas aims at so many that it
// spills a few registers.
constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// ---- Elements

template <class T>
__device__ __forceinline__ compute_t<T> load(const T* from) {
  return load_scalar(*from);
}
template <class T>
__device__ __forceinline__ T rounded(compute_t<T> v) {
  if constexpr (__is_same(T, f16))
    return T{ptx::to_f16(v)};
  else if constexpr (__is_same(T, bf16))
    return T{ptx::to_bf16(v)};
  else
    return v;
}
template <class T>
__device__ __forceinline__ void store(T* to, compute_t<T> v) {
  *to = rounded<T>(v);
}

// V neighbours, read and written at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};
template <class T, int V>
__device__ __forceinline__ void load(compute_t<T> (&out)[V], const T* from) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = load(&pack.v[i]);
}
template <class T, int V>
__device__ __forceinline__ void store(T* to, const compute_t<T> (&values)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.v[i] = rounded<T>(values[i]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Elements of 16 bytes; how many neighbours a thread takes where they are channels that divide into such packs. float64, which
// few compute in, has no kernels of its own for that.
template <class T>
constexpr int kPack = sizeof(T) == sizeof(double) ? 1 : 16 / static_cast<int>(sizeof(T));

static inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class... Pointers>
static inline bool packable(Layout layout, int64_t channels, int pack, Pointers... pointers) {
  return layout == Layout::nhwc && channels % pack == 0 && (aligned(pointers) && ...);
}

// ---- Images

struct Strides {
  int64_t n, c, h, w;
};
static inline Strides strides_of(Layout layout, int64_t c, int64_t h, int64_t w) {
  return layout == Layout::nchw ? Strides{c * h * w, h * w, w, 1} : Strides{h * w * c, 1, w * c, c};
}

__device__ __forceinline__ int64_t remainder_of(int64_t a, int64_t b) { return a - divided(a, b) * b; }

struct Element {
  int64_t n, c, h, w;
};
// Element i of an image in the order of memory, in packs of V channels.
template <int V>
__device__ __forceinline__ Element element_at(int64_t i, Layout layout, int64_t channels, int64_t height,
                                              int64_t width) {
  const auto next = [&i](int64_t size) {
    const int64_t rest = divided(i, size), at = i - rest * size;
    i = rest;
    return at;
  };
  Element e;
  if (layout == Layout::nchw) {
    e.w = next(width), e.h = next(height), e.c = next(channels);
  } else {
    e.c = next(V == 1 ? channels : channels / V) * V, e.w = next(width), e.h = next(height);
  }
  e.n = i;
  return e;
}
__device__ __forceinline__ int64_t offset(const Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * s.n + c * s.c + h * s.h + w * s.w;
}

// ---- Threads and launches

__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * static_cast<int64_t>(blockDim.x) + static_cast<int64_t>(threadIdx.x);
}

// The block's dynamic shared memory, aligned to 128 bytes.
template <class T>
__device__ __forceinline__ T* shared() {
#if CNNOPS_EMULATED
  return static_cast<T*>(emulation::shared_memory());
#else
  extern __shared__ __align__(128) unsigned char cnnops_shared[];
  return reinterpret_cast<T*>(cnnops_shared);
#endif
}

template <class V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(kWholeWarp, v, mask);
  return v;
}

struct Grid {
  int64_t x = 1, y = 1, z = 1;
  unsigned threads = 256;
  int64_t shared_bytes = 0;
};

// One thread for each of `count` pieces of work.
static inline Grid one_each(int64_t count, unsigned threads = 256) {
  return {ceil_div(count, static_cast<int64_t>(threads)), 1, 1, threads, 0};
}

#if CNNOPS_EMULATED
template <class... Arguments>
struct Emulated {
  void (*kernel)(Arguments...);
  const void* arguments[sizeof...(Arguments)];

  template <size_t... i>
  void call(std::index_sequence<i...>) const {
    kernel(*static_cast<const Arguments*>(arguments[i])...);
  }
  static void thread(void* self) { static_cast<Emulated*>(self)->call(std::index_sequence_for<Arguments...>{}); }
};
#endif

// Puts a kernel on the stream. Kernels take their arguments by value, and have no arguments of reference type.
template <class... Arguments>
void launch(const char* name, const Launch& where, const Grid& grid, void (*kernel)(Arguments...),
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  CNNOPS_CHECK(grid.x < int64_t{1} << 31 && grid.y < 65536 && grid.z < 65536, std::runtime_error, name,
               ": the problem is too large: a grid of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks");
  const dim3 blocks{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)};
#if CNNOPS_EMULATED
  (void)where;
  Emulated<Arguments...> emulated{kernel, {&arguments...}};
  emulation::run(name, blocks, grid.threads, grid.shared_bytes, &Emulated<Arguments...>::thread, &emulated);
#else
  const auto check = [&](cudaError_t status) {
    CNNOPS_CHECK(status == cudaSuccess, std::runtime_error, "CUDA kernel ", name, ": ", cudaGetErrorString(status));
  };
  if (grid.shared_bytes > 48 << 10)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)));
  const void* pointers[] = {&arguments...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), blocks, dim3(grid.threads),
                         const_cast<void**>(pointers), static_cast<size_t>(grid.shared_bytes),
                         static_cast<cudaStream_t>(where.stream)));
#endif
}

// A kernel with a thread for each of `count` elements, or, of two that differ in that, one for packs of them.
template <class T, class Params>
void launch_elements(const char* name, const Params& p, int64_t count, const Strides& strides, bool packs,
                     void (*kernel_of_packs)(Params, Strides, int64_t), void (*kernel)(Params, Strides, int64_t)) {
  const int64_t threads = packs ? count / kPack<T> : count;
  launch(name, *p.launch, one_each(threads), packs ? kernel_of_packs : kernel, p, strides, threads);
}

}  // namespace
}  // namespace cnnops
