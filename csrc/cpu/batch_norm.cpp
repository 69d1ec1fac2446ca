// Batch normalization in two passes: sums, then elements (one in evaluation, where backward makes its sums and dx
// together). Channels of NCHW that fit the cache take both passes one after the other, and memory is read once. The work is cut as BatchNormPlan says, never by the number of threads; each unit leaves its
// sums in the workspace and every channel adds its partial sums in the order of the units.
//
// Per column (a channel, or one of the pixels of it that share a row) the coefficients m, a, b of z = (x - m) a + b are
// rounded to the compute type once. m is the mean rounded, and b takes what that lost: x - m is exact where x is close
// to its mean, so a large mean costs no digits.
#include "ops/batch_norm.h"

#include "cpu/simd/activation.h"
#include "cpu/simd/stream.h"

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

// Neighbouring channels, whose coefficients are worked out together in vectors of float64.
constexpr int kGroup = 8;
struct Group {
  int64_t first;
  int count;
  double mean[kGroup], invstd[kGroup], weight[kGroup], bias[kGroup];
};

template <class E>
void widen(const void* from, int64_t at, int count, double* to) {
  for (int i = 0; i < count; ++i) to[i] = load_scalar(static_cast<const E*>(from)[at + i]);
}
void read_vector(const void* from, DType dtype, int64_t at, int count, double missing, double* to) {
  for (int i = 0; i < kGroup; ++i) to[i] = missing;
  if (!from) return;
  switch (dtype) {
    case DType::f32: return widen<float>(from, at, count, to);
    case DType::f64: return widen<double>(from, at, count, to);
    case DType::bf16: return widen<bf16>(from, at, count, to);
    case DType::f16: return widen<f16>(from, at, count, to);
    default: return;
  }
}
Group group_of(const BatchNormParams& p, int64_t first, int count) {
  Group g{first, count, {}, {}, {}, {}};
  read_vector(p.mean, p.statistics, first, count, 0, g.mean);
  read_vector(p.var, p.statistics, first, count, 1, g.invstd);
  read_vector(p.weight, p.affine, first, count, 1, g.weight);
  read_vector(p.bias, p.affine, first, count, 0, g.bias);
  for (int i = 0; i < kGroup; ++i) g.invstd[i] = 1 / __builtin_sqrt(g.invstd[i] + p.eps);
  return g;
}
// Calls f(first channel, channels) for all groups.
template <class Function>
[[gnu::always_inline]] inline void for_groups(const BatchNormParams& p, const Function& f) {
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.c >= 512)
  for (int64_t c = 0; c < p.c; c += kGroup) f(c, static_cast<int>(min64(kGroup, p.c - c)));
}

// What a mean loses where it is rounded to the compute type. An infinite one loses nothing that could be made up for.
template <class C>
double lost_of(double mean) {
  const double lost = mean - static_cast<double>(static_cast<C>(mean));
  return lost == lost ? lost : 0;
}

// Into all columns of the group's channels.
template <class C>
void spread(const BatchNormParams& p, const BatchNormPlan& plan, const Group& g, C* to, const C* values) {
  const int64_t columns = plan.columns(p);
  for (int64_t j = g.first; j < columns; j += p.c)
    std::memcpy(to + j, values, sizeof(C) * static_cast<size_t>(g.count));
}

// m, a, b of a group.
template <class C>
void set_coefficients(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<C>& to, const Group& g) {
  C m[kGroup], a[kGroup], b[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const double scale = g.invstd[i] * g.weight[i];
    m[i] = static_cast<C>(g.mean[i]), a[i] = static_cast<C>(scale);
    b[i] = static_cast<C>(g.bias[i] - lost_of<C>(g.mean[i]) * scale);
  }
  spread(p, plan, g, to.m, m), spread(p, plan, g, to.a, a), spread(p, plan, g, to.b, b);
}

// s and t of a group, and the gradients of its weights and biases, from its partial sums.
template <class C>
void set_gradients(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<C>& work, const Group& g) {
  double sum[kGroup] = {}, dot[kGroup] = {};
  for (int i = 0; i < g.count; ++i)
    for_partials(p, plan, g.first + i, [&](int64_t at, int64_t) CNNOPS_INLINE {
      sum[i] += work.sums[2 * at], dot[i] += work.sums[2 * at + 1];
    });
  const double count = static_cast<double>(p.n * p.h * p.w);
  C s[kGroup], t[kGroup];
  double dweight[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const double lost = lost_of<C>(g.mean[i]), a = g.weight[i] * g.invstd[i];
    dot[i] -= lost * sum[i];
    dweight[i] = dot[i] * g.invstd[i];
    const double slope = -a * g.invstd[i] * dweight[i] / count;
    s[i] = static_cast<C>(slope), t[i] = static_cast<C>(-a * sum[i] / count - lost * slope);
  }
  for (int i = 0; i < g.count; ++i) {
    if (p.dbias) batch_norm_set(p.dbias, p.affine, g.first + i, sum[i]);
    if (p.dweight) batch_norm_set(p.dweight, p.affine, g.first + i, dweight[i]);
  }
  spread(p, plan, g, work.s, s), spread(p, plan, g, work.t, t);
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

// Calls f(element, column of the coefficients, lanes) for the vectors of a unit of rows.
template <class C, class Function>
[[gnu::always_inline]] inline void for_vectors(const BatchNormPlan& plan, int64_t unit, const Function& f) {
  for_blocks(plan, unit, [&](const Block& block) CNNOPS_INLINE {
    for (int64_t row = 0; row < block.rows; ++row) {
      const int64_t begin = block.begin + row * block.stride;
      sweep<C>(block.columns, [&](int64_t j, int part, int) CNNOPS_INLINE { f(begin + j, block.column + j, part); });
    }
  });
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

template <class T>
void unit_statistics(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work,
                     int64_t unit) {
  const T* const x = static_cast<const T*>(p.x);
  if (!plan.planes) return block_statistics(x, plan, unit, work.sums);
  const Block piece = plane_piece(p, plan, unit);
  piece_statistics(x + piece.begin, piece.columns, work.sums + 2 * unit);
}

// Mean and variance of a channel into p.mean and p.var, from its partial sums.
template <class C>
void set_statistics(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<C>& work, int64_t c) {
  const double count = static_cast<double>(p.n * p.h * p.w);
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

// ------------------------------------------------------------------------------------------------------------ elements

// Whether what is as large as x is stored around the caches.
template <class T>
[[gnu::always_inline]] inline bool streams_images(const BatchNormParams& p) {
  return p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) >= kLargeImage;
}

// Bytes of one channel that stay in a core's cache between passes.
constexpr int64_t kCached = 512 << 10;

template <class T>
int64_t channel_bytes(const BatchNormParams& p) {
  return p.n * p.h * p.w * static_cast<int64_t>(sizeof(T)) * (p.dy ? 2 + (p.saved_y || p.residual) : 2);
}
// Whether all passes go channel by channel: planes in one piece that stay in the cache, and work for every thread.
// Results are the same either way.
template <class T>
bool channels_fit(const BatchNormParams& p, const BatchNormPlan& plan) {
  return plan.planes && plan.pieces == 1 && channel_bytes<T>(p) <= kCached &&
         (p.threads == 1 || p.c >= 2 * kGroup * p.threads);
}
// Calls f(first channel, channels) in parallel, with as many channels of a group at once as the cache holds.
template <class T, class Function>
[[gnu::always_inline]] inline void for_channels(const BatchNormParams& p, const Function& f) {
  const int64_t most = max64(min64(kCached / max64(channel_bytes<T>(p), 1), kGroup), 1);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t group = 0; group < p.c; group += kGroup)
    for (int64_t c = group; c < min64(group + kGroup, p.c); c += most) {
      f(c, static_cast<int>(min64(min64(group + kGroup, p.c) - c, most)));
      if (streams_images<T>(p)) end_streaming();
    }
}
template <class Function>
[[gnu::always_inline]] inline void for_planes(const BatchNormParams& p, int64_t first, int count, const Function& f) {
  const int64_t plane = p.h * p.w;
  for (int64_t n = 0; n < p.n; ++n)
    for (int64_t c = first; c < first + count; ++c) f(Block{(n * p.c + c) * plane, 1, plane, plane, c, n * p.c + c});
}

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
  store_output(static_cast<T*>(p.y) + i, z, part, streams_images<T>(p));
}

template <Kind kKind, class T>
[[gnu::noinline]] void normalize_piece(const BatchNormParams& params, const Workspace<compute_t<T>>& work,
                                       const Block& piece) {
  using C = compute_t<T>;
  using V = vec<C>;
  const BatchNormParams p = params;  // a copy that no store can alias
  const V m = broadcast<V>(work.m[piece.column]), a = broadcast<V>(work.a[piece.column]);
  const V b = set1<C>(work.b[piece.column]);
  sweep<C>(piece.columns,
           [&](int64_t i, int part, int) CNNOPS_INLINE { normalize<kKind, T>(p, piece.begin + i, part, m, a, b); });
}

template <Kind kKind, class T>
void normalize_unit(const BatchNormParams& params, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work,
                    int64_t unit) {
  using C = compute_t<T>;
  if (plan.planes) return normalize_piece<kKind, T>(params, work, plane_piece(params, plan, unit));
  const BatchNormParams p = params;
  for_vectors<C>(plan, unit, [&](int64_t i, int64_t k, int part) CNNOPS_INLINE {
    normalize<kKind, T>(p, i, part, load_n(work.m + k, part), load_n(work.a + k, part), load_n(work.b + k, part));
  });
}

template <Kind kKind, class T>
void normalize_all(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    normalize_unit<kKind, T>(p, plan, work, unit);
    if (streams_images<T>(p)) end_streaming();
  }
}

template <class T>
void evaluate(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  for_groups(p, [&](int64_t c, int count) CNNOPS_INLINE { set_coefficients(p, plan, work, group_of(p, c, count)); });
  switch (p.activation) {
    case Activation::none: return normalize_all<Kind::none, T>(p, plan, work);
    case Activation::relu: return normalize_all<Kind::relu, T>(p, plan, work);
    default: return normalize_all<Kind::any, T>(p, plan, work);
  }
}

// All passes over the channels of a group, one after the other while their planes are in the cache.
template <Kind kKind, class T>
void training_by_channels(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  for_channels<T>(p, [&](int64_t c, int count) CNNOPS_INLINE {
    for_planes(p, c, count, [&](const Block& plane) CNNOPS_INLINE {
      piece_statistics(static_cast<const T*>(p.x) + plane.begin, plane.columns, work.sums + 2 * plane.partial);
    });
    for (int64_t i = c; i < c + count; ++i) set_statistics(p, plan, work, i);
    set_coefficients(p, plan, work, group_of(p, c, count));
    for_planes(p, c, count, [&](const Block& plane) CNNOPS_INLINE { normalize_piece<kKind, T>(p, work, plane); });
  });
}

template <class T>
void training(const BatchNormParams& p) {
  const BatchNormPlan plan = batch_norm_plan(p);
  const Workspace<compute_t<T>> work(p);
  if (channels_fit<T>(p, plan)) {
    switch (p.activation) {
      case Activation::none: return training_by_channels<Kind::none, T>(p, plan, work);
      case Activation::relu: return training_by_channels<Kind::relu, T>(p, plan, work);
      default: return training_by_channels<Kind::any, T>(p, plan, work);
    }
  }
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) unit_statistics<T>(p, plan, work, unit);
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t c = 0; c < p.c; ++c) set_statistics(p, plan, work, c);
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
  const bool stream = streams_images<T>(p);
  if (p.dresidual) store_output(static_cast<T*>(p.dresidual) + i, dz, part, stream);
  if (!p.training && p.dx) store_output(static_cast<T*>(p.dx) + i, dz * a, part, stream);
}

template <Kind kKind, class T>
[[gnu::noinline]] void piece_sums(const BatchNormParams& params, const Workspace<compute_t<T>>& work,
                                  const Block& piece) {
  using C = compute_t<T>;
  using V = vec<C>;
  const BatchNormParams p = params;
  const V m = broadcast<V>(work.m[piece.column]), a = broadcast<V>(work.a[piece.column]);
  const V b = set1<C>(work.b[piece.column]);
  Sum<C> sum, dot;
  sweep<C>(piece.columns, [&](int64_t i, int part, int k) CNNOPS_INLINE {
    add_gradient<kKind, T>(p, piece.begin + i, part, m, a, b, sum.part[k], dot.part[k]);
  });
  work.sums[2 * piece.partial] = sum.total();
  work.sums[2 * piece.partial + 1] = dot.total();
}

template <Kind kKind, class T>
void unit_sums(const BatchNormParams& params, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work,
               int64_t unit) {
  using C = compute_t<T>;
  using V = vec<C>;
  if (plan.planes) return piece_sums<kKind, T>(params, work, plane_piece(params, plan, unit));
  const BatchNormParams p = params;
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

template <Kind kKind, class T>
[[gnu::always_inline]] inline void store_gradient(const BatchNormParams& p, int64_t i, int part, vec<compute_t<T>> m,
                                                  vec<compute_t<T>> a, vec<compute_t<T>> b, vec<compute_t<T>> s,
                                                  vec<compute_t<T>> t) {
  const vec<compute_t<T>> d = load_n(static_cast<const T*>(p.x) + i, part) - m;
  const vec<compute_t<T>> dz = gradient_of_z<kKind, T>(p, i, part, d, a, b);
  store_output(static_cast<T*>(p.dx) + i, fma(dz, a, fma(d, s, t)), part, streams_images<T>(p));
}

template <Kind kKind, class T>
[[gnu::noinline]] void piece_gradient(const BatchNormParams& params, const Workspace<compute_t<T>>& work,
                                      const Block& piece) {
  using C = compute_t<T>;
  using V = vec<C>;
  const BatchNormParams p = params;
  const V m = broadcast<V>(work.m[piece.column]), a = broadcast<V>(work.a[piece.column]);
  const V b = set1<C>(work.b[piece.column]);
  const V s = broadcast<V>(work.s[piece.column]), t = broadcast<V>(work.t[piece.column]);
  sweep<C>(piece.columns, [&](int64_t i, int part, int)
                              CNNOPS_INLINE { store_gradient<kKind, T>(p, piece.begin + i, part, m, a, b, s, t); });
}

template <Kind kKind, class T>
void unit_gradient(const BatchNormParams& params, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work,
                   int64_t unit) {
  using C = compute_t<T>;
  if (plan.planes) return piece_gradient<kKind, T>(params, work, plane_piece(params, plan, unit));
  const BatchNormParams p = params;
  for_vectors<C>(plan, unit, [&](int64_t i, int64_t k, int part) CNNOPS_INLINE {
    store_gradient<kKind, T>(p, i, part, load_n(work.m + k, part), load_n(work.a + k, part), load_n(work.b + k, part),
                             load_n(work.s + k, part), load_n(work.t + k, part));
  });
}

// kSums finds dz for the sums; kDx finds it again for dx, or none where the first pass has left it.
template <Kind kSums, Kind kDx, class T>
void backward_as(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  const bool elements = p.training && p.dx;
  BatchNormParams first = p, second = p;
  // An activation's derivative costs more than a store and a load of dz, which waits for the second pass in dx.
  if (kDx == Kind::none && elements && !p.dresidual && p.activation != Activation::none) first.dresidual = p.dx;
  if (first.dresidual) second.dy = first.dresidual;
  if (channels_fit<T>(p, plan)) {
    return for_channels<T>(p, [&](int64_t c, int count) CNNOPS_INLINE {
      const Group group = group_of(p, c, count);
      set_coefficients(p, plan, work, group);
      for_planes(p, c, count, [&](const Block& plane) CNNOPS_INLINE { piece_sums<kSums, T>(first, work, plane); });
      set_gradients(p, plan, work, group);
      if (elements)
        for_planes(p, c, count, [&](const Block& plane) CNNOPS_INLINE { piece_gradient<kDx, T>(second, work, plane); });
    });
  }
  for_groups(p, [&](int64_t c, int count) CNNOPS_INLINE { set_coefficients(p, plan, work, group_of(p, c, count)); });
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) unit_sums<kSums, T>(first, plan, work, unit);
  for_groups(p, [&](int64_t c, int count) CNNOPS_INLINE { set_gradients(p, plan, work, group_of(p, c, count)); });
  if (!elements) return;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    unit_gradient<kDx, T>(second, plan, work, unit);
    if (streams_images<T>(p)) end_streaming();
  }
}

template <class T>
void backward(const BatchNormParams& p) {
  const BatchNormPlan plan = batch_norm_plan(p);
  const Workspace<compute_t<T>> work(p);
  if (p.activation == Activation::none) return backward_as<Kind::none, Kind::none, T>(p, plan, work);
  if (p.activation != Activation::relu) {
    // Left in dx, dz of a 16-bit type would be rounded before the second pass.
    if (p.dresidual || sizeof(T) == sizeof(compute_t<T>)) return backward_as<Kind::any, Kind::none, T>(p, plan, work);
    return backward_as<Kind::any, Kind::any, T>(p, plan, work);
  }
  if (p.saved_y)
    return p.dresidual ? backward_as<Kind::relu_of_output, Kind::none, T>(p, plan, work)
                       : backward_as<Kind::relu_of_output, Kind::relu_of_output, T>(p, plan, work);
  p.dresidual ? backward_as<Kind::relu, Kind::none, T>(p, plan, work)
              : backward_as<Kind::relu, Kind::relu, T>(p, plan, work);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(batch_norm_training, BatchNormParams, training)
CNNOPS_EXPORT(batch_norm_evaluation, BatchNormParams, evaluation)
CNNOPS_EXPORT(batch_norm_backward, BatchNormParams, backward)
