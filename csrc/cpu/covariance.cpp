// covariance: mean [C] and biased covariance [C, C] of the rows of an activation, of the values as products read them.
//
// One pass over a, M*C*s bytes, M*C*C operations (the lower half of panels). Products are accumulated in float32 over
// short runs of rows (a long float32 sum costs a variance more than 4 eps kappa), chunks in double. Floats are centred
// about their chunk's mean, and the means' own covariance is added:
//   M cov = sum over chunks of (y - m_c).T (y - m_c)  +  sum over chunks of n_c (m_c - mean) (m_c - mean).T
// bfloat16 would be rounded by centring; there the products are corrected, cov = y.T y / M - mean mean.T, in double.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "isa.h"
#include "operands.h"
#include "panels.h"

namespace resfuse {

constexpr int64_t covariance_rows = 264;
constexpr int64_t covariance_runs = 4;  // of a chunk
// Sums of all shares together, bytes; more threads than that allows divide the panels among them.
constexpr int64_t covariance_bytes = int64_t{64} << 20;

// One share's sums.
struct CovarianceShare {
  std::vector<double> products;    // [C, padded C], lower half by panels
  std::vector<double> sum;         // [C]
  std::vector<float> chunk_means;  // [chunks, C], if centred
  std::vector<float> chunk_counts;
};

template <class T, class E>
struct CovarianceKernel {
  Activation<T> a;
  int64_t part;  // takes the panels p with p % parts == part
  int64_t parts;
  CovarianceShare* share;

  static constexpr bool centred = word_elements<E> == 1;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t channels = a.z.channels, stride = chunk_stride(channels), padded = round_up(channels, panel_columns);
    const int64_t size = chunk_size(end - begin, covariance_rows);
    const Buffer<E> rows(size * stride);
    const Buffer<Word> columns(column_words<E>(size, channels));
    const Buffer<float> runs(covariance_runs * channels * panel_columns), mean(padded);
    for (int64_t chunk = begin; chunk < end; chunk += size) {
      const int64_t count = std::min(size, end - chunk);
      fill_rows<E>(a, chunk, count, static_cast<E*>(rows), stride);
      column_means(rows, count, stride, padded, mean);
      for (int64_t c = 0; c < channels; ++c) share->sum[c] += static_cast<double>(mean[c]) * count;
      if constexpr (centred) {
        for (int64_t r = 0; r < count; ++r) {
          E* __restrict__ row = rows + r * stride;
          for (int64_t c = 0; c < padded; ++c) row[c] -= mean[c];
        }
        share->chunk_means.insert(share->chunk_means.end(), &mean[0], &mean[0] + channels);
        share->chunk_counts.push_back(static_cast<float>(count));
      }
      const auto y = by_columns<E>(rows, count, padded, stride, columns);
      for (int64_t first = part * panel_columns; first < channels; first += parts * panel_columns) {
        add_products(y, first, runs);
      }
    }
  }

  // One panel of the products, from its own rows on.
  RESFUSE_HD void add_products(ByColumns y, int64_t first, float* runs) const {
    const int64_t channels = a.z.channels, rows = channels - first;
    const int64_t length = (y.depth + covariance_runs - 1) / covariance_runs, size = rows * panel_columns;
    for (int64_t run = 0; run < covariance_runs; ++run) {
      const int64_t begin = std::min(y.depth, run * length), words = std::min(y.depth, begin + length) - begin;
      Right right = y.right(first);
      right.words = static_cast<const Word*>(right.words) + begin * right.depth;
      for (int64_t row = first; row < channels; row += panel_columns) {
        Left left = y.left(row);
        left.words = static_cast<const Word*>(left.words) + begin * left.depth;
        multiply<E>(std::min(panel_columns, channels - row), panel_columns, words, left, right,
                    runs + run * size + (row - first) * panel_columns, panel_columns, false);
      }
    }
    const float* __restrict__ run0 = runs;
    const float* __restrict__ run1 = runs + size;
    const float* __restrict__ run2 = runs + 2 * size;
    const float* __restrict__ run3 = runs + 3 * size;
    for (int64_t i = 0; i < rows; ++i) {
      double* __restrict__ to = share->products.data() + (first + i) * round_up(channels, panel_columns) + first;
      for (int64_t j = 0; j < panel_columns; ++j) {
        const int64_t at = i * panel_columns + j;
        to[j] += (run0[at] + run1[at]) + (run2[at] + run3[at]);
      }
    }
  }

  // Sums in float32 over a chunk.
  RESFUSE_HD static void column_means(const E* rows, int64_t count, int64_t stride, int64_t columns, float* mean) {
    float* __restrict__ m = mean;
    for (int64_t c = 0; c < columns; ++c) m[c] = 0.0f;
    for (int64_t r = 0; r < count; ++r) {
      const E* __restrict__ row = rows + r * stride;
      for (int64_t c = 0; c < columns; ++c) m[c] += load(row[c]);
    }
    for (int64_t c = 0; c < columns; ++c) m[c] /= static_cast<float>(count);
  }
};

// Sum over chunks of n (m - mean) (m - mean).T, [C, padded C], lower half by panels.
// The shares are every `parts`-th of the list.
void add_between(
    const std::vector<CovarianceShare>& sums, size_t parts, const double* mean, int64_t channels, double* total) {
  const int64_t stride = chunk_stride(channels), padded = round_up(channels, panel_columns);
  int64_t chunks = 0;
  for (size_t s = 0; s < sums.size(); s += parts) chunks += sums[s].chunk_counts.size();
  const Buffer<float> rows(chunks * stride), product(panel_columns * panel_columns);
  const Buffer<Word> columns(column_words<float>(chunks, channels));
  int64_t r = 0;
  for (size_t s = 0; s < sums.size(); s += parts) {
    const CovarianceShare& share = sums[s];
    for (size_t i = 0; i < share.chunk_counts.size(); ++i, ++r) {
      const double weight = std::sqrt(static_cast<double>(share.chunk_counts[i]));
      for (int64_t c = 0; c < channels; ++c) {
        rows[r * stride + c] = static_cast<float>(weight * (share.chunk_means[i * channels + c] - mean[c]));
      }
      for (int64_t c = channels; c < padded; ++c) rows[r * stride + c] = 0.0f;
    }
  }
  const ByColumns m = by_columns<float>(rows, chunks, padded, stride, columns);
  for (int64_t first = 0; first < channels; first += panel_columns) {
    for (int64_t row = first; row < channels; row += panel_columns) {
      const int64_t count = std::min(panel_columns, channels - row);
      multiply<float>(count, panel_columns, chunks, m.left(row), m.right(first), product, panel_columns, false);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < panel_columns; ++j) {
          total[(row + i) * padded + first + j] += product[i * panel_columns + j];
        }
      }
    }
  }
}

std::tuple<at::Tensor, at::Tensor> covariance(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu) {
  check_view(x, "x");
  check_affine(x_scale, x_shift, "x_scale", "x_shift", x.size(1));
  const int64_t channels = x.size(1), rows = row_count(x), padded = round_up(channels, panel_columns);
  const int64_t size = channels * padded, threads = share_count(rows, channels);
  const int64_t shares =
      std::clamp<int64_t>(covariance_bytes / std::max<int64_t>(1, size * sizeof(double)), 1, threads);
  const int64_t parts = threads / shares;
  std::vector<CovarianceShare> sums(shares * parts);
  const bool centred = with_types(x, [&](auto stored, auto element) {
    using Kernel = CovarianceKernel<decltype(stored), decltype(element)>;
    const auto a = activation_of<decltype(stored)>(x, x_scale, x_shift, x_relu);
    for_grid(rows, shares, parts, [&](int64_t share, int64_t part, int64_t begin, int64_t end) {
      CovarianceShare& own = sums[share * parts + part];
      own.products.assign(size, 0.0);
      own.sum.assign(channels, 0.0);
      run_best(Kernel{a, part, parts, &own}, begin, end);
    });
    return Kernel::centred;
  });

  // The parts of one share have the same sums and means; each has its own panels of the products.
  std::vector<double> exact(channels, 0.0), between(centred ? size : 0, 0.0);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t s = 0; s < shares * parts; s += parts) exact[c] += sums[s].sum[c];
    exact[c] /= static_cast<double>(rows);
  }
  if (centred) add_between(sums, parts, exact.data(), channels, between.data());
  const at::Tensor mean = at::empty({channels}, at::kFloat), cov = at::empty({channels, channels}, at::kFloat);
  float* m = mean.mutable_data_ptr<float>();
  float* v = cov.mutable_data_ptr<float>();
  at::parallel_for(0, channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      m[i] = static_cast<float>(exact[i]);
      for (int64_t j = 0; j <= i; ++j) {
        double value = centred ? between[i * padded + j] : 0.0;
        for (const CovarianceShare& share : sums) value += share.products[i * padded + j];
        value /= static_cast<double>(rows);
        if (!centred) value -= exact[i] * exact[j];
        v[i * channels + j] = v[j * channels + i] = static_cast<float>(value);
      }
    }
  });
  return {mean, cov};
}

TORCH_LIBRARY_IMPL(resfuse, CPU, m) {
  m.impl("covariance", &covariance);
}

}  // namespace resfuse
