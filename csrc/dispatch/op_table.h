// What csrc/ops/<op>.cpp includes: the bindings' helpers and the table of its Params.
#pragma once

#include <array>
#include <functional>
#include <utility>

#include "dispatch/tensor_arg.h"

namespace cnnops {

namespace py = pybind11;
using namespace py::literals;

using Pair = std::array<int64_t, 2>;

// The rows of the op whose parameters are Params; dispatch/define_table.h defines it from the .inc file.
template <class Params>
std::span<const KernelRow<Params>> table();

// Every table of the module, for Python to list.
using Describe = std::vector<KernelInfo> (*)();
inline std::vector<Describe>& tables() {
  static std::vector<Describe> all;
  return all;
}
struct Registration {
  explicit Registration(Describe describe) { tables().push_back(describe); }
};
template <class Params>
extern const Registration registration;

}  // namespace cnnops
