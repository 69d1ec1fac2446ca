// Batch normalization in two passes: sums, then elements (one in evaluation, where backward makes its sums and dx
// together). Channels of NCHW that fit the cache take both passes one after the other, and memory is read once; each
// thread has channels of its own then, and short planes are gone through several at a time. Rows stay whole and in
// order: blocks of columns for each thread were faster from the near cache, and up to 4 times slower where the threads'
// prefetchers took lines from each other. The sums of a channel are cut as BatchNormPlan says, never by the number of
// threads: each unit leaves its own in the workspace, and every channel adds them in the order of the units.
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

// Rows of `columns` elements, `stride` apart, from element `begin` of the image on, and where their coefficients and
// partial sums are: of a block of a matrix, one each per column, from `column` and `partial` on; of planes (or pieces
// of them), which are rows here, one each per row.
struct Block {
  int64_t begin, rows, columns, stride, column, partial;
};

// Calls f(block) for the full rows of a row block, from column `first` on, and for the partial row that may follow
// them.
template <class Function>
[[gnu::always_inline]] inline void for_blocks(const BatchNormPlan& plan, int64_t row_block, int64_t first,
                                              int64_t columns, const Function& f) {
  const int64_t row = row_block * plan.block_rows, rows = min64(plan.rows - row, plan.block_rows);
  const int64_t partial = row_block * plan.width + first;
  if (rows > 0) f(Block{row * plan.width + first, rows, columns, plan.width, first, partial});
  if (row_block == plan.row_blocks - 1 && plan.tail > first)
    f(Block{plan.rows * plan.width + first, 1, min64(plan.tail - first, columns), plan.width, first, partial});
}
// The part of the matrix that a unit is.
struct Part {
  int64_t row_block, first, columns;
};
Part matrix_part(const BatchNormPlan& plan, int64_t unit) {
  const int64_t first = unit % plan.column_blocks * plan.block_columns;
  return {unit / plan.column_blocks, first, min64(plan.width - first, plan.block_columns)};
}
Block plane_piece(const BatchNormParams& p, const BatchNormPlan& plan, int64_t unit) {
  const int64_t plane = unit / plan.pieces, at = unit % plan.pieces * plan.piece;
  const int64_t length = min64(p.h * p.w - at, plan.piece);
  return {plane * p.h * p.w + at, 1, length, length, plane % p.c, unit};
}

// Elements that the partial sum of column `column` (of row block `block`) covers.
int64_t block_count(const BatchNormPlan& plan, int64_t block, int64_t column) {
  const int64_t rows = min64(plan.rows - block * plan.block_rows, plan.block_rows);
  return max64(rows, 0) + (block == plan.row_blocks - 1 && column < plan.tail);
}

// Calls f(partial index of channel c, how far on that of channel c + 1 is, elements of it) for all partial sums of a
// channel, in a fixed order; up to kGroup neighbours of it share what f is told.
template <class Function>
[[gnu::always_inline]] inline void for_partials(const BatchNormParams& p, const BatchNormPlan& plan, int64_t c,
                                                const Function& f) {
  if (plan.planes) {
    for (int64_t n = 0; n < p.n; ++n)
      for (int64_t k = 0; k < plan.pieces; ++k)
        f((n * p.c + c) * plan.pieces + k, plan.pieces, min64(p.h * p.w - k * plan.piece, plan.piece));
  } else {
    for (int64_t block = 0; block < plan.row_blocks; ++block)
      for (int64_t j = c; j < plan.width; j += p.c) f(block * plan.width + j, 1, block_count(plan, block, j));
  }
}

// Columns of a part that the partial row covers.
int64_t block_columns_of_tail(const BatchNormPlan& plan, const Part& at) {
  return at.row_block == plan.row_blocks - 1 ? plan.tail - at.first : 0;
}

template <class C>
struct Workspace {
  double *first, *second;  // of each partial: mean and squared deviations from it, or sum dz and sum dz (x - m)
  C *m, *a, *b;            // z = (x - m) a + b
  C *s, *t;                // dx = dz a + (x - m) s + t
  explicit Workspace(const BatchNormParams& p) {
    const BatchNormPlan plan = batch_norm_plan(p);
    const int64_t columns = plan.columns(p);
    first = static_cast<double*>(p.workspace);
    second = first + plan.partials();
    m = reinterpret_cast<C*>(second + plan.partials());
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

// Calls f(channel of the group, index) with indices from `at`, `step` apart.
template <class Function>
[[gnu::always_inline]] inline void for_members(int count, int64_t at, int64_t step, const Function& f) {
  if (count == kGroup && step == 1) {
    for (int i = 0; i < kGroup; ++i) f(i, at + i);
  } else {
    for (int i = 0; i < count; ++i) f(i, at + i * step);
  }
}

template <class E>
[[gnu::always_inline]] inline void widen(const void* from, int64_t at, int count, double* to) {
  for_members(count, at, 1,
              [&](int i, int64_t k) CNNOPS_INLINE { to[i] = load_scalar(static_cast<const E*>(from)[k]); });
}
[[gnu::always_inline]] inline void read_vector(const void* from, DType dtype, int64_t at, int count, double missing,
                                               double* to) {
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
[[gnu::always_inline]] inline void write_vector(void* to, DType dtype, int64_t at, int count, const double* from) {
  if (!to) return;
  if (dtype == DType::f32)
    for_members(count, at, 1,
                [&](int i, int64_t k) CNNOPS_INLINE { static_cast<float*>(to)[k] = static_cast<float>(from[i]); });
  else
    for (int i = 0; i < count; ++i) batch_norm_set(to, dtype, at + i, from[i]);
}
// `var` in the place of invstd becomes that.
[[gnu::always_inline]] inline void finish_group(const BatchNormParams& p, Group& g) {
  read_vector(p.weight, p.affine, g.first, g.count, 1, g.weight);
  read_vector(p.bias, p.affine, g.first, g.count, 0, g.bias);
  for (int i = 0; i < kGroup; ++i) g.invstd[i] = 1 / __builtin_sqrt(g.invstd[i] + p.eps);
}
Group group_of(const BatchNormParams& p, int64_t first, int count) {
  Group g;
  g.first = first, g.count = count;
  read_vector(p.mean, p.statistics, first, count, 0, g.mean);
  read_vector(p.var, p.statistics, first, count, 1, g.invstd);
  finish_group(p, g);
  return g;
}
// Calls f(first channel, channels) for the groups of some channels.
template <class Function>
[[gnu::always_inline]] inline void for_groups_of(int64_t first, int64_t channels, const Function& f) {
  for (int64_t c = 0; c < channels; c += kGroup) f(first + c, static_cast<int>(min64(kGroup, channels - c)));
}
// Calls f(first channel, channels) for all groups, in a parallel region.
template <class Function>
[[gnu::always_inline]] inline void for_groups(const BatchNormParams& p, const Function& f) {
#pragma omp for schedule(static)
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
  for_partials(p, plan, g.first, [&](int64_t at, int64_t step, int64_t) CNNOPS_INLINE {
    for_members(g.count, at, step,
                [&](int i, int64_t k) CNNOPS_INLINE { sum[i] += work.first[k], dot[i] += work.second[k]; });
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
  write_vector(p.dbias, p.affine, g.first, g.count, sum);
  write_vector(p.dweight, p.affine, g.first, g.count, dweight);
  spread(p, plan, g, work.s, s), spread(p, plan, g, work.t, t);
}

// ---------------------------------------------------------------------------------------------------------------- sums

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
  // Short planes are all rest: vectors of it that wait for one another would be most of their time.
  if (i + 2 * kLanes <= n) {
    f(i, kLanes, 0);
    f(i + kLanes, kLanes, 1);
    i += 2 * kLanes;
  }
  if (i + kLanes <= n) {
    f(i, kLanes, 2);
    i += kLanes;
  }
  if (i < n) f(i, static_cast<int>(n - i), 3);
}

// Calls f(element, lanes) over n elements, where nothing is added up. `lanes` is a constant but in the last call.
template <class C, class Function>
[[gnu::always_inline]] inline void each(int64_t n, const Function& f) {
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) f(i, lanes<C>);
  if (i < n) f(i, static_cast<int>(n - i));
}

// Sums over n elements, in float64: of runs of them in the compute type, in four vectors. f(element, lanes, sums) adds to
// its vectors sums[0], ..., which are one of the four.
template <class C, int kSums, class Function>
[[gnu::always_inline]] inline void sum_up(int64_t n, double (&sums)[kSums], const Function& f) {
  constexpr int64_t kRun = 64 * lanes<C>;
  vec<C> run[4][kSums];
  const auto add = [&](int64_t from) CNNOPS_INLINE {
    for (int k = 0; k < 4; ++k)
      for (int s = 0; s < kSums; ++s) run[k][s] = vec<C>{};
    sweep<C>(min64(n - from, kRun), [&](int64_t i, int part, int k) CNNOPS_INLINE { f(from + i, part, run[k]); });
    for (int s = 0; s < kSums; ++s) run[0][s] = (run[0][s] + run[1][s]) + (run[2][s] + run[3][s]);
  };
  vec<double> total[kSums] = {};
  int64_t from = 0;
  do {
    add(from);
    if constexpr (kSums == 2)  // the sums of short planes' lanes are much of their time
      if (n <= kRun) return sum_lanes_of_both<C>(run[0][0], run[0][1], sums);
    for (int s = 0; s < kSums; ++s) total[s] += folded(run[0][s]);
    from += kRun;
  } while (from < n);
  for (int s = 0; s < kSums; ++s) sums[s] = sum_lanes<double>(total[s]);
}

// Calls f(element, column of the coefficients, lanes) for the vectors of a block, row by row.
template <class C, class Function>
[[gnu::always_inline]] inline void for_vectors(const Block& block, const Function& f) {
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t begin = block.begin + row * block.stride;
    each<C>(block.columns, [&](int64_t j, int part) CNNOPS_INLINE { f(begin + j, block.column + j, part); });
  }
}

// Rows that are added up together.
constexpr int kTogether = 4;

// Prefetchers follow few rows at a time, so each tile asks for the lines of later ones: this many bytes beyond the next
// tile, and for the second cache. Asked for by two tiles ahead into the first, which holds no eight rows of two images,
// memory was read at half the speed.
constexpr int64_t kAhead = 16 << 10;
// Of the line where element i is, if i is the first of a vector at column j with which a line begins.
template <class T>
[[gnu::always_inline]] inline void fetch(const void* image, int64_t i, int64_t j, int64_t stride) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (lanes<compute_t<T>> < kLine && j % kLine != 0) return;
  __builtin_prefetch(static_cast<const T*>(image) + i + kTogether * stride + kAhead / static_cast<int64_t>(sizeof(T)),
                     0, 2);
}

// How much of a block its mean is first guessed from; the deviations from the guess also correct it. Where a piece of a
// plane is summed twice, the first sum is one of float64, and the mean: between large terms that cancel, all digits count.
constexpr int64_t kGuessRows = 32;
int64_t guess_elements(int64_t of) { return min64(round_up(min64(of / 16, 255) + 1, 16), of); }

// A guess that has few bits leaves the deviations of 16-bit numbers exact, and sums of them nearly so.
template <class T>
[[gnu::always_inline]] inline vec<compute_t<T>> rounded_to(vec<compute_t<T>> guess) {
  if constexpr (sizeof(T) != 2) return guess;
  T rounded[lanes<compute_t<T>>];
  store(rounded, guess);
  return load(rounded);
}

// Elements whose first is guess enough: sums of lanes are dear. (float16, which has three bits more, would lose some.)
constexpr int64_t kShortPlane = 64;

// What float64 must be larger by than a number to keep just a bit more of it than T does.
template <class T>
constexpr double kCoarse = std::is_same_v<T, bf16> ? double(int64_t{1} << 44) : double(int64_t{1} << 41);

#if CNNOPS_ISA_avx512
constexpr int64_t kGroupPiece = 1024;

// The sums of the lanes of eight vectors a and eight vectors b, the last four lanes of each in float64: a third of the steps
// that they take one by one.
void sum_lanes_of_group(const vec<float>* a, const vec<float>* b, vec<double>* sums) {
  const vec<float>* const both[] = {a, b};
  for (const vec<float>* v : both) {
    __m512d four[2];  // of four vectors: sums of two lanes
    for (int i = 0; i < 2; ++i) {
      __m512 two[2];  // of two vectors: sums of eight lanes
      for (int j = 0; j < 2; ++j) {
        const __m512 even = reinterpret_cast<__m512>(v[4 * i + 2 * j]),
                     odd = reinterpret_cast<__m512>(v[4 * i + 2 * j + 1]);
        two[j] = _mm512_add_ps(_mm512_shuffle_f32x4(even, odd, 0x44), _mm512_shuffle_f32x4(even, odd, 0xee));
      }
      const __m512 lanes =
          _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes));
      const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1));
      four[i] = _mm512_add_pd(_mm512_unpacklo_pd(low, high), _mm512_unpackhi_pd(low, high));
    }
    const __m512d mixed =
        _mm512_add_pd(_mm512_shuffle_f64x2(four[0], four[1], 0x88), _mm512_shuffle_f64x2(four[0], four[1], 0xdd));
    *sums++ = reinterpret_cast<vec<double>>(_mm512_permutexvar_pd(_mm512_set_epi64(7, 5, 6, 4, 3, 1, 2, 0), mixed));
  }
}

// piece_statistics of 16-bit numbers, pieces no longer than a run of sum_up, kGroup at a time. Each piece's sums are its own,
// whatever is in the group beside it.
template <class T>
[[gnu::noinline]] void group_statistics(const T* x, const Block& pieces, const Workspace<float>& work) {
  static_assert(kGroup == lanes<double>);
  using V = vec<float>;
  const int64_t n = pieces.columns, some = guess_elements(n);
  const double count = static_cast<double>(n), reciprocal = 1 / count, some_reciprocal = 1 / static_cast<double>(some);
  V first[kGroup], second[kGroup];
  vec<double> sums[2];
  for (int64_t r0 = 0; r0 < pieces.rows; r0 += kGroup) {
    const int rows = static_cast<int>(min64(pieces.rows - r0, kGroup));
    for (int r = rows; r < kGroup; ++r) first[r] = second[r] = V{};
    float guess[kGroup] = {};
    const T* const from = x + pieces.begin + r0 * pieces.stride;
    const auto add = [&](auto elements, const auto& f) CNNOPS_INLINE {
      for (int r = 0; r < rows; ++r) {
        const T* const piece = from + r * pieces.stride;
        V run[4][2] = {};
        const V about = set1<float>(guess[r]);
        sweep<float>(elements, [&](int64_t i, int part, int k) CNNOPS_INLINE { f(piece + i, part, about, run[k]); });
        first[r] = (run[0][0] + run[1][0]) + (run[2][0] + run[3][0]);
        second[r] = (run[0][1] + run[1][1]) + (run[2][1] + run[3][1]);
      }
      sum_lanes_of_group(first, second, sums);
    };
    if (std::is_same_v<T, bf16> && n <= kShortPlane) {
      for (int r = 0; r < rows; ++r) guess[r] = load_scalar(from[r * pieces.stride]);
    } else {
      add(some, [&](const T* at, int part, const V&, V* to) CNNOPS_INLINE {
        const V v = load_n(at, part);
        to[0] += v;
        to[1] += v < V{} ? -v : v;
      });
      const vec<double> coarse = sums[1] * some_reciprocal * kCoarse<T>;
      const vec<double> means = (sums[0] * some_reciprocal + coarse) - coarse;
      for (int r = 0; r < rows; ++r) guess[r] = static_cast<float>(means[r]);
    }
    add(n, [&](const T* at, int part, const V& about, V* to) CNNOPS_INLINE {
      const V d = keep_n<float>(load_n(at, part) - about, part);
      to[0] = fma(d, d, to[0]);
      to[1] += d;
    });
    const vec<double> e = sums[1] * reciprocal;
    store_n(work.first + pieces.partial + r0, load_float64_n(guess, kGroup) + e, rows);
    store_n(work.second + pieces.partial + r0, sums[0] - e * e * count, rows);
  }
}
#endif

// Of up to kGroup pieces.
template <class T>
[[gnu::noinline]] void piece_statistics(const T* x, const Block& pieces, const Workspace<compute_t<T>>& work) {
  using C = compute_t<T>;
  constexpr bool kOnce = sizeof(T) == 2;
  const int64_t n = pieces.columns, some = guess_elements(n);
#if CNNOPS_ISA_avx512
  if constexpr (kOnce)
    if (n <= kGroupPiece) return group_statistics(x, pieces, work);
#endif
  const double count = static_cast<double>(n), reciprocal = 1 / count, some_reciprocal = 1 / static_cast<double>(some);
  double means[kGroup];
  for (int64_t r = 0; r < pieces.rows; ++r) {
    const T* const from = x + pieces.begin + r * pieces.stride;
    if constexpr (kOnce) {
      if (std::is_same_v<T, bf16> && n <= kShortPlane) {
        means[r] = load_scalar(from[0]);
        continue;
      }
      double sums[2];
      sum_up<C>(some, sums, [&](int64_t i, int part, vec<C>* to) CNNOPS_INLINE {
        const vec<C> v = load_n(from + i, part);
        to[0] += v;
        to[1] += v < vec<C>{} ? -v : v;
      });
      // To a multiple of the spacing of T's numbers where they are as large as these.
      const double mean = sums[0] * some_reciprocal, coarse = sums[1] * some_reciprocal * kCoarse<T>;
      means[r] = (mean + coarse) - coarse;
    } else {
      vec<double> sum[4] = {};
      sweep<double>(n, [&](int64_t i, int part, int k) CNNOPS_INLINE { sum[k] += load_float64_n(from + i, part); });
      means[r] = sum_lanes<double>((sum[0] + sum[1]) + (sum[2] + sum[3])) * reciprocal;
    }
  }
  for (int64_t r = 0; r < pieces.rows; ++r) {
    const T* const from = x + pieces.begin + r * pieces.stride;
    const C guess = static_cast<C>(means[r]);
    const vec<C> about = set1<C>(guess);
    double sums[kOnce ? 2 : 1];
    sum_up<C>(n, sums, [&](int64_t i, int part, vec<C>* to) CNNOPS_INLINE {
      const vec<C> d = keep_n<C>(load_n(from + i, part) - about, part);
      to[0] = fma(d, d, to[0]);
      if constexpr (kOnce) to[1] += d;
    });
    const double e = kOnce ? sums[kOnce] * reciprocal : means[r] - guess;
    work.first[pieces.partial + r] = guess + e;
    work.second[pieces.partial + r] = sums[0] - e * e * count;
  }
}

// Adds rows to accumulators in memory, kTogether at a time: f(row, rows, column, lanes, sums), where `rows` is a constant.
template <class C, int kSums, class Function>
[[gnu::always_inline]] inline void add_rows(const Block& block, C (*sums)[kColumns], const Function& f) {
  const auto columns = [&](int64_t row, auto rows, int64_t j, int part) CNNOPS_INLINE {
    vec<C> total[kSums] = {};  // of their own first: sums of fewer terms have smaller errors
    f(row, rows, j, part, total);
    for (int k = 0; k < kSums; ++k) store(sums[k] + j, load(sums[k] + j) + total[k]);
  };
  const auto across = [&](int64_t row, auto rows) CNNOPS_INLINE {
    int64_t j = 0;
    for (; j + lanes<C> <= block.columns; j += lanes<C>) columns(row, rows, j, lanes<C>);
    if (j < block.columns) columns(row, rows, j, static_cast<int>(block.columns - j));
  };
  int64_t row = 0;
  for (; row + kTogether <= block.rows; row += kTogether) across(row, std::integral_constant<int, kTogether>{});
  for (; row < block.rows; ++row) across(row, std::integral_constant<int, 1>{});
}

template <class T>
[[gnu::noinline]] void block_statistics(const T* x, const BatchNormPlan& plan, const Part& at,
                                        const Workspace<compute_t<T>>& work) {
  using C = compute_t<T>;
  static_assert(kColumns % lanes<float> == 0);
  alignas(64) C guess[1][kColumns], sums[2][kColumns];
  for (int64_t j = 0; j < round_up(at.columns, lanes<C>); ++j) guess[0][j] = sums[0][j] = sums[1][j] = 0;
  bool begun = false;
  for_blocks(plan, at.row_block, at.first, at.columns, [&](const Block& block) CNNOPS_INLINE {
    if (begun) return;  // the partial row, whose columns the guess is for as well
    begun = true;
    Block some = block;
    some.rows = min64(block.rows, kGuessRows);
    add_rows<C, 1>(some, guess, [&](int64_t row, auto rows, int64_t j, int part, vec<C>* total) CNNOPS_INLINE {
      for (int r = 0; r < decltype(rows)::value; ++r) {
        const int64_t i = block.begin + (row + r) * block.stride + j;
        fetch<T>(x, i, j, block.stride);
        total[0] += load_n(x + i, part);
      }
    });
    const C reciprocal = 1 / static_cast<C>(some.rows);
    for (int64_t j = 0; j < at.columns; j += lanes<C>)
      store(guess[0] + j, rounded_to<T>(load(guess[0] + j) * reciprocal));
  });
  for_blocks(plan, at.row_block, at.first, at.columns, [&](const Block& block) CNNOPS_INLINE {
    add_rows<C, 2>(block, sums, [&](int64_t row, auto rows, int64_t j, int part, vec<C>* total) CNNOPS_INLINE {
      const vec<C> about = load(guess[0] + j);
      for (int r = 0; r < decltype(rows)::value; ++r) {
        const int64_t i = block.begin + (row + r) * block.stride + j;
        fetch<T>(x, i, j, block.stride);
        const vec<C> d = keep_n<C>(load_n(x + i, part) - about, part);
        total[0] += d;
        total[1] = fma(d, d, total[1]);
      }
    });
  });
  // The tail's columns have a row more than the others.
  const int64_t partial = at.row_block * plan.width + at.first;
  const int64_t longer = min64(max64(block_columns_of_tail(plan, at), 0), at.columns);
  for (int64_t from = 0, to = longer; from < at.columns; from = to, to = at.columns) {
    if (from == to) continue;
    const double count = static_cast<double>(block_count(plan, at.row_block, at.first + from));
    const double reciprocal = count > 0 ? 1 / count : 0;
    for (int64_t j = from; j < to; ++j) {
      const double e = sums[0][j] * reciprocal;
      work.first[partial + j] = guess[0][j] + e;
      work.second[partial + j] = sums[1][j] - e * e * count;
    }
  }
}

template <class T>
void unit_statistics(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work,
                     int64_t unit) {
  const T* const x = static_cast<const T*>(p.x);
  if (!plan.planes) return block_statistics(x, plan, matrix_part(plan, unit), work);
  piece_statistics(x, plane_piece(p, plan, unit), work);
}

// Mean and variance of a group into p.mean and p.var, from its partial sums.
template <class C>
Group set_statistics(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<C>& work, int64_t first,
                     int count) {
  Group g;
  g.first = first, g.count = count;
  const double elements = static_cast<double>(p.n * p.h * p.w);
  double squares[kGroup] = {};
  for (int i = 0; i < kGroup; ++i) g.mean[i] = 0;
  for_partials(p, plan, first, [&](int64_t at, int64_t step, int64_t n) CNNOPS_INLINE {
    for_members(count, at, step,
                [&](int i, int64_t k) CNNOPS_INLINE { g.mean[i] += work.first[k] * static_cast<double>(n); });
  });
  for (int i = 0; i < kGroup; ++i) g.mean[i] /= elements;
  for_partials(p, plan, first, [&](int64_t at, int64_t step, int64_t n) CNNOPS_INLINE {
    for_members(count, at, step, [&](int i, int64_t k) CNNOPS_INLINE {
      const double d = work.first[k] - g.mean[i];
      squares[i] += work.second[k] + d * d * static_cast<double>(n);
    });
  });
  for (int i = 0; i < kGroup; ++i) g.invstd[i] = squares[i] > 0 || squares[i] != squares[i] ? squares[i] / elements : 0;
  for (int i = 0; i < count; ++i) {
    static_cast<double*>(p.mean)[first + i] = g.mean[i];
    static_cast<double*>(p.var)[first + i] = g.invstd[i];
  }
  finish_group(p, g);
  return g;
}

// ------------------------------------------------------------------------------------------------------------ elements

// Whether what is as large as x is stored around the caches: where all images together, of which forward has x and y, are
// as large as two large ones.
template <class T>
[[gnu::always_inline]] inline bool streams_images(const BatchNormParams& p) {
  const int64_t images = 2 + (p.dy != nullptr) + (p.saved_y || p.residual) + (p.dresidual != nullptr);
  return images * (p.n * p.c * p.h * p.w) * static_cast<int64_t>(sizeof(T)) >= 2 * kLargeImage;
}

// Bytes of what both passes read that stay in a core's caches between them, and of those that are near.
constexpr int64_t kCached = 4 << 20, kNear = 512 << 10;

// Bytes of `elements` elements of each tensor that both passes read.
template <class T>
int64_t bytes_read(const BatchNormParams& p, int64_t elements) {
  return elements * static_cast<int64_t>(sizeof(T)) *
         (p.dy ? 2 + (p.saved_y || p.residual) : 1 + (p.residual != nullptr));
}
// Whether all passes go channel by channel: what they read of one stays in the cache, and there is work for every
// thread. Results are the same either way.
template <class T>
bool channels_fit(const BatchNormParams& p, const BatchNormPlan& plan) {
  return plan.planes && bytes_read<T>(p, p.n * p.h * p.w) <= kCached && p.c >= 4 * p.threads;
}
// Calls f(first channel, channels) in parallel, with as many channels at once as the near cache holds: the longer the
// stretches of memory, the faster small planes are read (7 x 7, eight at a time: .6 to .9 times as fast).
template <class T, class Function>
[[gnu::always_inline]] inline void for_channels(const BatchNormParams& p, const Function& f) {
  const int64_t fit = max64(kNear / max64(bytes_read<T>(p, p.n * p.h * p.w), 1), 1);
  const int64_t most = fit < kGroup ? fit : fit / kGroup * kGroup;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int thread = 0; thread < p.threads; ++thread) {
    const int64_t end = p.c * (thread + 1) / p.threads;
    for (int64_t c = p.c * thread / p.threads; c < end; c += most) {
      f(c, static_cast<int>(min64(end - c, most)));
      if (streams_images<T>(p)) end_streaming();
    }
  }
}
// Calls f(block) for the planes of some channels; the second pass begins with what the first has read last.
template <bool kSecond, class Function>
[[gnu::always_inline]] inline void for_planes(const BatchNormParams& p, const BatchNormPlan& plan, int64_t first,
                                              int count, const Function& f) {
  const int64_t plane = p.h * p.w;
  for (int64_t i = 0; i < p.n; ++i) {
    const int64_t n = kSecond ? p.n - 1 - i : i, at = n * p.c + first;
    if (plan.pieces == 1) {
      f(Block{at * plane, count, plane, plane, first, at});
      continue;
    }
    const int64_t pieces = count * plan.pieces;
    for (int64_t k = 0; k < pieces; ++k) f(plane_piece(p, plan, at * plan.pieces + (kSecond ? pieces - 1 - k : k)));
  }
}

// Calls f(unit) for all units, in a parallel region.
template <class T, class Function>
[[gnu::always_inline]] inline void for_units(const BatchNormParams& p, const BatchNormPlan& plan, const Function& f) {
#pragma omp for schedule(static)
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    f(unit);
    if (streams_images<T>(p)) end_streaming();
  }
}

// none and relu cost less than the jump that chooses among the others, and the call; silu is in many networks.
enum class Kind { none, relu, relu_of_output, silu, any };

template <class C>
[[gnu::noinline]] vec<C> activate_any(vec<C> z, Activation a) {
  return activate<C>(z, a);
}
template <class C>
[[gnu::noinline]] vec<C> derivative_any(vec<C> z, Activation a, bool of_output) {
  return of_output ? derivative_of_output<C>(z, a) : derivative<C>(z, a);
}

template <Kind kKind, class T>
[[gnu::always_inline]] inline vec<compute_t<T>> normalized(const BatchNormParams& p, int64_t i, int part,
                                                           vec<compute_t<T>> m, vec<compute_t<T>> a,
                                                           vec<compute_t<T>> b) {
  using C = compute_t<T>;
  vec<C> z = fma(load_n(static_cast<const T*>(p.x) + i, part) - m, a, b);
  if (p.residual) z += load_n(static_cast<const T*>(p.residual) + i, part);
  if constexpr (kKind == Kind::relu) z = activate<Activation::relu, C>(z);
  if constexpr (kKind == Kind::silu) z = activate<Activation::silu, C>(z);
  if constexpr (kKind == Kind::any) z = activate_any<C>(z, p.activation);
  return z;
}
template <Kind kKind, class T>
[[gnu::always_inline]] inline void normalize(const BatchNormParams& p, int64_t i, int part, vec<compute_t<T>> m,
                                             vec<compute_t<T>> a, vec<compute_t<T>> b) {
  store_output(static_cast<T*>(p.y) + i, normalized<kKind, T>(p, i, part, m, a, b), part, streams_images<T>(p));
}

// Two vectors next to each other.
template <class T>
[[gnu::always_inline]] inline void store_both(T* p, vec<compute_t<T>> first, vec<compute_t<T>> second) {
#if CNNOPS_ISA_avx512
  if constexpr (std::is_same_v<T, bf16>) {  // one store for both
    _mm512_storeu_si512(p, narrow_both(first, second));
    return;
  }
#endif
  store(p, first), store(p + lanes<compute_t<T>>, second);
}

template <Kind kKind, class T>
[[gnu::noinline]] void normalize_piece(const BatchNormParams& params, const Workspace<compute_t<T>>& workspace,
                                       const Block& piece) {
  using C = compute_t<T>;
  using V = vec<C>;
  const BatchNormParams p = params;  // a copy that no store can alias
  const Workspace<compute_t<T>> work = workspace;
  const Block all = piece;
  // Short planes in a row: the last vector of one may reach into the next one, which is stored after it. Vectors of a part
  // were a third of the time that 7 x 7 took.
  const bool overlaps = sizeof(T) == 2 && all.columns >= lanes<C> && all.stride == all.columns && !streams_images<T>(p);
  for (int64_t r = 0; r < all.rows; ++r) {
    const int64_t begin = all.begin + r * all.stride, c = all.column + r;
    const V m = set1<C>(work.m[c]), a = set1<C>(work.a[c]), b = set1<C>(work.b[c]);
    if (overlaps && r + 1 < all.rows) {
      T* const y = static_cast<T*>(p.y) + begin;
      int64_t i = 0;
      for (; i + lanes<C> < all.columns; i += 2 * lanes<C>)
        store_both(y + i, normalized<kKind, T>(p, begin + i, lanes<C>, m, a, b),
                   normalized<kKind, T>(p, begin + i + lanes<C>, lanes<C>, m, a, b));
      if (i < all.columns) store(y + i, normalized<kKind, T>(p, begin + i, lanes<C>, m, a, b));
      continue;
    }
    each<C>(all.columns, [&](int64_t i, int part) CNNOPS_INLINE { normalize<kKind, T>(p, begin + i, part, m, a, b); });
  }
}

template <Kind kKind, class T>
[[gnu::noinline]] void normalize_part(const BatchNormParams& params, const BatchNormPlan& plan,
                                      const Workspace<compute_t<T>>& workspace, const Part& at) {
  using C = compute_t<T>;
  const BatchNormParams p = params;
  const Workspace<compute_t<T>> work = workspace;
  for_blocks(plan, at.row_block, at.first, at.columns, [&](const Block& block) CNNOPS_INLINE {
    for_vectors<C>(block, [&](int64_t i, int64_t k, int part) CNNOPS_INLINE {
      normalize<kKind, T>(p, i, part, load_n(work.m + k, part), load_n(work.a + k, part), load_n(work.b + k, part));
    });
  });
}

template <Kind kKind, class T>
void normalize_unit(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work,
                    int64_t unit) {
  if (plan.planes) return normalize_piece<kKind, T>(p, work, plane_piece(p, plan, unit));
  normalize_part<kKind, T>(p, plan, work, matrix_part(plan, unit));
}

template <Kind kKind, class T>
void training_as(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
  const T* const x = static_cast<const T*>(p.x);
  const auto group = [&](int64_t c, int count)
                         CNNOPS_INLINE { set_coefficients(p, plan, work, set_statistics(p, plan, work, c, count)); };
  if (channels_fit<T>(p, plan)) {
    return for_channels<T>(p, [&](int64_t c, int count) CNNOPS_INLINE {
      for_planes<false>(p, plan, c, count, [&](const Block& planes) CNNOPS_INLINE {
        for_groups_of(0, planes.rows, [&](int64_t r, int rows) CNNOPS_INLINE {
          Block some = planes;
          some.begin += r * planes.stride, some.rows = rows, some.partial += r;
          piece_statistics(x, some, work);
        });
      });
      for_groups_of(c, count, group);
      for_planes<true>(p, plan, c, count,
                       [&](const Block& planes) CNNOPS_INLINE { normalize_piece<kKind, T>(p, work, planes); });
    });
  }
#pragma omp parallel num_threads(p.threads)
  {
    for_units<T>(p, plan, [&](int64_t unit) CNNOPS_INLINE { unit_statistics<T>(p, plan, work, unit); });
    for_groups(p, group);
    for_units<T>(p, plan, [&](int64_t unit) CNNOPS_INLINE { normalize_unit<kKind, T>(p, plan, work, unit); });
  }
}

template <class T>
void training(const BatchNormParams& p) {
  const BatchNormPlan plan = batch_norm_plan(p);
  const Workspace<compute_t<T>> work(p);
  switch (p.activation) {
    case Activation::none: return training_as<Kind::none, T>(p, plan, work);
    case Activation::relu: return training_as<Kind::relu, T>(p, plan, work);
    case Activation::silu: return training_as<Kind::silu, T>(p, plan, work);
    default: return training_as<Kind::any, T>(p, plan, work);
  }
}

template <Kind kKind, class T>
void evaluation_as(const BatchNormParams& p, const BatchNormPlan& plan, const Workspace<compute_t<T>>& work) {
#pragma omp parallel num_threads(p.threads)
  {
    for_groups(p, [&](int64_t c, int count) CNNOPS_INLINE { set_coefficients(p, plan, work, group_of(p, c, count)); });
    for_units<T>(p, plan, [&](int64_t unit) CNNOPS_INLINE { normalize_unit<kKind, T>(p, plan, work, unit); });
  }
}

template <class T>
void evaluation(const BatchNormParams& p) {
  const BatchNormPlan plan = batch_norm_plan(p);
  const Workspace<compute_t<T>> work(p);
  switch (p.activation) {
    case Activation::none: return evaluation_as<Kind::none, T>(p, plan, work);
    case Activation::relu: return evaluation_as<Kind::relu, T>(p, plan, work);
    case Activation::silu: return evaluation_as<Kind::silu, T>(p, plan, work);
    default: return evaluation_as<Kind::any, T>(p, plan, work);
  }
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
    if constexpr (kKind == Kind::silu) return dy * derivative<Activation::silu, C>(z);
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
[[gnu::noinline]] void piece_sums(const BatchNormParams& params, const Workspace<compute_t<T>>& workspace,
                                  const Block& piece) {
  using C = compute_t<T>;
  using V = vec<C>;
  const BatchNormParams p = params;
  const Workspace<compute_t<T>> work = workspace;
  const Block all = piece;
  for (int64_t r = 0; r < all.rows; ++r) {
    const int64_t begin = all.begin + r * all.stride, c = all.column + r;
    const V m = set1<C>(work.m[c]), a = set1<C>(work.a[c]), b = set1<C>(work.b[c]);
    double sums[2];
    sum_up<C>(all.columns, sums, [&](int64_t i, int part, V* to) CNNOPS_INLINE {
      add_gradient<kKind, T>(p, begin + i, part, m, a, b, to[0], to[1]);
    });
    work.first[all.partial + r] = sums[0];
    work.second[all.partial + r] = sums[1];
  }
}

template <Kind kKind, class T>
[[gnu::noinline]] void part_sums(const BatchNormParams& params, const BatchNormPlan& plan,
                                 const Workspace<compute_t<T>>& workspace, const Part& at) {
  using C = compute_t<T>;
  using V = vec<C>;
  const BatchNormParams p = params;
  const Workspace<compute_t<T>> work = workspace;
  alignas(64) C sums[2][kColumns];
  for (int64_t j = 0; j < round_up(at.columns, lanes<C>); ++j) sums[0][j] = sums[1][j] = 0;
  for_blocks(plan, at.row_block, at.first, at.columns, [&](const Block& block) CNNOPS_INLINE {
    add_rows<C, 2>(block, sums, [&](int64_t row, auto rows, int64_t j, int part, V* total) CNNOPS_INLINE {
      const int64_t k = block.column + j;
      const V m = load_n(work.m + k, part), a = load_n(work.a + k, part), b = load_n(work.b + k, part);
      for (int r = 0; r < decltype(rows)::value; ++r) {
        const int64_t i = block.begin + (row + r) * block.stride + j;
        fetch<T>(p.x, i, j, block.stride);
        fetch<T>(p.dy, i, j, block.stride);
        if (kKind != Kind::none && p.saved_y) fetch<T>(p.saved_y, i, j, block.stride);
        add_gradient<kKind, T>(p, i, part, m, a, b, total[0], total[1]);
      }
    });
  });
  const int64_t partial = at.row_block * plan.width + at.first;
  for (int64_t j = 0; j < at.columns; ++j) work.first[partial + j] = sums[0][j], work.second[partial + j] = sums[1][j];
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
[[gnu::noinline]] void piece_gradient(const BatchNormParams& params, const Workspace<compute_t<T>>& workspace,
                                      const Block& piece) {
  using C = compute_t<T>;
  using V = vec<C>;
  const BatchNormParams p = params;
  const Workspace<compute_t<T>> work = workspace;
  const Block all = piece;
  for (int64_t r = 0; r < all.rows; ++r) {
    const int64_t begin = all.begin + r * all.stride, c = all.column + r;
    const V m = set1<C>(work.m[c]), a = set1<C>(work.a[c]), b = set1<C>(work.b[c]);
    const V s = set1<C>(work.s[c]), t = set1<C>(work.t[c]);
    each<C>(all.columns,
            [&](int64_t i, int part) CNNOPS_INLINE { store_gradient<kKind, T>(p, begin + i, part, m, a, b, s, t); });
  }
}

template <Kind kKind, class T>
[[gnu::noinline]] void part_gradient(const BatchNormParams& params, const BatchNormPlan& plan,
                                     const Workspace<compute_t<T>>& workspace, const Part& at) {
  using C = compute_t<T>;
  const BatchNormParams p = params;
  const Workspace<compute_t<T>> work = workspace;
  for_blocks(plan, at.row_block, at.first, at.columns, [&](const Block& block) CNNOPS_INLINE {
    for_vectors<C>(block, [&](int64_t i, int64_t k, int part) CNNOPS_INLINE {
      store_gradient<kKind, T>(p, i, part, load_n(work.m + k, part), load_n(work.a + k, part), load_n(work.b + k, part),
                               load_n(work.s + k, part), load_n(work.t + k, part));
    });
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
      for_groups_of(c, count, [&](int64_t from, int some) CNNOPS_INLINE {
        set_coefficients(p, plan, work, group_of(p, from, some));
      });
      for_planes<false>(p, plan, c, count,
                        [&](const Block& planes) CNNOPS_INLINE { piece_sums<kSums, T>(first, work, planes); });
      for_groups_of(c, count, [&](int64_t from, int some) CNNOPS_INLINE {
        set_gradients(p, plan, work, group_of(p, from, some));
      });
      if (!elements) return;
      for_planes<true>(p, plan, c, count,
                       [&](const Block& planes) CNNOPS_INLINE { piece_gradient<kDx, T>(second, work, planes); });
    });
  }
#pragma omp parallel num_threads(p.threads)
  {
    for_groups(p, [&](int64_t c, int count) CNNOPS_INLINE { set_coefficients(p, plan, work, group_of(p, c, count)); });
    for_units<T>(p, plan, [&](int64_t unit) CNNOPS_INLINE {
      if (plan.planes)
        piece_sums<kSums, T>(first, work, plane_piece(p, plan, unit));
      else
        part_sums<kSums, T>(first, plan, work, matrix_part(plan, unit));
    });
    for_groups(p, [&](int64_t c, int count) CNNOPS_INLINE { set_gradients(p, plan, work, group_of(p, c, count)); });
    if (elements) {
      for_units<T>(p, plan, [&](int64_t unit) CNNOPS_INLINE {
        if (plan.planes)
          piece_gradient<kDx, T>(second, work, plane_piece(p, plan, unit));
        else
          part_gradient<kDx, T>(second, plan, work, matrix_part(plan, unit));
      });
    }
  }
}

template <class T>
void backward(const BatchNormParams& p) {
  const BatchNormPlan plan = batch_norm_plan(p);
  const Workspace<compute_t<T>> work(p);
  if (p.activation == Activation::none) return backward_as<Kind::none, Kind::none, T>(p, plan, work);
  if (p.activation != Activation::relu) {
    const bool silu = p.activation == Activation::silu;
    // Left in dx, dz of a 16-bit type would be rounded before the second pass.
    if (p.dresidual || sizeof(T) == sizeof(compute_t<T>))
      return silu ? backward_as<Kind::silu, Kind::none, T>(p, plan, work)
                  : backward_as<Kind::any, Kind::none, T>(p, plan, work);
    return silu ? backward_as<Kind::silu, Kind::silu, T>(p, plan, work)
                : backward_as<Kind::any, Kind::any, T>(p, plan, work);
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
