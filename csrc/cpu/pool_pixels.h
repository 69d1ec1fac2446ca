// Rows of NHWC images for pooling: what the next rows of windows will read is fetched while the current one is worked on.
// The cells of a window lie in several rows, and hardware follows that many short streams late.
#pragma once

#include "cpu/simd/stream.h"
#include "ops/pool2d.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kCacheLine = 64;

// Whether to write a pooling's result around the caches: where it and the image do not fit there together.
template <class T>
bool large_output(int64_t in, int64_t out) {
  constexpr auto size = static_cast<int64_t>(sizeof(T));
  return out * size >= kLargeProduct && (in + out) * size >= kLargeImage;
}

// Whether kernels are compiled for common shapes of windows too: not for float64, nor 16-bit types without their vectors.
template <class T>
constexpr bool kShapeKernels = !std::is_same_v<T, double> && (kVectorBytes > 16 || std::is_same_v<T, float>);

// Copies around the caches, lines whole where `to` begins one.
template <class T>
void stream_copy(T* to, const T* from, int64_t count) {
  constexpr int64_t kVector = lanes<float> * static_cast<int64_t>(sizeof(float) / sizeof(T));
  int64_t i = 0;
  if constexpr (sizeof(T) <= sizeof(float))
    for (; i + kVector <= count; i += kVector)
      store_streaming(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  std::memcpy(static_cast<void*>(to + i), from + i, static_cast<size_t>(count - i) * sizeof(T));
}

// Bytes to have in L2 soon, fetched in equal shares.
class Ahead {
 public:
  // In `shares` calls of fetch().
  Ahead(const void* from, int64_t bytes, int64_t shares)
      : at_(static_cast<const char*>(from)), end_(at_ + bytes), share_(round_up(ceil_div(bytes, shares), kCacheLine)) {}
  void fetch() {
    const char* const to = share_ < end_ - at_ ? at_ + share_ : end_;
    for (; at_ < to; at_ += kCacheLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t share_;
};

// The rows of an image that the windows of output row `pp` reach and those above do not, of `row_bytes` each.
template <class T>
Ahead rows_of_next_windows(const T* image, int64_t pp, int64_t outputs, int64_t stride, int64_t pad, int64_t reach,
                           int64_t h, int64_t row_elements, int64_t shares) {
  const int64_t from = min64(max64((pp - 1) * stride - pad + reach, 0), h);
  const int64_t to = pp < outputs ? min64(max64(pp * stride - pad + reach, from), h) : from;
  return Ahead(image + from * row_elements, (to - from) * row_elements * static_cast<int64_t>(sizeof(T)), shares);
}

// What the row of adaptive windows after `pp` reaches first, as much of it as L2 has room for.
template <class T>
Ahead next_adaptive_rows(const T* image, int64_t pp, int64_t outputs, int64_t h, int64_t row_elements, int64_t shares) {
  constexpr int64_t kRoom = 512 << 10;
  const int64_t end = adaptive_end(pp, h, outputs);
  const int64_t from = pp + 1 < outputs ? max64(adaptive_start(pp + 1, h, outputs), end) : h;
  const int64_t to = pp + 1 < outputs ? adaptive_end(pp + 1, h, outputs) : h;
  return Ahead(image + from * row_elements, min64((to - from) * row_elements * static_cast<int64_t>(sizeof(T)), kRoom),
               shares);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
