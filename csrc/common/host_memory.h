// Scratch memory for kernels. Blocks are kept after use, so that a training loop in its steady state takes no page faults.
#pragma once

#include <cstddef>

namespace cnnops {

// A block of at least `bytes` bytes, aligned to a cache line (to a huge page where it is large); contents are undefined.
// Throws std::bad_alloc.
void* scratch_acquire(size_t bytes);
void scratch_release(void* block);
// Bytes in blocks that nobody uses, and the release of them to the system.
size_t scratch_cached_bytes();
void scratch_trim();

}  // namespace cnnops
