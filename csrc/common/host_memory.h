// Memory for results and for kernels' scratch, from one region of address space whose pages stay mapped after a release, up
// to a limit: a training loop in its steady state takes next to no page faults. (A fault costs about 0.9 us per 4 KB; malloc
// gives large blocks back to the system and pays it every time.) Safe from any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cnnops {

constexpr size_t kPooledBytes = size_t{64} << 10;  // smaller blocks are malloc's, which keeps those mapped itself

// At least `bytes` bytes, aligned to a cache line; contents are undefined. Throws std::bad_alloc.
void* memory_acquire(size_t bytes);
void memory_release(void* block, size_t bytes);  // the same `bytes`

struct MemoryStats {
  size_t in_use, peak_in_use;  // bytes in blocks of kPooledBytes or more, now and at most
  size_t cached;               // mapped bytes that no block uses
  size_t limit;                // on `cached`
  uint64_t hits, misses;       // pooled blocks served from mapped memory, and from the system
};
MemoryStats memory_stats();
// What is mapped beyond the limit goes back to the system at once; with 0 nothing is kept.
void memory_set_limit(size_t bytes);
// Gives all memory that no block uses back to the system.
void memory_empty_cache();

}  // namespace cnnops
