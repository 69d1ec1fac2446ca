// Kernels with one fault each, and some without: what the emulator is tested on. main(name) runs one over a tensor of 64
// floats (0, 1, 2, ...), and prints the error, or the sum of the 64 results.
#include <cstdio>

#include "cuda/device.cuh"
#include "cuda/emulation/memory.h"

namespace cnnops {
namespace {

constexpr int kSize = 64;

__global__ void copy(float* y, const float* x) { y[threadIdx.x] = x[threadIdx.x]; }
__global__ void reads_past_the_end(float* y, const float* x) { y[threadIdx.x] = x[threadIdx.x + 1]; }
__global__ void writes_before_the_begin(float* y, const float* x) { y[static_cast<int>(threadIdx.x) - 1] = x[0]; }
__global__ void misaligned(float* y, const float* x) {
  if (threadIdx.x % 4) return;
  *reinterpret_cast<uint4*>(y + (threadIdx.x + 1) % 32) = *reinterpret_cast<const uint4*>(x + (threadIdx.x + 1) % 32);
}
__global__ void reversed_by_shared_memory(float* y, const float* x) {
  float* const s = shared<float>();
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[kSize - 1 - threadIdx.x];
}
__global__ void forgets_the_barrier(float* y, const float* x) {
  float* const s = shared<float>();
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void forgets_the_second_barrier(float* y, const float* x) {
  float* const s = shared<float>();
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    sum += s[threadIdx.x ^ 40];
  }
  y[threadIdx.x] = sum;
}
__global__ void within_a_warp(float* y, const float* x) {
  float* const s = shared<float>();
  s[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}
__global__ void beyond_the_warp(float* y, const float* x) {
  float* const s = shared<float>();
  s[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x ^ 32];
}
__global__ void reads_what_nobody_wrote(float* y, const float*) { y[threadIdx.x] = shared<float>()[threadIdx.x]; }
__global__ void leaves_shared_memory(float* y, const float* x) {
  float* const s = shared<float>();
  s[threadIdx.x + 1] = x[threadIdx.x];
  y[threadIdx.x] = 0;
}
__global__ void waits_for_different_things(float* y, const float* x) {
  if (threadIdx.x < 32) __syncthreads();
  y[threadIdx.x] = warp_sum(x[threadIdx.x]);
  if (threadIdx.x % 32 == 0) __syncthreads();
}
__global__ void sums(float* y, const float* x) { y[threadIdx.x] = warp_sum(x[threadIdx.x]) / 32; }
template <int groups_left, bool barrier>
__global__ void copies_asynchronously(float* y, const float* x) {
  float* const s = shared<float>();
  if (threadIdx.x < 16) ptx::copy_async_16(s + threadIdx.x * 4, x + threadIdx.x * 4, 16);
  ptx::commit_copies();
  ptx::wait_for_copies<groups_left>();
  if (barrier) __syncthreads();
  const float v = s[threadIdx.x];
  __syncthreads();
  ptx::wait_for_copies<0>();
  y[threadIdx.x] = v;
}
__global__ void ends_before_its_copies(float* y, const float* x) {
  if (threadIdx.x < 16) ptx::copy_async_16(shared<float>() + threadIdx.x * 4, x + threadIdx.x * 4, 16);
  ptx::commit_copies();
  y[threadIdx.x] = 0;
}
// y (16 x 8, as the second half would not fit: 64 of its 128 results, rows 0 to 7) = A (16 x 16) B (16 x 8), through ldmatrix,
// plain for A and transposed for B; A[i][j] = i + j, B[i][j] = i - j in bfloat16, all exact.
__global__ void multiplies(float* y, const float*) {
  if (threadIdx.x >= 32) return;
  const int lane = static_cast<int>(threadIdx.x);
  uint16_t* const a = shared<uint16_t>();
  uint16_t* const b = a + 16 * 16;
  for (int i = lane; i < 256; i += 32) a[i] = ptx::to_bf16(static_cast<float>(i / 16 + i % 16));
  for (int i = lane; i < 16 * 16; i += 32) b[i] = ptx::to_bf16(static_cast<float>(i / 16 - i % 16));
  __syncwarp();
  uint32_t fa[4], fb[4];
  ptx::load_matrix_x4<false>(fa, a + lane % 16 * 16 + lane / 16 * 8);
  ptx::load_matrix_x4<true>(fb, b + lane % 16 * 16 + lane / 16 * 8);
  float d[4] = {};
  const uint32_t left[2] = {fb[0], fb[1]};
  ptx::mma<bf16>(d, fa, left);
  y[lane / 4 * 8 + lane % 4 * 2] = d[0];
  y[lane / 4 * 8 + lane % 4 * 2 + 1] = d[1];
}

__global__ void divides(float* y, const float*) {
  const int64_t a = (int64_t{0x123456789} << threadIdx.x % 28) + threadIdx.x,
                b = (int64_t{1} << threadIdx.x % 31) + 12345;
  y[threadIdx.x] = divided(a, b) == a / b && divided(threadIdx.x, 7) == threadIdx.x / 7 ? 1 : 0;
}

struct NoLaunch : Launch {
  void* allocate(int64_t) override { return nullptr; }
};

struct Program {
  const char* name;
  void (*kernel)(float*, const float*);
};
#define PROGRAM(name) {#name, &name}
const Program kPrograms[] = {
    PROGRAM(copy),
    PROGRAM(reads_past_the_end),
    PROGRAM(writes_before_the_begin),
    PROGRAM(misaligned),
    PROGRAM(reversed_by_shared_memory),
    PROGRAM(forgets_the_barrier),
    PROGRAM(forgets_the_second_barrier),
    PROGRAM(within_a_warp),
    PROGRAM(beyond_the_warp),
    PROGRAM(reads_what_nobody_wrote),
    PROGRAM(leaves_shared_memory),
    PROGRAM(waits_for_different_things),
    PROGRAM(sums),
    {"waits_for_its_copies", &copies_asynchronously<0, true>},
    {"waits_for_too_few_copies", &copies_asynchronously<1, true>},
    {"shares_copies_without_a_barrier", &copies_asynchronously<0, false>},
    PROGRAM(ends_before_its_copies),
    PROGRAM(multiplies),
    PROGRAM(divides),
};

}  // namespace
}  // namespace cnnops

int main(int, char** arguments) {
  using namespace cnnops;
  static float x[kSize], y[kSize];
  for (int i = 0; i < kSize; ++i) x[i] = static_cast<float>(i), y[i] = -1;
  // On the heap: what lies in the program's own data is not checked.
  float* const in = static_cast<float*>(std::aligned_alloc(64, 4 * sizeof x));
  float* const out = static_cast<float*>(std::aligned_alloc(64, 4 * sizeof y));
  std::memcpy(in + kSize, x, sizeof x), std::memcpy(out + kSize, y, sizeof y);
  for (const Program& program : kPrograms) {
    if (std::strcmp(program.name, arguments[1]) != 0) continue;
    const emulation::Range ranges[] = {{in + kSize, sizeof x}, {out + kSize, sizeof y}};
    emulation::begin(ranges, 2);
    try {
      NoLaunch where;
      const bool multiplying = std::strcmp(program.name, "multiplies") == 0;
      launch(program.name, where, Grid{1, 1, 1, kSize, multiplying ? 1024 : kSize * 4}, program.kernel, out + kSize,
             static_cast<const float*>(in + kSize));
      float sum = 0;
      for (int i = 0; i < kSize; ++i) sum += static_cast<float>(i % 7 + 1) * out[kSize + i];
      std::printf("%.9g\n", static_cast<double>(sum));
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
    emulation::end();
    return 0;
  }
  return 2;
}
