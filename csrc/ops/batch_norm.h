// Batch normalization with a fused residual and activation.
//
//   z = (x - mean[c]) * invstd[c] * weight[c] + bias[c] + residual,   y = act(z),   invstd = 1 / sqrt(var + eps)
//
// In training, mean and var are those of x over n, h, w (var divides by their number M) and are results; in evaluation
// they are given. A null weight stands for ones, a null bias for zeros, a null residual for zeros.
//
// Backward, with dz = dy * act'(z):
//   dresidual = dz,   dbias[c] = sum dz,   dweight[c] = sum dz * (x - mean[c]) * invstd[c]
//   dx = weight * invstd * dz                                                                        in evaluation
//   dx = weight * invstd * (dz - dbias / M - (x - mean) * invstd * dweight / M)                       in training
// act'(z) comes from y where `saved_y` is given (of activations with derivative_of_output), else from z, which is
// computed again from x and the residual exactly as forward did.
//
// x, y, residual and their gradients: [N, C, H, W], all in one layout. weight, bias, dweight, dbias: [C] in the dtype
// `affine`, float32 or that of x. mean, var: [C] in the dtype `statistics`: float64 where training wrote them.
//
// Statistics are accurate for any mean and deviation. A piece of a plane of float32 is summed in float64 for its mean, then
// the squares of the deviations from that. Rows, and planes of 16-bit numbers, are summed once: the beginning of each block
// (a quarter of its rows or more; a 32nd of a piece of a plane or more, one element of a plane of up to 64 in bfloat16) gives a
// guess of its mean, then the deviations from that and their squares are added up. Sums in the compute type are of 16 terms
// for each lane of a vector (of rows, of four, of which at most 32 are added up); all else but the halving of a vector's lanes
// is added in float64, in a fixed order. A guess of 16-bit numbers has hardly more bits than they, so that deviations from it
// are exact; one that misses by k deviations costs 1 + k k roundings of the variance, and k k is less than the block's size
// over that of its beginning. The mean is not rounded to the compute type where it is subtracted. NaN and Inf flow by IEEE
// arithmetic into all elements of their channel.
#pragma once

#include "common/activation.h"
#include "common/arith.h"
#include "common/tensor.h"

namespace cnnops {

struct BatchNormParams {
  Layout layout;
  int64_t n, c, h, w;
  double eps;
  bool training;
  Activation activation;
  DType affine, statistics;
  const void *x, *residual, *weight, *bias;
  void* y;                   // forward
  void *mean, *var;          // results of forward in training
  const void *dy, *saved_y;  // backward
  void *dx, *dresidual;      // backward, each null where it is not wanted
  void *dweight, *dbias;     // the same
  void* workspace;           // batch_norm_workspace_bytes(p); the references do without
  // update: running = (1 - momentum) * running + momentum * (mean, or var * count / (count - 1)), in the table's dtype
  void *running_mean, *running_var;
  int64_t running_mean_stride, running_var_stride, count;
  double momentum;
  int threads;
  Launch* launch = nullptr;
};

// How the work is cut, from the shape alone.
//
// Planes (NCHW): one unit is a piece of one plane. Rows (NHWC, and one-pixel planes): the image is a matrix of rows of
// `width` columns, where `fold` pixels stand in one row, so that a row fills vectors when C is small; column j belongs
// to channel j % C. Pixels that do not fill a row make a partial one of `tail` columns. A unit is a block of the
// matrix.
namespace {  // its members must not be shared between instruction sets
struct BatchNormPlan {
  static constexpr int64_t kPiece = 8192, kBlockRows = 128, kBlockColumns = 1024;
  bool planes;
  int64_t pieces, piece;            // planes: per plane, and elements of all but the last
  int64_t fold, width, rows, tail;  // rows
  int64_t row_blocks, block_rows, column_blocks, block_columns;
  int64_t units;

  int64_t partials() const { return planes ? units : row_blocks * width; }
  int64_t columns(const BatchNormParams& p) const { return planes ? p.c : width; }
};
}  // namespace

static inline BatchNormPlan batch_norm_plan(const BatchNormParams& p) {
  BatchNormPlan plan{};
  const int64_t plane = p.h * p.w;
  plan.planes = p.layout == Layout::nchw && plane > 1;
  if (plan.planes) {
    plan.pieces = ceil_div(plane, BatchNormPlan::kPiece);
    plan.piece = round_up(ceil_div(plane, plan.pieces), 64);
    plan.pieces = ceil_div(plane, plan.piece);
    plan.units = p.n * p.c * plan.pieces;
    return plan;
  }
  plan.fold = 1;
  if (p.c < 32)
    while (plan.fold * p.c < 64 || plan.fold * p.c % 16) ++plan.fold;
  const int64_t pixels = p.n * plane;
  plan.width = plan.fold * p.c;
  plan.rows = pixels / plan.fold;
  plan.tail = pixels % plan.fold * p.c;
  // Blocks of about one size, and of an even number: threads get the same work.
  const int64_t rows = plan.rows + (plan.tail > 0), row_blocks = ceil_div(rows, BatchNormPlan::kBlockRows);
  plan.block_rows = ceil_div(rows, rows < 32 ? 1 : round_up(row_blocks, row_blocks > 8 ? 8 : 2));
  plan.row_blocks = ceil_div(rows, plan.block_rows);
  plan.column_blocks = ceil_div(plan.width, BatchNormPlan::kBlockColumns);
  plan.block_columns = round_up(ceil_div(plan.width, plan.column_blocks), 32);
  plan.units = plan.row_blocks * plan.column_blocks;
  return plan;
}

// Two numbers per partial sum, and up to five coefficients per column.
static inline int64_t batch_norm_workspace_bytes(const BatchNormParams& p) {
  const BatchNormPlan plan = batch_norm_plan(p);
  return static_cast<int64_t>(sizeof(double)) * (2 * plan.partials() + 5 * plan.columns(p));
}

// Element i of a weight, a bias or a statistic.
CNNOPS_HD static inline double batch_norm_get(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(data)[i];
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::bf16: return load_scalar(static_cast<const bf16*>(data)[i]);
    case DType::f16: return load_scalar(static_cast<const f16*>(data)[i]);
    default: return 0;
  }
}
CNNOPS_HD static inline void batch_norm_set(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(value); break;
    case DType::f64: static_cast<double*>(data)[i] = value; break;
    case DType::bf16: store_scalar(&static_cast<bf16*>(data)[i], static_cast<float>(value)); break;
    case DType::f16: store_scalar(&static_cast<f16*>(data)[i], static_cast<float>(value)); break;
    default: break;
  }
}

}  // namespace cnnops
