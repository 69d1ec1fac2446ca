// Batch normalization in two passes over memory: sums, then elements (one pass in evaluation, where backward makes its
// sums and dx together). The work is cut as BatchNormPlan says, never by the number of threads; each unit leaves its
// sums in the workspace and every channel adds its partial sums in the order of the units.
//
// Per column (a channel, or one of the pixels of it that share a row) the coefficients m, a, b of z = (x - m) a + b are
// rounded to the compute type once. m is the mean rounded, and b takes what that lost: x - m is exact where x is close
// to its mean, so a large mean costs no digits.
#include "ops/batch_norm.h"

#include "cpu/simd/activation.h"

// Every lambda below is the body of a loop: a call in its place would send its vectors through memory.
#define CNNOPS_INLINE __attribute__((always_inline))

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int64_t kColumns = BatchNormPlan::kBlockColumns;

// What a unit covers: rows of `columns` elements, `stride` apart, from element `begin` of the image and column `column`
// of the coefficients. A piece of a plane is one row, all of one column.
struct Block {
  int64_t begin, rows, columns, stride, column, partial;
};

// Calls f(block) for the full rows of a unit and for the partial row that may follow them.
template <class Function>
[[gnu::always_inline]] inline void for_blocks(const BatchNormPlan& plan, int64_t unit, const Function& f) {
  const int64_t block = unit / plan.column_blocks, column = unit % plan.column_blocks * kColumns;
  const int64_t row = block * BatchNormPlan::kBlockRows;
  const int64_t rows = min64(plan.rows - row, BatchNormPlan::kBlockRows);
  const int64_t columns = min64(plan.width - column, kColumns), partial = block * plan.width + column;
  if (rows > 0) f(Block{row * plan.width + column, rows, columns, plan.width, column, partial});
  if (block == plan.row_blocks - 1 && plan.tail > column)
    f(Block{plan.rows * plan.width + column, 1, min64(plan.tail - column, kColumns), plan.width, column, partial});
}
Block plane_piece(const BatchNormParams& p, const BatchNormPlan& plan, int64_t unit) {
  const int64_t plane = unit / plan.pieces, at = unit % plan.pieces * plan.piece;
  const int64_t length = min64(p.h * p.w - at, plan.piece);
  return {plane * p.h * p.w + at, 1, length, length, plane % p.c, unit};
}

// Elements that the partial sum of column `column` (of row block `block`) covers.
int64_t block_count(const BatchNormPlan& plan, int64_t block, int64_t column) {
  const int64_t rows = min64(plan.rows - block * BatchNormPlan::kBlockRows, BatchNormPlan::kBlockRows);
  return max64(rows, 0) + (block == plan.row_blocks - 1 && column < plan.tail);
}

// Calls f(partial index, elements of it) for all partial sums of a channel, in a fixed order.
template <class Function>
[[gnu::always_inline]] inline void for_partials(const BatchNormParams& p, const BatchNormPlan& plan, int64_t c,
                                                const Function& f) {
  if (plan.planes) {
    for (int64_t n = 0; n < p.n; ++n)
      for (int64_t k = 0; k < plan.pieces; ++k)
        f((n * p.c + c) * plan.pieces + k, min64(p.h * p.w - k * plan.piece, plan.piece));
  } else {
    for (int64_t block = 0; block < plan.row_blocks; ++block)
      for (int64_t j = c; j < plan.width; j += p.c) f(block * plan.width + j, block_count(plan, block, j));
  }
}

template <class C>
struct Workspace {
  double* sums;  // two per partial
  C *m, *a, *b;  // z = (x - m) a + b
  C *s, *t;      // dx = dz a + (x - m) s + t
  explicit Workspace(const BatchNormParams& p) {
    const BatchNormPlan plan = batch_norm_plan(p);
    const int64_t columns = plan.columns(p);
    sums = static_cast<double*>(p.workspace);
    m = reinterpret_cast<C*>(sums + 2 * plan.partials());
    a = m + columns, b = a + columns, s = b + columns, t = s + columns;
  }
};

struct Channel {
  double mean, invstd, weight, bias;
};
Channel channel(const BatchNormParams& p, int64_t c) {
  return {batch_norm_get(p.mean, p.statistics, c), 1 / __builtin_sqrt(batch_norm_get(p.var, p.statistics, c) + p.eps),
          p.weight ? batch_norm_get(p.weight, p.affine, c) : 1, p.bias ? batch_norm_get(p.bias, p.affine, c) : 0};
}

// Writes m, a, b of one channel into all its columns, and returns the mean's rounding error.
template <class C>
double set_coefficients(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<C>& to, int64_t c,
                        const Channel& k) {
  const C m = static_cast<C>(k.mean);
  const double a = k.invstd * k.weight, lost = k.mean - static_cast<double>(m);
  // An infinite mean has lost nothing that could be made up for.
  const C b = static_cast<C>(lost == lost ? k.bias - lost * a : k.bias);
  const int64_t columns = plan.columns(p);
  for (int64_t j = c; j < columns; j += p.c) to.m[j] = m, to.a[j] = static_cast<C>(a), to.b[j] = b;
  return lost == lost ? lost : 0;
}

// ---------------------------------------------------------------------------------------------------------------- sums

// Four partial vectors, added at the end.
template <class C>
struct Sum {
  vec<C> part[4] = {};
  double total() const { return sum_lanes<C>((part[0] + part[1]) + (part[2] + part[3])); }
};

// Calls f(element, lanes, which of four accumulators) over n elements. `lanes` is a constant but in the last call.
template <class C, class Function>
[[gnu::always_inline]] inline void sweep(int64_t n, const Function& f) {
  constexpr int kLanes = lanes<C>;
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    f(i, kLanes, 0);
    f(i + kLanes, kLanes, 1);
    f(i + 2 * kLanes, kLanes, 2);
    f(i + 3 * kLanes, kLanes, 3);
  }
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes, 0);
  if (i < n) f(i, static_cast<int>(n - i), 1);
}

template <class T>
void piece_statistics(const T* x, int64_t n, double* out) {
  using C = compute_t<T>;
  Sum<C> sum;
  sweep<C>(n, [&](int64_t i, int part, int k) CNNOPS_INLINE { sum.part[k] += load_n(x + i, part); });
  const C guess = static_cast<C>(sum.total() / static_cast<double>(n));
  // The guess is good to a few roundings of the sum; the deviations from it also correct it.
  Sum<C> first, second;
  sweep<C>(n, [&](int64_t i, int part, int k) CNNOPS_INLINE {
    const vec<C> d = keep_n<C>(load_n(x + i, part) - guess, part);
    first.part[k] += d;
    second.part[k] = fma(d, d, second.part[k]);
  });
  const double e = first.total() / static_cast<double>(n);
  out[0] = guess + e;
  out[1] = second.total() - e * e * static_cast<double>(n);
}

// Adds rows to `columns` accumulators in memory, four rows at a time; f(row, column, lanes) gives the terms of up to
// two sums.
template <class C, int kSums, class Function>
[[gnu::always_inline]] inline void add_rows(const Block& block, C (*sums)[kColumns], const Function& f) {
  const auto columns = [&](int64_t row, auto rows, int64_t j, int part) CNNOPS_INLINE {
    vec<C> total[kSums];
    for (int k = 0; k < kSums; ++k) total[k] = load(sums[k] + j);
    for (int r = 0; r < decltype(rows)::value; ++r) f(row + r, j, part, total);
    for (int k = 0; k < kSums; ++k) store(sums[k] + j, total[k]);
  };
  const auto across = [&](int64_t row, auto rows) CNNOPS_INLINE {
    int64_t j = 0;
    for (; j + lanes<C> <= block.columns; j += lanes<C>) columns(row, rows, j, lanes<C>);
    if (j < block.columns) columns(row, rows, j, static_cast<int>(block.columns - j));
  };
  int64_t row = 0;
  for (; row + 4 <= block.rows; row += 4) across(row, std::integral_constant<int, 4>{});
  for (; row < block.rows; ++row) across(row, std::integral_constant<int, 1>{});
}

template <class T>
void block_statistics(const T* x, const BatchNormPlan& plan, int64_t unit, double* out) {
  using C = compute_t<T>;
  static_assert(kColumns % lanes<float> == 0);
  alignas(64) C guess[1][kColumns] = {}, sums[2][kColumns] = {};
  for_blocks(plan, unit, [&](const Block& block) CNNOPS_INLINE {
    add_rows<C, 1>(block, guess, [&](int64_t row, int64_t j, int part, vec<C>* total) CNNOPS_INLINE {
      total[0] += load_n(x + block.begin + row * block.stride + j, part);
    });
  });
  const int64_t first = unit % plan.column_blocks * kColumns, columns = min64(plan.width - first, kColumns);
  const int64_t row_block = unit / plan.column_blocks;
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t count = block_count(plan, row_block, first + j);
    guess[0][j] = count ? guess[0][j] / static_cast<C>(count) : C(0);
  }
  for_blocks(plan, unit, [&](const Block& block) CNNOPS_INLINE {
    add_rows<C, 2>(block, sums, [&](int64_t row, int64_t j, int part, vec<C>* total) CNNOPS_INLINE {
      const vec<C> d = keep_n<C>(load_n(x + block.begin + row * block.stride + j, part) - load(guess[0] + j), part);
      total[0] += d;
      total[1] = fma(d, d, total[1]);
    });
  });
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t count = block_count(plan, row_block, first + j);
    const double e = count ? sums[0][j] / static_cast<double>(count) : 0;
    double* const to = out + 2 * (row_block * plan.width + first + j);
    to[0] = guess[0][j] + e;
    to[1] = sums[1][j] - e * e * static_cast<double>(count);
  }
}

// Mean and variance of every channel into p.mean and p.var, and the coefficients.
template <class T>
void statistics(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  const T* const x = static_cast<const T*>(p.x);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    if (plan.planes) {
      const Block piece = plane_piece(p, plan, unit);
      piece_statistics(x + piece.begin, piece.columns, work.sums + 2 * unit);
    } else {
      block_statistics(x, plan, unit, work.sums);
    }
  }
  const double count = static_cast<double>(p.n * p.h * p.w);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < p.c; ++c) {
    double sum = 0, squares = 0;
    for_partials(p, plan, c,
                 [&](int64_t i, int64_t n) CNNOPS_INLINE { sum += work.sums[2 * i] * static_cast<double>(n); });
    const double mean = sum / count;
    for_partials(p, plan, c, [&](int64_t i, int64_t n) CNNOPS_INLINE {
      const double d = work.sums[2 * i] - mean;
      squares += work.sums[2 * i + 1] + d * d * static_cast<double>(n);
    });
    batch_norm_set(p.mean, p.statistics, c, mean);
    batch_norm_set(p.var, p.statistics, c, squares > 0 || squares != squares ? squares / count : 0);
  }
}

// ------------------------------------------------------------------------------------------------------------ elements

// none and relu cost less than the jump that chooses among the others.
enum class Kind { none, relu, relu_of_output, any };

template <class C>
[[gnu::noinline]] vec<C> activate_any(vec<C> z, Activation a) {
  return activate<C>(z, a);
}
template <class C>
[[gnu::noinline]] vec<C> derivative_any(vec<C> z, Activation a, bool of_output) {
  return of_output ? derivative_of_output<C>(z, a) : derivative<C>(z, a);
}

template <Kind kKind, class T>
[[gnu::always_inline]] inline void normalize(const BatchNormParams& p, int64_t i, int part, vec<compute_t<T>> m,
                                             vec<compute_t<T>> a, vec<compute_t<T>> b) {
  using C = compute_t<T>;
  vec<C> z = fma(load_n(static_cast<const T*>(p.x) + i, part) - m, a, b);
  if (p.residual) z += load_n(static_cast<const T*>(p.residual) + i, part);
  if constexpr (kKind == Kind::relu) z = activate<Activation::relu, C>(z);
  if constexpr (kKind == Kind::any) z = activate_any<C>(z, p.activation);
  store_n(static_cast<T*>(p.y) + i, z, part);
}

template <Kind kKind, class T>
void normalize_all(const BatchNormParams& params, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  using C = compute_t<T>;
  using V = vec<C>;
#pragma omp parallel for num_threads(params.threads) schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const BatchNormParams p = params;  // a copy that no store can alias
    if (plan.planes) {
      const Block piece = plane_piece(p, plan, unit);
      const V m = broadcast<V>(work.m[piece.column]), a = broadcast<V>(work.a[piece.column]);
      const V b = set1<C>(work.b[piece.column]);
      sweep<C>(piece.columns,
               [&](int64_t i, int part, int) CNNOPS_INLINE { normalize<kKind, T>(p, piece.begin + i, part, m, a, b); });
    } else {
      for_blocks(plan, unit, [&](const Block& block) CNNOPS_INLINE {
        for (int64_t row = 0; row < block.rows; ++row) {
          const int64_t begin = block.begin + row * block.stride;
          sweep<C>(block.columns, [&](int64_t j, int part, int) CNNOPS_INLINE {
            const int64_t k = block.column + j;
            normalize<kKind, T>(p, begin + j, part, load_n(work.m + k, part), load_n(work.a + k, part),
                                load_n(work.b + k, part));
          });
        }
      });
    }
  }
}

template <class T>
void evaluate(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  for (int64_t c = 0; c < p.c; ++c) set_coefficients(p, plan, work, c, channel(p, c));
  if (p.activation == Activation::none) return normalize_all<Kind::none, T>(p, plan, work);
  if (p.activation == Activation::relu) return normalize_all<Kind::relu, T>(p, plan, work);
  normalize_all<Kind::any, T>(p, plan, work);
}

template <class T>
void training(const BatchNormParams& p) {
  const BatchNormPlan plan = batch_norm_plan(p);
  const Workspace<compute_t<T>> work(p);
  statistics<T>(p, plan, work);
  evaluate<T>(p, plan, work);
}

template <class T>
void evaluation(const BatchNormParams& p) {
  evaluate<T>(p, batch_norm_plan(p), Workspace<compute_t<T>>(p));
}

// ------------------------------------------------------------------------------------------------------------ backward

// dz = dy act'(z) of one vector; d is x - m. Where dy is no longer known, it is zero (a tail's missing lanes).
template <Kind kKind, class T>
[[gnu::always_inline]] inline vec<compute_t<T>> gradient_of_z(const BatchNormParams& p, int64_t i, int part,
                                                              vec<compute_t<T>> d, vec<compute_t<T>> a,
                                                              vec<compute_t<T>> b) {
  using C = compute_t<T>;
  using V = vec<C>;
  const V dy = load_n(static_cast<const T*>(p.dy) + i, part), zero = {};
  if constexpr (kKind == Kind::none) {
    return dy;
  } else if constexpr (kKind == Kind::relu_of_output) {
    return load_n(static_cast<const T*>(p.saved_y) + i, part) <= zero ? zero : dy;
  } else {
    V z;
    if (kKind == Kind::any && p.saved_y) {
      z = load_n(static_cast<const T*>(p.saved_y) + i, part);
    } else {
      z = fma(d, a, b);
      if (p.residual) z += load_n(static_cast<const T*>(p.residual) + i, part);
    }
    if constexpr (kKind == Kind::relu) return z <= zero ? zero : dy;
    return dy * derivative_any<C>(z, p.activation, p.saved_y != nullptr);
  }
}

// One vector of the first pass: adds to the two sums, and writes dresidual and, in evaluation, dx.
template <Kind kKind, class T>
[[gnu::always_inline]] inline void add_gradient(const BatchNormParams& p, int64_t i, int part, vec<compute_t<T>> m,
                                                vec<compute_t<T>> a, vec<compute_t<T>> b, vec<compute_t<T>>& sum,
                                                vec<compute_t<T>>& dot) {
  using C = compute_t<T>;
  const vec<C> d = load_n(static_cast<const T*>(p.x) + i, part) - m;
  const vec<C> dz = gradient_of_z<kKind, T>(p, i, part, d, a, b);
  sum += dz;
  dot = fma(dz, d, dot);
  if (p.dresidual) store_n(static_cast<T*>(p.dresidual) + i, dz, part);
  if (!p.training && p.dx) store_n(static_cast<T*>(p.dx) + i, dz * a, part);
}

template <Kind kKind, class T>
void gradient_sums(const BatchNormParams& params, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  using C = compute_t<T>;
  using V = vec<C>;
#pragma omp parallel for num_threads(params.threads) schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const BatchNormParams p = params;
    if (plan.planes) {
      const Block piece = plane_piece(p, plan, unit);
      const V m = broadcast<V>(work.m[piece.column]), a = broadcast<V>(work.a[piece.column]);
      const V b = set1<C>(work.b[piece.column]);
      Sum<C> sum, dot;
      sweep<C>(piece.columns, [&](int64_t i, int part, int k) CNNOPS_INLINE {
        add_gradient<kKind, T>(p, piece.begin + i, part, m, a, b, sum.part[k], dot.part[k]);
      });
      work.sums[2 * unit] = sum.total();
      work.sums[2 * unit + 1] = dot.total();
    } else {
      alignas(64) C sums[2][kColumns] = {};
      for_blocks(plan, unit, [&](const Block& block) CNNOPS_INLINE {
        add_rows<C, 2>(block, sums, [&](int64_t row, int64_t j, int part, V* total) CNNOPS_INLINE {
          const int64_t k = block.column + j;
          add_gradient<kKind, T>(p, block.begin + row * block.stride + j, part, load_n(work.m + k, part),
                                 load_n(work.a + k, part), load_n(work.b + k, part), total[0], total[1]);
        });
      });
      const int64_t first = unit % plan.column_blocks * kColumns, columns = min64(plan.width - first, kColumns);
      double* const out = work.sums + 2 * (unit / plan.column_blocks * plan.width + first);
      for (int64_t j = 0; j < columns; ++j) out[2 * j] = sums[0][j], out[2 * j + 1] = sums[1][j];
    }
  }
}

template <Kind kKind, class T>
void input_gradient(const BatchNormParams& params, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  using C = compute_t<T>;
  using V = vec<C>;
  const auto one = [](const BatchNormParams& p, int64_t i, int part, V m, V a, V b, V s, V t) CNNOPS_INLINE {
    const V d = load_n(static_cast<const T*>(p.x) + i, part) - m;
    const V dz = gradient_of_z<kKind, T>(p, i, part, d, a, b);
    store_n(static_cast<T*>(p.dx) + i, fma(dz, a, fma(d, s, t)), part);
  };
#pragma omp parallel for num_threads(params.threads) schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const BatchNormParams p = params;
    if (plan.planes) {
      const Block piece = plane_piece(p, plan, unit);
      const V m = broadcast<V>(work.m[piece.column]), a = broadcast<V>(work.a[piece.column]);
      const V b = set1<C>(work.b[piece.column]);
      const V s = broadcast<V>(work.s[piece.column]), t = broadcast<V>(work.t[piece.column]);
      sweep<C>(piece.columns,
               [&](int64_t i, int part, int) CNNOPS_INLINE { one(p, piece.begin + i, part, m, a, b, s, t); });
    } else {
      for_blocks(plan, unit, [&](const Block& block) CNNOPS_INLINE {
        for (int64_t row = 0; row < block.rows; ++row) {
          const int64_t begin = block.begin + row * block.stride;
          sweep<C>(block.columns, [&](int64_t j, int part, int) CNNOPS_INLINE {
            const int64_t k = block.column + j;
            one(p, begin + j, part, load_n(work.m + k, part), load_n(work.a + k, part), load_n(work.b + k, part),
                load_n(work.s + k, part), load_n(work.t + k, part));
          });
        }
      });
    }
  }
}

template <class T>
void backward(const BatchNormParams& p) {
  using C = compute_t<T>;
  const BatchNormPlan plan = batch_norm_plan(p);
  const Workspace<C> work(p);
  for (int64_t c = 0; c < p.c; ++c) set_coefficients(p, plan, work, c, channel(p, c));
  switch (p.activation) {
    case Activation::none: gradient_sums<Kind::none, T>(p, plan, work); break;
    case Activation::relu:
      p.saved_y ? gradient_sums<Kind::relu_of_output, T>(p, plan, work) : gradient_sums<Kind::relu, T>(p, plan, work);
      break;
    default: gradient_sums<Kind::any, T>(p, plan, work);
  }
  const double count = static_cast<double>(p.n * p.h * p.w);
  const int64_t columns = plan.columns(p);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < p.c; ++c) {
    const Channel k = channel(p, c);
    double sum = 0, dot = 0;
    for_partials(p, plan, c,
                 [&](int64_t i, int64_t) CNNOPS_INLINE { sum += work.sums[2 * i], dot += work.sums[2 * i + 1]; });
    const double lost = k.mean - static_cast<double>(work.m[c]);
    if (lost == lost) dot -= lost * sum;
    if (p.dbias) batch_norm_set(p.dbias, p.affine, c, sum);
    if (p.dweight) batch_norm_set(p.dweight, p.affine, c, dot * k.invstd);
    const double a = k.weight * k.invstd, s = -a * k.invstd * k.invstd * dot / count;
    const double t = -a * sum / count - (lost == lost ? lost * s : 0);
    for (int64_t j = c; j < columns; j += p.c) work.s[j] = static_cast<C>(s), work.t[j] = static_cast<C>(t);
  }
  if (!p.training || !p.dx) return;
  if (p.activation == Activation::none) return input_gradient<Kind::none, T>(p, plan, work);
  if (p.dresidual) {  // dz lies there already
    BatchNormParams rest = p;
    rest.dy = p.dresidual;
    return input_gradient<Kind::none, T>(rest, plan, work);
  }
  if (p.activation != Activation::relu) return input_gradient<Kind::any, T>(p, plan, work);
  p.saved_y ? input_gradient<Kind::relu_of_output, T>(p, plan, work) : input_gradient<Kind::relu, T>(p, plan, work);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(batch_norm_training, BatchNormParams, training)
CNNOPS_EXPORT(batch_norm_evaluation, BatchNormParams, evaluation)
CNNOPS_EXPORT(batch_norm_backward, BatchNormParams, backward)
