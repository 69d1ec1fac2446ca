// Declares the functions of an op's kernel table and defines the table. Included once, in csrc/ops/<op>.cpp, before the
// table is used and within namespace cnnops, with
//   CNNOPS_OP      the op's name as a string
//   CNNOPS_PARAMS  the Params type
//   CNNOPS_TABLE   the .inc file
#define CNNOPS_KERNEL(pass, isa, dtype, function, accepts) \
  namespace isa {                                          \
  void function(const CNNOPS_PARAMS&);                     \
  }
#include CNNOPS_TABLE
#undef CNNOPS_KERNEL

template <>
std::span<const KernelRow<CNNOPS_PARAMS>> table<CNNOPS_PARAMS>() {
  using Params = CNNOPS_PARAMS;
#define CNNOPS_KERNEL(pass, isa, dtype, function, accepts) \
  {#pass, Isa::isa, DType::dtype, #function, &isa::function, accepts},
  static const KernelRow<Params> rows[] = {
#include CNNOPS_TABLE
  };
#undef CNNOPS_KERNEL
  return rows;
}

template <>
const Registration registration<CNNOPS_PARAMS>{[] { return describe(CNNOPS_OP, table<CNNOPS_PARAMS>()); }};
#undef CNNOPS_OP
#undef CNNOPS_PARAMS
#undef CNNOPS_TABLE
