#include "common/host_memory.h"

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <set>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace cnnops {
namespace {

constexpr size_t kCacheLine = 64;

#if defined(__linux__)

constexpr size_t kGrain = size_t{64} << 10;  // blocks begin and end at multiples of this
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kDefaultLimit = size_t{8} << 30;

// Free ranges of the region, by address and by size. Best fit, neighbours merged; a range is either mapped (its pages are in
// memory) or not, and only ranges of one kind merge.
class Pool {
 public:
  std::mutex mutex;
  MemoryStats stats{0, 0, 0, kDefaultLimit, 0, 0};

  Pool() {
    const size_t physical = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    // Address space only: pages come with the first touch. A process that limits its address space gets a smaller region,
    // or none, and malloc's memory instead.
    for (size_t size = physical * 2 / kHugePage * kHugePage; size >= (size_t{1} << 30); size /= 2) {
      void* const at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (at == MAP_FAILED) continue;
      madvise(at, size, MADV_HUGEPAGE);
      begin_ = reinterpret_cast<uintptr_t>(at);
      end_ = begin_ + size;
      insert(begin_, size, false);
      break;
    }
  }

  bool owns(const void* block) const {
    const auto at = reinterpret_cast<uintptr_t>(block);
    return at >= begin_ && at < end_;
  }

  // Null where the region has no room.
  void* acquire(size_t bytes) {
    bytes = rounded(bytes);
    for (const bool mapped : {true, false}) {
      const auto found = by_size_.lower_bound({mapped, bytes, 0});
      if (found == by_size_.end() || found->mapped != mapped) continue;
      const Key range = *found;
      remove(range);
      if (range.size > bytes) insert(range.at + bytes, range.size - bytes, mapped);
      if (mapped) stats.cached -= bytes;
      ++(mapped ? stats.hits : stats.misses);
      stats.in_use += bytes;
      if (stats.in_use > stats.peak_in_use) stats.peak_in_use = stats.in_use;
      return reinterpret_cast<void*>(range.at);
    }
    return nullptr;
  }

  void release(void* block, size_t bytes) {
    bytes = rounded(bytes);
    stats.in_use -= bytes;
    stats.cached += bytes;
    merge(reinterpret_cast<uintptr_t>(block), bytes, true);
    shrink(stats.limit);
  }

  // Unmaps free ranges, largest first, until at most `target` bytes are kept.
  void shrink(size_t target) {
    while (stats.cached > target) {
      const Key range = *std::prev(by_size_.end());  // mapped ranges sort after the others
      remove(range);
      madvise(reinterpret_cast<void*>(range.at), range.size, MADV_DONTNEED);
      stats.cached -= range.size;
      merge(range.at, range.size, false);
    }
  }

 private:
  struct Key {
    bool mapped;
    size_t size;
    uintptr_t at;
    auto operator<=>(const Key&) const = default;
  };
  struct Range {
    size_t size;
    bool mapped;
  };
  std::map<uintptr_t, Range> by_address_;
  std::set<Key> by_size_;
  uintptr_t begin_ = 0, end_ = 0;

  static size_t rounded(size_t bytes) { return (bytes + kGrain - 1) / kGrain * kGrain; }
  void insert(uintptr_t at, size_t size, bool mapped) {
    by_address_[at] = {size, mapped};
    by_size_.insert({mapped, size, at});
  }
  void remove(const Key& range) {
    by_size_.erase(range);
    by_address_.erase(range.at);
  }
  void merge(uintptr_t at, size_t size, bool mapped) {
    auto next = by_address_.lower_bound(at);
    if (next != by_address_.end() && next->first == at + size && next->second.mapped == mapped) {
      size += next->second.size;
      remove({mapped, next->second.size, next->first});
      next = by_address_.lower_bound(at);
    }
    if (next != by_address_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second.size == at && before->second.mapped == mapped) {
        at = before->first;
        size += before->second.size;
        remove({mapped, before->second.size, before->first});
      }
    }
    insert(at, size, mapped);
  }
};

#else

class Pool {
 public:
  std::mutex mutex;
  MemoryStats stats{};
  bool owns(const void*) const { return false; }
  void* acquire(size_t) { return nullptr; }
  void release(void*, size_t) {}
  void shrink(size_t) {}
};

#endif

// Never destroyed: tensors may die after static destructors have begun.
Pool& pool() {
  static Pool* const the_pool = [] {
    Pool* const created = new Pool;
#if defined(__linux__)
    // A forked child must not inherit a mutex that another thread held.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
#endif
    return created;
  }();
  return *the_pool;
}

}  // namespace

void* memory_acquire(size_t bytes) {
  if (bytes >= kPooledBytes) {
    Pool& p = pool();
    std::lock_guard lock(p.mutex);
    if (void* const block = p.acquire(bytes)) return block;
  }
  void* const block = std::aligned_alloc(kCacheLine, (bytes + kCacheLine) / kCacheLine * kCacheLine);
  if (!block) throw std::bad_alloc();
  return block;
}

void memory_release(void* block, size_t bytes) {
  Pool& p = pool();
  if (!p.owns(block)) return std::free(block);
  std::lock_guard lock(p.mutex);
  p.release(block, bytes);
}

MemoryStats memory_stats() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  return p.stats;
}

void memory_set_limit(size_t bytes) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.stats.limit = bytes;
  p.shrink(bytes);
}

void memory_empty_cache() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.shrink(0);
}

}  // namespace cnnops
