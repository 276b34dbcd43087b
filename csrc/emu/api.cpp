// What tests call, through ctypes or from a binding.
#include <algorithm>

#include "runtime.h"

#define EMU_API extern "C" __attribute__((visibility("default")))

using emu::g;

// Forgets the buffers, the error and the counts.
EMU_API void emu_reset() {
  g.buffers.clear();
  g.error.clear();
  g.n_mma = g.n_ldmatrix = g.n_ldmatrix_cycles = g.n_cp_async = g.n_barriers = 0;
  g.n_shared_read = g.n_shared_write = 0;
}

// From the first buffer on, a kernel may access the registered ones only.
// mode 0: read-only; 1: write, contents start undefined (and are poisoned); 2: read-write
EMU_API void emu_register(void* p, uint64_t bytes, const char* name, int mode) {
  g.buffers.push_back({static_cast<char*>(p), bytes, name, mode, {}, 0, 0});
  if (mode) g.buffers.back().cells.resize(bytes);
  if (mode == 1) memset(p, 0xff, bytes);
}

// Of threads and of blocks: 0 forward, 1 backward, 2 random.
EMU_API void emu_set_order(int order, uint64_t seed) {
  g.order = order;
  g.seed = seed * 2 + 1;
}

// What the first launch that failed since emu_reset failed of; null if none did.
EMU_API const char* emu_error() { return g.error.empty() ? nullptr : g.error.c_str(); }

// Of the buffer that begins at p, like the traffic below; all ones if none does.
EMU_API uint64_t emu_unwritten_bytes(const void* p) {
  for (const auto& b : g.buffers) {
    if (b.base == p) return std::count_if(b.cells.begin(), b.cells.end(), [](const auto& c) { return !c.writer; });
  }
  return ~0ull;
}

EMU_API uint64_t emu_buffer_traffic(const void* p, int written) {
  for (const auto& b : g.buffers) {
    if (b.base == p) return written ? b.written_bytes : b.read_bytes;
  }
  return ~0ull;
}

EMU_API uint64_t emu_stat(const char* name) {
  const std::map<std::string, uint64_t> all{
      {"mma", g.n_mma},
      {"ldmatrix", g.n_ldmatrix},
      {"ldmatrix_cycles", g.n_ldmatrix_cycles},
      {"cp_async_bytes", g.n_cp_async},
      {"barrier_arrivals", g.n_barriers},
      {"shared_read_bytes", g.n_shared_read},
      {"shared_written_bytes", g.n_shared_write},
  };
  const auto it = all.find(name);
  return it == all.end() ? ~0ull : it->second;
}
