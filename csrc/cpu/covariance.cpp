// covariance: mean [C] and biased covariance [C, C] of the rows of an activation, of the values as products read them.
//
// One pass over a, M*C*s bytes, M*C*C operations (the lower half of panels). Products are accumulated in float32 over
// short runs of rows (a long float32 sum costs a variance more than 4 eps kappa), chunks in double. Floats are centred
// about their chunk's mean, and the means' own covariance is added:
//   M cov = sum over chunks of (y - m_c).T (y - m_c)  +  sum over chunks of n_c (m_c - mean) (m_c - mean).T
// bfloat16 would be rounded by centring; there the products are corrected, cov = y.T y / M - mean mean.T, in double.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "isa.h"
#include "operands.h"
#include "panels.h"
#include "primitives.h"

namespace resfuse {

constexpr int64_t covariance_rows = 256;
constexpr int64_t covariance_runs = 4;  // of a chunk
// Sums of all shares together, bytes; more threads than that allows divide the panels among them.
constexpr int64_t covariance_bytes = int64_t{64} << 20;

// One share's sums.
struct CovarianceShare {
  std::unique_ptr<Buffer<double>> products;  // [C, padded C], lower half by panels; null before the first chunk
  std::vector<double> sum;                   // [C]
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
      const bool accumulate = share->products != nullptr;
      if (!accumulate) share->products = std::make_unique<Buffer<double>>(channels * padded);
      for (int64_t first = part * panel_columns; first < channels; first += parts * panel_columns) {
        add_products(y, first, runs, accumulate);
      }
    }
  }

  // One panel of the products, from its own rows on.
  RESFUSE_HD void add_products(ByColumns y, int64_t first, float* runs, bool accumulate) const {
    const int64_t channels = a.z.channels, rows = channels - first;
    const int64_t length = (y.depth + covariance_runs - 1) / covariance_runs, size = rows * panel_columns;
    for (int64_t run = 0; run < covariance_runs; ++run) {
      const int64_t begin = std::min(y.depth, run * length), words = std::min(y.depth, begin + length) - begin;
      Right right = y.right(first);
      right.words = static_cast<const Word*>(right.words) + begin * right.depth;
      for (int64_t row = first; row < channels; row += panel_columns) {
        Left left = y.left(row);
        left.words = static_cast<const Word*>(left.words) + begin * left.depth;
        multiply<E>(std::min(panel_columns, channels - row), std::min(panel_columns, rows), words, left, right,
                    runs + run * size + (row - first) * panel_columns, panel_columns, false);
      }
    }
    const float* __restrict__ run0 = runs;
    const float* __restrict__ run1 = runs + size;
    const float* __restrict__ run2 = runs + 2 * size;
    const float* __restrict__ run3 = runs + 3 * size;
    for (int64_t i = 0; i < rows; ++i) {
      double* __restrict__ to = *share->products + ((first + i) * round_up(channels, panel_columns) + first);
      for (int64_t j = 0; j < panel_columns; ++j) {
        const int64_t at = i * panel_columns + j;
        to[j] = (accumulate ? to[j] : 0.0) + ((run0[at] + run1[at]) + (run2[at] + run3[at]));
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

// sqrt(n) (m - mean) of every chunk as a product reads them, [chunks, C]. The shares are every `parts`-th of the list.
struct Between {
  int64_t chunks = 0;
  Buffer<Word> columns;

  Between(const std::vector<CovarianceShare>& sums, size_t parts, const double* mean, int64_t channels)
      : chunks(count(sums, parts)), columns(column_words<float>(chunks, channels)) {
    const int64_t stride = chunk_stride(channels), padded = round_up(channels, panel_columns);
    const Buffer<float> rows(chunks * stride);
    float* row = rows;
    for (size_t s = 0; s < sums.size(); s += parts) {
      const CovarianceShare& share = sums[s];
      for (size_t i = 0; i < share.chunk_counts.size(); ++i, row += stride) {
        const double weight = std::sqrt(static_cast<double>(share.chunk_counts[i]));
        for (int64_t c = 0; c < channels; ++c) {
          row[c] = static_cast<float>(weight * (share.chunk_means[i * channels + c] - mean[c]));
        }
        for (int64_t c = channels; c < padded; ++c) row[c] = 0.0f;
      }
    }
    by_columns<float>(rows, chunks, padded, stride, columns);
  }

  static int64_t count(const std::vector<CovarianceShare>& sums, size_t parts) {
    int64_t chunks = 0;
    for (size_t s = 0; s < sums.size(); s += parts) chunks += sums[s].chunk_counts.size();
    return chunks;
  }
};

// Panels of rows of the covariance, from all shares' sums, and the columns that mirror them.
struct MergeCovariance {
  const std::vector<CovarianceShare>* sums;
  int64_t parts;
  const Between* between;  // or null: the products are to be corrected
  const double* mean;      // [C]
  int64_t rows;            // M
  int64_t channels;
  float* out;  // [C, C]

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t panels = (channels + panel_columns - 1) / panel_columns;
    const Buffer<float> product(panel_columns * panel_columns);
    for (int64_t index = begin; index < end; ++index) {
      // A short panel and a long one by turns, so that contiguous ranges are alike.
      const int64_t i = (index % 2 ? panels - 1 - index / 2 : index / 2) * panel_columns;
      const int64_t count = std::min(panel_columns, channels - i);
      for (int64_t j = 0; j <= i; j += panel_columns) {
        if (between) {
          const ByColumns m{between->columns, between->chunks};
          multiply<float>(count, panel_columns, between->chunks, m.left(i), m.right(j), product, panel_columns, false);
        }
        for (int64_t r = 0; r < count; ++r) write_row(i + r, j, product + r * panel_columns);
        for (int64_t c = 0; c < panel_columns; ++c) {
          for (int64_t r = j < i ? 0 : c + 1; r < count; ++r) {
            out[(j + c) * channels + i + r] = out[(i + r) * channels + j + c];
          }
        }
      }
    }
  }

  RESFUSE_HD void write_row(int64_t i, int64_t first, const float* __restrict__ product) const {
    const int64_t at = i * round_up(channels, panel_columns) + first, n = std::min(panel_columns, channels - first);
    double row[panel_columns];
    for (int64_t c = 0; c < panel_columns; ++c) row[c] = between ? product[c] : 0.0;
    for (size_t s = first / panel_columns % parts; s < sums->size(); s += parts) {
      if (!(*sums)[s].products) continue;
      const double* __restrict__ own = *(*sums)[s].products + at;
      for (int64_t c = 0; c < panel_columns; ++c) row[c] += own[c];
    }
    float* __restrict__ to = out + i * channels + first;
    for (int64_t c = 0; c < n; ++c) {
      to[c] = static_cast<float>(row[c] / rows - (between ? 0.0 : mean[i] * mean[first + c]));
    }
  }
};

std::tuple<at::Tensor, at::Tensor> covariance(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu, bool /*tf32*/) {
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
      own.sum.assign(channels, 0.0);
      run_best(Kernel{a, part, parts, &own}, begin, end);
    });
    return Kernel::centred;
  });

  // The parts of one share have the same sums and means; each has its own panels of the products.
  std::vector<double> exact(channels, 0.0);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t s = 0; s < shares * parts; s += parts) exact[c] += sums[s].sum[c];
    exact[c] /= static_cast<double>(rows);
  }
  const at::Tensor mean = uninitialized({channels}, at::kFloat), cov = uninitialized({channels, channels}, at::kFloat);
  std::copy(exact.begin(), exact.end(), mean.mutable_data_ptr<float>());
  const auto between = centred ? std::make_unique<Between>(sums, parts, exact.data(), channels) : nullptr;
  const MergeCovariance kernel{&sums, parts, between.get(), exact.data(), rows, channels,
                               cov.mutable_data_ptr<float>()};
  at::parallel_for(0, (channels + panel_columns - 1) / panel_columns, 1,
                   [&](int64_t begin, int64_t end) { run_best(kernel, begin, end); });
  return {mean, cov};
}

}  // namespace resfuse
