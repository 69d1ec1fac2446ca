// The inner loop of every dense convolution pass: a register tile of kRows x kVecs vectors,
//
//   c[i][:] (+)= sum over kk < len of a(i, kk) * b[kk][:]          summed over `runs` such runs, a and b moving on between
//
// where a is broadcast and b is a panel of contiguous vectors. Eight ways to read `a` serve all passes:
//   PackedRows    a(i, kk) = base[kk * kStride + i]       weights packed for NCHW outputs
//   PitchedRows   a(i, kk) = base[i * pitch + kk]         pixels of channels_last images
//   ColumnRows    a(i, kk) = base[kk * pitch + i]         the same for weight gradients, whose reduction is over pixels
//   PanelRows     ColumnRows that meanwhile call something else from memory
//   LineRows      PitchedRows that do
//   OffsetRows    a(i, kk) = base[offset[i] + kk * step]  (tap, channel) pairs of an image strip, for weight gradients
//   FetchingRows  OffsetRows that do
//   WindowRows    a(i, kk) = base[offset[i] + term[kk]]   windows of an image strip
// CopyingRows are any of these that leave a copy of b behind.
//
// The tile is as large as the registers allow: kTileRows * kTileVecs accumulators, kTileVecs loads of b and one broadcast.
#pragma once

#include "cpu/simd/stream.h"

namespace cnnops::CNNOPS_ISA {
namespace {

#if CNNOPS_ISA_avx512
constexpr int kTileRows = 8, kTileVecs = 3;  // 24 of 32 registers
#elif CNNOPS_ISA_avx2
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 of 16 registers
#else
constexpr int kTileRows = 6, kTileVecs = 2;
#endif
template <class C>
constexpr int kTileColumns = kTileVecs * lanes<C>;

constexpr int64_t kNeverFlush = int64_t{1} << 62;

template <class C>
struct PackedRows {
  const C* base;
  static constexpr int64_t run = 0;
  [[gnu::always_inline]] C at(int i, int64_t kk) const { return base[kk * kTileRows + i]; }
};
template <class C>
struct PitchedRows {
  const C* base;
  int64_t pitch;
  static constexpr int64_t run = 0;
  [[gnu::always_inline]] C at(int i, int64_t kk) const { return base[i * pitch + kk]; }
};
template <class C>
struct ColumnRows {
  const C* base;
  int64_t pitch;
  int64_t run;  // from one run to the next
  [[gnu::always_inline]] C at(int i, int64_t kk) const { return base[kk * pitch + i]; }
};
template <class C>
struct PanelRows {
  const C* base;
  int64_t pitch;
  const char* ahead;  // with each kk a line of the cache is called to L2, ahead_step bytes after the one before
  int64_t ahead_step;
  static constexpr int64_t run = 0;
  [[gnu::always_inline]] C at(int i, int64_t kk) const { return base[kk * pitch + i]; }
};
template <class C>
struct LineRows {
  const C* base;
  int64_t pitch;
  const char* ahead;  // as in PanelRows
  int64_t ahead_step;
  static constexpr int64_t run = 0;
  [[gnu::always_inline]] C at(int i, int64_t kk) const { return base[i * pitch + kk]; }
};
template <class C>
struct OffsetRows {
  const C* base;
  const int64_t* offset;
  int64_t step;
  int64_t run;  // from one run to the next
  [[gnu::always_inline]] C at(int i, int64_t kk) const { return base[offset[i] + kk * step]; }
};

template <class C>
struct WindowRows {
  const C* base;
  const int64_t *offset, *term;
  static constexpr int64_t run = 0;
  [[gnu::always_inline]] C at(int i, int64_t kk) const { return base[offset[i] + term[kk]]; }
};

template <class C>
struct FetchingRows {
  const C* base;
  const int64_t* offset;
  int64_t step;
  int64_t run;
  const char* ahead;  // as in PanelRows
  int64_t ahead_step;
  [[gnu::always_inline]] C at(int i, int64_t kk) const { return base[offset[i] + kk * step]; }
};

template <class C, class Rows>
struct CopyingRows : Rows {
  C* copy;  // vectors of b, one after another
};

// What is packed next: rows of `bytes` bytes, `step` bytes apart. Tiles of `length` terms call it from memory while they
// work, each a line of the cache of `length` rows.
struct Ahead {
  const char* first = nullptr;
  int64_t rows = 0, step = 0, bytes = 0;

  int64_t lines() const { return (bytes + 63) / 64; }  // of a row
  int64_t tiles(int64_t length) const { return (rows + length - 1) / length * lines(); }
  template <class C>
  PanelRows<C> rows_of_tile(int64_t index, int64_t length, const C* base, int64_t pitch) const {
    if (index >= tiles(length)) return {base, pitch, reinterpret_cast<const char*>(base), 0};
    return {base, pitch, first + index / lines() * length * step + index % lines() * 64, step};
  }
};

// Where a tile's sums go, [kRows][pitch], and what is added to them first, [kRows][old_pitch], if not null.
template <class C>
struct TileSums {
  C* data;
  int64_t pitch;
  const C* old;
  int64_t old_pitch;
  bool stream = false;  // around the caches
};

// b advances by b_step from one kk to the next, through all runs. Sums are added to the old ones when they are finished: the
// rounding error of many such tiles is near that of one. For the same reason sums of `flush` terms, or up to a run more, are
// put aside, which costs about 2 / flush of the time.
template <int kRows, int kVecs, class C, class Rows>
void gemm_tile(const Rows& rows, const C* b, int64_t b_step, int64_t len, int64_t runs, const TileSums<C>& c,
               int64_t flush) {
  Rows a = rows;
  vec<C> sum[kRows][kVecs] = {}, aside[kRows][kVecs];
  bool flushed = false;
  int64_t terms = 0;  // of the running sums
  if (c.old)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) __builtin_prefetch(c.old + i * c.old_pitch + v * lanes<C>, 1, 3);
  for (int64_t run = 0; run < runs; ++run, a.base += a.run) {
    for (int64_t begin = 0; begin < len;) {
      const int64_t end = begin + flush < len ? begin + flush : len;
      for (int64_t kk = begin; kk < end; ++kk, b += b_step) {
        if constexpr (requires { a.ahead; }) __builtin_prefetch(a.ahead + kk * a.ahead_step, 0, 2);
        if constexpr (__is_same(Rows, PitchedRows<C>))  // the next tile's rows, if they follow each other without a gap
          __builtin_prefetch(a.base + kTileRows * (a.pitch + kk), 0, 3);
        vec<C> bv[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) bv[v] = load(b + v * lanes<C>);
        if constexpr (requires { a.copy; }) {
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) store(a.copy + v * lanes<C>, bv[v]);
          a.copy += kVecs * lanes<C>;
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const C av = a.at(i, kk);
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) sum[i][v] += av * bv[v];
        }
      }
      terms += end - begin;
      begin = end;
      if (begin == len && (run == runs - 1 || terms < flush)) break;
      terms = 0;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          aside[i][v] = flushed ? aside[i][v] + sum[i][v] : sum[i][v];
          sum[i][v] = vec<C>{};
        }
      // They stay in memory: in registers they would drive b out of them, in smaller tiles than the largest.
      asm volatile("" : "+m"(aside));
      flushed = true;
    }
  }
  if (flushed)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] += aside[i][v];
  if (c.old)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] += load(c.old + i * c.old_pitch + v * lanes<C>);
  if (c.stream) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store_streaming(c.data + i * c.pitch + v * lanes<C>, sum[i][v]);
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) store(c.data + i * c.pitch + v * lanes<C>, sum[i][v]);
}

// The tile for 1 <= rows <= kTileRows and 1 <= vecs <= kTileVecs.
template <class C, class Rows>
void gemm_tile(int rows, int vecs, const Rows& a, const C* b, int64_t b_step, int64_t len, int64_t runs,
               const TileSums<C>& c, int64_t flush = kNeverFlush) {
#define CNNOPS_TILE(r, v) \
  case r * 4 + v: return gemm_tile<r, v>(a, b, b_step, len, runs, c, flush);
#if CNNOPS_ISA_avx512
#define CNNOPS_TILES(r) CNNOPS_TILE(r, 1) CNNOPS_TILE(r, 2) CNNOPS_TILE(r, 3)
#else
#define CNNOPS_TILES(r) CNNOPS_TILE(r, 1) CNNOPS_TILE(r, 2)
#endif
  switch (rows * 4 + vecs) {
    CNNOPS_TILES(1)
    CNNOPS_TILES(2)
    CNNOPS_TILES(3)
    CNNOPS_TILES(4)
    CNNOPS_TILES(5)
    CNNOPS_TILES(6)
#if CNNOPS_ISA_avx512
    CNNOPS_TILES(7)
    CNNOPS_TILES(8)
#endif
    default: __builtin_unreachable();
  }
#undef CNNOPS_TILES
#undef CNNOPS_TILE
}

// The same with sums that stay where they are: overwritten, or added to.
template <class C, class Rows>
void gemm_tile(int rows, int vecs, const Rows& a, const C* b, int64_t b_step, int64_t len, int64_t runs, C* c,
               int64_t pitch, bool add, int64_t flush = kNeverFlush) {
  gemm_tile<C>(rows, vecs, a, b, b_step, len, runs, TileSums<C>{c, pitch, add ? c : nullptr, pitch}, flush);
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA
