// The products of csrc/cpu/amx_product.h on a model of the matrix unit, against sums of products one by one.
//
// Every shape has edges; what lies behind an operand is NaN and c's other columns are watched. Prints what is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/cpu/amx.cpp"
#include "../csrc/cpu/product.cpp"

using namespace resfuse;

// What the probe of the unit runs must not ask for its result.
Isa resfuse::isa() { std::abort(); }

Isa resfuse::vector_isa() {
#if RESFUSE_X86
  if (__builtin_cpu_supports("avx512dq")) return Isa::avx512;
#endif
  return Isa::baseline;
}

namespace {

float low(Word w) { return bits_float(w << 16); }
float high(Word w) { return bits_float(w & ~0xffffu); }

// Eight tiles of 16 rows of 64 bytes, and the instructions on them as the processor's manual defines them.
struct Model {
  Word tiles[8][16][16];

  template <int tile>
  void zero() {
    std::memset(tiles[tile], 0, sizeof(tiles[tile]));
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(tiles[tile][i], static_cast<const char*>(from) + i * stride, 64);
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles[tile][i], 64);
  }
  template <int sum, int left, int right>
  void multiply() {
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          float c = bits_float(tiles[sum][i][n]);
          const Word a = tiles[left][i][k], b = tiles[right][k][n];
          c += low(a) * low(b);
          c += high(a) * high(b);
          tiles[sum][i][n] = float_bits(c);
        }
      }
    }
  }
  static void transpose(const Word* from, int64_t stride, Word* to) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) to[j * 16 + i] = from[i * stride + j];
    }
  }
};

std::mt19937 generator(0);

int draw(int most) { return static_cast<int>(generator() % most); }

Word number() {
  const auto small = [] { return float_bits(static_cast<float>(draw(9) - 4)) >> 16; };
  return small() | small() << 16;
}

constexpr Word nan_pair = 0x7fc07fc0u;

// One product of taps with rows at random places, or of a plain left operand by rows or by columns.
bool right(int rows, int columns, int depth, int taps, int kind, bool accumulate) {
  const int panels = (columns + 63) / 64, width = panels * 64, stride = width + 16;
  const int a_depth = kind == 2 ? rows + draw(3) : 1;
  std::vector<int64_t> a_taps(taps), b_taps(taps), a_rows(rows);
  const int row = kind == 2 ? 1 : taps * (depth + draw(2));
  for (int i = 0; i < rows; ++i) a_rows[i] = kind == 1 ? int64_t{row} * i + draw(2) * 5000000 : int64_t{row} * i;
  for (int t = 0; t < taps; ++t) {
    a_taps[t] = kind == 2 ? int64_t{t} * depth * a_depth : t * depth;
    b_taps[t] = int64_t{t} * depth * 64;
  }
  int64_t most = 0;
  for (int i = 0; i < rows; ++i) most = std::max(most, a_rows[i] + a_taps[taps - 1] + int64_t{depth - 1} * a_depth + 1);
  std::vector<Word> a(most, nan_pair), b(int64_t{panels} * taps * depth * 64, nan_pair);
  for (int i = 0; i < rows; ++i) {
    for (int t = 0; t < taps; ++t) {
      for (int k = 0; k < depth; ++k) a[a_rows[i] + a_taps[t] + int64_t{k} * a_depth] = number();
    }
  }
  for (Word& w : b) w = number();
  const float watch = 12345.0f;
  std::vector<float> c(int64_t{rows} * stride, accumulate ? 3.0f : std::numeric_limits<float>::quiet_NaN());
  for (int i = 0; i < rows; ++i) std::fill_n(c.begin() + int64_t{i} * stride + width, stride - width, watch);
  Model model;
  Ahead ahead;
  ahead.add(a.data(), static_cast<int64_t>(a.size()) * 4);
  ahead.spread(tile_words(rows, columns, int64_t{taps} * depth));
  AmxProduct<Model>::run(
      model, rows, columns, Taps{taps, depth, a_taps.data(), b_taps.data()},
      [&](int64_t i) { return a.data() + a_rows[i]; }, a_depth,
      Right{b.data(), int64_t{taps} * depth * 64, 64}, c.data(), stride, accumulate, &ahead);
  for (int i = 0; i < rows; ++i) {
    for (int n = 0; n < stride; ++n) {
      if (n >= columns && n < width) continue;  // written, with anything
      float sum = n >= width ? watch : accumulate ? 3.0f : 0.0f;
      for (int t = 0; t < taps && n < width; ++t) {
        for (int k = 0; k < depth; ++k) {
          const Word x = a[a_rows[i] + a_taps[t] + int64_t{k} * a_depth];
          const Word y = b[int64_t{n / 64} * taps * depth * 64 + b_taps[t] + k * 64 + n % 64];
          sum += low(x) * low(y) + high(x) * high(y);
        }
      }
      if (c[int64_t{i} * stride + n] != sum) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  int wrong = 0;
  Word from[16 * 21], ours[256], plain[256];
  for (Word& w : from) w = generator();
  transpose_words(from, 21, ours, 16);
  Model::transpose(from, 21, plain);
  if (std::memcmp(ours, plain, sizeof(ours))) ++wrong, std::printf("transpose\n");
  for (int i = 0; i < 200; ++i) {
    const int rows = 1 + draw(i % 3 ? 70 : 200), columns = 1 + draw(200);
    const int depth = i % 4 ? 1 + draw(70) : 16 * (1 + draw(4));
    const int taps = i % 5 == 0 ? 40 : 1 + draw(9), kind = draw(3);
    const bool accumulate = draw(2);
    if (right(rows, columns, i % 5 == 0 ? depth % 20 + 1 : depth, taps, kind, accumulate)) continue;
    ++wrong;
    std::printf("rows %d columns %d depth %d taps %d kind %d accumulate %d\n", rows, columns, depth, taps, kind,
                accumulate);
  }
  return wrong != 0;
}
