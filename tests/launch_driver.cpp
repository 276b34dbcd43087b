// Stands for libcuda: a launch is recorded, and a function is one of this library, which is called there and then.
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Record {
  void* function;
  unsigned grid[3], block[3], shared;
  uint64_t stream, words[8];  // as many parameters as `recorded` says, each read as 8 bytes
};

std::vector<Record> records;
int recorded = 0, failing = -1, context_of = -1;
thread_local int context = -1;

}  // namespace

extern "C" {

// What tests ask.
void driver_start(int parameters, int failing_launch) {
  records.clear();
  recorded = parameters;
  failing = failing_launch;
  context = context_of = -1;
}
int driver_launches() { return static_cast<int>(records.size()); }
const Record* driver_record(int i) { return &records[i]; }
int driver_context() { return context; }

// Kernels, which are given what cuLaunchKernel is.
void axpy(const unsigned* grid, void** p) {  // out = factor * a + b, a program a value
  auto out = *static_cast<float**>(p[0]);
  auto a = *static_cast<float**>(p[1]), b = *static_cast<float**>(p[2]);
  const float factor = *static_cast<float*>(p[3]);
  for (unsigned i = 0; i < grid[0]; ++i) out[i] = factor * a[i] + (b == nullptr ? 0 : b[i]);
}

void gate(const unsigned*, void** p) {  // once there is a 1, for which it waits some seconds, a 2
  auto value = *static_cast<volatile int**>(p[0]);
  for (int i = 0; *value != 1 && i < 5000; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (*value == 1) *value = 2;
}

// The driver.
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void* stream, void** parameters, void**) {
  if (static_cast<int>(records.size()) == failing) return 701;
  if (context < 0) return 201;
  Record r{function, {x, y, z}, {block_x, block_y, block_z}, shared, reinterpret_cast<uint64_t>(stream), {}};
  for (int i = 0; i < recorded; ++i) std::memcpy(&r.words[i], parameters[i], 8);
  records.push_back(r);
  if (function != nullptr) reinterpret_cast<void (*)(const unsigned*, void**)>(function)(r.grid, parameters);
  return 0;
}
int cuGetErrorName(int error, const char** name) {
  *name = error == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : nullptr;
  return 0;
}
int cuCtxGetCurrent(void** current) {
  *current = context < 0 ? nullptr : &context;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 100;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** found, int device) {
  context_of = device;
  *found = &context_of;
  return 0;
}
int cuCtxSetCurrent(void* given) {
  context = *static_cast<int*>(given);
  return 0;
}
}
