// Scratch memory of a kernel, one piece per thread, taken before its parallel region so that running out of memory is an
// exception of the calling thread. Internal linkage throughout: kernels of all instruction sets include this.
#pragma once

#include <cstdint>

#include "common/host_memory.h"

namespace cnnops {
namespace {

class Scratch {
 public:
  // Throws std::bad_alloc.
  Scratch(int pieces, int64_t bytes_each)
      : stride_((bytes_each + 63) / 64 * 64), base_(static_cast<char*>(scratch_acquire(pieces * stride_))) {}
  ~Scratch() { scratch_release(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // 64-byte aligned, and no two pieces share a cache line.
  void* piece(int index) const { return base_ + index * stride_; }

 private:
  int64_t stride_;
  char* base_;
};

// Carves arrays out of a piece. With a null piece it only adds up the bytes: the same code measures and lays out.
struct Arena {
  char* at;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const out = reinterpret_cast<T*>(at + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return out;
  }
};

}  // namespace
}  // namespace cnnops
