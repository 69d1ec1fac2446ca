// A parallel region of one thread, without the runtime's part in it: libgomp makes a team, and ends it with a call of the
// kernel (futex) for threads that nobody waits for; 0.4 µs together, as long as a kernel on a small tensor. The linker
// (--wrap, cmake/cnnops.cmake) has the extension's regions come through here.
#include <omp.h>

extern "C" {

void __real_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  // Outside of all regions, omp_get_thread_num() is 0 and omp_get_num_threads() 1, as the body expects.
  if (threads == 1 && omp_get_level() == 0) return body(data);
  __real_GOMP_parallel(body, data, threads, flags);
}
}
