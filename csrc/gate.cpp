// Whether modules are still what they were when they were looked at: what a fused block asks before every call.
//
// In Python some ten lookups a module take ten microseconds a block. resfuse/blocks/gate.py makes the record and says
// what it means. Everything here is borrowed: the record outlives the call, and nothing is called that could run Python.
#include "module.h"

namespace py = pybind11;

namespace {

PyObject* field(PyObject* tuple, int i) { return PyTuple_GET_ITEM(tuple, i); }

// Whether a dictionary has the recorded keys, in order, and the recorded objects as values; Ellipsis stands for any.
bool same(PyObject* keys, PyObject* values, PyObject* dictionary) {
  if (!PyDict_Check(dictionary) || PyDict_GET_SIZE(dictionary) != PyTuple_GET_SIZE(values)) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(dictionary, &position, &key, &value); ++i) {
    PyObject* expected = PyTuple_GET_ITEM(values, i);
    if (PyTuple_GET_ITEM(keys, i) != key || (expected != value && expected != Py_Ellipsis)) return false;
  }
  return true;
}

// recorded: (class, names and values of attributes, the dictionary of children, their names, children)
bool same_module(PyObject* recorded, PyObject* module) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != field(recorded, 0)) return false;
  PyObject* attributes = PyObject_GenericGetDict(module, nullptr);
  if (attributes == nullptr) throw py::error_already_set();
  Py_DECREF(attributes);  // the module has it
  return same(field(recorded, 1), field(recorded, 2), attributes) &&
         same(field(recorded, 4), field(recorded, 5), field(recorded, 3));
}

// recorded: (module, its record, its dictionaries of hooks, of parameters)
bool same_inner(PyObject* recorded, PyObject* accepted) {
  if (!same_module(field(recorded, 1), field(recorded, 0))) return false;
  PyObject* hooks = field(recorded, 2);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(hooks); ++i) {
    PyObject* dictionary = PyTuple_GET_ITEM(hooks, i);
    if (!PyDict_Check(dictionary) || PyDict_GET_SIZE(dictionary) != 0) return false;
  }
  PyObject *parameters = field(recorded, 3), *value;
  if (!PyDict_Check(parameters)) return false;
  Py_ssize_t position = 0;
  while (PyDict_Next(parameters, &position, nullptr, &value)) {
    bool found = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(accepted) && !found; ++i) {
      found = PyTuple_GET_ITEM(accepted, i) == reinterpret_cast<PyObject*>(Py_TYPE(value));
    }
    if (!found) return false;
  }
  return true;
}

// record: (that of the block, those of its inner modules); accepted: classes of parameters.
bool unchanged(const py::tuple& record, const py::handle& block, const py::tuple& accepted) {
  if (!same_module(field(record.ptr(), 0), block.ptr())) return false;
  PyObject* inner = field(record.ptr(), 1);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(inner); ++i) {
    if (!same_inner(PyTuple_GET_ITEM(inner, i), accepted.ptr())) return false;
  }
  return true;
}

}  // namespace

void define_gate(py::module_& m) {
  m.def("unchanged", &unchanged, "Whether a block is still what its record says (resfuse/blocks/gate.py).");
}
