// The warp's instructions: ldmatrix, mma.sync, cp.async.
#include <algorithm>

#include "runtime.h"

namespace emu {
namespace {

struct LdmatrixArg {
  uint32_t* regs;
  uint32_t address;
  int count;
  bool transpose;
  const void* pc;
};

struct MmaArg {
  MmaType type;
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

void ldmatrix_fn(void* const* args, uint32_t mask) {
  if (mask != ~0u) fail_at("divergence", "ldmatrix in a warp of fewer than 32 threads", nullptr);
  const auto& first = *static_cast<LdmatrixArg*>(args[0]);
  const unsigned warp = g.my_id & ~31u, self = g.my_id;
  for (int m = 0; m < first.count; ++m) {
    uint16_t tile[8][8];
    unsigned line_use[8] = {}, cycles = 0;
    for (int r = 0; r < 8; ++r) {
      const int l = 8 * m + r;
      const auto& a = *static_cast<LdmatrixArg*>(args[l]);
      set_current(warp + l);  // the lane that supplies a row's address is charged with its read
      if (a.address % 16) fail_at("misaligned", "ldmatrix row address is not a multiple of 16", a.pc);
      char* p = smem_pointer(a.address);
      check_shared(p, 16, Access::read, a.pc);
      memcpy(tile[r], p, 16);
      cycles = std::max(cycles, ++line_use[a.address / 16 % 8]);
    }
    g.n_ldmatrix_cycles += cycles;
    ++g.n_ldmatrix;
    g.n_shared_read += 128;
    for (int l = 0; l < 32; ++l) {
      const int i = l / 4, j = l % 4 * 2;
      const auto& a = *static_cast<LdmatrixArg*>(args[l]);
      const uint32_t low = a.transpose ? tile[j][i] : tile[i][j], high = a.transpose ? tile[j + 1][i] : tile[i][j + 1];
      a.regs[m] = low | high << 16;
    }
  }
  set_current(self);
}

void mma_fn(void* const* args, uint32_t mask) {
  if (mask != ~0u) fail_at("divergence", "mma in a warp of fewer than 32 threads", nullptr);
  const MmaType type = static_cast<MmaArg*>(args[0])->type;
  const int k_size = type == MmaType::tf32 ? 8 : 16;
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<MmaArg*>(args[l]);
    const int row = l / 4, t = l % 4;
    if (type == MmaType::tf32) {  // the tensor core ignores the 13 low mantissa bits
      for (int r = 0; r < 4; ++r) a[row + 8 * (r & 1)][t + 4 * (r >> 1)] = __uint_as_float(x.a[r] & ~0x1fffu);
      for (int r = 0; r < 2; ++r) b[t + 4 * r][row] = __uint_as_float(x.b[r] & ~0x1fffu);
      continue;
    }
    for (int h = 0; h < 2; ++h) {
      for (int r = 0; r < 4; ++r) {
        const uint32_t v = x.a[r] >> (16 * h);
        a[row + 8 * (r & 1)][2 * t + h + 8 * (r >> 1)] = type == MmaType::bf16 ? bf16(v) : f16(v);
      }
      for (int r = 0; r < 2; ++r) {
        const uint32_t v = x.b[r] >> (16 * h);
        b[2 * t + h + 8 * r][row] = type == MmaType::bf16 ? bf16(v) : f16(v);
      }
    }
  }
  float out[16][8];
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      const auto& x = *static_cast<MmaArg*>(args[m % 8 * 4 + n / 2]);
      const auto product = [&](int k) { return double(a[m][k]) * double(b[k][n]); };
      out[m][n] = matrix_sum(k_size, x.c[n % 2 + 2 * (m / 8)], product);
    }
  }
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) static_cast<MmaArg*>(args[l])->d[i] = out[l / 4 + 8 * (i / 2)][l % 4 * 2 + i % 2];
  }
  ++g.n_mma;
}

// The bytes are there, for whoever is ordered after this thread's wait.
void finish_copy(const Copy& c) {
  memset(c.dst, 0, c.bytes);
  memcpy(c.dst, c.src, c.src_bytes);
  for (int i = 0; i < c.bytes; ++i) {
    SharedCell& cell = g.cells[c.dst + i - g.arena];
    cell.flags = (cell.flags & ~cell_pending) | cell_init | cell_generic;
    cell.writer = g.my_id;
    cell.write_clock = g.me->clock;
  }
}

}  // namespace

void ldmatrix(uint32_t* regs, int count, bool transpose, uint32_t row_address) {
  LdmatrixArg a{regs, row_address, count, transpose, EMU_SITE};
  warp_collective(Collective::ldmatrix, ~0u, &a, ldmatrix_fn);
}

void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  MmaArg x{type, d, a, b, c};
  warp_collective(Collective::mma, ~0u, &x, mma_fn);
}

// The bytes move only in cp_async_wait; until then reading or writing them is an error.
void cp_async(uint32_t dst, const void* src, int bytes, int src_bytes) {
  if (dst % bytes || (src_bytes && reinterpret_cast<uintptr_t>(src) % bytes)) {
    fail_at("misaligned", "cp.async source or destination is not aligned to its size", EMU_SITE);
  }
  char* p = smem_pointer(dst);
  if (src_bytes) check_access(src, src_bytes, Access::read, EMU_SITE);
  check_shared(p, bytes, Access::async_issue, EMU_SITE);
  g.me->open_copies.push_back({p, static_cast<const char*>(src), bytes, src_bytes});
  g.n_cp_async += bytes;
}

void cp_async_commit() {
  g.me->copy_groups.push_back(std::move(g.me->open_copies));
  g.me->open_copies.clear();
}

void cp_async_wait(int groups_left) {
  auto& groups = g.me->copy_groups;
  while (int(groups.size()) > groups_left) {
    for (const Copy& c : groups.front()) finish_copy(c);
    groups.pop_front();
  }
}

}  // namespace emu
