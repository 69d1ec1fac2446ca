// Mean pooling, one output row at a time. Work is cut into rows of the output image (rows of dx in backward), so every
// element is summed by one thread in the contract's order, whatever the number of threads.
#include "ops/avg_pool2d.h"

#include "common/arith.h"

#include "cpu/simd/vec.h"

namespace cnnops::CNNOPS_ISA {
namespace {

// Cells that D counts along one axis for the window that begins at `begin`.
int64_t counted(int64_t begin, int64_t kernel, int64_t size, int64_t margin) {
  return min64(begin + kernel, size + margin) - max64(begin, -margin);
}

struct Window {
  int64_t h0, h1, w0, w1;  // the part inside the image
  double scale;            // 1 / D
};

Window window(const AvgPool2dParams& p, int64_t pp, int64_t qq) {
  const int64_t h = pp * p.stride_h - p.pad_h, w = qq * p.stride_w - p.pad_w;
  const int64_t mh = p.count_include_pad ? p.pad_h : 0, mw = p.count_include_pad ? p.pad_w : 0;
  const int64_t cells = p.divisor ? p.divisor : counted(h, p.kernel_h, p.h, mh) * counted(w, p.kernel_w, p.w, mw);
  return {max64(h, 0), min64(h + p.kernel_h, p.h), max64(w, 0), min64(w + p.kernel_w, p.w),
          1.0 / static_cast<double>(cells)};
}

template <class T>
void forward(const AvgPool2dParams& p) {
  using C = compute_t<T>;
  const T* const x = static_cast<const T*>(p.in);
  T* const y = static_cast<T*>(p.out);
  if (p.layout == Layout::nchw) {
    const int64_t rows = p.n * p.c * p.p;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T* const plane = x + row / p.p * p.h * p.w;
      for (int64_t q = 0; q < p.q; ++q) {
        const Window v = window(p, row % p.p, q);
        C sum = 0;
        for (int64_t h = v.h0; h < v.h1; ++h)
          for (int64_t w = v.w0; w < v.w1; ++w) sum += load_scalar(plane[h * p.w + w]);
        store_scalar(&y[row * p.q + q], static_cast<C>(sum * v.scale));
      }
    }
  } else {
    const int64_t rows = p.n * p.p;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T* const image = x + row / p.p * p.h * p.w * p.c;
      for (int64_t q = 0; q < p.q; ++q) {
        const Window v = window(p, row % p.p, q);
        for (int64_t c = 0; c < p.c; c += lanes<C>) {
          const int part = static_cast<int>(min64(p.c - c, lanes<C>));
          vec<C> sum = {};
          for (int64_t h = v.h0; h < v.h1; ++h)
            for (int64_t w = v.w0; w < v.w1; ++w) sum += load_n(image + (h * p.w + w) * p.c + c, part);
          store_n(y + (row * p.q + q) * p.c + c, sum * static_cast<C>(v.scale), part);
        }
      }
    }
  }
}

// The windows along one axis that hold cell `at`: [first, last).
int64_t first_window(int64_t at, int64_t pad, int64_t kernel, int64_t stride) {
  const int64_t past = at + pad - kernel;
  return past < 0 ? 0 : past / stride + 1;
}
int64_t last_window(int64_t at, int64_t pad, int64_t stride, int64_t count) {
  return min64((at + pad) / stride + 1, count);
}

template <class T>
void backward(const AvgPool2dParams& p) {
  using C = compute_t<T>;
  const T* const dy = static_cast<const T*>(p.in);
  T* const dx = static_cast<T*>(p.out);
  if (p.layout == Layout::nchw) {
    const int64_t rows = p.n * p.c * p.h;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T* const plane = dy + row / p.h * p.p * p.q;
      const int64_t h = row % p.h;
      const int64_t p0 = first_window(h, p.pad_h, p.kernel_h, p.stride_h),
                    p1 = last_window(h, p.pad_h, p.stride_h, p.p);
      for (int64_t w = 0; w < p.w; ++w) {
        const int64_t q0 = first_window(w, p.pad_w, p.kernel_w, p.stride_w);
        const int64_t q1 = last_window(w, p.pad_w, p.stride_w, p.q);
        C sum = 0;
        for (int64_t pp = p0; pp < p1; ++pp)
          for (int64_t q = q0; q < q1; ++q)
            sum += load_scalar(plane[pp * p.q + q]) * static_cast<C>(window(p, pp, q).scale);
        store_scalar(&dx[row * p.w + w], sum);
      }
    }
  } else {
    const int64_t rows = p.n * p.h;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const T* const image = dy + row / p.h * p.p * p.q * p.c;
      const int64_t h = row % p.h;
      const int64_t p0 = first_window(h, p.pad_h, p.kernel_h, p.stride_h),
                    p1 = last_window(h, p.pad_h, p.stride_h, p.p);
      for (int64_t w = 0; w < p.w; ++w) {
        const int64_t q0 = first_window(w, p.pad_w, p.kernel_w, p.stride_w);
        const int64_t q1 = last_window(w, p.pad_w, p.stride_w, p.q);
        for (int64_t c = 0; c < p.c; c += lanes<C>) {
          const int part = static_cast<int>(min64(p.c - c, lanes<C>));
          vec<C> sum = {};
          for (int64_t pp = p0; pp < p1; ++pp)
            for (int64_t q = q0; q < q1; ++q)
              sum += load_n(image + (pp * p.q + q) * p.c + c, part) * static_cast<C>(window(p, pp, q).scale);
          store_n(dx + (row * p.w + w) * p.c + c, sum, part);
        }
      }
    }
  }
}

}  // namespace
}  // namespace cnnops::CNNOPS_ISA

CNNOPS_EXPORT(avg_pool2d_forward, AvgPool2dParams, forward)
CNNOPS_EXPORT(avg_pool2d_backward, AvgPool2dParams, backward)
