// Convolution on the matrix units (mma.sync, sm_80 and later), for bfloat16, float16 and float32.
//
// float32 as precise as float32 is split into three bfloat16 numbers, x = x1 + x2 + x3, each the rounding of what the ones
// before leave, and so are the weights: x3w1 + x1w3 + x2w2 + x2w1 + x1w2 + x1w1 carry float32's 24 bits (six products). Each 32
// terms of a reduction are added up apart and then to a float32 sum, so that the error does not grow with the length of the
// reduction on the matrix unit. Data that cannot be split (not finite, rounding to Inf in bfloat16, or all so small that the
// last part would vanish) raise a flag while they are read; a following kernel of multiply-adds finds it and computes the
// result again (cuda/conv2d.cu). As precise as bfloat16, it is the last product alone. As precise as TF32, it is one product
// of numbers rounded to TF32, which has float32's range.
//
// Forward and the input's gradient are one implicit product: rows are 128 pixels of the result, columns 64 or 128 of its
// channels, and the reduction goes over taps and, innermost, the source's channels in chunks of 16 bytes, rounded up for each
// tap. The input's gradient of a strided convolution is one such product for each phase of the pixels, with the taps that
// meet it. Weights are packed first, [column][tap][chunk], split if need be. The weights' gradient has filters for rows,
// channels for columns and pixels for its reduction; blocks differ in the tap, too, and in the part of the pixels, whose sums
// a second kernel adds in order.
//
// Tiles in shared memory are rows of 16-byte chunks, permuted so that ldmatrix and the stores meet no bank conflicts. They
// are filled ahead, by cp.async where chunks are 16 aligned bytes of memory, else through registers.
#include "cuda/conv2d.cuh"

namespace cnnops::CNNOPS_ISA {

void conv2d_forward_unless(const Conv2dParams& p, const SplitFlags* flags);
void conv2d_input_grad_unless(const Conv2dParams& p, const SplitFlags* flags);
void conv2d_weight_grad_unless(const Conv2dParams& p, const SplitFlags* flags);

namespace {

constexpr int kThreads = 256, kRows = 128, kChunkBytes = 16;

// How numbers go through the matrix unit: as elements of which type, how many for one number (each kind in a plane of the
// tiles), and how many of them in a chunk.
template <class T>
struct AsTheyAre {
  using number = T;
  using element = T;
  static constexpr int planes = 1, chunk = 8;
};
struct Split {
  using number = float;
  using element = bf16;
  static constexpr int planes = 3, chunk = 8;
};
struct Tf32 {
  using number = float;
  using element = uint32_t;
  static constexpr int planes = 1, chunk = 4;
};
template <class As>
constexpr int kDepth = 4 * As::chunk;  // terms of a step
template <class As>
constexpr bool kIsTf32 = As::chunk == 4;

struct Chunk {
  uint32_t pair[4];
};
static_assert(sizeof(Chunk) == kChunkBytes);

// What a thread has seen of the numbers it split.
struct Seen {
  bool bad = false, large = false, some = false;
  __device__ void look(float v) {
    const uint32_t magnitude = bits_as<uint32_t>(v) & 0x7fffffffu;
    bad = bad || magnitude >= 0x7f7f8000u;
    large = large || magnitude >= 27u << 23;  // 2^-100: its third part is a normal number still
    some = some || magnitude;
  }
  __device__ void report(SplitFlags* flags, int factor) const {
    if (bad) flags->bad = 1;
    if (large) flags->large[factor] = 1;
    if (some) flags->some[factor] = 1;
  }
};

__device__ __forceinline__ uint32_t pair_of(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}
__device__ __forceinline__ float from_bf16(uint16_t v) { return bits_as<float>(static_cast<uint32_t>(v) << 16); }

// float32 to the nearest TF32; what is not finite stays as it is.
__device__ __forceinline__ uint32_t tf32_of(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + 0x1000u;
}

// A chunk's numbers as chunks, one for each plane.
template <class As>
__device__ __forceinline__ void chunks_of(const typename As::number (&v)[As::chunk], Chunk (&out)[As::planes],
                                          [[maybe_unused]] Seen& seen) {
  if constexpr (kIsTf32<As>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[0].pair[i] = tf32_of(bits_as<uint32_t>(v[i]));
  } else if constexpr (As::planes == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[0].pair[i] = pair_of(v[2 * i].bits, v[2 * i + 1].bits);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint16_t part[3][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float rest = v[2 * i + j];
        seen.look(rest);
#pragma unroll
        for (int plane = 0; plane < 3; ++plane) {
          part[plane][j] = ptx::to_bf16(rest);
          rest -= from_bf16(part[plane][j]);
        }
      }
#pragma unroll
      for (int plane = 0; plane < 3; ++plane) out[plane].pair[i] = pair_of(part[plane][0], part[plane][1]);
    }
  }
}

// into[i][j] += a[i] * b[j], of numbers in parts the smallest products first.
template <class As, int rows, int columns>
__device__ __forceinline__ void multiply_fragments(float (&into)[rows][columns][4],
                                                   const uint32_t (&a)[As::planes][rows][4],
                                                   const uint32_t (&b)[As::planes][columns][2],
                                                   [[maybe_unused]] bool all) {
#pragma unroll
  for (int i = 0; i < rows; ++i)
#pragma unroll
    for (int j = 0; j < columns; ++j) {
      if constexpr (kIsTf32<As>) {
        ptx::mma_tf32(into[i][j], a[0][i], b[0][j]);
      } else {
        using E = typename As::element;
        if constexpr (As::planes == 3) {
          if (all) {
            ptx::mma<E>(into[i][j], a[2][i], b[0][j]);
            ptx::mma<E>(into[i][j], a[0][i], b[2][j]);
            ptx::mma<E>(into[i][j], a[1][i], b[1][j]);
            ptx::mma<E>(into[i][j], a[1][i], b[0][j]);
            ptx::mma<E>(into[i][j], a[0][i], b[1][j]);
          }
        }
        ptx::mma<E>(into[i][j], a[0][i], b[0][j]);
      }
    }
}

template <int rows, int columns>
__device__ __forceinline__ void add_fragments(float (&sum)[rows][columns][4], const float (&part)[rows][columns][4]) {
#pragma unroll
  for (int i = 0; i < rows; ++i)
#pragma unroll
    for (int j = 0; j < columns; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[i][j][k] += part[i][j][k];
}

// Multiplies step by step, with the tiles of `stages` steps in shared memory. fetch() begins to get a step's numbers, and
// ends a group of copies, also past the last step; put() stores those that go through registers.
template <int stages, class Fetch, class Put, class Multiply>
__device__ __forceinline__ void go_through(int steps, const Fetch& fetch, const Put& put, const Multiply& multiply) {
#pragma unroll
  for (int step = 0; step < stages - 1; ++step) fetch(step), put(step);
  for (int step = 0; step < steps; ++step) {
    ptx::wait_for_copies<stages - 2>();  // this step's chunks are there, of this thread,
    __syncthreads();                     // and of all; and the stage that is filled next has been used by all
    fetch(step + stages - 1);
    multiply(step);
    put(step + stages - 1);
  }
  ptx::wait_for_copies<0>();
}

// ---- Forward and the input's gradient

struct Axis {    // one axis of a phase of the result
  int64_t size;  // pixels of the phase
  int64_t first_tap, tap_step, taps;
  int64_t offset;                  // where in the source tap 0 of pixel 0 lies
  int64_t pixel_step, place_step;  // the source's, from pixel to pixel and from tap to tap
};

struct Image {
  void* data;
  Strides strides;
  int64_t h, w, group_c;
};

struct Product {
  Conv2dParams p;
  Image from, to;
  bool is_forward;
  int phases_h, phases_w;
  int chunks;  // of the source's channels, per tap
  int64_t column_tiles;
  const Chunk* weights;  // [plane][group][column][r][s][chunk]
  int64_t plane;         // chunks from plane to plane
  SplitFlags* flags;
  bool all;      // six products of a number in parts, else one
  bool packs;    // 16 bytes of channels of the result are stored at once
  bool changes;  // the last step: bias, residual, activation
};

__device__ Axis axis_of(bool is_forward, int64_t result, int64_t taps, int64_t stride, int64_t pad, int64_t dilation,
                        int64_t phase) {
  if (is_forward) return {result, 0, 1, taps, -pad, stride, dilation};
  // Pixels phase, phase + stride, ...; the taps with (phase + pad - tap * dilation) divisible by stride.
  int64_t first = 0, step = 1;
  while (first < taps && first < stride && (phase + pad - first * dilation) % stride) ++first;
  while (step * dilation % stride) ++step;
  const bool any_tap = first < taps && (phase + pad - first * dilation) % stride == 0;
  return {ceil_div(result - phase, stride),
          first,
          step,
          any_tap ? ceil_div(taps - first, step) : 0,
          (phase + pad - first * dilation) / stride,
          1,
          -(step * dilation / stride)};
}

// Chunk `chunk` of row `row`, of rows of 4 chunks: two rows make the 128 bytes of all banks, and 8 rows of one column of
// chunks meet all banks once.
__device__ __forceinline__ int place_in_rows(int row, int chunk) { return row * 4 + (chunk ^ (row >> 1 & 3)); }

template <class As, int columns, int stages>
struct Tiles {
  static constexpr int planes = As::planes;
  static constexpr int row_chunks = kRows * 4, column_chunks = columns * 4;
  static constexpr int stage_chunks = planes * (row_chunks + column_chunks);
  static constexpr int64_t bytes = int64_t{stages} * stage_chunks * kChunkBytes;
};

template <class As, int columns, int stages, bool async>
__global__ void __launch_bounds__(kThreads, async && !kIsTf32<As> ? 2 : 1) product_kernel(Product q) {
  using T = typename As::number;
  using Tile = Tiles<As, columns, stages>;
  constexpr int planes = As::planes, kChunk = As::chunk;
  constexpr int warps_n = columns / 32, warps_m = 8 / warps_n, warp_rows = kRows / warps_m;
  constexpr int fragments_m = warp_rows / 16, fragments_n = 4;
  constexpr int kMine = kRows * 4 / kThreads;  // row chunks a thread loads
  Chunk* const tiles = shared<Chunk>();
  const Conv2dParams& p = q.p;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t g = blockIdx.z, phase_h = blockIdx.y / q.phases_w, phase_w = blockIdx.y % q.phases_w;
  const Axis vertical = axis_of(q.is_forward, q.to.h, p.r, p.stride_h, p.pad_h, p.dilation_h, phase_h);
  const Axis horizontal = axis_of(q.is_forward, q.to.w, p.s, p.stride_w, p.pad_w, p.dilation_w, phase_w);
  const int64_t rows = p.n * vertical.size * horizontal.size;
  // Neighbouring blocks share rows, so that the source comes from L2.
  const int64_t row0 = blockIdx.x / q.column_tiles * kRows, column0 = blockIdx.x % q.column_tiles * columns;
  if (row0 >= rows) return;
  const int taps_w = static_cast<int>(horizontal.taps), taps = static_cast<int>(vertical.taps) * taps_w;
  const int depth_chunks = taps * q.chunks, steps = (depth_chunks + 3) / 4;

  // The rows of which this thread loads chunks: neighbouring threads take neighbours in memory.
  const bool wide = p.layout == Layout::nhwc;
  const T* source[kMine];
  int top[kMine], left[kMine], row_of[kMine], chunk_of[kMine];
#pragma unroll
  for (int j = 0; j < kMine; ++j) {
    row_of[j] = wide ? thread / 4 + j * (kThreads / 4) : thread % kRows;
    chunk_of[j] = wide ? thread % 4 : thread / kRows + j * (kThreads / kRows);
    const int64_t row = row0 + row_of[j];
    const int64_t lines = divided(row, horizontal.size), n = divided(lines, vertical.size),
                  h = lines - n * vertical.size, w = row - lines * horizontal.size;
    source[j] = static_cast<const T*>(q.from.data) + n * q.from.strides.n + g * q.from.group_c * q.from.strides.c;
    top[j] = static_cast<int>(h * vertical.pixel_step + vertical.offset);
    left[j] = static_cast<int>(w * horizontal.pixel_step + horizontal.offset);
    if (row >= rows) top[j] = -(1 << 30);  // outside for every tap
  }
  Seen seen;

  struct Where {
    const T* from;  // null where there is nothing
    int channels;
  };
  const auto locate = [&](int step, int j) -> Where {
    const int at = step * 4 + chunk_of[j];
    if (at >= depth_chunks) return {nullptr, 0};
    const int tap = at / q.chunks, chunk = at % q.chunks;
    const int64_t h = top[j] + int64_t{tap / taps_w} * vertical.place_step,
                  w = left[j] + int64_t{tap % taps_w} * horizontal.place_step;
    if (h < 0 || h >= q.from.h || w < 0 || w >= q.from.w) return {nullptr, 0};
    return {source[j] + h * q.from.strides.h + w * q.from.strides.w + int64_t{chunk} * kChunk * q.from.strides.c,
            static_cast<int>(q.from.group_c) - chunk * kChunk};
  };
  T held[kMine][kChunk];
  const auto fetch = [&](int step) {  // rows to registers or, by cp.async, on their way; columns on their way
    Chunk* const stage = tiles + step % stages * Tile::stage_chunks;
    if (step < steps) {
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        const Where where = locate(step, j);
        if constexpr (async) {
          ptx::copy_async_16(stage + place_in_rows(row_of[j], chunk_of[j]),
                             where.from ? static_cast<const void*>(where.from) : q.from.data, where.from ? 16 : 0);
        } else {
#pragma unroll
          for (int i = 0; i < kChunk; ++i) held[j][i] = i < where.channels ? where.from[i * q.from.strides.c] : T{};
        }
      }
      // Chunks of the packed weights, whose taps are all of them.
#pragma unroll
      for (int j = 0; j < planes * columns * 4 / kThreads; ++j) {
        const int index = thread + j * kThreads, plane = index / (columns * 4), column = index / 4 % columns,
                  chunk = index % 4, at = step * 4 + chunk;
        const int tap = at / q.chunks;
        const int64_t r = vertical.first_tap + tap / (taps_w ? taps_w : 1) * vertical.tap_step,
                      s = horizontal.first_tap + tap % (taps_w ? taps_w : 1) * horizontal.tap_step;
        const bool there = at < depth_chunks && column0 + column < q.to.group_c;
        const int64_t from = (((g * q.to.group_c + column0 + column) * p.r + r) * p.s + s) * q.chunks + at % q.chunks;
        ptx::copy_async_16(
            stage + planes * Tile::row_chunks + plane * Tile::column_chunks + place_in_rows(column, chunk),
            q.weights + (there ? plane * q.plane + from : 0), there ? 16 : 0);
      }
    }
    ptx::commit_copies();
  };
  const auto put = [&](int step) {  // rows from registers
    if constexpr (!async) {
      if (step >= steps) return;
      Chunk* const stage = tiles + step % stages * Tile::stage_chunks;
#pragma unroll
      for (int j = 0; j < kMine; ++j) {
        Chunk out[planes];
        chunks_of<As>(held[j], out, seen);
#pragma unroll
        for (int plane = 0; plane < planes; ++plane)
          stage[plane * Tile::row_chunks + place_in_rows(row_of[j], chunk_of[j])] = out[plane];
      }
    }
  };

  float sum[fragments_m][fragments_n][4] = {};
  const int warp_row = warp / warps_n * warp_rows, warp_column = warp % warps_n * 32;
  const auto multiply = [&](int step) {
    const Chunk* const stage = tiles + step % stages * Tile::stage_chunks;
    float part[fragments_m][fragments_n][4] = {};
    float (&into)[fragments_m][fragments_n][4] = planes == 1 ? sum : part;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[planes][fragments_m][4], b[planes][fragments_n][2];
#pragma unroll
      for (int plane = 0; plane < planes; ++plane) {
        if (plane > 0 && !q.all) break;
#pragma unroll
        for (int i = 0; i < fragments_m; ++i)
          ptx::load_matrix_x4<false>(
              a[plane][i],
              stage + plane * Tile::row_chunks + place_in_rows(warp_row + i * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
        for (int i = 0; i < fragments_n; i += 2) {
          uint32_t two[4];
          ptx::load_matrix_x4<false>(
              two, stage + planes * Tile::row_chunks + plane * Tile::column_chunks +
                       place_in_rows(warp_column + i * 8 + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2));
          b[plane][i][0] = two[0], b[plane][i][1] = two[1], b[plane][i + 1][0] = two[2], b[plane][i + 1][1] = two[3];
        }
      }
      if constexpr (kIsTf32<As> && async) {
#pragma unroll
        for (int i = 0; i < fragments_m; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) a[0][i][j] = tf32_of(a[0][i][j]);
      }
      multiply_fragments<As>(into, a, b, q.all);
    }
    if constexpr (planes == 3) add_fragments(sum, part);
  };

  go_through<stages>(steps, fetch, put, multiply);
  if constexpr (planes == 3) seen.report(q.flags, 0);

  // Through shared memory, 16 x 32 results of a warp at a time, so that neighbouring threads store neighbours. The loops are
  // not unrolled: each copy would hold every activation.
  __syncthreads();
  constexpr int kRow = 40;
  float* const staged = shared<float>() + warp * 16 * kRow;
  const int row_step = wide ? kRow : kRow - 7;                          // where bank conflicts are few
  const auto place_of = [&](int64_t row, int64_t channel) -> int64_t {  // -1: outside
    if (row >= rows || channel >= q.to.group_c) return -1;
    const int64_t lines = divided(row, horizontal.size), n = divided(lines, vertical.size),
                  h = lines - n * vertical.size, w = row - lines * horizontal.size;
    return offset(q.to.strides, n, g * q.to.group_c + channel, q.is_forward ? h : h * p.stride_h + phase_h,
                  q.is_forward ? w : w * p.stride_w + phase_w);
  };
#pragma unroll
  for (int i = 0; i < fragments_m; ++i) {
    const int64_t first_row = row0 + warp_row + i * 16, first_channel = column0 + warp_column;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < fragments_n; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        staged[(lane / 4 + e / 2 * 8) * row_step + j * 8 + lane % 4 * 2 + e % 2] = sum[i][j][e];
    __syncwarp();
    if (q.changes || !q.packs) {
#pragma unroll 1
      for (int index = lane; index < 16 * 32; index += kWarp) {
        const int line = wide ? index / 32 : index % 16, column = wide ? index % 32 : index / 16;
        const int64_t at = place_of(first_row + line, first_channel + column);
        if (at < 0) continue;
        float value = staged[line * row_step + column];
        if (p.bias) value += load(static_cast<const T*>(p.bias) + g * q.to.group_c + first_channel + column);
        if (p.residual) value += load(static_cast<const T*>(p.residual) + at);
        value = activate(value, p.activation);
        if (q.packs)
          staged[line * row_step + column] = value;
        else
          store(static_cast<T*>(q.to.data) + at, value);
      }
    }
    if (q.packs) {
      __syncwarp();
#pragma unroll 1
      for (int index = lane; index < 16 * 32 / kPack<T>; index += kWarp) {
        const int line = index * kPack<T> / 32, column = index * kPack<T> % 32;
        const int64_t at = place_of(first_row + line, first_channel + column);
        if (at < 0) continue;
        float value[kPack<T>];
#pragma unroll
        for (int side = 0; side < kPack<T>; ++side) value[side] = staged[line * row_step + column + side];
        store<T, kPack<T>>(static_cast<T*>(q.to.data) + at, value);
      }
    }
  }
}

// One chunk a thread: [group][column][r][s][chunk]; columns are filters in forward, channels in the input's gradient.
template <class As>
__global__ void __launch_bounds__(kThreads) pack_weights_kernel(Product q, int64_t count, Chunk* packed) {
  using T = typename As::number;
  constexpr int kChunk = As::chunk;
  const int64_t i = thread_index();
  if (i >= count) return;
  const Conv2dParams& p = q.p;
  const int64_t chunk = i % q.chunks, s = i / q.chunks % p.s, r = i / q.chunks / p.s % p.r,
                column = i / q.chunks / p.s / p.r, g = column / q.to.group_c;
  T v[kChunk];
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    const int64_t c = chunk * kChunk + j;
    const int64_t k = q.is_forward ? column : g * q.from.group_c + c, inner = q.is_forward ? c : column % q.to.group_c;
    v[j] = c < q.from.group_c ? static_cast<const T*>(p.weight)[k * p.weight_stride[0] + inner * p.weight_stride[1] +
                                                                r * p.weight_stride[2] + s * p.weight_stride[3]]
                              : T{};
  }
  Chunk out[As::planes];
  Seen seen;
  chunks_of<As>(v, out, seen);
  for (int plane = 0; plane < As::planes; ++plane) packed[plane * q.plane + i] = out[plane];
  if constexpr (As::planes == 3) seen.report(q.flags, 1);
}

__global__ void __launch_bounds__(kWarp) clear_kernel(SplitFlags* flags) {
  if (threadIdx.x == 0) *flags = {};
}

SplitFlags* new_flags(const Conv2dParams& p) {
  auto* const flags = static_cast<SplitFlags*>(p.launch->allocate(static_cast<int64_t>(sizeof(SplitFlags))));
  launch("conv2d flags", *p.launch, Grid{1, 1, 1, kWarp, 0}, &clear_kernel, flags);
  return flags;
}

// Calls f with the way that the numbers go.
template <class T, class F>
void as_precision_wants(const Conv2dParams& p, const F& f) {
  if constexpr (!__is_same(T, float))
    f(AsTheyAre<T>{});
  else if (p.precision == Precision::tf32)
    f(Tf32{});
  else
    f(Split{});
}

template <class As, int columns, int stages, bool async>
void launch_product(const char* name, Product q, int64_t rows) {
  q.column_tiles = ceil_div(q.to.group_c, int64_t{columns});
  const Grid grid{ceil_div(rows, int64_t{kRows}) * q.column_tiles, int64_t{q.phases_h} * q.phases_w, q.p.groups,
                  kThreads, Tiles<As, columns, stages>::bytes};
  launch(name, *q.p.launch, grid, &product_kernel<As, columns, stages, async>, q);
}

template <class As>
void multiply(const char* name, const Conv2dParams& p, bool is_forward) {
  const ConvGroups group = group_sizes(p);
  const Image x{p.x, strides_of(p.layout, p.c, p.h, p.w), p.h, p.w, group.c};
  const Image y{p.y, strides_of(p.layout, p.k, p.p, p.q), p.p, p.q, group.k};
  Product q{};
  q.p = p, q.from = is_forward ? x : y, q.to = is_forward ? y : x, q.is_forward = is_forward;
  q.phases_h = is_forward ? 1 : static_cast<int>(min64(p.stride_h, p.h));
  q.phases_w = is_forward ? 1 : static_cast<int>(min64(p.stride_w, p.w));
  q.chunks = static_cast<int>(ceil_div(q.from.group_c, int64_t{As::chunk}));
  q.all = p.precision == Precision::ieee;
  q.packs = packable(p.layout, q.to.group_c, kPack<typename As::number>, q.to.data);
  q.changes = p.bias || p.residual || p.activation != Activation::none;
  const int64_t packed = p.groups * q.to.group_c * p.r * p.s * q.chunks;
  q.plane = packed;
  Chunk* const weights = static_cast<Chunk*>(p.launch->allocate(packed * As::planes * kChunkBytes));
  q.weights = weights;
  if (As::planes == 3) q.flags = new_flags(p);
  launch("conv2d pack weights", *p.launch, one_each(packed), &pack_weights_kernel<As>, q, packed, weights);
  // Rows of the largest phase, the first.
  const int64_t rows = p.n * ceil_div(q.to.h, int64_t{q.phases_h}) * ceil_div(q.to.w, int64_t{q.phases_w});
  if constexpr (As::planes == 3) {
    launch_product<As, 64, 2, false>(name, q, rows);
    if (is_forward)
      conv2d_forward_unless(p, q.flags);
    else
      conv2d_input_grad_unless(p, q.flags);
  } else {
    const bool async = packable(p.layout, q.from.group_c, As::chunk, q.from.data);
    if (!async)
      launch_product<As, 64, 2, false>(name, q, rows);
    else if (q.to.group_c > 64)
      launch_product<As, 128, 3, true>(name, q, rows);
    else
      launch_product<As, 64, 4, true>(name, q, rows);
  }
}

template <class T>
void forward(const Conv2dParams& p) {
  as_precision_wants<T>(p, [&](auto as) { multiply<decltype(as)>("conv2d_mma_forward", p, true); });
}

template <class T>
void input_grad(const Conv2dParams& p) {
  as_precision_wants<T>(p, [&](auto as) { multiply<decltype(as)>("conv2d_mma_input_grad", p, false); });
}

// ---- The weights' gradient

constexpr int kFilters = 128, kChannels = 64;

struct WeightProduct {
  Conv2dParams p;
  ConvGroups group;
  Strides x, y;
  int64_t filter_tiles, channel_tiles, splits, split_pixels;
  float* partial;  // [split][k][c][r][s]
  SplitFlags* flags;
  bool all;  // as in Product
};

// Rows of 8 chunks and multiples: 8 rows of one column of chunks meet all banks once, and so do 4 rows of two columns.
__device__ __forceinline__ int place_among(int chunks, int row, int chunk) {
  return row * chunks + (chunk ^ ((row & 3) << 1 | (row >> 2 & 1)));
}

template <class As, int stages>
struct WeightTiles {
  static constexpr int planes = As::planes;
  static constexpr int y_row = kFilters / As::chunk, x_row = kChannels / As::chunk;  // chunks
  static constexpr int y_chunks = kDepth<As> * y_row, x_chunks = kDepth<As> * x_row;
  static constexpr int stage_chunks = planes * (y_chunks + x_chunks);
  static constexpr int64_t bytes = int64_t{stages} * stage_chunks * kChunkBytes;
};

template <class As, int stages, bool async>
__global__ void __launch_bounds__(kThreads) weight_kernel(WeightProduct q) {
  using T = typename As::number;
  using Tile = WeightTiles<As, stages>;
  constexpr int planes = As::planes, fragments_m = 2, fragments_n = 4;  // 4 x 2 warps of 32 x 32 results
  constexpr int kChunk = As::chunk, y_row = Tile::y_row, x_row = Tile::x_row;
  Chunk* const tiles = shared<Chunk>();
  const Conv2dParams& p = q.p;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t filter0 = blockIdx.x % q.filter_tiles * kFilters,
                channel0 = blockIdx.x / q.filter_tiles % q.channel_tiles * kChannels,
                g = blockIdx.x / q.filter_tiles / q.channel_tiles;
  const int64_t r = blockIdx.y / p.s, s = blockIdx.y % p.s, split = blockIdx.z;
  const int64_t pixels = p.n * p.p * p.q, begin = split * q.split_pixels, end = min64(begin + q.split_pixels, pixels);
  const int steps = static_cast<int>(ceil_div(end - begin, kDepth<As>));
  const bool wide = p.layout == Layout::nhwc;
  Seen seen_y, seen_x;

  T held[3][kChunk];  // two chunks of dy, one of x
  const auto fetch = [&](int step) {
    Chunk* const stage = tiles + step % stages * Tile::stage_chunks;
    if (step < steps) {
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const bool is_y = j < 2;
        const int row = wide ? (is_y ? thread / y_row + j * (kThreads / y_row) : thread / x_row) : thread % kDepth<As>;
        const int chunk = wide ? (is_y ? thread % y_row : thread % x_row)
                               : thread / kDepth<As> + (j == 1 ? kThreads / kDepth<As> : 0);
        const int64_t pixel = begin + int64_t{step} * kDepth<As> + row;
        const int64_t channel = (is_y ? filter0 : channel0) + chunk * kChunk, channels = is_y ? q.group.k : q.group.c;
        const int64_t lines = divided(pixel, p.q), n = divided(lines, p.p), pp = lines - n * p.p,
                      qq = pixel - lines * p.q;
        const T* from = nullptr;
        if (pixel < end && channel < channels) {
          if (is_y) {
            from = static_cast<const T*>(p.y) + offset(q.y, n, g * channels + channel, pp, qq);
          } else {
            const int64_t h = pp * p.stride_h - p.pad_h + r * p.dilation_h,
                          w = qq * p.stride_w - p.pad_w + s * p.dilation_w;
            if (h >= 0 && h < p.h && w >= 0 && w < p.w)
              from = static_cast<const T*>(p.x) + offset(q.x, n, g * channels + channel, h, w);
          }
        }
        if constexpr (async) {
          Chunk* const to = is_y ? stage + place_among(y_row, row, chunk)
                                 : stage + planes * Tile::y_chunks + place_among(x_row, row, chunk);
          ptx::copy_async_16(to, from ? static_cast<const void*>(from) : p.x, from ? 16 : 0);
        } else {
          const int64_t step_c = is_y ? q.y.c : q.x.c;
#pragma unroll
          for (int i = 0; i < kChunk; ++i) held[j][i] = from && channel + i < channels ? from[i * step_c] : T{};
        }
      }
    }
    ptx::commit_copies();
  };
  const auto put = [&](int step) {
    if constexpr (!async) {
      if (step >= steps) return;
      Chunk* const stage = tiles + step % stages * Tile::stage_chunks;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        const bool is_y = j < 2;
        const int row = wide ? (is_y ? thread / y_row + j * (kThreads / y_row) : thread / x_row) : thread % kDepth<As>;
        const int chunk = wide ? (is_y ? thread % y_row : thread % x_row)
                               : thread / kDepth<As> + (j == 1 ? kThreads / kDepth<As> : 0);
        Chunk out[planes];
        chunks_of<As>(held[j], out, is_y ? seen_y : seen_x);
#pragma unroll
        for (int plane = 0; plane < planes; ++plane) {
          Chunk* const to =
              is_y ? stage + plane * Tile::y_chunks + place_among(y_row, row, chunk)
                   : stage + planes * Tile::y_chunks + plane * Tile::x_chunks + place_among(x_row, row, chunk);
          *to = out[plane];
        }
      }
    }
  };

  float sum[fragments_m][fragments_n][4] = {};
  const int warp_filter = warp / 2 * 32, warp_channel = warp % 2 * 32;
  const auto multiply = [&](int step) {
    const Chunk* const stage = tiles + step % stages * Tile::stage_chunks;
    float part[fragments_m][fragments_n][4] = {};
    float (&into)[fragments_m][fragments_n][4] = planes == 1 ? sum : part;
    const int quarter = lane / 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[planes][fragments_m][4], b[planes][fragments_n][2];
      if constexpr (kIsTf32<As>) {
        const auto at = [&](const Chunk* tile, int row_chunks, int row, int channel) {
          const uint32_t bits = tile[place_among(row_chunks, row, channel / kChunk)].pair[channel % kChunk];
          return async ? tf32_of(bits) : bits;
        };
        const int pixel = half * 8 + lane % 4;
#pragma unroll
        for (int i = 0; i < fragments_m; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            a[0][i][e] = at(stage, y_row, pixel + e / 2 * 4, warp_filter + i * 16 + e % 2 * 8 + lane / 4);
#pragma unroll
        for (int i = 0; i < fragments_n; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            b[0][i][e] = at(stage + Tile::y_chunks, x_row, pixel + e * 4, warp_channel + i * 8 + lane / 4);
      } else {
#pragma unroll
        for (int plane = 0; plane < planes; ++plane) {
          if (plane > 0 && !q.all) break;
#pragma unroll
          for (int i = 0; i < fragments_m; ++i)
            ptx::load_matrix_x4<true>(a[plane][i], stage + plane * Tile::y_chunks +
                                                       place_among(y_row, half * 16 + quarter / 2 * 8 + lane % 8,
                                                                   (warp_filter + i * 16) / kChunk + quarter % 2));
#pragma unroll
          for (int i = 0; i < fragments_n; i += 2) {
            uint32_t two[4];
            ptx::load_matrix_x4<true>(two, stage + planes * Tile::y_chunks + plane * Tile::x_chunks +
                                               place_among(x_row, half * 16 + quarter % 2 * 8 + lane % 8,
                                                           (warp_channel + i * 8) / kChunk + quarter / 2));
            b[plane][i][0] = two[0], b[plane][i][1] = two[1], b[plane][i + 1][0] = two[2], b[plane][i + 1][1] = two[3];
          }
        }
      }
      multiply_fragments<As>(into, a, b, q.all);
    }
    if constexpr (planes == 3) add_fragments(sum, part);
  };

  go_through<stages>(steps, fetch, put, multiply);
  if constexpr (planes == 3) {
    seen_x.report(q.flags, 0);
    seen_y.report(q.flags, 1);
  }
#pragma unroll
  for (int i = 0; i < fragments_m; ++i)
#pragma unroll
    for (int j = 0; j < fragments_n; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t filter = filter0 + warp_filter + i * 16 + e / 2 * 8 + lane / 4;
        const int64_t channel = channel0 + warp_channel + j * 8 + lane % 4 * 2 + e % 2;
        if (filter >= q.group.k || channel >= q.group.c) continue;
        q.partial[(((split * p.k + g * q.group.k + filter) * q.group.c + channel) * p.r + r) * p.s + s] = sum[i][j][e];
      }
}

template <class As>
void multiply_weights(const Conv2dParams& p) {
  static constexpr const char* kName = "conv2d_mma_weight_grad";
  WeightProduct q{};
  q.p = p, q.group = group_sizes(p);
  q.x = strides_of(p.layout, p.c, p.h, p.w), q.y = strides_of(p.layout, p.k, p.p, p.q);
  q.filter_tiles = ceil_div(q.group.k, int64_t{kFilters}), q.channel_tiles = ceil_div(q.group.c, int64_t{kChannels});
  q.all = p.precision == Precision::ieee;
  const int64_t pixels = p.n * p.p * p.q, blocks = q.filter_tiles * q.channel_tiles * p.groups;
  const Splits parts = splits_for(pixels, blocks * p.r * p.s, 512, kDepth<As>);
  q.splits = parts.count, q.split_pixels = parts.each;
  const int64_t count = p.k * q.group.c * p.r * p.s;
  q.partial = static_cast<float*>(p.launch->allocate(q.splits * count * static_cast<int64_t>(sizeof(float))));
  if (As::planes == 3) q.flags = new_flags(p);
  const auto go = [&](auto kernel, int64_t bytes) {
    launch(kName, *p.launch, Grid{blocks, p.r * p.s, q.splits, kThreads, bytes}, kernel, q);
  };
  if constexpr (As::planes == 3) {
    go(&weight_kernel<As, 2, false>, WeightTiles<As, 2>::bytes);
  } else if (packable(p.layout, q.group.c, As::chunk, p.x) && packable(p.layout, q.group.k, As::chunk, p.y)) {
    go(&weight_kernel<As, 4, true>, WeightTiles<As, 4>::bytes);
  } else {
    go(&weight_kernel<As, 2, false>, WeightTiles<As, 2>::bytes);
  }
  launch("conv2d_mma_weight_grad sum", *p.launch, one_each(count), &add_splits_kernel<typename As::number>, p,
         static_cast<const float*>(q.partial), q.splits, count, false);
  if constexpr (As::planes == 3) conv2d_weight_grad_unless(p, q.flags);
}

template <class T>
void weight_grad(const Conv2dParams& p) {
  as_precision_wants<T>(p, [&](auto as) { multiply_weights<decltype(as)>(p); });
}

}  // namespace

#define CNNOPS_EXPORT_MMA(name, kernel)                                  \
  void name##_f32(const Conv2dParams& p) { kernel<float>(p); }           \
  void name##_bf16(const Conv2dParams& p) { kernel<::cnnops::bf16>(p); } \
  void name##_f16(const Conv2dParams& p) { kernel<::cnnops::f16>(p); }
CNNOPS_EXPORT_MMA(conv2d_mma_forward, forward)
CNNOPS_EXPORT_MMA(conv2d_mma_input_grad, input_grad)
CNNOPS_EXPORT_MMA(conv2d_mma_weight_grad, weight_grad)

}  // namespace cnnops::CNNOPS_ISA
