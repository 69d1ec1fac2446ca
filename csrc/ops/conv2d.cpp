#include "ops/conv2d.h"

#include "common/arith.h"
#include "dispatch/direct.h"
#include "dispatch/op_table.h"

namespace cnnops {
namespace {

bool is_depthwise(const Conv2dParams& p) { return p.groups == p.c && p.k == p.c; }
bool is_depthwise_nhwc(const Conv2dParams& p) { return is_depthwise(p) && p.layout == Layout::nhwc; }

// NCHW rows of at most two vectors, of stride 2 one, few enough to be summed in float32, and a square filter whose middle meets
// the output's pixels.
bool has_narrow_planes(const Conv2dParams& p) {
  const int64_t taps = p.s, stride = p.stride_w;
  return is_depthwise(p) && p.layout == Layout::nchw && p.r == taps && (taps == 3 || taps == 5 || taps == 7) &&
         p.stride_h == stride && stride <= 2 && p.dilation_h == 1 && p.dilation_w == 1 && p.pad_h == taps / 2 &&
         p.pad_w == taps / 2 && p.p == (p.h - 1) / stride + 1 && p.q == (p.w - 1) / stride + 1 && p.w <= 32 &&
         p.h <= 128 && p.h * p.w > 0 && !(stride == 2 && taps == 7);
}
// Where images of 7 x 7 leave lanes without work, vectors of channels are as fast or faster.
bool narrow_planes_pay(const Conv2dParams& p) { return has_narrow_planes(p) && (p.w > 8 || p.s == 3); }
bool narrow_planes_weight_grad_pays(const Conv2dParams& p) {
  return has_narrow_planes(p) && p.w > 8 && !(p.s == 5 && p.q <= 8);
}

// NCHW rows of `least` pixels or more in the output, and a square filter whose rows' middle meets them.
bool has_wide_planes(const Conv2dParams& p, int64_t least) {
  const int64_t taps = p.s, stride = p.stride_w, step = p.dilation_w;
  return is_depthwise(p) && p.layout == Layout::nchw && p.r == taps && p.stride_h == stride && p.dilation_h == step &&
         ((stride == 1 && step == 1) || (stride == 2 && step == 1) || (stride == 1 && step == 2 && taps == 3)) &&
         (taps == 3 || taps == 5) && p.pad_w == taps / 2 * step && p.q == (p.w - 1) / stride + 1 && p.q >= least &&
         p.n * p.c * p.h * p.w * p.p > 0;
}
// Rows of a vector; with 3 x 3, 14 of 16 lanes are enough.
bool wide_planes_pay(const Conv2dParams& p) { return has_wide_planes(p, p.s == 3 && p.stride_w == 1 ? 12 : 16); }
// 5 x 5 with stride 2 takes 1.2 times as long so as on vectors of channels.
bool wide_planes_input_grad_pays(const Conv2dParams& p) { return wide_planes_pay(p) && (p.stride_w == 1 || p.s == 3); }
bool wide_planes_weight_grad_pays(const Conv2dParams& p) { return has_wide_planes(p, 16); }

// Under 8 channels meet 8 filters: no work for matrix products.
bool has_narrow_groups(const Conv2dParams& p) {
  return p.groups > 1 && p.c / p.groups < 8 && p.k / p.groups < 8 && p.r * p.s < 65536;
}

bool has_groups_of(const Conv2dParams& p, int64_t most) {
  return p.groups > 1 && p.c > 0 && p.k > 0 && max64(p.c, p.k) <= most * p.groups;
}
// Up to these, kernels on vectors of channels were faster than matrix products in 3x3 convolutions: with 8 channels all
// passes, with 16 in float32 on AVX-512 forward and the gradient of the input.
bool has_groups_of_8(const Conv2dParams& p) { return has_groups_of(p, 8); }
bool has_groups_of_16(const Conv2dParams& p) { return has_groups_of(p, 16); }

// Coordinates have 32 bits there.
bool suits_matrix_units(const Conv2dParams& p) {
  constexpr int64_t kLargest = 1 << 28;
  return !has_narrow_groups(p) && p.groups < 65536 && p.r * p.s < 65536 && p.stride_h * p.stride_w < 65536 &&
         max64(p.h, p.w) * max64(p.stride_h, p.stride_w) < kLargest && max64(p.p, p.q) < kLargest &&
         p.r * p.dilation_h < kLargest && p.s * p.dilation_w < kLargest && max64(p.c, p.k) * p.r * p.s < kLargest;
}

// From some batch size on, packing the weights into tiles pays.
bool is_single_pixel(const Conv2dParams& p) {
  constexpr int64_t kMostImages = 8;
  return p.h == 1 && p.w == 1 && p.p == 1 && p.q == 1 && p.r == 1 && p.s == 1 && p.groups == 1 && p.pad_h == 0 &&
         p.pad_w == 0 && p.n <= kMostImages && p.weight_stride[0] == p.c && p.weight_stride[1] == 1;
}

bool is_pointwise(const Conv2dParams& p) {
  return p.r == 1 && p.s == 1 && p.pad_h == 0 && p.pad_w == 0 && (p.p - 1) * p.stride_h < p.h &&
         (p.q - 1) * p.stride_w < p.w && p.n * p.p * p.q > 0 && p.c > 0 && p.k > 0;
}

// 1x1, or in channels_last windows side by side, whose taps and channels are neighbours in the image and the weights: 1.0 to
// 1.25 times as fast as matrix products on strips, if the pixels are not few.
bool windows_are_pixels(const Conv2dParams& p) {
  constexpr int64_t kLeastChannels = 16, kLeastPixels = 512;
  if (is_pointwise(p)) return true;
  return p.layout == Layout::nhwc && p.groups == 1 && p.c >= kLeastChannels && p.n * p.p * p.q >= kLeastPixels &&
         p.stride_h == p.r && p.stride_w == p.s && p.dilation_h == 1 && p.dilation_w == 1 && p.pad_h == 0 &&
         p.pad_w == 0 && p.p * p.r <= p.h && p.q * p.s <= p.w && p.k > 0 && p.weight_stride[1] == 1 &&
         p.weight_stride[2] == p.s * p.c && p.weight_stride[3] == p.c;
}

// NCHW, planes that fill vectors, and sums of so many pixels that adding up lanes is a small part of the work.
bool plane_dots_pay(const Conv2dParams& p) {
  constexpr int64_t kLeastPixels = 400, kLeastChannels = 16, kLeastPlane = 16;
  return p.layout == Layout::nchw && p.groups == 1 && is_pointwise(p) && p.stride_h == 1 && p.stride_w == 1 &&
         p.h == p.p && p.w == p.q && p.h * p.w >= kLeastPlane && p.n * p.h * p.w >= kLeastPixels &&
         min64(p.c, p.k) >= kLeastChannels;
}
// On AVX2 planes of 7x7 are 0.8 to 1.0 times as fast so.
bool large_plane_dots_pay(const Conv2dParams& p) { return plane_dots_pay(p) && p.h * p.w >= 96; }

// A few pixels do not pay for packing the weights in pairs: at 16, as in squeeze-and-excitation, the direct kernels are up to
// 1.5 times as fast.
bool pairs_pay(const Conv2dParams& p) {
  constexpr int64_t kLeastPixels = 32;
  return p.n * p.p * p.q >= kLeastPixels;
}

// Where the transforms of the image and of the result are a small part of the work, and few of the 2 x 2 tiles' pixels lie
// outside the image.
bool winograd_pays(const Conv2dParams& p) {
  constexpr int64_t kLeastChannels = 16;
  const int64_t computed = (p.h + p.h % 2) * (p.w + p.w % 2);
  return p.r == 3 && p.s == 3 && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
         p.pad_h == 1 && p.pad_w == 1 && p.p == p.h && p.q == p.w && p.c / p.groups >= kLeastChannels &&
         p.k / p.groups >= kLeastChannels && p.n > 0 && 3 * p.h * p.w >= 2 * computed;
}

// NCHW: channels fill register tiles better than pixels do, unless there are so many tiles that the copies leave the caches.
bool short_rows_winograd_pays(const Conv2dParams& p) {
  constexpr int64_t kLeastChannels = 48, kMostTiles = 16384;
  return p.layout == Layout::nchw && p.groups == 1 && min64(p.c, p.k) >= kLeastChannels && winograd_pays(p) &&
         p.n * ((p.h + 1) / 2) * ((p.w + 1) / 2) <= kMostTiles;
}

// Where there are few products to add up, the transforms' roundings would be the larger part of the error, and above
// PyTorch's: its error in channels_last is small where images have few rows in all.
bool winograd_weight_grad_pays(const Conv2dParams& p) {
  constexpr int64_t kLeastTerms = 1600, kLeastRows = 112, kLeastTermsNchw = 144;
  const int64_t terms = p.n * p.p * p.q;
  if (!winograd_pays(p)) return false;
  return p.layout == Layout::nchw ? terms >= kLeastTermsNchw : terms >= kLeastTerms || p.n * p.p >= kLeastRows;
}

bool has_few_channels(const Conv2dParams& p) {
  constexpr int64_t kFew = 8, kLeastFilters = 8, kMostColumns = 1024;
  return p.layout == Layout::nhwc && p.groups == 1 && p.c > 0 && p.c <= kFew && p.k >= kLeastFilters && p.r * p.s > 1 &&
         p.r * p.s * p.c <= kMostColumns && p.dilation_w == 1 && !p.residual && p.activation == Activation::none &&
         p.n * p.p * p.q * p.h * p.w > 0;
}

bool has_few_planes(const Conv2dParams& p) {
  constexpr int64_t kFew = 8, kLeastFilters = 8, kLeastColumns = 16, kMostTerms = 512, kMostReach = 32, kMostStride = 8;
  return p.layout == Layout::nchw && p.groups == 1 && p.c > 0 && p.c <= kFew && p.k >= kLeastFilters && p.r * p.s > 1 &&
         p.q >= kLeastColumns && p.c * p.r * p.s <= kMostTerms && (p.r - 1) * p.dilation_h < kMostReach &&
         (p.s - 1) * p.dilation_w < kMostReach && p.stride_w <= kMostStride && p.n * p.p * p.h * p.w > 0;
}

// Rows that fill vectors of 16 pixels.
bool has_few_planes_of_16(const Conv2dParams& p) { return has_few_planes(p) && 8 * round_up(p.q, 16) <= 9 * p.q; }

// NCHW, 1x1 on small planes, or strides: limits as measured on AVX-512. Where windows overlap, the sums of whole images must
// fit L2, and be small beside the problem.
bool columns_pay(const Conv2dParams& p) {
  constexpr int64_t kLeastChannels = 16, kFewPixels = 64, kMostPlane = 256;    // 1x1
  constexpr int64_t kLeastStridedChannels = 64, kMostOverlappingPixels = 400;  // strides
  const int64_t taps = p.r * p.s, plane = p.p * p.q;
  if (p.layout != Layout::nchw || p.groups != 1 || min64(p.c, p.k) < kLeastChannels) return false;
  if (p.n * plane * p.h * p.w == 0 || p.weight_stride[1] != taps || (p.r > 1 && p.weight_stride[2] != p.s) ||
      (p.s > 1 && p.weight_stride[3] != 1))
    return false;
  if (p.stride_h == 1 && p.stride_w == 1)
    return is_pointwise(p) && p.p == p.h && p.q == p.w && plane <= kMostPlane && p.n * plane > kFewPixels;
  const bool overlap =
      p.pad_h || p.pad_w || (p.r - 1) * p.dilation_h >= p.stride_h || (p.s - 1) * p.dilation_w >= p.stride_w;
  return min64(p.c, p.k) >= kLeastStridedChannels && (!overlap || plane <= kMostOverlappingPixels);
}

// NCHW rows much shorter than a tile of pixels: transposing the images costs less than tiles that are not full. Limits as
// measured on AVX-512 over the layers of resnet50, convnext_tiny and some with kernels of 5x5.
bool short_rows_pay(const Conv2dParams& p, bool strided_rows_are_short) {
  constexpr int64_t kLeastChannels = 16, kFewPixels = 64, kManyPixels = 1024;
  if (p.layout != Layout::nchw || p.groups != 1 || min64(p.c, p.k) < kLeastChannels) return false;
  const int64_t pixels = p.n * p.p * p.q;
  if (pixels == 0 || p.h * p.w == 0) return false;
  if (p.stride_h > 1 || p.stride_w > 1) return strided_rows_are_short;
  return is_pointwise(p) ? pixels <= kFewPixels : p.q <= 28 && pixels >= kManyPixels;
}
bool short_rows_forward_pays(const Conv2dParams& p) { return short_rows_pay(p, p.q <= (is_pointwise(p) ? 16 : 28)); }
bool short_rows_input_grad_pays(const Conv2dParams& p) { return short_rows_pay(p, p.w <= 64); }

}  // namespace

#define CNNOPS_OP "conv2d"
#define CNNOPS_PARAMS Conv2dParams
#define CNNOPS_TABLE "ops/conv2d.inc"
#include "dispatch/define_table.h"

namespace {

struct Geometry {
  Pair stride, padding, dilation;
  int64_t groups;
};

Conv2dParams validate(const char* op, const Tensor& x, const Tensor& weight, const Tensor& y, const Geometry& g,
                      int threads, int precision) {
  Conv2dParams p{};
  p.layout = common_layout(op, x.dtype, {{"input", &x}, {"output", &y}});
  CNNOPS_CHECK(weight.place == x.place && weight.dtype == x.dtype && weight.ndim == 4, std::runtime_error, op,
               ": expected weight in ", name(x.dtype), " with 4 dimensions on ", place_text(x.place), ", but it is ",
               shape_text(weight), " in ", name(weight.dtype), " on ", place_text(weight.place));
  p.n = x.shape[0], p.c = x.shape[1], p.h = x.shape[2], p.w = x.shape[3];
  p.k = weight.shape[0], p.r = weight.shape[2], p.s = weight.shape[3];
  p.p = y.shape[2], p.q = y.shape[3];
  p.groups = g.groups;
  CNNOPS_CHECK(p.groups > 0 && p.c % p.groups == 0 && p.k % p.groups == 0, std::runtime_error, op, ": groups of ",
               p.groups, " do not divide ", p.c, " input and ", p.k, " output channels");
  expect_shape(op, {"weight", &weight}, {p.k, p.c / p.groups, p.r, p.s});
  expect_shape(op, {"output", &y}, {p.n, p.k, p.p, p.q});
  if (p.h * p.w == 1 && p.p * p.q == 1) p.layout = Layout::nhwc;  // it is both, and pixels fill vectors with channels
  p.stride_h = g.stride[0], p.stride_w = g.stride[1];
  p.pad_h = g.padding[0], p.pad_w = g.padding[1];
  p.dilation_h = g.dilation[0], p.dilation_w = g.dilation[1];
  CNNOPS_CHECK(p.r > 0 && p.s > 0 && p.stride_h > 0 && p.stride_w > 0 && p.dilation_h > 0 && p.dilation_w > 0,
               std::invalid_argument, op, ": kernel size, stride and dilation must be positive");
  CNNOPS_CHECK(p.pad_h >= 0 && p.pad_w >= 0, std::invalid_argument, op, ": padding must not be negative");
  for (const Pair& pair : {g.stride, g.padding, g.dilation})
    CNNOPS_CHECK(x.place.device == Device::cpu || max64(pair[0], pair[1]) < int64_t{1} << 30, std::invalid_argument, op,
                 ": on a device, stride, padding and dilation must be below 2^30");
  for (int i = 0; i < 4; ++i) p.weight_stride[i] = weight.stride[i];
  p.x = x.data;
  p.weight = weight.data;
  p.y = y.data;
  // Waking a thread costs as much as some hundred thousand products.
  p.threads = threads_for(p.n * p.k * p.p * p.q * (p.c / p.groups) * p.r * p.s / 8, threads);
  CNNOPS_CHECK(precision >= 0 && precision <= static_cast<int>(Precision::bf16), std::invalid_argument, op,
               ": precision ", precision, " does not exist");
  p.precision = static_cast<Precision>(precision);
  return p;
}

void* optional_vector(const char* op, const char* argument, const std::optional<Tensor>& t, const Tensor& image,
                      int64_t size) {
  if (!t) return nullptr;
  expect_contiguous(op, {argument, &*t}, image.dtype, {size}, image.place);
  return t->data;
}

void conv2d_forward(const Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, Pair stride, Pair padding, Pair dilation, int64_t groups,
                    int activation, int threads, int precision, int kernel) {
  constexpr const char* kOp = "conv2d";
  Conv2dParams p = validate(kOp, x, weight, y, {stride, padding, dilation, groups}, threads, precision);
  p.bias = optional_vector(kOp, "bias", bias, x, p.k);
  if (residual) {
    expect_shape(kOp, {"residual", &*residual}, {p.n, p.k, p.p, p.q});
    const Layout common = common_layout(kOp, x.dtype, {{"input", &x}, {"output", &y}, {"residual", &*residual}});
    if (p.h * p.w * p.p * p.q != 1) p.layout = common;
    p.residual = residual->data;
  }
  CNNOPS_CHECK(activation >= 0 && activation <= static_cast<int>(Activation::gelu), std::invalid_argument, kOp,
               ": activation ", activation, " does not exist");
  p.activation = static_cast<Activation>(activation);
  run(table<Conv2dParams>(), "forward", x, p, kernel);
}

void conv2d_input_grad(const Tensor& dx, const Tensor& dy, const Tensor& weight, const std::optional<Tensor>& bias,
                       Pair stride, Pair padding, Pair dilation, int64_t groups, int threads, int precision,
                       int kernel) {
  constexpr const char* kOp = "conv2d_input_grad";
  Conv2dParams p = validate(kOp, dx, weight, dy, {stride, padding, dilation, groups}, threads, precision);
  p.bias = optional_vector(kOp, "bias", bias, dx, p.c);
  run(table<Conv2dParams>(), "input_grad", dx, p, kernel);
}

void conv2d_weight_grad(const Tensor& dw, const Tensor& dy, const Tensor& x, Pair stride, Pair padding, Pair dilation,
                        int64_t groups, int threads, int precision, int kernel) {
  const Conv2dParams p =
      validate("conv2d_weight_grad", x, dw, dy, {stride, padding, dilation, groups}, threads, precision);
  run(table<Conv2dParams>(), "weight_grad", x, p, kernel);
}

void conv2d_bias_grad(const Tensor& db, const Tensor& dy, int threads, int kernel) {
  Conv2dParams p{};
  p.layout = common_layout("conv2d_bias_grad", dy.dtype, {{"output gradient", &dy}});
  p.n = dy.shape[0], p.k = dy.shape[1], p.p = dy.shape[2], p.q = dy.shape[3];
  expect_contiguous("conv2d_bias_grad", {"bias gradient", &db}, dy.dtype, {p.k}, dy.place);
  p.y = dy.data;
  p.bias = db.data;
  p.threads = threads_for(dy.numel(), threads);
  run(table<Conv2dParams>(), "bias_grad", dy, p, kernel);
}

// channels_last where one of them is, as PyTorch decides for an image and the weight.
Layout common(const Tensor& a, const Tensor& b) {
  return direct::suggested(a) == Layout::nhwc || direct::suggested(b) == Layout::nhwc ? Layout::nhwc : Layout::nchw;
}

bool suits(const Tensor& bias, const Tensor& x, int64_t channels) {
  return !bias.data || (bias.dtype == x.dtype && bias.shape[0] == channels && (channels == 1 || bias.stride[0] == 1));
}

// (input, weight, bias, residual, stride, padding, dilation, groups, activation, grad, threads, precision) -> y; (y,), without
// residual and activation, where a gradient is wanted; or None.
PyObject* conv2d_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor x, weight, bias, residual, y;
    Geometry g;
    int64_t activation, threads, precision;
    if (count != 12 || !direct::tensor(args[0], x) || !direct::tensor(args[1], weight) ||
        !direct::optional_tensor(args[2], bias, 1) || !direct::optional_tensor(args[3], residual, 4) ||
        !direct::pair(args[4], g.stride) || !direct::pair(args[5], g.padding) || !direct::pair(args[6], g.dilation) ||
        !direct::integer(args[7], g.groups) || !direct::integer(args[8], activation) ||
        !direct::integer(args[10], threads) || !direct::integer(args[11], precision))
      return nullptr;
    const bool wants_grad = args[9] == Py_True && (direct::requires_grad(args[0]) || direct::requires_grad(args[1]) ||
                                                   direct::requires_grad(args[2]) || direct::requires_grad(args[3]));
    const int64_t k = weight.shape[0];
    std::array<int64_t, 4> shape = {x.shape[0], k, 0, 0};
    for (int i = 0; i < 2; ++i) {
      if (g.stride[i] == 0 || g.dilation[i] == 0) return nullptr;
      const int64_t room = x.shape[2 + i] + 2 * g.padding[i] - g.dilation[i] * (weight.shape[2 + i] - 1) - 1;
      if (room < 0) return nullptr;
      shape[2 + i] = room / g.stride[i] + 1;
    }
    const Layout layout = common(x, weight);
    if (g.groups == 0 || x.shape[1] != weight.shape[1] * g.groups || k % g.groups || weight.dtype != x.dtype ||
        !direct::dense(x, layout) || !suits(bias, x, k))
      return nullptr;
    if (residual.data) {
      for (int i = 0; i < 4; ++i)
        if (residual.shape[i] != shape[static_cast<size_t>(i)]) return nullptr;
      if (residual.dtype != x.dtype || !direct::dense(residual, layout)) return nullptr;
    }
    py::object made = direct::empty(args[0], shape, x.dtype, layout, y);
    Conv2dParams p = validate("conv2d", x, weight, y, g, static_cast<int>(threads), static_cast<int>(precision));
    p.bias = bias.data;
    if (!wants_grad) {
      p.residual = residual.data;
      p.activation = static_cast<Activation>(activation);
    }
    run(table<Conv2dParams>(), "forward", x, p, kSelect);
    return wants_grad ? py::make_tuple(std::move(made)).release().ptr() : made.release().ptr();
  });
}

// (input, weight, bias, stride, padding, output_padding, groups, dilation, grad, threads, precision) -> y, (y,) where a
// gradient is wanted, or None. Named as in a convolution from y to the input, whose gradient y is.
PyObject* conv_transpose2d_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor dy, weight, bias, dx;
    Geometry g;
    Pair extra;
    int64_t threads, precision;
    if (count != 11 || !direct::tensor(args[0], dy) || !direct::tensor(args[1], weight) ||
        !direct::optional_tensor(args[2], bias, 1) || !direct::pair(args[3], g.stride) ||
        !direct::pair(args[4], g.padding) || !direct::pair(args[5], extra) || !direct::integer(args[6], g.groups) ||
        !direct::pair(args[7], g.dilation) || !direct::integer(args[9], threads) ||
        !direct::integer(args[10], precision))
      return nullptr;
    const bool wants_grad = args[8] == Py_True && (direct::requires_grad(args[0]) || direct::requires_grad(args[1]) ||
                                                   direct::requires_grad(args[2]));
    std::array<int64_t, 4> shape = {dy.shape[0], weight.shape[1] * g.groups, 0, 0};
    for (int i = 0; i < 2; ++i) {
      if (g.stride[i] == 0 || g.dilation[i] == 0 || extra[i] >= max64(g.stride[i], g.dilation[i])) return nullptr;
      shape[2 + i] = (dy.shape[2 + i] - 1) * g.stride[i] - 2 * g.padding[i] +
                     g.dilation[i] * (weight.shape[2 + i] - 1) + extra[i] + 1;
      if (shape[2 + i] < 1) return nullptr;
    }
    const Layout layout = common(dy, weight);
    if (g.groups == 0 || dy.shape[1] != weight.shape[0] || weight.shape[0] % g.groups || weight.dtype != dy.dtype ||
        !direct::dense(dy, layout) || !suits(bias, dy, shape[1]))
      return nullptr;
    py::object made = direct::empty(args[0], shape, dy.dtype, layout, dx);
    const std::optional<Tensor> added = bias.data ? std::optional(bias) : std::nullopt;
    conv2d_input_grad(dx, dy, weight, added, g.stride, g.padding, g.dilation, g.groups, static_cast<int>(threads),
                      static_cast<int>(precision), kSelect);
    return wants_grad ? py::make_tuple(std::move(made)).release().ptr() : made.release().ptr();
  });
}

// (dy, x, weight, stride, padding, dilation, groups, want dx, want dw, want db, threads, precision) -> (dx, dw, db), None
// where one is not wanted; or None. Of a transposed convolution: dx is the convolution of dy, in whose weight gradient the
// images change places.
template <bool transposed>
PyObject* conv2d_backward_direct(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return direct::attempt([&]() -> PyObject* {
    Tensor dy, x, weight;
    Geometry g;
    bool wants[3];
    int64_t threads, precision;
    if (count != 12 || !direct::tensor(args[0], dy) || !direct::tensor(args[1], x) ||
        !direct::tensor(args[2], weight) || !direct::pair(args[3], g.stride) || !direct::pair(args[4], g.padding) ||
        !direct::pair(args[5], g.dilation) || !direct::integer(args[6], g.groups) ||
        !direct::truth(args[7], wants[0]) || !direct::truth(args[8], wants[1]) || !direct::truth(args[9], wants[2]) ||
        !direct::integer(args[10], threads) || !direct::integer(args[11], precision))
      return nullptr;
    const Layout images = common(dy, weight), both = common(x, dy);
    if (!direct::dense(dy, images) || !direct::dense(dy, both) || !direct::dense(x, both)) return nullptr;
    const int most = static_cast<int>(threads), exact = static_cast<int>(precision);
    py::object dx = py::none(), dw = py::none(), db = py::none();
    Tensor made;
    if (wants[0]) {
      dx = direct::empty(args[0], {x.shape[0], x.shape[1], x.shape[2], x.shape[3]}, dy.dtype, images, made);
      if (transposed)
        conv2d_forward(made, dy, weight, std::nullopt, std::nullopt, g.stride, g.padding, g.dilation, g.groups, 0, most,
                       exact, kSelect);
      else
        conv2d_input_grad(made, dy, weight, std::nullopt, g.stride, g.padding, g.dilation, g.groups, most, exact,
                          kSelect);
    }
    if (wants[1]) {
      dw = direct::empty(args[0], {weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3]}, dy.dtype,
                         direct::suggested(weight), made);
      conv2d_weight_grad(made, transposed ? x : dy, transposed ? dy : x, g.stride, g.padding, g.dilation, g.groups,
                         most, exact, kSelect);
    }
    if (wants[2]) {
      db = direct::empty_vector(args[0], dy.shape[1], dy.dtype, made);
      conv2d_bias_grad(made, dy, most, kSelect);
    }
    return py::make_tuple(std::move(dx), std::move(dw), std::move(db)).release().ptr();
  });
}

}  // namespace

void bind_conv2d(py::module_& m) {
  direct::define(
      m, "conv2d_direct", &conv2d_direct,
      "conv2d_direct(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, "
      "stride: Any, padding: Any, dilation: Any, groups: int, activation: int, grad: bool, threads: int, "
      "precision: int) -> object");
  direct::define(m, "conv_transpose2d_direct", &conv_transpose2d_direct,
                 "conv_transpose2d_direct(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, "
                 "stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any, grad: bool, "
                 "threads: int, precision: int) -> object");
  direct::define(m, "conv_transpose2d_backward_direct", &conv2d_backward_direct<true>,
                 "conv_transpose2d_backward_direct(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, "
                 "stride: Any, padding: Any, dilation: Any, groups: int, want_dx: bool, want_dw: bool, want_db: bool, "
                 "threads: int, precision: int) -> object");
  direct::define(m, "conv2d_backward_direct", &conv2d_backward_direct<false>,
                 "conv2d_backward_direct(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, stride: Any, "
                 "padding: Any, dilation: Any, groups: int, want_dx: bool, want_dw: bool, want_db: bool, "
                 "threads: int, precision: int) -> object");
  m.def("conv2d_forward", &conv2d_forward, "y"_a, "x"_a, "weight"_a, "bias"_a, "residual"_a, "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a, "activation"_a, "threads"_a, "precision"_a = 0, "kernel"_a = kSelect);
  m.def("conv2d_input_grad", &conv2d_input_grad, "dx"_a, "dy"_a, "weight"_a, "bias"_a, "stride"_a, "padding"_a,
        "dilation"_a, "groups"_a, "threads"_a, "precision"_a = 0, "kernel"_a = kSelect);
  m.def("conv2d_weight_grad", &conv2d_weight_grad, "dw"_a, "dy"_a, "x"_a, "stride"_a, "padding"_a, "dilation"_a,
        "groups"_a, "threads"_a, "precision"_a = 0, "kernel"_a = kSelect);
  m.def("conv2d_bias_grad", &conv2d_bias_grad, "db"_a, "dy"_a, "threads"_a, "kernel"_a = kSelect);
}

}  // namespace cnnops
