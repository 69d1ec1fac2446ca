#include "ops/peak.h"

#include "common/export.h"

namespace cnnops::reference {
namespace {

template <class T>
void fma(const PeakParams& p) {
  const T* const x = static_cast<const T*>(p.x);
  T* const y = static_cast<T*>(p.y);
  for (int64_t i = 0; i < p.threads * PeakParams::kWidth; ++i) {
    double value = load_scalar(x[i]);
    for (int64_t n = 0; n < p.iterations; ++n) value = value * p.a + p.b;
    store_scalar(&y[i], static_cast<compute_t<T>>(value));
  }
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(peak_fma, PeakParams, fma)
