#include "dispatch/isa.h"

#include <atomic>
#include <cstdint>
#include <cstring>

#include "common/check.h"

#if CNNOPS_X86
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cnnops {
namespace {

bool was_built(const char* level) {
  const std::string list = "," CNNOPS_BUILT_ISAS ",";
  return list.find("," + std::string(level) + ",") != std::string::npos;
}

#if CNNOPS_X86
struct Cpu {
  uint32_t leaf1_ecx = 0, leaf7_eax1 = 0, leaf7_ebx = 0, leaf7_edx = 0;
  uint64_t xcr0 = 0;

  Cpu() {
    uint32_t a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) leaf1_ecx = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) leaf7_ebx = b, leaf7_edx = d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) leaf7_eax1 = a;
    if (leaf1_ecx >> 27 & 1) {  // OSXSAVE: XGETBV may be executed
      uint32_t low, high;
      __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      xcr0 = static_cast<uint64_t>(high) << 32 | low;
    }
  }
  bool state(uint64_t mask) const { return (xcr0 & mask) == mask; }
};

constexpr uint64_t kStateYmm = 0x6, kStateZmm = 0xe6, kStateTiles = 0x60000;

std::string missing_avx2(const Cpu& cpu) {
  if (!(cpu.leaf7_ebx >> 5 & 1)) return "the CPU has no AVX2";
  if (!(cpu.leaf1_ecx >> 12 & 1)) return "the CPU has no FMA";
  if (!(cpu.leaf1_ecx >> 29 & 1)) return "the CPU has no F16C";
  if (!cpu.state(kStateYmm)) return "the operating system does not save the YMM registers";
  return "";
}

std::string missing_avx512(const Cpu& cpu) {
  if (std::string why = missing_avx2(cpu); !why.empty()) return why;
  constexpr struct {
    int bit;
    const char* name;
  } kNeeded[] = {{16, "F"}, {17, "DQ"}, {30, "BW"}, {31, "VL"}};
  for (const auto& part : kNeeded)
    if (!(cpu.leaf7_ebx >> part.bit & 1)) return std::string("the CPU has no AVX-512") + part.name;
  if (!cpu.state(kStateZmm)) return "the operating system does not save the ZMM registers";
  return "";
}

std::string missing_avx512_bf16(const Cpu& cpu) {
  if (std::string why = missing_avx512(cpu); !why.empty()) return why;
  if (!(cpu.leaf7_eax1 >> 5 & 1)) return "the CPU has no AVX-512 bfloat16 products";
  return "";
}

std::string missing_amx(const Cpu& cpu) {
  if (std::string why = missing_avx512_bf16(cpu); !why.empty()) return why;
  if (!(cpu.leaf7_edx >> 24 & 1)) return "the CPU has no AMX tiles";
  if (!(cpu.leaf7_edx >> 22 & 1)) return "the CPU has no AMX bfloat16 products";
  if (!cpu.state(kStateTiles)) return "the operating system does not save the AMX tiles";
#if defined(__linux__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) != 0)
    return "the kernel denies the AMX tile state to this process";
#endif
  return "";
}
#endif  // CNNOPS_X86

std::vector<IsaLevel> detect() {
  std::vector<IsaLevel> levels = {{Isa::baseline, true, true, ""},
                                  {Isa::avx2, was_built("avx2"), false, "not an x86-64 CPU"},
                                  {Isa::avx512, was_built("avx512"), false, "not an x86-64 CPU"},
                                  {Isa::avx512_bf16, was_built("avx512_bf16"), false, "not an x86-64 CPU"},
                                  {Isa::amx, was_built("amx"), false, "not an x86-64 CPU"}};
#if CNNOPS_X86
  const Cpu cpu;
  levels[1].reason = missing_avx2(cpu);
  levels[2].reason = missing_avx512(cpu);
  levels[3].reason = missing_avx512_bf16(cpu);
  levels[4].reason = missing_amx(cpu);
#endif
  for (IsaLevel& level : levels) {
    level.supported = level.reason.empty();
    if (level.supported && !level.built) level.reason = "this build has no kernels for it";
  }
  return levels;
}

Isa best_level() {
  Isa best = Isa::baseline;
  for (const IsaLevel& level : isa_levels())
    if (level.built && level.supported) best = level.isa;
  return best;
}

std::atomic<int> limit{-1};

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::amx_emulated: return "amx_emulated";
    case Isa::reference: return "reference";
    case Isa::baseline: return "baseline";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
    case Isa::cuda: return "cuda";
    case Isa::cuda_emulated: return "cuda_emulated";
  }
  return "?";
}

const std::vector<IsaLevel>& isa_levels() {
  static const std::vector<IsaLevel> levels = detect();
  return levels;
}

Isa isa_limit() {
  int level = limit.load(std::memory_order_relaxed);
  if (level < 0) {
    level = static_cast<int>(best_level());
    limit.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

void set_isa_limit(const std::string& level) {
  if (level.empty()) {
    limit.store(static_cast<int>(best_level()));
    return;
  }
  std::string known;
  for (const IsaLevel& candidate : isa_levels()) {
    known += std::string(known.empty() ? "" : ", ") + name(candidate.isa);
    if (level != name(candidate.isa)) continue;
    CNNOPS_CHECK(candidate.supported && candidate.built, std::invalid_argument, "CNNOPS_ISA=", level,
                 " cannot be used here: ", candidate.reason);
    limit.store(static_cast<int>(candidate.isa));
    return;
  }
  throw std::invalid_argument(message("CNNOPS_ISA=", level, " is not a level; the levels are ", known));
}

}  // namespace cnnops
