// Twelve independent chains of fused multiply-adds: more than the latency times the number of FMA units of current CPUs
// (4 x 2), few enough for the 16 registers of AVX2. A row of 192 elements is twelve registers of 16 lanes, or several
// such groups where registers are narrower.
#include "ops/peak.h"

#include "cpu/simd/vec.h"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int kChains = 12;

template <class T>
void fma(const PeakParams& p) {
  using C = compute_t<T>;
  constexpr int64_t kGroup = kChains * lanes<C>;
  static_assert(PeakParams::kWidth % kGroup == 0);
  const vec<C> a = set1(static_cast<C>(p.a)), b = set1(static_cast<C>(p.b));
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int thread = 0; thread < p.threads; ++thread) {
    const T* const x = static_cast<const T*>(p.x) + thread * PeakParams::kWidth;
    T* const y = static_cast<T*>(p.y) + thread * PeakParams::kWidth;
    for (int64_t group = 0; group < PeakParams::kWidth; group += kGroup) {
      vec<C> chain[kChains];
      for (int i = 0; i < kChains; ++i) chain[i] = load(x + group + i * lanes<C>);
      for (int64_t n = 0; n < p.iterations; ++n)
        for (int i = 0; i < kChains; ++i) chain[i] = fma(chain[i], a, b);
      for (int i = 0; i < kChains; ++i) store(y + group + i * lanes<C>, chain[i]);
    }
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(peak_fma, PeakParams, fma)
