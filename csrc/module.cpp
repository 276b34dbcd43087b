// The Python module resfuse._C: what the compiler saw. It needs nothing of torch, and no kernel needs it.
#include <pybind11/pybind11.h>

#include "common/multiversion.h"

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict facts;
#if defined(__VERSION__)
  facts["compiled_by"] = __VERSION__;
#endif
  facts["cplusplus"] = static_cast<long>(__cplusplus);
#if defined(RESFUSE_AVX2)
  facts["cpu_versions"] = py::make_tuple(RESFUSE_AVX512, RESFUSE_AVX2, "baseline");
#else
  facts["cpu_versions"] = py::make_tuple("baseline");
#endif
  facts["cpu_selected"] = resfuse::selected_isa();
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of resfuse's native library.";
  m.def("build_facts", &build_facts, "Compiler, language level, CPU versions compiled and the one this machine runs.");
}
