// Plain loops, straight from the contract: float64, and long double for sums over many elements.
#include "ops/batch_norm.h"

#include "reference/activation.h"
#include "reference/image.h"

namespace cnnops::reference {
namespace {

template <class Function>
void for_each_of_channel(const BatchNormParams& p, int64_t c, const Function& function) {
  for_each(p.n, 1, p.h, p.w, [&](int64_t n, int64_t, int64_t h, int64_t w) { function(n, c, h, w); });
}

struct Channel {
  double mean, invstd, weight, bias;
};

Channel channel(const BatchNormParams& p, int64_t c) {
  return {batch_norm_get(p.mean, p.statistics, c), 1 / __builtin_sqrt(batch_norm_get(p.var, p.statistics, c) + p.eps),
          p.weight ? batch_norm_get(p.weight, p.affine, c) : 1, p.bias ? batch_norm_get(p.bias, p.affine, c) : 0};
}

template <class T>
double pre_activation(const BatchNormParams& p, const Channel& k, int64_t n, int64_t c, int64_t h, int64_t w) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w), residual(p.residual, p.layout, p.c, p.h, p.w);
  const double z = (x.get(n, c, h, w) - k.mean) * k.invstd * k.weight + k.bias;
  return p.residual ? z + residual.get(n, c, h, w) : z;
}

template <class T>
void evaluation(const BatchNormParams& p) {
  Image<T> y(p.y, p.layout, p.c, p.h, p.w);
  for (int64_t c = 0; c < p.c; ++c) {
    const Channel k = channel(p, c);
    for_each_of_channel(p, c, [&](int64_t n, int64_t, int64_t h, int64_t w) {
      y.set(n, c, h, w, activate(pre_activation<T>(p, k, n, c, h, w), p.activation));
    });
  }
}

template <class T>
void training(const BatchNormParams& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w);
  const double count = static_cast<double>(p.n * p.h * p.w);
  for (int64_t c = 0; c < p.c; ++c) {
    long double sum = 0, squares = 0;
    for_each_of_channel(p, c, [&](int64_t n, int64_t, int64_t h, int64_t w) { sum += x.get(n, c, h, w); });
    const double mean = static_cast<double>(sum / count);
    for_each_of_channel(p, c, [&](int64_t n, int64_t, int64_t h, int64_t w) {
      const double d = x.get(n, c, h, w) - mean;
      squares += d * d;
    });
    batch_norm_set(p.mean, p.statistics, c, mean);
    batch_norm_set(p.var, p.statistics, c, static_cast<double>(squares / count));
  }
  evaluation<T>(p);
}

template <class T>
void backward(const BatchNormParams& p) {
  const Image<const T> x(p.x, p.layout, p.c, p.h, p.w), dy(p.dy, p.layout, p.c, p.h, p.w);
  const Image<const T> y(p.saved_y, p.layout, p.c, p.h, p.w);
  Image<T> dx(p.dx, p.layout, p.c, p.h, p.w), dresidual(p.dresidual, p.layout, p.c, p.h, p.w);
  const double count = static_cast<double>(p.n * p.h * p.w);
  for (int64_t c = 0; c < p.c; ++c) {
    const Channel k = channel(p, c);
    const auto dz = [&](int64_t n, int64_t h, int64_t w) {
      return dy.get(n, c, h, w) * (p.saved_y ? derivative_of_output(y.get(n, c, h, w), p.activation)
                                             : derivative(pre_activation<T>(p, k, n, c, h, w), p.activation));
    };
    long double long_sum = 0, long_dot = 0;
    for_each_of_channel(p, c, [&](int64_t n, int64_t, int64_t h, int64_t w) {
      long_sum += dz(n, h, w);
      long_dot += dz(n, h, w) * (x.get(n, c, h, w) - k.mean) * k.invstd;
    });
    const double sum = static_cast<double>(long_sum), dot = static_cast<double>(long_dot);
    for_each_of_channel(p, c, [&](int64_t n, int64_t, int64_t h, int64_t w) {
      const double d = dz(n, h, w);
      const double through = p.training ? (sum + (x.get(n, c, h, w) - k.mean) * k.invstd * dot) / count : 0;
      if (p.dx) dx.set(n, c, h, w, k.weight * k.invstd * (d - through));
      if (p.dresidual) dresidual.set(n, c, h, w, d);
    });
    if (p.dweight) batch_norm_set(p.dweight, p.affine, c, dot);
    if (p.dbias) batch_norm_set(p.dbias, p.affine, c, sum);
  }
}

template <class T>
void update(const BatchNormParams& p) {
  const double unbiased = static_cast<double>(p.count) / static_cast<double>(p.count - 1);
  for (int64_t c = 0; c < p.c; ++c) {
    T* const mean = static_cast<T*>(p.running_mean) + c * p.running_mean_stride;
    T* const var = static_cast<T*>(p.running_var) + c * p.running_var_stride;
    const auto mix = [&](double old, double observed) {
      return static_cast<compute_t<T>>((1 - p.momentum) * old + p.momentum * observed);
    };
    store_scalar(mean, mix(load_scalar(*mean), static_cast<const double*>(p.mean)[c]));
    store_scalar(var, mix(load_scalar(*var), unbiased * static_cast<const double*>(p.var)[c]));
  }
}

}  // namespace
}  // namespace cnnops::reference

CNNOPS_EXPORT(batch_norm_training, BatchNormParams, training)
CNNOPS_EXPORT(batch_norm_evaluation, BatchNormParams, evaluation)
CNNOPS_EXPORT(batch_norm_update, BatchNormParams, update)
CNNOPS_EXPORT(batch_norm_backward, BatchNormParams, backward)
