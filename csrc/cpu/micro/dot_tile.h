// The inner loop of convolution on instructions that multiply pairs of bfloat16 numbers and add to float32:
//
//   c[i][j] (+)= sum over t of a[i][t] * b[t][j]
//
// with a as rows of terms and b as panels of pairs of terms, [term / 2][column][term % 2], both zero from the last term up to
// a multiple of kDotGrain. The same packed operands serve two instructions:
//   VDPBF16PS (avx512_bf16)  a pair of a row is broadcast and meets 16 columns; 8 rows x 3 vectors of sums in registers
//   TDPBF16PS (amx)          16 rows x 32 terms times 32 terms x 16 columns; 2 x 2 tiles of sums
//
// float32 comes as sums of bfloat16 numbers, x = x1 + x2 + x3, each of which rounds what the ones before leave. The products
// taken are x1w1 (one: bfloat16 accuracy), with x2w1 and x1w2 (three), with x3w1, x2w2 and x1w3 (six: each that is left out is
// below 2^-24 of |x||w|).
#pragma once

#include "common/arith.h"
#include "cpu/simd/vec.h"
#if !CNNOPS_ISA_avx512_bf16
#include "cpu/micro/tiles.h"
#endif

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int kDotLanes = 16;  // columns of a vector or tile
#if CNNOPS_ISA_avx512_bf16
constexpr int kDotRows = 8, kDotVecs = 3;
constexpr int64_t kDotGrain = 2;
constexpr bool kRowsAnywhere = true;  // dot_tile_of_pieces exists
#else
constexpr int kDotRows = 2 * kTileSide, kDotVecs = 2;
constexpr int64_t kDotGrain = kTileTerms;
constexpr bool kRowsAnywhere = false;
#endif
constexpr int kDotColumns = kDotVecs * kDotLanes;

// Numbers that a value is split into.
constexpr int parts_for(int products) { return products == 6 ? 3 : products == 3 ? 2 : 1; }

// Terms between two visits of the float32 sums in memory. A panel of b must leave room for a's rows in L1 (24 KB of 32 here,
// measured); on amx, where 48 KB are expected, 24 or 32 KB. Shorter sums of split values also keep the rounding error low.
constexpr int64_t dot_chunk([[maybe_unused]] int products) {
#if CNNOPS_ISA_avx512_bf16
  return 256;
#else
  return products == 6 ? 128 : products == 3 ? 192 : 512;
#endif
}

// A packed operand: the first part of the first row (column) and the distance from part to part, in numbers.
struct DotOperand {
  const uint16_t* data;
  int64_t part;
};

typedef uint32_t PairBits __attribute__((may_alias));

#if CNNOPS_ISA_avx512_bf16

struct DotUnit {};  // nothing to set up

// row(run, i) is where a run of row i begins; `runs` of them, each of `pairs` pairs, make a row. Those that row.skip(run) names
// are zeros.
template <int kRows, int kVecs, class Row>
void dot_registers(const Row& row, int64_t runs, const PairBits* b, int64_t width, int64_t pairs, float* c, int64_t ldc,
                   bool add) {
  __m512 sum[kRows][kVecs] = {};
  if (add)
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) __builtin_prefetch(c + i * ldc + v * kDotLanes, 1);
  for (int64_t run = 0; run < runs; ++run) {
    if (row.skip(run)) {
      b += pairs * width;
      continue;
    }
    const PairBits* a[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) a[i] = row(run, i);
    for (int64_t t = 0; t < pairs; ++t, b += width) {
      __m512bh bv[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) bv[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * kDotLanes));
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512bh av = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[i][t])));
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], av, bv[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      float* const to = c + i * ldc + v * kDotLanes;
      const f32v z = reinterpret_cast<f32v>(sum[i][v]);
      store(to, add ? load(to) + z : z);
    }
}

template <class Row>
void dot_select(int rows, int vecs, const Row& row, int64_t runs, const PairBits* b, int64_t width, int64_t pairs,
                float* c, int64_t ldc, bool add) {
#define CNNOPS_TILE(r, v) \
  case r * 4 + v: return dot_registers<r, v>(row, runs, b, width, pairs, c, ldc, add);
#define CNNOPS_TILES(r) CNNOPS_TILE(r, 1) CNNOPS_TILE(r, 2) CNNOPS_TILE(r, 3)
  switch (rows * 4 + vecs) {
    CNNOPS_TILES(1)
    CNNOPS_TILES(2)
    CNNOPS_TILES(3)
    CNNOPS_TILES(4)
    CNNOPS_TILES(5)
    CNNOPS_TILES(6)
    CNNOPS_TILES(7)
    CNNOPS_TILES(8)
    default: __builtin_unreachable();
  }
#undef CNNOPS_TILES
#undef CNNOPS_TILE
}

struct EvenRows {
  const PairBits* a;
  int64_t pitch;
  const PairBits* operator()(int64_t, int64_t i) const { return a + i * pitch; }
  bool skip(int64_t) const { return false; }
};
struct RowsOfPieces {
  const uint16_t* const* pieces;
  int64_t pitch;
  const uint8_t* zero;
  int64_t zero_pitch;
  const PairBits* operator()(int64_t run, int64_t i) const {
    return reinterpret_cast<const PairBits*>(pieces[run * pitch + i]);
  }
  bool skip(int64_t run) const { return zero[run * zero_pitch]; }
};

// The tile for rows <= kDotRows and vecs <= kDotVecs; `width` columns from pair to pair of b, `terms` a multiple of kDotGrain.
template <int kProducts>
void dot_tile(int rows, int vecs, DotOperand a, int64_t a_pitch, DotOperand b, int64_t width, int64_t terms, float* c,
              int64_t ldc, bool add) {
  static_assert(kProducts == 1);
  dot_select(rows, vecs, EvenRows{reinterpret_cast<const PairBits*>(a.data), a_pitch / 2}, 1,
             reinterpret_cast<const PairBits*>(b.data), width, terms / 2, c, ldc, add);
}

// The same with rows in pieces that lie anywhere: `runs` of them, of `terms` terms each, of row i at a[run * a_pitch + i]. Where
// zero[run * zero_pitch] is set, all rows' are zeros.
void dot_tile_of_pieces(int rows, int vecs, const uint16_t* const* a, int64_t a_pitch, const uint8_t* zero,
                        int64_t zero_pitch, int64_t runs, const uint16_t* b, int64_t width, int64_t terms, float* c,
                        int64_t ldc, bool add) {
  dot_select(rows, vecs, RowsOfPieces{a, a_pitch, zero, zero_pitch}, runs, reinterpret_cast<const PairBits*>(b), width,
             terms / 2, c, ldc, add);
}

#else  // tiles

// What a thread must hold while it calls dot_tile.
struct DotUnit {
  DotUnit() { tile_configure(); }
  ~DotUnit() { tile_release(); }
  DotUnit(const DotUnit&) = delete;
  DotUnit& operator=(const DotUnit&) = delete;
};

// kM x kN tiles of sums in registers 0 to 3; operands go through 4, 5 (a) and 6, 7 (b). A product is expected to take 16
// cycles and a load 8 from L1, so 2 x 2 tiles with one product (4 loads, 4 products) are bound by the products, with six (16
// loads, 24 products) far more so.
template <int kM, int kN, int kProducts>
void dot_tiles(DotOperand a, int64_t a_pitch, DotOperand b, int64_t width, int64_t terms, float* c, int64_t ldc,
               bool add) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  const auto load_a = [&](int part, int64_t t) __attribute__((always_inline)) {
    const uint16_t* const from = a.data + part * a.part + t;
    tile_load<4>(from, a_pitch * 2);
    if constexpr (kM > 1) tile_load<5>(from + kTileSide * a_pitch, a_pitch * 2);
  };
  const auto load_b = [&](int part, int64_t t) __attribute__((always_inline)) {
    const uint16_t* const from = b.data + part * b.part + t * width;
    tile_load<6>(from, width * 4);
    if constexpr (kN > 1) tile_load<7>(from + 2 * kTileSide, width * 4);
  };
  const auto multiply = [&]() __attribute__((always_inline)) {
    tile_dot<0, 4, 6>();
    if constexpr (kN > 1) tile_dot<1, 4, 7>();
    if constexpr (kM > 1) tile_dot<2, 5, 6>();
    if constexpr (kM > 1 && kN > 1) tile_dot<3, 5, 7>();
  };
  // Small products first, while the sums are small: only the roundings of x1w1 count, a sixth of all.
  if constexpr (kProducts > 1)
    for (int64_t t = 0; t < terms; t += kTileTerms) {
      if constexpr (kProducts == 6) {
        load_a(2, t), load_b(0, t), multiply();
        load_a(1, t), multiply();
        load_b(1, t), multiply();
        load_a(0, t), multiply();
        load_b(2, t), multiply();
      } else {
        load_a(1, t), load_b(0, t), multiply();
        load_a(0, t), load_b(1, t), multiply();
      }
    }
  for (int64_t t = 0; t < terms; t += kTileTerms) load_a(0, t), load_b(0, t), multiply();
  alignas(64) float fresh[kDotRows * kDotColumns];
  float* const to = add ? fresh : c;
  const int64_t pitch = add ? kDotColumns : ldc;
  tile_store<0>(to, pitch * 4);
  if constexpr (kN > 1) tile_store<1>(to + kTileSide, pitch * 4);
  if constexpr (kM > 1) tile_store<2>(to + kTileSide * pitch, pitch * 4);
  if constexpr (kM > 1 && kN > 1) tile_store<3>(to + kTileSide * pitch + kTileSide, pitch * 4);
  if (!add) return;
  for (int i = 0; i < kM * kTileSide; ++i)
    for (int j = 0; j < kN * kTileSide; j += lanes<float>)
      store(c + i * ldc + j, load(c + i * ldc + j) + load(fresh + i * kDotColumns + j));
}

// The tile for rows <= kDotRows and vecs <= kDotVecs; `width` columns from pair to pair of b, `terms` a multiple of kDotGrain.
// Rows are read and written up to a multiple of 16.
template <int kProducts>
void dot_tile(int rows, int vecs, DotOperand a, int64_t a_pitch, DotOperand b, int64_t width, int64_t terms, float* c,
              int64_t ldc, bool add) {
  if (rows > kTileSide && vecs > 1) return dot_tiles<2, 2, kProducts>(a, a_pitch, b, width, terms, c, ldc, add);
  if (rows > kTileSide) return dot_tiles<2, 1, kProducts>(a, a_pitch, b, width, terms, c, ldc, add);
  if (vecs > 1) return dot_tiles<1, 2, kProducts>(a, a_pitch, b, width, terms, c, ldc, add);
  return dot_tiles<1, 1, kProducts>(a, a_pitch, b, width, terms, c, ldc, add);
}

// A tile's rows lie at even distances.
void dot_tile_of_pieces(int, int, const uint16_t* const*, int64_t, const uint8_t*, int64_t, int64_t, const uint16_t*,
                        int64_t, int64_t, float*, int64_t, bool) {
  __builtin_unreachable();
}

#endif

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
