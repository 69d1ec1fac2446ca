// Errors that reach Python: std::invalid_argument as ValueError, std::runtime_error as RuntimeError, TypeError as
// TypeError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace cnnops {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// CNNOPS_CHECK(condition, ErrorType, "conv2d: expected ", a, " but got ", b)
#define CNNOPS_CHECK(condition, ErrorType, ...)                        \
  do {                                                                 \
    if (!(condition)) throw ErrorType(::cnnops::message(__VA_ARGS__)); \
  } while (false)

}  // namespace cnnops
