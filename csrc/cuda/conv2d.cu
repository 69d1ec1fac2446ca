// Convolution by multiply-adds in the compute type: every dtype, shape and group size; float64's only way, and float32's for
// data that bfloat16 products cannot carry (cuda/conv2d_mma.cu).
//
// An implicit matrix product: blocks of 64 x 64 results, reductions 16 terms at a time from shared memory, 4 x 4 results a
// thread. Forward and the input's gradient have pixels for rows, channels for columns, and reduce over taps and channels,
// channels innermost; the weights' gradient has filters for rows, channels and taps for columns, and reduces over pixels,
// in parts that a second kernel adds up in order.
#include "cuda/conv2d.cuh"

namespace cnnops::CNNOPS_ISA {
namespace {

constexpr int kTile = 64, kDepth = 16, kThreads = 256;
enum class Pass { forward, input_grad, weight_grad };

struct Problem {
  Conv2dParams p;
  ConvGroups group;
  Strides x, y;
  int64_t rows, columns, depth;  // of one group's product
  int64_t splits, split_depth;   // parts of the reduction
  bool depth_first;              // neighbours of a reduction are neighbours in memory
  void* partial;                 // weight_grad with several splits
  const SplitFlags* flags;       // not null: of cuda/conv2d_mma.cu; nothing to do where its result is right
};

struct Place3 {
  int64_t n, h, w;
};
__device__ __forceinline__ Place3 pixel_at(int64_t i, int64_t height, int64_t width) {
  const int64_t rows = divided(i, width), n = divided(rows, height);
  return {n, rows - n * height, i - rows * width};
}

struct Reduced {
  int64_t channel, r, s;
};
__device__ __forceinline__ Reduced reduced_at(int64_t i, int64_t channels, int64_t s) {
  const int64_t tap = divided(i, channels), r = divided(tap, s);
  return {i - tap * channels, r, tap - r * s};
}

template <class T>
__device__ __forceinline__ compute_t<T> x_at(const Problem& q, const Place3& out, int64_t c, int64_t r, int64_t s) {
  const Conv2dParams& p = q.p;
  const int64_t h = out.h * p.stride_h - p.pad_h + r * p.dilation_h,
                w = out.w * p.stride_w - p.pad_w + s * p.dilation_w;
  if (h < 0 || h >= p.h || w < 0 || w >= p.w) return 0;
  return load(static_cast<const T*>(p.x) + offset(q.x, out.n, c, h, w));
}

template <class T>
__device__ __forceinline__ compute_t<T> dy_at(const Problem& q, const Place3& in, int64_t k, int64_t r, int64_t s) {
  const Conv2dParams& p = q.p;
  const int64_t down = in.h + p.pad_h - r * p.dilation_h, right = in.w + p.pad_w - s * p.dilation_w;
  if (down < 0 || right < 0 || remainder_of(down, p.stride_h) || remainder_of(right, p.stride_w)) return 0;
  const int64_t pp = divided(down, p.stride_h), qq = divided(right, p.stride_w);
  if (pp >= p.p || qq >= p.q) return 0;
  return load(static_cast<const T*>(p.y) + offset(q.y, in.n, k, pp, qq));
}

template <class T, Pass pass>
__global__ void __launch_bounds__(kThreads, 2) product_kernel(Problem q) {
  using A = compute_t<T>;
  if (q.flags && is_right(*q.flags)) return;
  const Conv2dParams& p = q.p;
  A* const a = shared<A>();  // [kDepth][kTile + 4]
  A* const b = a + kDepth * (kTile + 4);
  constexpr int kRow = kTile + 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row_tiles = ceil_div(q.rows, kTile), g = blockIdx.z / q.splits, split = blockIdx.z % q.splits;
  const int64_t row0 = blockIdx.x % row_tiles * kTile, column0 = blockIdx.x / row_tiles * kTile;
  const int64_t depth0 = split * q.split_depth, depth1 = min64(depth0 + q.split_depth, q.depth);
  const int64_t c0 = g * q.group.c, k0 = g * q.group.k;

  // Where this thread reads: 4 places of each tile, along the reduction or along rows and columns.
  const int line = q.depth_first ? thread / kDepth : thread % kTile, line_step = q.depth_first ? kThreads / kDepth : 0;
  const int deep = q.depth_first ? thread % kDepth : thread / kTile, deep_step = q.depth_first ? 0 : kThreads / kTile;
  A sum[16] = {};  // [4][4]
  const int ty = thread / 16, tx = thread % 16;
  for (int64_t depth = depth0; depth < depth1; depth += kDepth) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int l = line + j * line_step, d = deep + j * deep_step;
      const int64_t row = row0 + l, column = column0 + l, at = depth + d;
      A left = 0, right = 0;
      if (at < depth1) {
        if constexpr (pass == Pass::weight_grad) {
          const Place3 out = pixel_at(at, p.p, p.q);
          if (row < q.rows) left = load(static_cast<const T*>(p.y) + offset(q.y, out.n, k0 + row, out.h, out.w));
          if (column < q.columns) {
            const int64_t s = column % p.s, r = column / p.s % p.r, c = column / (p.s * p.r);
            right = x_at<T>(q, out, c0 + c, r, s);
          }
        } else {
          const Reduced t = reduced_at(at, pass == Pass::forward ? q.group.c : q.group.k, p.s);
          if (row < q.rows)
            left = pass == Pass::forward ? x_at<T>(q, pixel_at(row, p.p, p.q), c0 + t.channel, t.r, t.s)
                                         : dy_at<T>(q, pixel_at(row, p.h, p.w), k0 + t.channel, t.r, t.s);
          if (column < q.columns)
            right = pass == Pass::forward ? weight_at<T>(p, k0 + column, t.channel, t.r, t.s)
                                          : weight_at<T>(p, k0 + t.channel, column, t.r, t.s);
        }
      }
      a[d * kRow + l] = left;
      b[d * kRow + l] = right;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      A left[4], right[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) left[j] = a[d * kRow + ty * 4 + j], right[j] = b[d * kRow + tx + 16 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i * 4 + j] += left[i] * right[j];
    }
    __syncthreads();
  }
  // One at a time, and the others move up: a copy for each would hold every activation.
#pragma unroll 1
  for (int i = 0; i < 16; ++i) {
    const A v = sum[0];
#pragma unroll
    for (int j = 1; j < 16; ++j) sum[j - 1] = sum[j];
    const int64_t row = row0 + ty * 4 + i / 4, column = column0 + tx + 16 * (i % 4);
    if (row >= q.rows || column >= q.columns) continue;
    if constexpr (pass == Pass::forward) {
      const Place3 out = pixel_at(row, p.p, p.q);
      finish<T>(p, v, k0 + column, offset(q.y, out.n, k0 + column, out.h, out.w));
    } else if constexpr (pass == Pass::input_grad) {
      const Place3 in = pixel_at(row, p.h, p.w);
      const A bias = p.bias ? load(static_cast<const T*>(p.bias) + c0 + column) : A(0);
      store(static_cast<T*>(p.x) + offset(q.x, in.n, c0 + column, in.h, in.w), v + bias);
    } else if (q.splits > 1) {
      static_cast<A*>(q.partial)[(split * p.k + k0 + row) * q.columns + column] = v;
    } else {
      const int64_t s = column % p.s, r = column / p.s % p.r, c = column / (p.s * p.r);
      store(static_cast<T*>(p.weight) + (k0 + row) * p.weight_stride[0] + c * p.weight_stride[1] +
                r * p.weight_stride[2] + s * p.weight_stride[3],
            v);
    }
  }
}

template <class T, Pass pass>
void multiply(const Conv2dParams& p, const SplitFlags* flags = nullptr) {
  using A = compute_t<T>;
  Problem q{};
  q.p = p, q.group = group_sizes(p), q.flags = flags;
  q.x = strides_of(p.layout, p.c, p.h, p.w), q.y = strides_of(p.layout, p.k, p.p, p.q);
  q.rows = pass == Pass::forward ? p.n * p.p * p.q : pass == Pass::input_grad ? p.n * p.h * p.w : q.group.k;
  q.columns = pass == Pass::forward ? q.group.k : pass == Pass::input_grad ? q.group.c : q.group.c * p.r * p.s;
  q.depth = pass == Pass::forward      ? q.group.c * p.r * p.s
            : pass == Pass::input_grad ? q.group.k * p.r * p.s
                                       : p.n * p.p * p.q;
  q.depth_first = (p.layout == Layout::nhwc) != (pass == Pass::weight_grad);
  const int64_t blocks = ceil_div(q.rows, kTile) * ceil_div(q.columns, kTile);
  // With flags nearly always nothing is done: one part, so that no second kernel needs to know.
  Splits parts{1, round_up(q.depth, kDepth)};
  if (pass == Pass::weight_grad && !flags) parts = splits_for(q.depth, blocks * p.groups, 256, kDepth);
  q.splits = parts.count, q.split_depth = parts.each;
  if (q.splits > 1) q.partial = p.launch->allocate(q.splits * p.k * q.columns * static_cast<int64_t>(sizeof(A)));
  static constexpr const char* kNames[] = {"conv2d_forward", "conv2d_input_grad", "conv2d_weight_grad"};
  const Grid grid{blocks, 1, p.groups * q.splits, kThreads, 2 * kDepth * (kTile + 4) * static_cast<int64_t>(sizeof(A))};
  launch(kNames[static_cast<int>(pass)], *p.launch, grid, &product_kernel<T, pass>, q);
  if (q.splits > 1)
    launch("conv2d_weight_grad sum", *p.launch, one_each(p.k * q.columns), &add_splits_kernel<T>, p,
           static_cast<const A*>(q.partial), q.splits, p.k * q.columns, false);
}

// A block per filter and part of the pixels (NCHW), or per 32 filters and part (NHWC).
template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_kernel(Conv2dParams p, Strides y, int64_t splits, int64_t each, compute_t<T>* partial) {
  double* const scratch = shared<double>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const bool wide = p.layout == Layout::nhwc;
  const int64_t split = blockIdx.x % splits, block = blockIdx.x / splits, k = wide ? block * kWarp + lane : block;
  const int64_t pixels = p.n * p.p * p.q, end = min64((split + 1) * each, pixels);
  const T* const dy = static_cast<const T*>(p.y);
  compute_t<T> sum = 0;
  if (k < p.k)
    for (int64_t i = split * each + (wide ? warp : thread); i < end; i += wide ? kThreads / kWarp : kThreads) {
      const Place3 out = pixel_at(i, p.p, p.q);
      sum += load(dy + offset(y, out.n, k, out.h, out.w));
    }
  scratch[thread] = static_cast<double>(sum);
  __syncthreads();
  if (wide ? warp > 0 || k >= p.k : thread > 0) return;
  double total = 0;
  for (int i = wide ? lane : 0; i < kThreads; i += wide ? kWarp : 1) total += scratch[i];
  partial[split * p.k + k] = static_cast<compute_t<T>>(total);
}

template <class T>
void bias_grad(const Conv2dParams& p) {
  using A = compute_t<T>;
  const int64_t pixels = p.n * p.p * p.q, blocks = p.layout == Layout::nhwc ? ceil_div(p.k, int64_t{kWarp}) : p.k;
  const auto [splits, each] = splits_for(pixels, blocks, 4096);
  A* const partial = static_cast<A*>(p.launch->allocate(splits * p.k * static_cast<int64_t>(sizeof(A))));
  launch("conv2d_bias_grad", *p.launch, Grid{blocks * splits, 1, 1, kThreads, kThreads * sizeof(double)},
         &bias_kernel<T>, p, strides_of(p.layout, p.k, p.p, p.q), splits, each, partial);
  launch("conv2d_bias_grad sum", *p.launch, one_each(p.k), &add_splits_kernel<T>, p, static_cast<const A*>(partial),
         splits, p.k, true);
}

template <class T>
void forward(const Conv2dParams& p) {
  multiply<T, Pass::forward>(p);
}
template <class T>
void input_grad(const Conv2dParams& p) {
  multiply<T, Pass::input_grad>(p);
}
template <class T>
void weight_grad(const Conv2dParams& p) {
  multiply<T, Pass::weight_grad>(p);
}

}  // namespace

// For cuda/conv2d_mma.cu: the same, unless its flags say that its result is right.
void conv2d_forward_unless(const Conv2dParams& p, const SplitFlags* flags) { multiply<float, Pass::forward>(p, flags); }
void conv2d_input_grad_unless(const Conv2dParams& p, const SplitFlags* flags) {
  multiply<float, Pass::input_grad>(p, flags);
}
void conv2d_weight_grad_unless(const Conv2dParams& p, const SplitFlags* flags) {
  multiply<float, Pass::weight_grad>(p, flags);
}

}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(conv2d_forward, Conv2dParams, forward)
CNNOPS_EXPORT(conv2d_input_grad, Conv2dParams, input_grad)
CNNOPS_EXPORT(conv2d_weight_grad, Conv2dParams, weight_grad)
CNNOPS_EXPORT(conv2d_bias_grad, Conv2dParams, bias_grad)
