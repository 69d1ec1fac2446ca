// Scratch memory of kernels, given back at the end of the scope. Taken before a parallel region, so that running out of
// memory is an exception of the calling thread. Internal linkage: kernels of all instruction sets include this.
#pragma once

#include <omp.h>

#include <cstdint>

#include "common/arith.h"
#include "common/host_memory.h"

namespace cnnops {
namespace {

// Room for `count` elements; contents are undefined.
template <class E>
struct Scratch {
  const size_t bytes;
  E* const data;
  explicit Scratch(int64_t count)
      : bytes(static_cast<size_t>(max64(count, 1)) * sizeof(E)), data(static_cast<E*>(memory_acquire(bytes))) {}
  ~Scratch() { memory_release(data, bytes); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Pieces of equal size, one per thread; no two share a cache line.
class ScratchPieces {
 public:
  ScratchPieces(int pieces, int64_t bytes_each) : stride_(round_up(bytes_each, 64)), all_(pieces * stride_) {}
  void* piece(int index) const { return all_.data + index * stride_; }

 private:
  int64_t stride_;
  Scratch<char> all_;
};

// Carves arrays out of a piece. With a null piece it only adds up the bytes: the same code measures and lays out.
struct Arena {
  char* at;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const out = reinterpret_cast<T*>(at + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return out;
  }
};

// The arrays of each thread of a parallel region: lay_out(arena) takes them and returns where they are.
template <class LayOut>
class ThreadScratch {
 public:
  ThreadScratch(int threads, const LayOut& lay_out) : lay_out_(lay_out), pieces_(threads, bytes(lay_out)) {}
  // Those of the calling thread.
  auto mine() const {
    Arena arena{static_cast<char*>(pieces_.piece(omp_get_thread_num()))};
    return lay_out_(arena);
  }

 private:
  static int64_t bytes(const LayOut& lay_out) {
    Arena arena{nullptr};
    lay_out(arena);
    return arena.used;
  }

  LayOut lay_out_;
  ScratchPieces pieces_;
};

}  // namespace
}  // namespace cnnops
