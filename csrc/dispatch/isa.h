// Which instruction sets this build has, this CPU and operating system offer, and the user allows.
#pragma once

#include <string>
#include <vector>

namespace cnnops {

// cuda is no level: its kernels are for tensors on a device. cuda_emulated is the same sources on the CPU, for tests.
enum class Isa : int {
  cuda_emulated = -3,
  amx_emulated = -2,
  reference = -1,
  baseline = 0,
  avx2 = 1,
  avx512 = 2,
  avx512_bf16 = 3,
  amx = 4,
  cuda = 100
};

// Runs anywhere, and only where a row is asked for by its index.
constexpr bool for_tests(Isa isa) { return isa < Isa::baseline; }

struct IsaLevel {
  Isa isa;
  bool built;
  bool supported;
  std::string reason;  // why it is not usable; empty when it is
};

const char* name(Isa isa);
// All levels, lowest first.
const std::vector<IsaLevel>& isa_levels();
// The highest level kernels may use: the best supported one, or the cap.
Isa isa_limit();
// Caps the choice; "" removes the cap. Throws ValueError for an unknown name or a level that cannot run here.
void set_isa_limit(const std::string& level);

}  // namespace cnnops
