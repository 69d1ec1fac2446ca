// Activations of vec<float> and vec<double>, their derivatives, and the elementary functions they need.
//
//   activate<A, C>(z), activate<C>(z, a)             the activation of one vector, fixed at compile time or switched on
//   activate_row(row, n, a)                          a contiguous row of the compute type, in place
//   derivative<A, C>(z), derivative<C>(z, a)         d activate(z) / dz, from the pre-activation z
//   derivative_of_output<A, C>(y), (y, a)            the same from y = activate(z), where has_output_derivative(a)
//   with_activation(a, f)                            calls f(constant) with the activation as a compile-time constant
//
// The switch in the run-time forms is one well-predicted jump per vector: next to the transcendental activations it is
// free; for none and relu a kernel should hoist it with with_activation, or call activate_row on rows in L1.
//
// The float functions are this file's own: exponential, logarithm and what derives from them within 2 units in the last
// place, right at infinities, NaN, zeros and subnormal arguments and results (tests/test_activations.py sweeps them).
// The double ones and erf call libm lane by lane.
#pragma once

#include "common/activation.h"
#include "common/arith.h"
#include "cpu/simd/vec.h"

namespace cnnops::CNNOPS_ISA {
namespace {

using i32v = typename VectorOf<int32_t, lanes<float>>::type;

[[gnu::always_inline]] inline f32v as_f32(i32v v) { return reinterpret_cast<f32v>(v); }
[[gnu::always_inline]] inline i32v as_i32(f32v v) { return reinterpret_cast<i32v>(v); }
[[gnu::always_inline]] inline f32v abs(f32v v) { return as_f32(as_i32(v) & 0x7fffffff); }
[[gnu::always_inline]] inline f32v copysign(f32v magnitude, f32v sign) {
  return as_f32((as_i32(magnitude) & 0x7fffffff) | (as_i32(sign) & INT32_MIN));
}

// z = n ln 2 + r with |r| <= ln 2 / 2, and expm1(r). Adding 1.5 * 2^23 leaves round(z / ln 2) in the low bits of the
// sum. ln 2 = 355/512 + kLow: n * 355/512 is exact for the n that occur, with or without fused multiply-add.
struct Reduced {
  f32v n;        // as a number
  i32v integer;  // the same
  f32v expm1;    // of r
};
[[gnu::always_inline]] inline Reduced reduce(f32v z) {
  constexpr float kMagic = 12582912.0f, kHigh = 355.0f / 512.0f, kLow = -2.12194440e-4f;
  const f32v shifted = fma(z, broadcast<f32v>(1.44269504f), broadcast<f32v>(kMagic));
  const f32v n = shifted - kMagic;
  const f32v r = fma(n, broadcast<f32v>(-kLow), fma(n, broadcast<f32v>(-kHigh), z));
  // (expm1(r) - r) / r^2, minimax over the interval; relative to expm1(r) the error is below 2.4e-10.
  f32v q = broadcast<f32v>(0x1.a1a1b4p-13f);
  q = fma(q, r, broadcast<f32v>(0x1.6d74cep-10f));
  q = fma(q, r, broadcast<f32v>(0x1.111090p-7f));
  q = fma(q, r, broadcast<f32v>(0x1.5554aep-5f));
  q = fma(q, r, broadcast<f32v>(0x1.555556p-3f));
  q = fma(q, r, broadcast<f32v>(0.5f));
  return {n, as_i32(shifted) - as_i32(broadcast<f32v>(kMagic)), fma(q, r * r, r)};
}
// 2^n for -126 <= n <= 127.
[[gnu::always_inline]] inline f32v power_of_two(i32v n) { return as_f32((n + 127) << 23); }

// v where it is not less (not more) than the limit; NaN as it is.
[[gnu::always_inline]] inline f32v at_least(f32v v, float limit) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<f32v>(_mm512_max_ps(_mm512_set1_ps(limit), reinterpret_cast<__m512>(v)));
#else
  return v < limit ? broadcast<f32v>(limit) : v;
#endif
}
[[gnu::always_inline]] inline f32v at_most(f32v v, float limit) {
#if CNNOPS_ISA_avx512
  return reinterpret_cast<f32v>(_mm512_min_ps(_mm512_set1_ps(limit), reinterpret_cast<__m512>(v)));
#else
  return v > limit ? broadcast<f32v>(limit) : v;
#endif
}

// For z that is not above 89.
[[gnu::always_inline]] inline f32v exp_below(f32v z) {
  const Reduced t = reduce(at_least(z, -104.0f));  // below, the result is 0 already
  const f32v v = t.expm1 + 1.0f;
#if CNNOPS_ISA_avx512
  return reinterpret_cast<f32v>(_mm512_scalef_ps(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(t.n)));
#else
  // In two steps, for n from -150 to 128: only the second one can overflow or round to a subnormal number.
  const i32v half = t.integer >> 1;
  return v * power_of_two(half) * power_of_two(t.integer - half);
#endif
}
[[gnu::always_inline]] inline f32v exp(f32v z) { return exp_below(at_most(z, 89.0f)); }  // above, it is Inf already
[[gnu::always_inline]] inline f32v exp_of_negative_size(f32v z) { return exp_below(as_f32(as_i32(z) | INT32_MIN)); }
[[gnu::always_inline]] inline vec<double> exp(vec<double> z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] = __builtin_exp(z[i]);
  return z;
}

[[gnu::always_inline]] inline vec<double> exp_of_negative_size(vec<double> z) { return exp(z < 0 ? z : -z); }

// exp(z) - 1 for z <= 0.
[[gnu::always_inline]] inline f32v expm1_negative(f32v z) {
  z = z < -30.0f ? broadcast<f32v>(-30.0f) : z;
  const Reduced t = reduce(z);
  const f32v scale = power_of_two(t.integer);
  return fma(t.expm1, scale, scale - 1.0f);
}
[[gnu::always_inline]] inline vec<double> expm1_negative(vec<double> z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] = __builtin_expm1(z[i]);
  return z;
}

// log(1 + u) for 0 <= u < Inf (NaN stays NaN).
[[gnu::always_inline]] inline f32v log1p_positive(f32v u) {
  const f32v sum = u + 1.0f;
  // What the rounding of the sum lost; the larger of u and 1 is the one to subtract first.
  const f32v lost = u > 1.0f ? 1.0f - (sum - u) : u - (sum - 1.0f);
  // sum = 2^k (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); 0x3f3504f3 is sqrt(1/2).
  const i32v bits = as_i32(sum) - 0x3f3504f3;
  const i32v k = bits >> 23;
  const f32v f = (as_f32((bits & 0x7fffff) + 0x3f3504f3) - 1.0f) + lost * power_of_two(-k);
  // log(1 + f) = 2 atanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = f / (2 + f), |s| < 0.172; 2 s = f - s f.
  const f32v s = f / (f + 2.0f), s2 = s * s;
  f32v tail = fma(s2, broadcast<f32v>(2.0f / 9.0f), broadcast<f32v>(2.0f / 7.0f));
  tail = fma(tail, s2, broadcast<f32v>(2.0f / 5.0f));
  tail = fma(tail, s2, broadcast<f32v>(2.0f / 3.0f)) * s2;
  const f32v e = __builtin_convertvector(k, f32v);
  constexpr float kHigh = 355.0f / 512.0f, kLow = -2.12194440e-4f;
  return fma(e, broadcast<f32v>(kHigh), f - (s * (f - tail) - e * kLow));
}
[[gnu::always_inline]] inline vec<double> log1p_positive(vec<double> z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] = __builtin_log1p(z[i]);
  return z;
}

[[gnu::always_inline]] inline f32v tanh(f32v z) {
  const f32v t = expm1_negative(abs(z) * -2.0f);
  return copysign(t / (t + 2.0f), z);
}
[[gnu::always_inline]] inline vec<double> tanh(vec<double> z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] = __builtin_tanh(z[i]);
  return z;
}

[[gnu::always_inline]] inline f32v erf(f32v z) {
  for (int i = 0; i < lanes<float>; ++i) z[i] = __builtin_erff(z[i]);
  return z;
}
[[gnu::always_inline]] inline vec<double> erf(vec<double> z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] = __builtin_erf(z[i]);
  return z;
}

// 1 / v for v from 1 to 2.
[[gnu::always_inline]] inline f32v inverse(f32v v) {
#if CNNOPS_ISA_avx512  // a Newton step doubles the 14 digits of the instruction, in a third of a division's time
  const f32v guess = reinterpret_cast<f32v>(_mm512_rcp14_ps(reinterpret_cast<__m512>(v)));
  return fma(guess, fma(-v, guess, broadcast<f32v>(1.0f)), guess);
#else
  return 1.0f / v;
#endif
}
[[gnu::always_inline]] inline vec<double> inverse(vec<double> v) { return 1.0 / v; }

// 1 / (1 + exp(-z)), and that of -z, with the exponential of -|z|, so that nothing overflows and small results keep their
// digits.
template <class C>
struct Sigmoids {
  vec<C> of_z, of_minus_z;
  [[gnu::always_inline]] explicit Sigmoids(vec<C> z) {
    const vec<C> e = exp_of_negative_size(z), large = inverse(e + C(1)), small = e * large;
    of_z = z < C(0) ? small : large;
    of_minus_z = z < C(0) ? large : small;
  }
};
template <class C>
[[gnu::always_inline]] inline vec<C> sigmoid(vec<C> z) {
  return Sigmoids<C>(z).of_z;
}

template <Activation A, class C>
[[gnu::always_inline]] inline vec<C> activate(vec<C> z) {
  using V = vec<C>;
  const V zero = {};
  if constexpr (A == Activation::relu) {
    return z < zero ? zero : z;
  } else if constexpr (A == Activation::relu6) {
    const V low = z < zero ? zero : z;
    return low > C(6) ? broadcast<V>(C(6)) : low;
  } else if constexpr (A == Activation::leaky_relu) {
    return z > zero ? z : z * C(0.01);
  } else if constexpr (A == Activation::elu) {
    return z < zero ? expm1_negative(z < zero ? z : zero) : z;
  } else if constexpr (A == Activation::sigmoid) {
    return sigmoid<C>(z);
  } else if constexpr (A == Activation::tanh) {
    return tanh(z);
  } else if constexpr (A == Activation::softplus) {
    return z > C(20) ? z : log1p_positive(exp(z > C(20) ? zero : z));
  } else if constexpr (A == Activation::silu) {
    return z * sigmoid<C>(z);
  } else if constexpr (A == Activation::hardswish) {
    return z * activate<Activation::relu6, C>(z + C(3)) / C(6);
  } else if constexpr (A == Activation::gelu) {
    return z * C(0.5) * (erf(z * C(0.70710678118654752440)) + C(1));
  } else {
    return z;
  }
}

template <Activation A, class C>
[[gnu::always_inline]] inline vec<C> derivative(vec<C> z) {
  using V = vec<C>;
  const V zero = {}, one = broadcast<V>(C(1));
  if constexpr (A == Activation::relu) {
    return z <= zero ? zero : one;  // 1 for NaN, as PyTorch's
  } else if constexpr (A == Activation::relu6) {
    return (z <= zero) | (z >= C(6)) ? zero : one;
  } else if constexpr (A == Activation::leaky_relu) {
    return z > zero ? one : broadcast<V>(C(0.01));
  } else if constexpr (A == Activation::elu) {
    return z < zero ? exp(z < zero ? z : zero) : one;
  } else if constexpr (A == Activation::sigmoid) {
    const V s = sigmoid<C>(z);
    return s * (one - s);
  } else if constexpr (A == Activation::tanh) {
    const V t = tanh(z);
    return one - t * t;
  } else if constexpr (A == Activation::softplus) {
    return z > C(20) ? one : sigmoid<C>(z);
  } else if constexpr (A == Activation::silu) {
    const Sigmoids<C> s(z);  // 1 - sigmoid(z) = sigmoid(-z), without the cancellation
    return s.of_z * fma(z, s.of_minus_z, one);
  } else if constexpr (A == Activation::hardswish) {
    const V middle = z / C(3) + C(0.5);
    return z <= C(-3) ? zero : z < C(3) ? middle : one;
  } else if constexpr (A == Activation::gelu) {
    const V density = exp(z * z * C(-0.5)) * C(0.39894228040143267794);
    return fma(z, density, (erf(z * C(0.70710678118654752440)) + C(1)) * C(0.5));
  } else {
    return one;
  }
}

constexpr bool has_output_derivative(Activation a) {
  return a != Activation::silu && a != Activation::hardswish && a != Activation::gelu;
}

template <Activation A, class C>
[[gnu::always_inline]] inline vec<C> derivative_of_output(vec<C> y) {
  static_assert(has_output_derivative(A));
  using V = vec<C>;
  const V zero = {}, one = broadcast<V>(C(1));
  if constexpr (A == Activation::elu) {
    return y < zero ? y + C(1) : one;
  } else if constexpr (A == Activation::sigmoid) {
    return y * (one - y);
  } else if constexpr (A == Activation::tanh) {
    return one - y * y;
  } else if constexpr (A == Activation::softplus) {
    return y > C(kSoftplusOf20) ? one : -expm1_negative(-y);
  } else {  // monotonic, and fixed at 0 and 6: y says what z would
    return derivative<A, C>(y);
  }
}

template <Activation A>
struct ActivationConstant {
  static constexpr Activation value = A;
};

template <class Function>
[[gnu::always_inline]] inline auto with_activation(Activation a, const Function& f) {
  switch (a) {
    case Activation::relu: return f(ActivationConstant<Activation::relu>{});
    case Activation::relu6: return f(ActivationConstant<Activation::relu6>{});
    case Activation::leaky_relu: return f(ActivationConstant<Activation::leaky_relu>{});
    case Activation::elu: return f(ActivationConstant<Activation::elu>{});
    case Activation::sigmoid: return f(ActivationConstant<Activation::sigmoid>{});
    case Activation::tanh: return f(ActivationConstant<Activation::tanh>{});
    case Activation::softplus: return f(ActivationConstant<Activation::softplus>{});
    case Activation::silu: return f(ActivationConstant<Activation::silu>{});
    case Activation::hardswish: return f(ActivationConstant<Activation::hardswish>{});
    case Activation::gelu: return f(ActivationConstant<Activation::gelu>{});
    case Activation::none: break;
  }
  return f(ActivationConstant<Activation::none>{});
}

template <class C>
[[gnu::always_inline]] inline vec<C> activate(vec<C> z, Activation a) {
  return with_activation(a, [&](auto constant) { return activate<decltype(constant)::value, C>(z); });
}
template <class C>
[[gnu::always_inline]] inline vec<C> derivative(vec<C> z, Activation a) {
  return with_activation(a, [&](auto constant) { return derivative<decltype(constant)::value, C>(z); });
}
// Of an activation without it, the derivative is not known from y: 1 is returned.
template <class C>
[[gnu::always_inline]] inline vec<C> derivative_of_output(vec<C> y, Activation a) {
  return with_activation(a, [&](auto constant) {
    constexpr Activation kActivation = decltype(constant)::value;
    if constexpr (has_output_derivative(kActivation)) return derivative_of_output<kActivation, C>(y);
    return broadcast<vec<C>>(C(1));
  });
}

// C is float or double; nothing past row + n is touched.
template <class C>
[[gnu::noinline]] void activate_row(C* row, int64_t n, Activation a) {
  if (a == Activation::none) return;
  with_activation(a, [&](auto constant) {
    for (int64_t i = 0; i < n; i += lanes<C>) {
      const int part = static_cast<int>(min64(n - i, lanes<C>));
      store_n(row + i, activate<decltype(constant)::value, C>(load_n(row + i, part)), part);
    }
  });
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
