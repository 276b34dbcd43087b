// What the parts of the emulator's runtime share: its state, and how they fail, order and check memory accesses.
//
// One fiber per CUDA thread, one block at a time. fibers.cpp runs them, memory.cpp checks what they access, warp.cpp
// and hopper.cpp are the instructions, api.cpp is what tests call. Compiled without any sanitizer.
#pragma once
#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_emu.h"

// Where the kernel called the function that names this.
#define EMU_SITE __builtin_return_address(0)

#pragma GCC visibility push(hidden)
namespace emu {

constexpr unsigned max_threads = 1024;
constexpr size_t stack_bytes = 256 << 10, arena_bytes = 1 << 20, redzone = 128;
constexpr size_t shared_limit = 227 << 10;   // of a block on sm_90
constexpr size_t shared_unasked = 48 << 10;  // of one whose launch did not ask for more
constexpr uint32_t arena_base = 0x400;  // 32-bit shared address of the dynamic part's first byte

enum class State : uint8_t { runnable, blocked, exited };

// A cp.async that was issued and not yet waited for.
struct Copy {
  char* dst;
  const char* src;
  int bytes, src_bytes;
};

struct WgmmaOp;

struct Fiber {
  void* sp;
  uint3 index;
  State state;
  const char* waits_for;
  const void* wait_pc;
  uint32_t clock, proxy_clock;  // proxy_clock: last fence.proxy.async
  bool wgmma_fenced;
  std::vector<uint32_t> seen;  // seen[t]: latest clock of thread t that is ordered before us
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<std::shared_ptr<WgmmaOp>> open_wgmma;
  std::deque<std::vector<std::shared_ptr<WgmmaOp>>> wgmma_groups;
};

// One per byte of shared memory.
struct SharedCell {
  uint32_t write_clock, read_clock, read_set_floor;  // cell_read_set: read_clock is an index into read_sets
  uint16_t writer, reader;
  uint8_t flags, async_readers;
};
enum : uint8_t {
  cell_valid = 1,     // belongs to an array
  cell_init = 2,      // holds something
  cell_pending = 4,   // an asynchronous copy into it is in flight
  cell_atomic = 8,    // last written by an atomic
  cell_read_set = 16, // has unordered readers
  cell_generic = 32,  // last written by an ordinary store, which the asynchronous proxy must be told of
};

// One per byte of a global buffer that may be written. Who: 1 + a thread's number in the grid, 0 nobody.
struct GlobalCell {
  uint32_t writer, write_clock, reader, read_clock;
};
constexpr uint32_t atomic_bit = 1u << 31, earlier_launch = 0x7fffffff;

struct Buffer {
  char* base;
  size_t bytes;
  std::string name;
  int mode;  // 0 read-only, 1 write (starts undefined), 2 read-write
  std::vector<GlobalCell> cells;
  uint64_t read_bytes, written_bytes;
};

struct Barrier {
  int expected;
  std::vector<int> waiting;
};

// A warp collective that some lanes have reached.
struct Meeting {
  Collective kind;
  uint32_t mask, arrived;
  void* args[32];
};

struct Mbarrier {
  int arrivals, pending;
  int64_t tx;
  unsigned phase;
  std::vector<uint32_t> clocks, done_clocks;  // of the running and of the last completed phase
  struct Load {
    TensorMap2d map;  // by value: the issuer may exit first
    uint32_t dst;
    int x, y;
  };
  std::vector<Load> loads;                             // in flight until somebody waits
  std::vector<std::pair<unsigned, unsigned>> waiting;  // thread, parity
};

// Warpgroup-wide product whose threads are arriving, and the last one issued.
struct WgmmaGroup {
  std::shared_ptr<WgmmaOp> arriving, last;
  int arrived;
};

struct Runtime {
  std::vector<Buffer> buffers;
  int order = 0;
  uint64_t seed = 1;
  std::string error;  // sticky, like a CUDA launch failure

  bool active = false, aborting = false;  // active: a kernel's own code is running
  const char* fail_kind = nullptr;
  std::string fail_text;
  const void* fail_pc = nullptr;

  char *stacks = nullptr, *arena = nullptr;
  void* main_sp = nullptr;
  void (*enter)(void*) = nullptr;
  char* params = nullptr;
  size_t params_bytes = 0;

  unsigned threads = 0;
  uint32_t block = 0;
  std::vector<Fiber> fibers;
  Fiber* me = nullptr;
  unsigned my_id = 0;
  uint32_t floor = 0;  // clocks <= floor are ordered before everything that follows
  const void* asking = nullptr;  // the kernel for which the next launch may have asked_bytes of dynamic shared memory
  size_t asked_bytes = 0;
  size_t shared_allowed = 0, dynamic_bytes = 0, static_bytes = 0, arena_used = 0;
  std::map<const void*, size_t> statics;
  std::vector<SharedCell> cells;
  std::vector<std::vector<uint32_t>> read_sets;
  Barrier barriers[16];
  std::vector<Meeting> warps[max_threads / 32];
  WgmmaGroup warpgroups[max_threads / 128];
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<uint8_t> fenced;  // per block: executed __threadfence
  bool block_did_atomic = false;

  uint64_t n_mma = 0, n_ldmatrix = 0, n_ldmatrix_cycles = 0, n_cp_async = 0, n_barriers = 0;
  uint64_t n_shared_read = 0, n_shared_write = 0;
};
extern Runtime g;

// fibers.cpp

std::string format(const char* f, ...) __attribute__((format(printf, 1, 2)));
std::string thread_name(unsigned t);
// Ends the launch with "kind: text" and the source line of pc, if any.
[[noreturn]] void fail_at(const char* kind, const std::string& text, const void* pc);
void set_current(unsigned t);
void block_until_woken(const char* why, const void* pc);
// Everything that each of the threads did happens before what all of them do next.
void join_threads(const int* ids, int n);
// What this thread did so far happens before what those do who acquire the clocks.
void release_to(std::vector<uint32_t>& clocks);

inline bool ordered(unsigned thread, uint32_t clock) {
  return clock <= g.floor || thread == g.my_id || g.me->seen[thread] >= clock;
}

// memory.cpp

enum class Access { read, write, atomic, async_issue, async_read };

void check_shared(char* p, size_t n, Access a, const void* pc);
void check_global(char* p, size_t n, Access a, const void* pc);
void check_access(const void* p, size_t n, Access a, const void* pc);
char* smem_pointer(uint32_t address);

inline float bf16(uint32_t v) { return __bfloat162float({uint16_t(v)}); }
inline float f16(uint32_t v) { return __half2float({uint16_t(v)}); }
// The sum of a matrix unit's exact products and the value that they are added to: each is cut toward zero one bit below
// the last of the largest, and their sum to float32. So does an A100; an H100 keeps one bit more.
template <class Term>
float matrix_sum(int products, double before, const Term& term) {
  double largest = std::fabs(before), sum = before;
  for (int k = 0; k < products; ++k) {
    const double t = term(k);
    largest = std::max(largest, std::fabs(t)), sum += t;
  }
  if (largest == 0.0 || !std::isfinite(sum)) return float(sum);
  const double last = std::ldexp(1.0, 24 - std::ilogb(largest));
  int64_t units = int64_t(before * last);
  for (int k = 0; k < products; ++k) units += int64_t(term(k) * last);
  const double kept = double(units) / last;
  const float nearest = float(kept);
  const bool up = std::isfinite(nearest) && std::fabs(double(nearest)) > std::fabs(kept);
  return up ? std::nextafterf(nearest, 0.0f) : nearest;
}

}  // namespace emu
#pragma GCC visibility pop
