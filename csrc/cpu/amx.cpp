// The matrix unit itself, in the instructions' own names, and its probe.
#include "amx.h"

#include "amx_product.h"
#include "isa.h"

#if RESFUSE_X86 && defined(__linux__)
#define RESFUSE_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>
#else
#define RESFUSE_AMX 0
#endif

namespace resfuse {

#if RESFUSE_AMX

namespace {

// All eight tiles 16 rows of 64 bytes, for as long as this lives. Other code on this thread configures its own.
class Unit {
 public:
  Unit() {
    struct alignas(64) Shapes {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    static_assert(sizeof(shapes) == 64, "as the instruction reads it");
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Unit() { asm volatile("tilerelease"); }
  Unit(const Unit&) = delete;
  Unit& operator=(const Unit&) = delete;

  template <int tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"n"(tile));
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "n"(tile) : "memory");
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "n"(tile) : "memory");
  }
  template <int sum, int left, int right>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"n"(sum), "n"(left), "n"(right));
  }

  static void transpose(const Word* from, int64_t stride, Word* to) { transpose_words(from, stride, to, amx_size); }
};

// The processor's word for it, the system's, and the permission that Linux wants to be asked for.
bool is_there() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, tile_state = 3u << 17;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & tile_state) != tile_state) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

// Small whole numbers, which bfloat16 holds and whose sums are exact, in a shape with every kind of edge.
bool is_right() {
  constexpr int64_t rows = 45, columns = 96, depth = 37, padded = 2 * panel_columns;
  const auto value = [](int64_t i) { return static_cast<float>((i * 7 + i / 5) % 9 - 4); };
  const auto pair = [&](int64_t i) {
    return float_bits(value(2 * i)) >> 16 | (float_bits(value(2 * i + 1)) & ~0xffffu);
  };
  std::vector<Word> a(rows * depth), a_columns(rows * depth), b(padded * depth);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k) a[i * depth + k] = a_columns[k * rows + i] = pair(i * depth + k);
  }
  for (size_t i = 0; i < b.size(); ++i) b[i] = pair(i + 3);
  for (const bool by_columns : {false, true}) {
    std::vector<float> c(rows * padded, 1.0f);
    const Left left = by_columns ? Left{a_columns.data(), 1, rows} : Left{a.data(), depth, 1};
    multiply_amx(rows, columns, depth, left, {b.data(), panel_columns * depth, panel_columns}, c.data(), padded, true,
                 nullptr);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t n = 0; n < columns; ++n) {
        float sum = 1.0f;
        for (int64_t k = 0; k < depth; ++k) {
          const Word x = a[i * depth + k];
          const Word y = b[n / panel_columns * panel_columns * depth + k * panel_columns + n % panel_columns];
          sum += bits_float(x << 16) * bits_float(y << 16) + bits_float(x & ~0xffffu) * bits_float(y & ~0xffffu);
        }
        if (c[i * padded + n] != sum) return false;
      }
    }
  }
  return true;
}

}  // namespace

bool amx_works() {
  static const bool works = is_there() && is_right();
  return works;
}

void multiply_amx(
    int64_t rows, int64_t columns, int64_t depth, Left a, Right b, float* c, int64_t stride, bool accumulate,
    Ahead* ahead) {
  Unit unit;
  const int64_t here = 0;
  const Word* words = static_cast<const Word*>(a.words);
  AmxProduct<Unit>::run(unit, rows, columns, {1, depth, &here, &here}, [&](int64_t i) { return words + i * a.row; },
                        a.depth, b, c, stride, accumulate, ahead);
}

void multiply_taps_amx(
    int64_t rows, int64_t columns, const Taps& taps, const void* a, int64_t a_depth, const int64_t* a_rows, Right b,
    float* c, int64_t stride, bool accumulate, Ahead* ahead) {
  Unit unit;
  const Word* words = static_cast<const Word*>(a);
  AmxProduct<Unit>::run(unit, rows, columns, taps, [&](int64_t i) { return words + a_rows[i]; }, a_depth, b, c, stride,
                        accumulate, ahead);
}

#else

bool amx_works() {
  return false;
}

void multiply_amx(int64_t, int64_t, int64_t, Left, Right, float*, int64_t, bool, Ahead*) {}
void multiply_taps_amx(
    int64_t, int64_t, const Taps&, const void*, int64_t, const int64_t*, Right, float*, int64_t, bool, Ahead*) {}

#endif

}  // namespace resfuse
