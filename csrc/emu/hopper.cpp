// Hopper's instructions: mbarrier, TMA, wgmma.
#include <algorithm>

#include "runtime.h"

namespace emu {

// A product of a warpgroup, from the first thread that issues it to the last that waited for it.
struct WgmmaOp {
  int n;
  bool a_transposed, b_transposed, accumulate, done;
  uint64_t a_desc, b_desc;
  int waits_left;
  std::vector<char*> reads;  // 16-byte chunks of shared memory
  struct PerThread {
    float *d, acc[128];
    uint32_t a[4];
    bool a_in_regs;
  } thread[128];
  std::shared_ptr<WgmmaOp> previous;  // in flight on the same accumulators
};

namespace {

Mbarrier& mbarrier_at(uint32_t bar, const void* pc) {
  const auto it = g.mbarriers.find(bar);
  if (it == g.mbarriers.end()) fail_at("uninitialised", "mbarrier used before mbarrier.init", pc);
  check_shared(smem_pointer(bar), 8, Access::read, pc);  // finds a missing barrier after init
  return it->second;
}

void acquire(Fiber& f, const std::vector<uint32_t>& clocks) {
  for (size_t t = 0; t < clocks.size(); ++t) f.seen[t] = std::max(f.seen[t], clocks[t]);
}

void complete_phase_if_due(Mbarrier& m) {
  if (m.pending || m.tx) return;
  ++m.phase;
  m.pending = m.arrivals;
  m.done_clocks = m.clocks;
  std::vector<std::pair<unsigned, unsigned>> still;
  for (const auto& [thread, parity] : m.waiting) {
    if ((m.phase & 1) == parity) {
      still.push_back({thread, parity});
      continue;
    }
    acquire(g.fibers[thread], m.done_clocks);
    g.fibers[thread].state = State::runnable;
  }
  m.waiting = still;
}

// One row of a TMA box: 64 elements of 2 bytes in 128-byte swizzle, zeros where the matrix ends.
void deliver_row(const Mbarrier::Load& l, int r) {
  const int y = l.y + r;
  for (int c = 0; c < 8; ++c) {
    const uint32_t linear = l.dst + r * 128 + c * 16;
    char* p = smem_pointer(linear ^ (linear >> 7 & 7) << 4);
    memset(p, 0, 16);
    for (int e = 0; e < 8; ++e) {
      const int x = l.x + c * 8 + e;
      const bool inside = x >= 0 && x < l.map.width && y >= 0 && y < l.map.height;
      if (inside) memcpy(p + 2 * e, l.map.base + size_t(y) * l.map.row_bytes + 2 * x, 2);
    }
    for (int i = 0; i < 16; ++i) {  // for whoever acquires the mbarrier: keeps the stamp taken at issue
      SharedCell& cell = g.cells[p + i - g.arena];
      cell.flags = (cell.flags & ~cell_pending) | cell_init;
    }
  }
}

void deliver_loads(Mbarrier& m) {
  for (const auto& l : m.loads) {
    for (int r = 0; r < l.map.box_height; ++r) deliver_row(l, r);
    m.tx -= l.map.box_height * 128;
  }
  m.loads.clear();
}

}  // namespace

void mbarrier_init(uint32_t bar, int arrivals) {
  if (bar % 8) fail_at("misaligned", "mbarrier is not 8-byte aligned", EMU_SITE);
  check_shared(smem_pointer(bar), 8, Access::write, EMU_SITE);
  g.mbarriers[bar] = Mbarrier{arrivals, arrivals, 0, 0, {}, {}, {}, {}};
}

void mbarrier_arrive(uint32_t bar, int expect_tx_bytes) {
  Mbarrier& m = mbarrier_at(bar, EMU_SITE);
  if (!m.pending) fail_at("divergence", "more arrivals on an mbarrier than it was initialised for", EMU_SITE);
  m.tx += expect_tx_bytes;
  --m.pending;
  release_to(m.clocks);
  complete_phase_if_due(m);
}

void mbarrier_wait(uint32_t bar, unsigned parity) {
  Mbarrier& m = mbarrier_at(bar, EMU_SITE);
  if ((m.phase & 1) == parity) {
    deliver_loads(m);
    complete_phase_if_due(m);
  }
  if ((m.phase & 1) != parity) return acquire(*g.me, m.done_clocks);
  m.waiting.push_back({g.my_id, parity});
  block_until_woken("mbarrier", EMU_SITE);
}

void tma_load_2d(uint32_t dst, const TensorMap2d* map, int x, int y, uint32_t bar) {
  Mbarrier& m = mbarrier_at(bar, EMU_SITE);
  if (dst % 1024) fail_at("misaligned", "128B-swizzled TMA destination is not 1024-byte aligned", EMU_SITE);
  check_shared(smem_pointer(dst), map->box_height * 128, Access::async_issue, EMU_SITE);
  const int x0 = std::max(x, 0), x1 = std::min(x + 64, map->width);
  for (int r = std::max(y, 0); r < std::min(y + map->box_height, map->height) && x0 < x1; ++r) {
    char* const row = const_cast<char*>(map->base) + size_t(r) * map->row_bytes;
    check_global(row + 2 * x0, 2 * (x1 - x0), Access::read, EMU_SITE);
  }
  m.loads.push_back({*map, dst, x, y});
  release_to(m.clocks);
  if (!m.waiting.empty()) {  // e.g. consumers arrived before the producer
    deliver_loads(m);
    complete_phase_if_due(m);
  }
}
void fence_proxy_async() { g.me->proxy_clock = g.me->clock++; }

namespace {

// Where 8 elements of an operand in shared memory lie, 128-byte swizzle. mn: row of A or column of B.
char* operand_chunk(uint64_t desc, bool transposed, int mn, int k, const void* pc) {
  const auto field = [&](int shift) { return uint32_t(desc >> shift & 0x3fff) << 4; };
  const uint32_t start = field(0), lead = field(16), stride = field(32);
  if (desc >> 62 != 1) fail_at("undefined", "only 128B-swizzled wgmma descriptors are emulated", pc);
  const uint32_t a = transposed ? start + mn / 64 * lead + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  return smem_pointer(a ^ (a >> 7 & 7) << 4);
}

void start_wgmma(const std::shared_ptr<WgmmaOp>& op, const void* pc) {
  const auto read = [&](uint64_t desc, bool transposed, int extent) {
    for (int i = 0; i < extent * 2; ++i) {  // 8 elements each
      char* p = transposed ? operand_chunk(desc, true, i % (extent / 8) * 8, i / (extent / 8), pc)
                           : operand_chunk(desc, false, i / 2, i % 2 * 8, pc);
      check_shared(p, 16, Access::async_read, pc);
      for (int b = 0; b < 16; ++b) ++g.cells[p + b - g.arena].async_readers;
      op->reads.push_back(p);
    }
  };
  read(op->b_desc, op->b_transposed, op->n);
  if (!op->thread[0].a_in_regs) read(op->a_desc, op->a_transposed, 64);
}

// m64nNk16 of bfloat16, once somebody waits for it.
void run_wgmma(WgmmaOp& op) {
  if (op.done) return;
  op.done = true;
  if (op.previous) run_wgmma(*op.previous);
  const auto element = [&](uint64_t desc, bool transposed, int mn, int k) {
    uint16_t v;
    memcpy(&v, operand_chunk(desc, transposed, mn, k, nullptr), 2);
    return bf16(v);
  };
  std::vector<float> a(64 * 16), b(size_t(op.n) * 16);
  for (int n = 0; n < op.n; ++n) {
    for (int k = 0; k < 16; ++k) b[n * 16 + k] = element(op.b_desc, op.b_transposed, n, k);
  }
  for (int t = 0; t < 128; ++t) {
    const auto& thread = op.thread[t];
    const int row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
    for (int e = 0; thread.a_in_regs && e < 8; ++e) {
      const int m = row + (e >> 1 & 1) * 8, k = col + (e & 1) + (e >> 2) * 8;
      a[m * 16 + k] = bf16(thread.a[e / 2] >> (16 * (e & 1)));
    }
  }
  for (int m = 0; !op.thread[0].a_in_regs && m < 64; ++m) {
    for (int k = 0; k < 16; ++k) a[m * 16 + k] = element(op.a_desc, op.a_transposed, m, k);
  }
  for (int t = 0; t < 128; ++t) {
    float* const acc = op.thread[t].acc;
    const float* const before = op.previous ? op.previous->thread[t].acc : acc;
    for (int i = 0; i < op.n / 2; ++i) {
      const int m = t / 32 * 16 + t % 32 / 4 + (i >> 1 & 1) * 8, n = i / 4 * 8 + t % 4 * 2 + (i & 1);
      const auto product = [&](int k) { return double(a[m * 16 + k]) * double(b[n * 16 + k]); };
      acc[i] = matrix_sum(16, op.accumulate ? before[i] : 0.0, product);
    }
  }
  ++g.n_mma;
}

}  // namespace

void wgmma_fence() { g.me->wgmma_fenced = true; }

void wgmma(int n, float* d, const uint32_t* a_regs, uint64_t a_desc, uint64_t b_desc, bool a_transposed,
           bool b_transposed, bool accumulate) {
  WgmmaGroup& group = g.warpgroups[g.my_id / 128];
  if (!g.me->wgmma_fenced) {
    fail_at("async-read", "wgmma without a wgmma.fence since its registers were last accessible", EMU_SITE);
  }
  if (!group.arriving) {
    group.arriving = std::make_shared<WgmmaOp>();
    WgmmaOp& op = *group.arriving;
    op.n = n;
    op.a_desc = a_desc;
    op.b_desc = b_desc;
    op.a_transposed = a_transposed;
    op.b_transposed = b_transposed;
    op.accumulate = accumulate;
    op.done = false;
    op.waits_left = 128;
    group.arrived = 0;
  }
  const std::shared_ptr<WgmmaOp> op = group.arriving;
  if (op->n != n || op->b_desc != b_desc || op->a_desc != a_desc || op->accumulate != accumulate) {
    fail_at("divergence", "threads of a warpgroup issue different wgmma operands", EMU_SITE);
  }
  auto& mine = op->thread[g.my_id % 128];
  mine.d = d;
  mine.a_in_regs = a_regs != nullptr;
  if (a_regs) memcpy(mine.a, a_regs, 16);
  memcpy(mine.acc, d, 4 * (n / 2));
  memset(d, 0xff, 4 * (n / 2));  // NaN until wgmma_wait
  g.me->open_wgmma.push_back(op);
  if (++group.arrived < 128) return block_until_woken("wgmma", EMU_SITE);
  const bool in_flight = group.last && group.last->waits_left == 128 && group.last->thread[g.my_id % 128].d == d;
  if (in_flight) op->previous = group.last;
  group.last = op;
  group.arriving.reset();
  start_wgmma(op, EMU_SITE);
  for (unsigned t = g.my_id & ~127u, e = t + 128; t < e; ++t) g.fibers[t].state = State::runnable;
}

void wgmma_commit() {
  g.me->wgmma_groups.push_back(std::move(g.me->open_wgmma));
  g.me->open_wgmma.clear();
}

void wgmma_wait(int groups_left) {
  auto& groups = g.me->wgmma_groups;
  while (int(groups.size()) > groups_left) {
    for (auto& op : groups.front()) {
      run_wgmma(*op);
      auto& mine = op->thread[g.my_id % 128];
      memcpy(mine.d, mine.acc, 4 * (op->n / 2));
      if (--op->waits_left) continue;
      for (char* p : op->reads) {  // only now is the whole warpgroup done reading
        for (int b = 0; b < 16; ++b) --g.cells[p + b - g.arena].async_readers;
      }
      op->previous.reset();
    }
    groups.pop_front();
  }
  if (groups.empty() && g.me->open_wgmma.empty()) g.me->wgmma_fenced = false;
}

}  // namespace emu
