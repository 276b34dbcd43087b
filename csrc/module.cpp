// The Python module resfuse._C: what the compiler saw. It needs nothing of torch, and no kernel needs it.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict facts;
#if defined(__VERSION__)
  facts["compiled_by"] = __VERSION__;
#endif
  facts["cplusplus"] = static_cast<long>(__cplusplus);
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of resfuse's native library.";
  m.def("build_facts", &build_facts, "Compiler and language level.");
}
