// Every load and store of a kernel, checked.
//
// Kernels are compiled with -fsanitize=thread and some of -fsanitize=undefined, but linked to the hooks at the end of
// this file instead of a sanitizer's runtime; the result is an ordinary shared library.
// Shared memory: bounds, reads of what was never written, races (vector clocks, byte by byte), bytes with an
// asynchronous copy in flight, the order between ordinary stores and the asynchronous proxy. Global memory: bounds of
// the registered buffers, stores to read-only ones, races, reads of output never written, misaligned vectors.
#include <algorithm>

#include "runtime.h"

// The linker's: where this library begins and ends.
extern "C" char __ehdr_start __attribute__((visibility("hidden")));
extern "C" char _end __attribute__((visibility("hidden")));

namespace emu {
namespace {

std::string shared_where(const char* p) {
  const size_t off = p - g.arena;
  if (off >= redzone && off < redzone + g.dynamic_bytes) return format("dynamic shared byte %zu", off - redzone);
  return format("shared arena byte %zu (dynamic part: %zu bytes)", off, g.dynamic_bytes);
}

bool in_arena(const void* p) { return size_t(static_cast<const char*>(p) - g.arena) < arena_bytes; }

}  // namespace

void check_shared(char* p, size_t n, Access a, const void* pc) {
  const unsigned me = g.my_id;
  const char* const done = a == Access::read ? " read" : " written";
  for (size_t i = 0; i < n; ++i) {
    const size_t off = p + i - g.arena;
    SharedCell* c = off < g.cells.size() ? &g.cells[off] : nullptr;
    const auto where = [&] { return shared_where(p + i); };
    if (!c || !(c->flags & cell_valid)) {
      fail_at("out-of-bounds", format("%s of %zu bytes at ", a == Access::read ? "read" : "write", n) + where(), pc);
    }
    if (c->flags & cell_pending) {
      fail_at("async-copy", where() + done + " while an asynchronous copy into it is still in flight", pc);
    }
    const bool both_atomic = a == Access::atomic && (c->flags & cell_atomic);
    const bool reads = a == Access::read || a == Access::atomic || a == Access::async_read;
    if (reads && !(c->flags & cell_init)) {
      fail_at("uninitialised", where() + " read before anything was written to it", pc);
    }
    if ((c->flags & cell_init) && !both_atomic && !ordered(c->writer, c->write_clock)) {
      fail_at("race", where() + done + ", unordered with a write by " + thread_name(c->writer), pc);
    }
    if (a == Access::async_read) {  // by the tensor core: counted by the caller, not charged to a thread
      if (c->flags & cell_generic && g.fibers[c->writer].proxy_clock < c->write_clock) {
        const std::string text = where() + " written by ordinary stores of " + thread_name(c->writer);
        fail_at("proxy", text + " and read by wgmma without a fence.proxy.async in between", pc);
      }
      continue;
    }
    if (a == Access::read) {
      if (c->flags & cell_read_set && c->read_set_floor == g.floor) {
        g.read_sets[c->read_clock][me] = g.me->clock;
      } else if (c->flags & cell_read_set || ordered(c->reader, c->read_clock)) {
        c->flags &= ~cell_read_set;
        c->reader = me;
        c->read_clock = g.me->clock;
      } else {  // a second unordered reader: remember all of them
        g.read_sets.emplace_back(g.threads);
        auto& set = g.read_sets.back();
        set[c->reader] = c->read_clock;
        set[me] = g.me->clock;
        c->flags |= cell_read_set;
        c->read_clock = g.read_sets.size() - 1;
        c->read_set_floor = g.floor;
      }
      continue;
    }
    if (c->async_readers) fail_at("async-read", where() + " written while a wgmma that reads it is in flight", pc);
    if (!(c->flags & cell_read_set)) {
      if (!ordered(c->reader, c->read_clock)) {
        fail_at("race", where() + " written, unordered with a read by " + thread_name(c->reader), pc);
      }
    } else if (c->read_set_floor == g.floor) {
      const auto& set = g.read_sets[c->read_clock];
      for (unsigned t = 0; t < g.threads; ++t) {
        if (set[t] && !ordered(t, set[t])) {
          fail_at("race", where() + " written, unordered with a read by " + thread_name(t), pc);
        }
      }
    }
    c->flags &= ~(cell_read_set | cell_atomic | cell_generic | cell_init);
    c->flags |= a == Access::async_issue ? cell_pending : cell_init | cell_generic;
    if (a == Access::atomic) c->flags |= cell_atomic;
    c->read_clock = 0;
    c->writer = me;
    c->write_clock = g.me->clock;
  }
}

namespace {

void check_global_cells(Buffer& b, size_t at, size_t n, Access a, const void* pc) {
  const uint32_t me = g.block * max_threads + g.my_id + 1;
  const auto conflict = [&](uint32_t who, uint32_t clock) {
    if (who == earlier_launch) return false;
    who = (who & ~atomic_bit) - 1;
    if (who / max_threads == g.block) return !ordered(who % max_threads, clock);
    // Another block: only the "last block done" pattern (fence, then atomic) orders blocks.
    return !(g.fenced[who / max_threads] && g.block_did_atomic);
  };
  const auto who_is = [&](uint32_t who) {
    who = (who & ~atomic_bit) - 1;
    return format("linear block %u, thread %u", who / max_threads, who % max_threads);
  };
  for (size_t i = at; i < at + n; ++i) {
    GlobalCell& c = b.cells[i];
    const auto race = [&](const char* what, const char* other, uint32_t who) {
      const std::string text = format("%s of '%s' byte %zu, unordered with a %s by ", what, b.name.c_str(), i, other);
      fail_at("race", text + who_is(who), pc);
    };
    if (a == Access::read) {
      if (!c.writer && b.mode == 1) {
        fail_at("uninitialised", format("read of '%s' byte %zu, never written", b.name.c_str(), i), pc);
      }
      if (c.writer && conflict(c.writer, c.write_clock)) race("read", "write", c.writer);
      c.reader = me;
      c.read_clock = g.me->clock;
    } else {
      const bool both_atomic = a == Access::atomic && (c.writer & atomic_bit);
      if (c.writer && !both_atomic && conflict(c.writer, c.write_clock)) race("write", "write", c.writer);
      if (c.reader && conflict(c.reader, c.read_clock)) race("write", "read", c.reader);
      c.writer = me | (a == Access::atomic ? atomic_bit : 0);
      c.write_clock = g.me->clock;
    }
  }
}

}  // namespace

void check_global(char* p, size_t n, Access a, const void* pc) {
  if (g.buffers.empty()) return;  // nothing registered: global accesses are not checked
  static size_t last = 0;
  for (size_t k = 0; k < g.buffers.size(); ++k) {
    const size_t at = (last + k) % g.buffers.size();
    Buffer& b = g.buffers[at];
    const size_t off = p - b.base;
    if (off >= b.bytes || off + n > b.bytes) continue;
    last = at;
    if (a != Access::read && b.mode == 0) fail_at("read-only", "write to read-only buffer '" + b.name + "'", pc);
    (a == Access::read ? b.read_bytes : b.written_bytes) += n;
    if (!b.cells.empty()) check_global_cells(b, off, n, a, pc);
    return;
  }
  std::string near = "no registered buffer is near";
  long best = 1 << 20;
  for (Buffer& b : g.buffers) {
    const long before = b.base - p, after = p + n - (b.base + b.bytes);
    const long d = std::max(before, after);
    if (d < best) {
      best = d;
      const char* const side = after > before ? "past the end of" : "before";
      near = format("%ld byte(s) %s '%s' (%zu bytes)", d, side, b.name.c_str(), b.bytes);
    }
  }
  fail_at("out-of-bounds", format("global %s of %zu bytes, ", a == Access::read ? "read" : "write", n) + near, pc);
}

void check_access(const void* cp, size_t n, Access a, const void* pc) {
  if (!g.active) return;
  char* p = static_cast<char*>(const_cast<void*>(cp));
  const size_t stack_off = p - g.stacks;
  if (stack_off < max_threads * stack_bytes) {  // registers / local memory
    if (stack_off / stack_bytes != g.my_id) fail_at("local-memory", "access to another thread's local memory", pc);
    return;
  }
  if (in_arena(p)) {
    (a == Access::read ? g.n_shared_read : g.n_shared_write) += n;
    return check_shared(p, n, a, pc);
  }
  if (p >= g.params && p + n <= g.params + g.params_bytes) return;  // kernel parameters
  if (p >= &__ehdr_start && p < &_end) return;                      // constants, __device__ variables
  check_global(p, n, a, pc);
}

void* shared_dynamic() { return g.arena + redzone; }

void* shared_static(const void* key, size_t bytes, size_t align) {
  auto it = g.statics.find(key);
  if (it == g.statics.end()) {
    align = std::max<size_t>(align, 16);
    g.static_bytes = (g.static_bytes + align - 1) / align * align + bytes;
    if (g.dynamic_bytes + g.static_bytes > g.shared_allowed) {  // which a GPU says before it starts the kernel
      fail_at("launch", format("%zu dynamic and %zu static bytes of shared memory, of %zu that the launch may have",
                               g.dynamic_bytes, g.static_bytes, g.shared_allowed), EMU_SITE);
    }
    const size_t at = (g.arena_used + align - 1) / align * align;
    g.arena_used = at + bytes + redzone;
    if (g.arena_used > arena_bytes) fail_at("launch", "shared memory exhausted", EMU_SITE);
    g.cells.resize(g.arena_used, SharedCell{});
    memset(g.arena + at, 0xff, bytes + redzone);
    for (size_t i = 0; i < bytes; ++i) g.cells[at + i].flags = cell_valid;
    it = g.statics.emplace(key, at).first;
  }
  return g.arena + it->second;
}

uint32_t smem_address(const void* p) {
  if (!in_arena(p)) fail_at("out-of-bounds", "address passed as shared is not in shared memory", EMU_SITE);
  return arena_base + uint32_t(static_cast<const char*>(p) - g.arena) - uint32_t(redzone);
}

char* smem_pointer(uint32_t address) { return g.arena + redzone + int32_t(address - arena_base); }

void check_atomic(void* p, size_t n) {
  if (reinterpret_cast<uintptr_t>(p) % n) fail_at("misaligned", "atomic on a misaligned address", EMU_SITE);
  g.block_did_atomic = true;
  check_access(p, n, Access::atomic, EMU_SITE);
}

void fence_gpu() { g.fenced[g.block] = 1; }

}  // namespace emu

// What the compiler calls before each load and store.
#define EMU_HOOK extern "C" __attribute__((visibility("hidden"))) void
#define EMU_ACCESS(name, n, kind) \
  EMU_HOOK __tsan_##name##n(void* p) { emu::check_access(p, n, emu::Access::kind, EMU_SITE); }
#define EMU_ACCESSES(n)                                                      \
  EMU_ACCESS(read, n, read)                                                  \
  EMU_ACCESS(write, n, write)                                                \
  EMU_ACCESS(volatile_read, n, read)                                         \
  EMU_ACCESS(volatile_write, n, write)                                       \
  EMU_ACCESS(unaligned_read, n, read)                                        \
  EMU_ACCESS(unaligned_write, n, write)
EMU_ACCESSES(1)
EMU_ACCESSES(2)
EMU_ACCESSES(4)
EMU_ACCESSES(8)
EMU_ACCESSES(16)
EMU_HOOK __tsan_read_range(void* p, size_t n) { emu::check_access(p, n, emu::Access::read, EMU_SITE); }
EMU_HOOK __tsan_write_range(void* p, size_t n) { emu::check_access(p, n, emu::Access::write, EMU_SITE); }
EMU_HOOK __tsan_init() {}
EMU_HOOK __tsan_func_entry(void*) {}
EMU_HOOK __tsan_func_exit() {}
EMU_HOOK __tsan_vptr_update(void*, void*) {}

// Every report of undefined behaviour starts with this.
struct UbsanSite {
  const char* file;
  uint32_t line, column;
};

static void undefined(const char* kind, const char* what, const UbsanSite* s) {
  if (emu::g.active) emu::fail_at(kind, emu::format("%s at %s:%u", what, s->file, s->line), nullptr);
}

#define EMU_UBSAN(name, kind, what, ...) \
  EMU_HOOK __ubsan_handle_##name(UbsanSite* s, ##__VA_ARGS__) { undefined(kind, what, s); }
EMU_UBSAN(type_mismatch_v1, "misaligned", "misaligned vector access", void*)
EMU_UBSAN(out_of_bounds, "out-of-bounds", "local array index", void*)
EMU_UBSAN(shift_out_of_bounds, "undefined", "shift amount", void*, void*)
EMU_UBSAN(add_overflow, "undefined", "integer overflow (+)", void*, void*)
EMU_UBSAN(sub_overflow, "undefined", "integer overflow (-)", void*, void*)
EMU_UBSAN(mul_overflow, "undefined", "integer overflow (*)", void*, void*)
EMU_UBSAN(divrem_overflow, "undefined", "integer division", void*, void*)
EMU_UBSAN(negate_overflow, "undefined", "integer overflow (negate)", void*)
