// Element access for the references: slow, plain, and in float64.
#pragma once

#include <type_traits>

#include "common/export.h"
#include "common/tensor.h"

namespace cnnops::reference {
namespace {

template <class T>
struct Image {
  T* data;
  Layout layout;
  int64_t c, h, w;

  template <class Void>
  Image(Void* data, Layout layout, int64_t c, int64_t h, int64_t w)
      : data(static_cast<T*>(data)), layout(layout), c(c), h(h), w(w) {}

  bool inside(int64_t row, int64_t column) const { return row >= 0 && row < h && column >= 0 && column < w; }
  int64_t index(int64_t n, int64_t channel, int64_t row, int64_t column) const {
    return layout == Layout::nchw ? ((n * c + channel) * h + row) * w + column
                                  : ((n * h + row) * w + column) * c + channel;
  }
  double get(int64_t n, int64_t channel, int64_t row, int64_t column) const {
    return load_scalar(data[index(n, channel, row, column)]);
  }
  void set(int64_t n, int64_t channel, int64_t row, int64_t column, double value) {
    store_scalar(&data[index(n, channel, row, column)], static_cast<compute_t<std::remove_const_t<T>>>(value));
  }
};

template <class Function>
void for_each(int64_t n, int64_t c, int64_t h, int64_t w, const Function& function) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < c; ++j)
      for (int64_t k = 0; k < h; ++k)
        for (int64_t l = 0; l < w; ++l) function(i, j, k, l);
}

}  // namespace
}  // namespace cnnops::reference
