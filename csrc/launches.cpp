// Batch: kernel launches that are the same in every step but for addresses, as one Python call.
//
// A launch costs the driver two or three microseconds and a launcher in Python ten more. The driver is opened when the
// first batch is made, and what is called of it is declared here: no CUDA header, no CUDA library to link.
#include "module.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace {

using Handle = void*;  // CUfunction, CUstream, CUcontext

// The driver's functions, of its library or, in tests, of one that stands for it. It is never closed.
class Driver {
 public:
  explicit Driver(const std::string& library) : library_(dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error(dlerror());
    find(launch, "cuLaunchKernel");
    find(error_name, "cuGetErrorName");
    find(current_context, "cuCtxGetCurrent");
    find(set_context, "cuCtxSetCurrent");
    find(device_of, "cuDeviceGet");
    find(primary_context, "cuDevicePrimaryCtxRetain");
  }

  void check(int error, const std::string& what) const {
    if (error == 0) return;
    const char* name = nullptr;
    error_name(error, &name);
    throw std::runtime_error(what + ": " + (name != nullptr ? name : "CUDA error " + std::to_string(error)));
  }

  int (*launch)(Handle function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                Handle stream, void** parameters, void** extra);
  int (*error_name)(int error, const char** name);
  int (*current_context)(Handle*);
  int (*set_context)(Handle);
  int (*device_of)(int*, int ordinal);
  int (*primary_context)(Handle*, int device);

 private:
  template <typename Function>
  void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (function == nullptr) throw std::runtime_error(std::string(name) + " is missing in the CUDA driver's library");
  }

  Handle library_;
};

struct Launch {
  std::string name;
  Handle function;
  std::array<unsigned, 3> grid;
  unsigned threads, shared;
  size_t first;  // of its parameters
};

// A parameter that is addresses[index] + offset.
struct Address {
  size_t parameter, index;
  uint64_t offset;
};

using Given = std::tuple<py::object, std::string, uintptr_t, std::array<unsigned, 3>, unsigned, unsigned, py::sequence>;

class Batch {
 public:
  Batch(int device, const std::vector<Given>& launches, const std::string& library)
      : driver_(library), device_(device) {
    for (const auto& [kernel, name, function, grid, threads, shared, parameters] : launches) {
      kernels_.append(kernel);
      launches_.push_back({name, reinterpret_cast<Handle>(function), grid, threads, shared, values_.size()});
      for (const py::handle& parameter : parameters) add(parameter);
    }
  }

  // The interpreter's lock is given up while the driver launches, which may wait until the device has got on. Other
  // threads may run this batch meanwhile, so each call has values of its own.
  void operator()(uintptr_t stream, const py::args& addresses) const {
    if (addresses.size() != addresses_) {
      throw py::type_error(std::to_string(addresses_) + " addresses are needed, not " +
                           std::to_string(addresses.size()));
    }
    std::vector<uint64_t> values(values_);
    for (const Address& address : used_) {
      const uint64_t base = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(addresses.ptr(), address.index));
      if (base == static_cast<uint64_t>(-1) && PyErr_Occurred() != nullptr) throw py::error_already_set();
      values[address.parameter] = base + address.offset;
    }
    std::vector<void*> parameters(values.size());
    for (size_t i = 0; i < values.size(); ++i) parameters[i] = &values[i];
    const py::gil_scoped_release released;
    ensure_context();
    for (const Launch& l : launches_) {
      driver_.check(driver_.launch(l.function, l.grid[0], l.grid[1], l.grid[2], l.threads, 1, 1, l.shared,
                                   reinterpret_cast<Handle>(stream), parameters.data() + l.first, nullptr),
                    l.name);
    }
  }

 private:
  // bytes: a constant as it lies in memory; (index, offset): an address. The driver reads as much as a parameter has.
  void add(const py::handle& given) {
    uint64_t value = 0;
    if (py::isinstance<py::bytes>(given)) {
      const auto bytes = given.cast<std::string>();
      if (bytes.size() > sizeof value) throw py::value_error("a parameter has at most 8 bytes");
      std::memcpy(&value, bytes.data(), bytes.size());
    } else {
      const auto [index, offset] = given.cast<std::tuple<size_t, uint64_t>>();
      used_.push_back({values_.size(), index, offset});
      addresses_ = std::max(addresses_, index + 1);
    }
    values_.push_back(value);
  }

  // Of this thread: autograd's own have none before the runtime library is called there.
  void ensure_context() const {
    Handle context = nullptr;
    driver_.check(driver_.current_context(&context), "cuCtxGetCurrent");
    if (context != nullptr) return;
    int device = 0;
    driver_.check(driver_.device_of(&device, device_), "cuDeviceGet");
    driver_.check(driver_.primary_context(&context, device), "cuDevicePrimaryCtxRetain");
    driver_.check(driver_.set_context(context), "cuCtxSetCurrent");
  }

  Driver driver_;
  int device_;
  py::list kernels_;  // whose functions must not be unloaded
  std::vector<Launch> launches_;
  std::vector<Address> used_;
  std::vector<uint64_t> values_;
  size_t addresses_ = 0;
};

}  // namespace

void define_batch(py::module_& m) {
  py::class_<Batch>(m, "Batch", "batch(stream, *addresses) makes the launches in order; it raises the driver's errors.")
      .def(py::init<int, const std::vector<Given>&, const std::string&>(), py::arg("device"), py::arg("launches"),
           py::arg("library") = "libcuda.so.1",
           "launches: (kernel, name, function, grid, threads, shared, parameters), a parameter being the bytes of a "
           "constant or, for addresses[index] + offset, (index, offset).")
      .def("__call__", &Batch::operator());
}
