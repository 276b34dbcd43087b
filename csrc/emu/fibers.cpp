// The fibers: switching, scheduling, barriers, warp collectives, launches, and how a launch fails.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdlib>
#include <numeric>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Runtime g;

#if !defined(__x86_64__)
#error "emu_switch_stack is written for x86-64"
#endif

// Pushes what the ABI keeps, stores the stack's top in *save and goes on with the stack `load`.
extern "C" void emu_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden emu_switch_stack
.globl emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch_stack, .-emu_switch_stack
)");

namespace {

constexpr uint64_t canary = 0x5ac3c0de5ac3c0de;  // at each stack's far end
uint64_t& stack_canary(unsigned t) { return *reinterpret_cast<uint64_t*>(g.stacks + t * stack_bytes); }

std::string source_line(const void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info) || !info.dli_fname) return "?";
  const size_t offset = static_cast<const char*>(pc) - static_cast<char*>(info.dli_fbase) - 1;
  std::string out;
  if (FILE* p = popen(format("addr2line -iCs -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset).c_str(), "r")) {
    char line[256];
    while (fgets(line, sizeof line, p)) {  // innermost inlined frame first; keep kernel frames
      line[strcspn(line, "\n ")] = 0;
      if (!strstr(line, "cuda_emu.h")) out += (out.empty() ? "" : " < ") + std::string(line);
    }
    pclose(p);
  }
  return out;
}

}  // namespace

std::string format(const char* f, ...) {
  char b[512];
  va_list ap;
  va_start(ap, f);
  vsnprintf(b, sizeof b, f, ap);
  va_end(ap);
  return b;
}

std::string thread_name(unsigned t) {
  const uint3 i = g.fibers[t].index;
  return format("thread (%u,%u,%u)", i.x, i.y, i.z);
}

void fail_at(const char* kind, const std::string& text, const void* pc) {
  g.fail_kind = kind;
  const std::string block = format(" of block (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z);
  g.fail_text = text + " | " + thread_name(g.my_id) + block;
  g.fail_pc = pc;
  g.aborting = true;
  void* ignored;
  emu_switch_stack(&ignored, g.main_sp);  // abandons the fiber; kernels own nothing to destroy
  abort();
}

void join_threads(const int* ids, int n) {
  static std::vector<uint32_t> all;
  all.assign(g.threads, 0);
  for (int i = 0; i < n; ++i) {
    Fiber& f = g.fibers[ids[i]];
    f.seen[ids[i]] = f.clock;
    for (unsigned t = 0; t < g.threads; ++t) all[t] = std::max(all[t], f.seen[t]);
  }
  for (int i = 0; i < n; ++i) {
    g.fibers[ids[i]].seen = all;
    ++g.fibers[ids[i]].clock;
  }
}

void release_to(std::vector<uint32_t>& clocks) {
  g.me->seen[g.my_id] = g.me->clock++;
  clocks.resize(g.threads);
  for (unsigned t = 0; t < g.threads; ++t) clocks[t] = std::max(clocks[t], g.me->seen[t]);
}

void set_current(unsigned t) {
  g.my_id = t;
  g.me = &g.fibers[t];
  threadIdx = g.me->index;
}

namespace {

void yield_to_scheduler(const char* why, const void* pc) {
  g.me->waits_for = why;
  g.me->wait_pc = pc;
  g.active = false;
  emu_switch_stack(&g.me->sp, g.main_sp);
}

}  // namespace

void block_until_woken(const char* why, const void* pc) {
  g.me->state = State::blocked;
  yield_to_scheduler(why, pc);
}

namespace {

void fiber_main() {
  g.enter(g.params);
  Fiber& f = *g.me;
  if (!f.open_copies.empty() || !f.copy_groups.empty()) {
    fail_at("async-copy", "thread exits with cp.async copies not waited for", nullptr);
  }
  if (!f.open_wgmma.empty() || !f.wgmma_groups.empty()) {
    fail_at("async-read", "thread exits with wgmma operations not waited for", nullptr);
  }
  f.state = State::exited;
  yield_to_scheduler("exit", nullptr);
  abort();
}

void prepare_block() {
  const dim3 b = blockDim;
  g.fibers.resize(g.threads);
  for (unsigned t = 0; t < g.threads; ++t) {
    Fiber& f = g.fibers[t];
    f = Fiber{};
    f.index = {t % b.x, t / b.x % b.y, t / (b.x * b.y)};
    f.clock = 1;
    f.seen.assign(g.threads, 0);
    void** top = reinterpret_cast<void**>(g.stacks + (t + 1) * stack_bytes);
    *--top = nullptr;  // return address of fiber_main, and the ABI's stack alignment
    *--top = reinterpret_cast<void*>(&fiber_main);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    f.sp = top;
    stack_canary(t) = canary;
  }
  g.floor = 0;
  g.statics.clear();
  g.static_bytes = 0;
  g.read_sets.clear();
  g.mbarriers.clear();
  g.block_did_atomic = false;
  g.arena_used = redzone + g.dynamic_bytes + redzone;
  g.cells.assign(g.arena_used, SharedCell{});
  memset(g.arena, 0xff, g.arena_used);  // NaN in every float format
  for (size_t i = 0; i < g.dynamic_bytes; ++i) g.cells[redzone + i].flags = cell_valid;
  for (auto& x : g.barriers) x = {};
  for (auto& x : g.warps) x.clear();
  for (auto& x : g.warpgroups) x = {};
}

void report_deadlock() {
  std::map<std::pair<std::string, const void*>, std::vector<unsigned>> who;
  for (unsigned t = 0; t < g.threads; ++t) who[{g.fibers[t].waits_for, g.fibers[t].wait_pc}].push_back(t);
  g.fail_kind = "divergence";
  g.fail_pc = nullptr;
  g.fail_text = "threads wait for each other at different places:";
  for (const auto& [wait, threads] : who) {
    const std::string at = wait.second ? " at " + source_line(wait.second) : "";
    g.fail_text += format(" [%zu threads, first %u: ", threads.size(), threads[0]) + wait.first + at + "]";
  }
  g.aborting = true;
}

uint64_t next_random() {
  g.seed ^= g.seed << 13;
  g.seed ^= g.seed >> 7;
  return g.seed ^= g.seed << 17;
}
// 0 .. n-1 in the order asked for. Random order is drawn anew by each call.
void set_order(std::vector<unsigned>& order, unsigned n) {
  order.resize(n);
  std::iota(order.begin(), order.end(), 0u);
  if (g.order == 1) std::reverse(order.begin(), order.end());
  if (g.order == 2) {
    for (size_t i = n; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  }
}

void run_block() {
  std::vector<unsigned> order;
  prepare_block();
  while (!g.aborting) {
    set_order(order, g.threads);
    bool ran = false, alive = false;
    for (unsigned t : order) {
      Fiber& f = g.fibers[t];
      alive |= f.state != State::exited;
      if (f.state != State::runnable) continue;
      ran = true;
      set_current(t);
      g.active = true;
      emu_switch_stack(&g.main_sp, f.sp);
      g.active = false;
      if (stack_canary(t) != canary) {
        fputs("cuda_emu: a kernel overflowed its fiber's stack\n", stderr);
        abort();
      }
      if (g.aborting) return;
    }
    if (!alive) return;
    if (!ran) report_deadlock();
  }
}

// join_threads for the whole block, in one number.
void join_block() {
  for (auto& f : g.fibers) g.floor = std::max(g.floor, f.clock);
  for (auto& f : g.fibers) f.clock = g.floor + 1;
  g.read_sets.clear();
}

char* map_memory(size_t n) {  // no guard pages: they would cost 2 of the 65530 mappings each
  void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) {
    perror("cuda_emu: mmap");
    abort();
  }
  return static_cast<char*>(p);
}

}  // namespace

void fail(const char* kind, const char* message) { fail_at(kind, message, EMU_SITE); }
unsigned lane_id() { return g.my_id & 31; }

void block_barrier(int id, int thread_count) {
  ++g.n_barriers;
  if (id < 0 || id > 15) fail_at("undefined", "a block has barriers 0 to 15", EMU_SITE);
  Barrier& b = g.barriers[id];
  const int expected = thread_count ? thread_count : int(g.threads);
  if (b.waiting.empty()) b.expected = expected;
  if (b.expected != expected) fail_at("divergence", "threads disagree on a named barrier's thread count", EMU_SITE);
  b.waiting.push_back(int(g.my_id));
  if (int(b.waiting.size()) < expected) return block_until_woken("block barrier", EMU_SITE);
  if (expected == int(g.threads)) {
    join_block();
  } else {
    join_threads(b.waiting.data(), expected);
  }
  for (int t : b.waiting) g.fibers[t].state = State::runnable;
  b.waiting.clear();
}

void warp_collective(Collective kind, uint32_t mask, void* arg, CollectiveFn fn) {
  static const char* const names[] = {"__syncwarp", "shuffle", "vote", "warp reduce", "ldmatrix", "mma"};
  const char* const name = names[int(kind)];
  const unsigned lane = g.my_id & 31;
  if (!(mask >> lane & 1)) {
    fail_at("divergence", std::string(name) + " executed by a lane that is not in its mask", EMU_SITE);
  }
  // Diverged lanes may meet in different collectives; each completes when all of its mask is there.
  auto& pending = g.warps[g.my_id / 32];
  auto it = std::find_if(pending.begin(), pending.end(), [&](auto& x) { return x.kind == kind && x.mask == mask; });
  if (it == pending.end()) it = pending.insert(it, Meeting{kind, mask, 0, {}});
  Meeting& c = *it;
  c.args[lane] = arg;
  c.arrived |= 1u << lane;
  const unsigned first = g.my_id & ~31u, width = std::min(32u, g.threads - first);
  const uint32_t wanted = width == 32 ? mask : mask & ((1u << width) - 1);
  if (c.arrived != wanted) return block_until_woken(name, EMU_SITE);
  g.active = false;
  fn(c.args, wanted);
  g.active = true;
  pending.erase(it);
  int ids[32], n = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(wanted >> l & 1)) continue;
    g.fibers[first + l].state = State::runnable;
    ids[n++] = int(first) + l;
  }
  if (kind == Collective::syncwarp) join_threads(ids, n);  // the only collective that orders memory
}

void ask_for_shared(const void* kernel, int dynamic_bytes) {
  g.asking = kernel;
  g.asked_bytes = size_t(dynamic_bytes);
}

int run_grid(const void* kernel, const cudaLaunchConfig_t& config, void (*enter)(void*), void* params,
             size_t params_bytes) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const size_t smem_bytes = config.dynamicSmemBytes;
  const bool asked = g.asking == kernel;
  g.asking = nullptr;  // a GPU remembers it, which would hide a later launch that does not ask
  if (!g.error.empty()) return 1;
  g.shared_allowed = asked ? shared_limit : shared_unasked;
  const size_t dynamic_allowed = std::min(asked ? g.asked_bytes : shared_unasked, shared_limit);
  g.threads = block.x * block.y * block.z;
  if (!g.threads || g.threads > max_threads || smem_bytes > dynamic_allowed || !(grid.x && grid.y && grid.z) ||
      grid.y > 65535 || grid.z > 65535 || block.z > 64) {
    g.error = format("launch: invalid configuration: %u threads, %zu shared bytes, grid (%u,%u,%u)", g.threads,
                     smem_bytes, grid.x, grid.y, grid.z);
    return 1;
  }
  if (!g.stacks) {
    g.stacks = map_memory(max_threads * stack_bytes);
    g.arena = map_memory(arena_bytes + 4096) + 1024 - redzone;  // the dynamic part starts 1024-byte aligned
  }
  g.enter = enter;
  g.params = static_cast<char*>(params);
  g.params_bytes = params_bytes;
  g.dynamic_bytes = smem_bytes;
  gridDim = grid;
  blockDim = block;
  const uint32_t blocks = grid.x * grid.y * grid.z;
  g.fenced.assign(blocks, 0);
  for (auto& b : g.buffers) {  // launches are ordered: forget who wrote, keep what is written
    for (auto& c : b.cells) c = GlobalCell{c.writer ? earlier_launch : 0, 0, 0, 0};
  }
  g.aborting = false;
  std::vector<unsigned> order;
  set_order(order, blocks);
  for (size_t i = 0; i < blocks && !g.aborting; ++i) {
    g.block = order[i];
    blockIdx = {g.block % grid.x, g.block / grid.x % grid.y, g.block / (grid.x * grid.y)};
    run_block();
  }
  if (!g.aborting) return 0;
  g.error = std::string(g.fail_kind) + ": " + g.fail_text;
  if (g.fail_pc) g.error += " | " + source_line(g.fail_pc);
  return 1;
}

}  // namespace emu
