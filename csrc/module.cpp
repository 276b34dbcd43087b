// The Python module resfuse._C: what the compiler saw, launches in batches, the gate. It needs nothing of torch.
#include "module.h"

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
  m.doc() = "Build facts of resfuse's native library, kernel launches in batches, and the gate of fused blocks.";
  m.def("build_facts", &build_facts, "Compiler and language level.");
  define_batch(m);
  define_gate(m);
}
