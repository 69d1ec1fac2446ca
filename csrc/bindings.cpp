// The extension module cnnops._C: the ops' functions, the kernel tables and what is known about this CPU.
#include <omp.h>

#include "common/activation.h"
#include "dispatch/op_table.h"
#if CNNOPS_CUDA
#include "cuda/runtime.h"
#endif

namespace cnnops {

void bind_adaptive_avg_pool2d(py::module_&);
void bind_adaptive_max_pool2d(py::module_&);
void bind_avg_pool2d(py::module_&);
void bind_conv2d(py::module_&);
void bind_direct(py::module_&);
void bind_memory(py::module_&);
void bind_peak(py::module_&);
void bind_batch_norm(py::module_&);
void bind_locally_connected2d(py::module_&);
void bind_index_pool2d(py::module_&);
void bind_max_pool2d(py::module_&);
void bind_median_pool2d(py::module_&);

namespace {

py::list kernels() {
  py::list rows;
  for (Describe describe : tables())
    for (const KernelInfo& k : describe())
      rows.append(py::dict("op"_a = k.op, "pass"_a = k.pass, "isa"_a = k.isa, "dtype"_a = k.dtype,
                           "function"_a = k.function, "row"_a = k.row, "usable"_a = k.usable,
                           "selected"_a = k.selected));
  return rows;
}

py::list levels() {
  py::list out;
  for (const IsaLevel& level : isa_levels())
    out.append(py::dict("isa"_a = name(level.isa), "built"_a = level.built, "supported"_a = level.supported,
                        "reason"_a = level.reason));
  return out;
}

// What the CUDA kernels were built with; None where there are none.
py::object cuda_build() {
#if CNNOPS_CUDA
  return py::dict("compiler"_a = cuda::compiler_version(), "capabilities"_a = cuda::capabilities());
#else
  return py::none();
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of cnnops; use cnnops.functional and cnnops.nn instead.";
  py::register_exception<NotApplicable>(m, "KernelNotApplicable", PyExc_ValueError);
  py::register_exception<TypeError>(m, "KernelTypeError", PyExc_TypeError);
  m.attr("__version__") = CNNOPS_VERSION;
  m.attr("compiler") = CNNOPS_COMPILER;
  m.attr("activations") = std::vector<std::string>(kActivationNames, kActivationNames + kActivations);
  m.def("kernels", &kernels, "Every row of every kernel table.");
  m.def("isa_levels", &levels, "The instruction-set levels, lowest first, and why one cannot be used.");
  m.def("isa_limit", [] { return name(isa_limit()); }, "The highest level that kernels are chosen from.");
  m.def("set_isa_limit", &set_isa_limit, "level"_a, "Caps the level; an empty string removes the cap.");
  m.def("cuda_build", &cuda_build,
        "The compiler of the CUDA kernels, and the compute capabilities that they are machine code for; None without "
        "any.");
  m.attr("emulation") = CNNOPS_EMULATION != 0;
  m.def("omp_max_threads", [] { return omp_get_max_threads(); });
  bind_adaptive_avg_pool2d(m);
  bind_adaptive_max_pool2d(m);
  bind_avg_pool2d(m);
  bind_conv2d(m);
  bind_direct(m);
  bind_memory(m);
  bind_peak(m);
  bind_batch_norm(m);
  bind_locally_connected2d(m);
  bind_index_pool2d(m);
  bind_max_pool2d(m);
  bind_median_pool2d(m);
}

}  // namespace cnnops
