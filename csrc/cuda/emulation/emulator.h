// CUDA's execution model on the host, for tests: what csrc/cuda/*.cu need of it, and nothing more.
//
// Blocks run one after the other; the threads of a block are fibers that run until they end or wait. A warp's lanes meet in
// every collective (shuffles, mma, ldmatrix, __syncwarp), a block's threads at every barrier; threads that wait for
// different things are an error. Shared memory is filled with 0xff (NaN) before each block. Sources are compiled with the
// instrumentation of -fsanitize=thread, whose calls come here, so that every access to memory is checked:
//   - it lies in a tensor of the call, in the kernel's own workspace, or in shared memory;
//   - shared memory was written before it is read;
//   - two threads of a block touch the same byte of shared memory, one of them writing, only with a barrier (or within a
//     warp, a collective) in between.
// Not emulated: more than one dimension of threads, memory models weaker than program order, races in global memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cnnops::emulation {

constexpr int kLanes = 32;

struct Position {
  dim3 thread, block, block_size, grid;
};
extern Position position;  // of the thread that runs

// All lanes of the warp meet; the last one to come runs `compute` on what each brought.
using Compute = void (*)(void** lanes);
void collective(const char* what, void* mine, Compute compute);
void barrier();
void* shared_memory();
// Copies of cp.async: pending until the thread waits for their group.
void copy_later(void* to, const void* from, int bytes, int from_bytes);
void commit_copies();
void wait_for_copies(int groups_left);
// Checks an access that the compiler does not see (of ptx.cuh's host bodies).
void check(const void* address, int bytes, bool write);
[[noreturn]] void fail(const char* what);

void run(const char* kernel, dim3 grid, unsigned threads, int64_t shared_bytes, void (*thread)(void*), void* context);

template <class V>
struct Shuffle {
  V value;
  int from;
  V out;
};

template <class V>
V shuffle(V value, int from) {
  Shuffle<V> mine{value, from, value};
  collective("a shuffle", &mine, [](void** lanes) {
    for (int i = 0; i < kLanes; ++i) {
      auto* const lane = static_cast<Shuffle<V>*>(lanes[i]);
      lane->out = static_cast<Shuffle<V>*>(lanes[lane->from & (kLanes - 1)])->value;
    }
  });
  return mine.out;
}

}  // namespace cnnops::emulation

#define threadIdx (::cnnops::emulation::position.thread)
#define blockIdx (::cnnops::emulation::position.block)
#define blockDim (::cnnops::emulation::position.block_size)
#define gridDim (::cnnops::emulation::position.grid)

static inline void __syncthreads() { ::cnnops::emulation::barrier(); }
static inline void __syncwarp(unsigned = 0xffffffffu) {
  char nothing = 0;
  ::cnnops::emulation::collective("__syncwarp", &nothing, [](void**) {});
}
template <class V>
static inline V __shfl_xor_sync(unsigned, V value, int mask) {
  return ::cnnops::emulation::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <class V>
static inline V __shfl_sync(unsigned, V value, int lane) {
  return ::cnnops::emulation::shuffle(value, lane);
}
