#include "cuda/emulation/emulator.h"

#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#include <deque>
#include <mutex>
#include <vector>

#include "common/check.h"
#include "cuda/emulation/memory.h"

#if defined(__x86_64__)
// Saves the callee's registers and the stack pointer, and goes on with another stack.
extern "C" void cnnops_switch_stack(void** save, void* load);
__asm__(R"(
.text
.hidden cnnops_switch_stack
.globl cnnops_switch_stack
.type cnnops_switch_stack, @function
cnnops_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cnnops_switch_stack, .-cnnops_switch_stack
)");
#else
#include <ucontext.h>
#endif

namespace cnnops::emulation {

Position position;

namespace {

constexpr int64_t kStackBytes = 128 << 10;
constexpr int kMaxThreads = 1024;
constexpr int kEverybody = -2, kSeveralOfWarp = -3;  // kSeveralOfWarp - w: of warp w

enum class State : uint8_t { ready, at_collective, at_barrier, done };

struct Copy {
  char* to;
  const char* from;
  int bytes, from_bytes, group;
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  State state = State::done;
  const char* what = nullptr;
  void* payload = nullptr;
  Compute compute = nullptr;
  std::deque<Copy> copies;
  int group = 0;
};

// What is known of kCellBytes of shared memory: who touched them last, in which intervals between barriers (of the block) and
// collectives (of the warp), and the last block that wrote them. Barriers are counted on from block to block, so that nothing
// needs to be cleared between them.
struct Shadow {
  int16_t writer = -1, reader = -1;
  int write_barrier = 0, write_warp = 0, read_barrier = 0, read_warp = 0;
  int written_by = 0;
  bool operator==(const Shadow&) const = default;
};
constexpr int kCellBytes = 2;

std::mutex one_call;
bool running = false;
std::vector<Range> ranges;
std::vector<void*> allocated;
std::vector<char> shared_storage;
std::vector<Shadow> shadows;
char* shared_begin = nullptr;
int64_t shared_size = 0;
int barriers = 0, blocks = 0;
int warp_steps[kMaxThreads / kLanes];
Fiber fibers[kMaxThreads];
Fiber* current = nullptr;
#if defined(__x86_64__)
void* scheduler = nullptr;
#else
ucontext_t scheduler;
#endif
void (*thread_function)(void*) = nullptr;
void* thread_context = nullptr;
const char* kernel_name = nullptr;
std::string error;
Range host_stack, image_segments[16];
int image_segment_count = 0;

int index_of(const Fiber* fiber) { return static_cast<int>(fiber - fibers); }

void to_scheduler() {
#if defined(__x86_64__)
  cnnops_switch_stack(&current->stack_pointer, scheduler);
#else
  swapcontext(&current->context, &scheduler);
#endif
}

void start_of_fiber() {
  thread_function(thread_context);
  if (!current->copies.empty()) fail("a thread ended with cp.async copies that it did not wait for");
  current->state = State::done;
  to_scheduler();
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    void* const stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CNNOPS_CHECK(stack != MAP_FAILED, std::runtime_error, "emulator: no memory for stacks");
    fiber.stack = static_cast<char*>(stack);
  }
  fiber.state = State::ready;
  fiber.copies.clear();
  fiber.group = 0;
#if defined(__x86_64__)
  // Six registers, the address to return to, and a word so that the stack is aligned as after a call.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&start_of_fiber);
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, &start_of_fiber, 0);
#endif
}

void resume(Fiber& fiber) {
  current = &fiber;
  position.thread.x = static_cast<unsigned>(index_of(&fiber));
#if defined(__x86_64__)
  cnnops_switch_stack(&scheduler, fiber.stack_pointer);
#else
  swapcontext(&scheduler, &fiber.context);
#endif
}

// Runs one block to its end; false where a thread failed.
bool run_block(int threads) {
  for (int i = 0; i < threads; ++i) prepare(fibers[i]);
  ++barriers, ++blocks;
  for (int& steps : warp_steps) steps = 0;
  if (shared_size) std::memset(shared_begin, 0xff, static_cast<size_t>(shared_size));
  // Every second block runs its threads in the opposite order: what depends on the order is seen to.
  const bool forward = position.block.x % 2 == 0;
  for (;;) {
    bool progress = false;
    int done = 0, waiting = 0;
    for (int j = 0; j < threads; ++j) {
      Fiber& fiber = fibers[forward ? j : threads - 1 - j];
      if (fiber.state == State::ready) {
        resume(fiber);
        if (!error.empty()) return false;
        progress = true;
      }
    }
    for (int warp = 0; warp * kLanes < threads; ++warp) {
      Fiber* const lanes = fibers + warp * kLanes;
      int met = 0;
      for (int i = 0; i < kLanes && warp * kLanes + i < threads; ++i)
        met += lanes[i].state == State::at_collective && lanes[i].compute == lanes[0].compute;
      if (met < kLanes) continue;
      void* payloads[kLanes];
      for (int i = 0; i < kLanes; ++i) payloads[i] = lanes[i].payload;
      running = false;  // it works on the stacks of all lanes, which each have checked what they bring
      lanes[0].compute(payloads);
      running = true;
      for (int i = 0; i < kLanes; ++i) lanes[i].state = State::ready;
      ++warp_steps[warp];
      progress = true;
    }
    for (int i = 0; i < threads; ++i) {
      done += fibers[i].state == State::done;
      waiting += fibers[i].state == State::at_barrier;
    }
    if (done == threads) return true;
    if (waiting == threads) {
      for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
      ++barriers;
      progress = true;
    }
    if (!progress) {
      error = message("threads of a block wait for different things: ", waiting, " of ", threads, " at a barrier, ",
                      done, " have ended, the others at a collective of their warp");
      return false;
    }
  }
}

int find_segments(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&position);
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    ours = ours || (segment.p_type == PT_LOAD && here >= begin && here < begin + segment.p_memsz);
  }
  if (!ours) return 0;
  for (int i = 0; i < info->dlpi_phnum && image_segment_count < 16; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD)
      image_segments[image_segment_count++] = {reinterpret_cast<void*>(info->dlpi_addr + segment.p_vaddr),
                                               static_cast<int64_t>(segment.p_memsz)};
  }
  return 1;
}

bool within(const Range& range, const char* address, int bytes) {
  const char* const begin = static_cast<const char*>(range.begin);
  return address >= begin && address + bytes <= begin + range.bytes;
}

// The warp of a thread or of several of one warp, -1 of others.
int warp_of(int who) { return who >= 0 ? who / kLanes : who <= kSeveralOfWarp ? kSeveralOfWarp - who : -1; }

// Whether an earlier access by `other`, in these intervals, comes before what the thread `self` does now.
bool ordered(int other, int barrier_then, int warp_then, int self) {
  if (other == -1 || other == self || barrier_then < barriers) return true;
  return warp_of(other) == self / kLanes && warp_then < warp_steps[self / kLanes];
}

void check_shared(const char* address, int bytes, bool write) {
  const int self = index_of(current), warp = self / kLanes;
  const int64_t offset = address - shared_begin;
  if (offset % kCellBytes || bytes % kCellBytes) fail("single bytes of shared memory, which are not told apart");
  Shadow *const first = shadows.data() + offset / kCellBytes, *const end = first + bytes / kCellBytes;
  // A read of what was written before the last barrier and is being read changes nothing.
  const auto is_known = [&](const Shadow& s) {
    return s.written_by == blocks && s.write_barrier < barriers && s.read_barrier == barriers &&
           (s.reader == kEverybody ||
            (s.read_warp == warp_steps[warp] && (s.reader == self || s.reader == kSeveralOfWarp - warp)));
  };
  Shadow before, after;  // of a cell that changed: most change alike
  bool changed = false;
  for (Shadow* cell = first; cell < end; ++cell) {
    Shadow& s = *cell;
    if (!write && is_known(s)) continue;
    if (changed && s == before) {
      s = after;
      continue;
    }
    const Shadow was = s;
    if (!ordered(s.writer, s.write_barrier, s.write_warp, self))
      fail(write ? "a race: two threads write the same shared memory"
                 : "a race: reads shared memory another is writing");
    if (write) {
      if (!ordered(s.reader, s.read_barrier, s.read_warp, self))
        fail("a race: writes shared memory another is reading");
      s.writer = static_cast<int16_t>(self), s.write_barrier = barriers, s.write_warp = warp_steps[warp];
      s.written_by = blocks;
    } else {
      if (s.written_by != blocks) fail("reads shared memory that nobody has written");
      const bool alone = ordered(s.reader, s.read_barrier, s.read_warp, self);
      s.reader = static_cast<int16_t>(alone ? self : warp_of(s.reader) == warp ? kSeveralOfWarp - warp : kEverybody);
      s.read_barrier = barriers, s.read_warp = warp_steps[warp];
    }
    before = was, after = s, changed = true;
  }
}

}  // namespace

void fail(const char* what) {
  running = false;  // std::string's functions may be the instrumented ones of a kernel's source
  if (error.empty())
    error = message("emulation of ", kernel_name, ": thread ", index_of(current), " of block ", position.block.x, ", ",
                    position.block.y, ", ", position.block.z, ": ", what);
  to_scheduler();
  __builtin_unreachable();
}

void check(const void* pointer, int bytes, bool write) {
  if (!running || !error.empty()) return;
  const char* const address = static_cast<const char*>(pointer);
  if (address >= current->stack && address < current->stack + kStackBytes) return;
  if (address >= shared_begin && address < shared_begin + shared_size) {
    if (address + bytes > shared_begin + shared_size) fail("an access past the end of shared memory");
    return check_shared(address, bytes, write);
  }
  for (const Range& range : ranges)
    if (within(range, address, bytes)) {
      if (reinterpret_cast<uintptr_t>(address) & static_cast<unsigned>((bytes & -bytes) - 1))
        fail("a misaligned access");
      return;
    }
  for (int i = 0; i < image_segment_count; ++i)
    if (within(image_segments[i], address, bytes)) return;
  if (within(host_stack, address, bytes)) return;
  fail(write ? "writes outside of every tensor" : "reads outside of every tensor");
}

void collective(const char* what, void* mine, Compute compute) {
  current->state = State::at_collective;
  current->what = what;
  current->payload = mine;
  current->compute = compute;
  to_scheduler();
}

void barrier() {
  current->state = State::at_barrier;
  to_scheduler();
}

void* shared_memory() { return shared_begin; }

void copy_later(void* to, const void* from, int bytes, int from_bytes) {
  // The destination belongs to the copy from here on: a race shows where the copy is begun, not only where it ends.
  check(to, bytes, true);
  if (from_bytes) check(from, from_bytes, false);
  current->copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, from_bytes, current->group});
}

void commit_copies() { ++current->group; }

void wait_for_copies(int groups_left) {
  while (!current->copies.empty() && current->copies.front().group < current->group - groups_left) {
    const Copy copy = current->copies.front();
    current->copies.pop_front();
    check(copy.to, copy.bytes, true);
    std::memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.from_bytes));
  }
}

void run(const char* kernel, dim3 grid, unsigned threads, int64_t shared_bytes, void (*thread)(void*), void* context) {
  CNNOPS_CHECK(threads > 0 && threads <= kMaxThreads && threads % kLanes == 0, std::runtime_error, kernel,
               ": blocks of ", threads, " threads");
  CNNOPS_CHECK(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16,
               std::runtime_error, kernel, ": a grid of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks");
  // 99 KiB: what a block of sm_89 can have at most.
  CNNOPS_CHECK(shared_bytes <= 99 << 10, std::runtime_error, kernel, ": ", shared_bytes, " bytes of shared memory");
  if (!image_segment_count) dl_iterate_phdr(&find_segments, nullptr);
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  size_t stack_bytes = 0;
  pthread_attr_getstack(&attributes, &host_stack.begin, &stack_bytes);
  pthread_attr_destroy(&attributes);
  host_stack.bytes = static_cast<int64_t>(stack_bytes);
  shared_storage.resize(static_cast<size_t>(shared_bytes) + 128);
  shared_begin = shared_storage.data() + (-reinterpret_cast<uintptr_t>(shared_storage.data()) & 127);
  shared_size = shared_bytes;
  kernel_name = kernel, thread_function = thread, thread_context = context;
  position.grid = grid, position.block_size = {threads, 1, 1};
  error.clear();
  barriers = blocks = 0;
  shadows.assign(static_cast<size_t>((shared_bytes + kCellBytes - 1) / kCellBytes), Shadow{});
  running = true;
  for (position.block.z = 0; position.block.z < grid.z; ++position.block.z)
    for (position.block.y = 0; position.block.y < grid.y; ++position.block.y)
      for (position.block.x = 0; position.block.x < grid.x; ++position.block.x)
        if (!run_block(static_cast<int>(threads))) {
          running = false;
          throw std::runtime_error(error);
        }
  running = false;
}

void begin(const Range* tensors, int count) {
  one_call.lock();
  ranges.assign(tensors, tensors + count);
}

void* allocate(int64_t bytes) {
  bytes = bytes > 0 ? bytes : 1;
  void* const memory = std::aligned_alloc(512, static_cast<size_t>((bytes + 511) & ~int64_t{511}));
  CNNOPS_CHECK(memory, std::runtime_error, "emulator: no memory");
  std::memset(memory, 0xff, static_cast<size_t>(bytes));
  allocated.push_back(memory);
  ranges.push_back({memory, bytes});
  return memory;
}

void end() {
  for (void* memory : allocated) std::free(memory);
  allocated.clear();
  one_call.unlock();
}

}  // namespace cnnops::emulation

// What -fsanitize=thread calls; no part of that sanitizer's own library is linked.
extern "C" {
#define CNNOPS_ACCESS(name, bytes, write) \
  __attribute__((visibility("hidden"))) void name(void* address) { ::cnnops::emulation::check(address, bytes, write); }
CNNOPS_ACCESS(__tsan_read1, 1, false)
CNNOPS_ACCESS(__tsan_read2, 2, false)
CNNOPS_ACCESS(__tsan_read4, 4, false)
CNNOPS_ACCESS(__tsan_read8, 8, false)
CNNOPS_ACCESS(__tsan_read16, 16, false)
CNNOPS_ACCESS(__tsan_write1, 1, true)
CNNOPS_ACCESS(__tsan_write2, 2, true)
CNNOPS_ACCESS(__tsan_write4, 4, true)
CNNOPS_ACCESS(__tsan_write8, 8, true)
CNNOPS_ACCESS(__tsan_write16, 16, true)
CNNOPS_ACCESS(__tsan_unaligned_read2, 2, false)
CNNOPS_ACCESS(__tsan_unaligned_read4, 4, false)
CNNOPS_ACCESS(__tsan_unaligned_read8, 8, false)
CNNOPS_ACCESS(__tsan_unaligned_read16, 16, false)
CNNOPS_ACCESS(__tsan_unaligned_write2, 2, true)
CNNOPS_ACCESS(__tsan_unaligned_write4, 4, true)
CNNOPS_ACCESS(__tsan_unaligned_write8, 8, true)
CNNOPS_ACCESS(__tsan_unaligned_write16, 16, true)
__attribute__((visibility("hidden"))) void __tsan_read_range(void* address, long bytes) {
  ::cnnops::emulation::check(address, static_cast<int>(bytes), false);
}
__attribute__((visibility("hidden"))) void __tsan_write_range(void* address, long bytes) {
  ::cnnops::emulation::check(address, static_cast<int>(bytes), true);
}
__attribute__((visibility("hidden"))) void __tsan_init() {}
__attribute__((visibility("hidden"))) void __tsan_func_entry(void*) {}
__attribute__((visibility("hidden"))) void __tsan_func_exit(void*) {}
__attribute__((visibility("hidden"))) void __tsan_vptr_update(void**, void*) {}
__attribute__((visibility("hidden"))) void __tsan_vptr_read(void**) {}
}
