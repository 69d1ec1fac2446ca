// Convolution of NCHW images whose rows are shorter than a register tile: through channels_last, where a tile's columns are
// channels. The images are transposed once each way, which costs a few hundredths of the products over many channels.
#include "common/arith.h"
#include "common/scratch.h"
#include "cpu/conv2d_blocks.h"
#include "cpu/simd/transpose.h"

namespace cnnops::CNNOPS_ISA {
void conv2d_forward_f32(const Conv2dParams& p);
void conv2d_input_grad_f32(const Conv2dParams& p);
// With the shorter running sums of NCHW.
void conv2d_winograd_exactly(const Conv2dParams& p, bool transposed);

namespace {

constexpr int64_t kChannels = 32, kPixels = 128;  // of a block: two cache lines wide, 16 KB of sums

// Calls visit(image, first channel, channels) for blocks of channels.
template <class Visit>
void for_channel_blocks(int64_t images, int64_t channels, int threads, const Visit& visit) {
  const int64_t blocks = ceil_div(channels, kChannels);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < images * blocks; ++i) {
    const int64_t c0 = i % blocks * kChannels;
    visit(i / blocks, c0, min64(kChannels, channels - c0));
  }
}

// Runs `kernel` on a channels_last copy of `input`, of in_c channels and in_plane pixels, and finishes what it gives.
template <class Kernel>
void run(const Conv2dParams& p, const Kernel& kernel, void* Conv2dParams::* input, int64_t in_c, int64_t in_plane,
         void* Conv2dParams::* output, int64_t out_c, int64_t out_plane) {
  Scratch<float> in(p.n * in_c * in_plane), out(p.n * out_c * out_plane);
  const float* const from = static_cast<const float*>(p.*input);
  for_channel_blocks(p.n, in_c, p.threads, [&](int64_t n, int64_t c0, int64_t channels) {
    transpose(from + (n * in_c + c0) * in_plane, in_plane, channels, in_plane, in.data + n * in_c * in_plane + c0,
              in_c);
  });
  Conv2dParams q = p;
  q.layout = Layout::nhwc;
  q.*input = in.data, q.*output = out.data;
  q.bias = nullptr, q.residual = nullptr;
  q.activation = Activation::none;
  kernel(q);
  const float* const bias = static_cast<const float*>(p.bias);
  const float* const residual = static_cast<const float*>(p.residual);
  float* const to = static_cast<float*>(p.*output);
  for_channel_blocks(p.n, out_c, p.threads, [&](int64_t n, int64_t c0, int64_t channels) {
    float planes[kChannels * kPixels];
    for (int64_t i = 0; i < out_plane; i += kPixels) {
      const int64_t pixels = min64(kPixels, out_plane - i);
      transpose(out.data + (n * out_plane + i) * out_c + c0, out_c, pixels, channels, planes, kPixels);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = (n * out_c + c0 + c) * out_plane + i;
        finish_row<float>(planes + c * kPixels, pixels, bias ? bias[c0 + c] : 0, nullptr,
                          residual ? residual + at : nullptr, p.activation, to + at, 1);
      }
    }
  });
}

}  // namespace

void conv2d_short_rows_forward_f32(const Conv2dParams& p) {
  run(p, conv2d_forward_f32, &Conv2dParams::x, p.c, p.h * p.w, &Conv2dParams::y, p.k, p.p * p.q);
}
// The phases of a strided convolution each read some of the taps: from a matrix per tap they need not skip the others.
void conv2d_short_rows_input_grad_f32(const Conv2dParams& p) {
  const int64_t taps = p.r * p.s;
  const bool by_tap = taps > 1 && p.weight_stride[1] == taps && p.weight_stride[2] == p.s && p.weight_stride[3] == 1;
  Scratch<float> weights(by_tap ? taps * p.k * p.c : 0);
  Conv2dParams q = p;
  if (by_tap) {
    const float* const from = static_cast<const float*>(p.weight);
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t k = 0; k < p.k; ++k)
      transpose(from + k * p.weight_stride[0], taps, p.c, taps, weights.data + k * p.c, p.k * p.c);
    q.weight = weights.data;
    q.weight_stride[0] = p.c, q.weight_stride[1] = 1;
    q.weight_stride[2] = p.s * p.k * p.c, q.weight_stride[3] = p.k * p.c;
  }
  run(q, conv2d_input_grad_f32, &Conv2dParams::y, p.k, p.p * p.q, &Conv2dParams::x, p.c, p.h * p.w);
}
void conv2d_short_rows_winograd_forward_f32(const Conv2dParams& p) {
  const auto kernel = [](const Conv2dParams& q) { conv2d_winograd_exactly(q, false); };
  run(p, kernel, &Conv2dParams::x, p.c, p.h * p.w, &Conv2dParams::y, p.k, p.p * p.q);
}
void conv2d_short_rows_winograd_input_grad_f32(const Conv2dParams& p) {
  const auto kernel = [](const Conv2dParams& q) { conv2d_winograd_exactly(q, true); };
  run(p, kernel, &Conv2dParams::y, p.k, p.p * p.q, &Conv2dParams::x, p.c, p.h * p.w);
}
}  // namespace cnnops::CNNOPS_ISA
