#include "common/host_memory.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cnnops {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kMaxCached = size_t{1} << 30;  // beyond this, a released block goes back to the system

struct Pool {
  std::mutex mutex;
  std::multimap<size_t, void*> idle;          // by size
  std::unordered_map<void*, size_t> in_use;
  size_t cached = 0;
};

Pool& pool() {
  static Pool* const the_pool = new Pool;  // never destroyed: kernels may run while the interpreter shuts down
  return *the_pool;
}

}  // namespace

void* scratch_acquire(size_t bytes) {
  const size_t unit = bytes < kHugePage ? size_t{4096} : kHugePage;
  bytes = (bytes + unit - 1) / unit * unit;
  Pool& p = pool();
  {
    std::lock_guard lock(p.mutex);
    const auto found = p.idle.lower_bound(bytes);
    if (found != p.idle.end() && found->first <= 2 * bytes) {
      void* const block = found->second;
      p.in_use.emplace(block, found->first);
      p.cached -= found->first;
      p.idle.erase(found);
      return block;
    }
  }
  void* const block = std::aligned_alloc(unit, bytes);
  if (!block) throw std::bad_alloc();
#if defined(__linux__)
  if (unit == kHugePage) madvise(block, bytes, MADV_HUGEPAGE);
#endif
  std::lock_guard lock(p.mutex);
  p.in_use.emplace(block, bytes);
  return block;
}

void scratch_release(void* block) {
  Pool& p = pool();
  {
    std::lock_guard lock(p.mutex);
    const auto found = p.in_use.find(block);
    const size_t bytes = found->second;
    p.in_use.erase(found);
    if (p.cached + bytes <= kMaxCached) {
      p.cached += bytes;
      p.idle.emplace(bytes, block);
      return;
    }
  }
  std::free(block);
}

size_t scratch_cached_bytes() {
  std::lock_guard lock(pool().mutex);
  return pool().cached;
}

void scratch_trim() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  for (const auto& [bytes, block] : p.idle) std::free(block);
  p.idle.clear();
  p.cached = 0;
}

}  // namespace cnnops
