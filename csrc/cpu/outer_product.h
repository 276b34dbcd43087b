// Sums over rows of outer products, g.T @ y: the weight gradients. Who works on which part of them, and their merging.
#pragma once


#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "isa.h"
#include "parallel.h"
#include "rows.h"
#include "tensors.h"

namespace resfuse {

// Sums of all shares together, bytes.
constexpr int64_t outer_bytes = int64_t{64} << 20;
// A share's sums beyond these bytes leave its cache; more rows at a time then make each visit worth it.
constexpr int64_t near_bytes = 512 << 10;

// Columns of y that stay in cache while all of g's channels meet them.
constexpr int64_t outer_columns = 256;

// `shares` of the rows times `parts` of g's channels. With one part, everything comes in one pass over the rows; with
// more (many threads, few rows), the row products go first, over all threads, and the sums second.
struct OuterGrid {
  int64_t shares;
  int64_t parts;
  int64_t row_shares;  // of the row products' own pass
  int64_t chunk;       // rows at a time

  OuterGrid(int64_t rows, int64_t outer, int64_t inner) {
    const int64_t bytes = outer * chunk_stride(inner) * static_cast<int64_t>(sizeof(float));
    row_shares = share_count(rows, outer + inner);
    chunk = chunk_rows * (bytes <= near_bytes ? 1 : bytes <= 4 * near_bytes ? 2 : 4);
    // A share of fewer rows than one chunk spends more on its sums than on its products.
    const int64_t worth = std::max<int64_t>(1, rows / chunk);
    shares = std::max<int64_t>(1, std::min({row_shares, outer_bytes / std::max<int64_t>(1, bytes), worth}));
    parts = std::min(row_shares / shares, (outer + panel_columns - 1) / panel_columns);
  }

  // Shares of the pass that makes the row products, and the sums too unless they have a pass of their own.
  int64_t row_pass_shares(bool no_sums) const { return parts == 1 && !no_sums ? shares : row_shares; }

  // The channels of a part: begin and end, multiples of 64 but for the last.
  std::pair<int64_t, int64_t> channels(int64_t part, int64_t outer) const {
    const int64_t panels = (outer + panel_columns - 1) / panel_columns;
    return {panels * part / parts * panel_columns, std::min(outer, panels * (part + 1) / parts * panel_columns)};
  }
};

// One share's sums [outer, stride], in memory of their own or in that of a result [outer, inner].
class OuterSum {
 public:
  OuterSum(int64_t outer, int64_t inner)
      : stride_(chunk_stride(inner)), own_(std::make_unique<Buffer<float>>(outer * stride_)), data_(*own_) {}
  OuterSum(float* result, int64_t inner) : stride_(inner), data_(result) {}

  // Rows first .. + count of the sum gain g.T @ y in the columns column .. + columns; g and y hold those channels
  // alone. The first gain must not accumulate.
  template <class E>
  void add(
      int64_t first, int64_t count, int64_t column, int64_t columns, ByColumns g, ByColumns y, bool accumulate,
      Ahead* ahead = nullptr) {
    for (int64_t i = 0; i < count; i += panel_columns) {
      multiply<E>(std::min(panel_columns, count - i), columns, g.depth, g.left(i), y.right(), row(first + i) + column,
                  stride_, accumulate, ahead);
    }
  }

  float* row(int64_t i) const { return data_ + i * stride_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<Buffer<float>> own_;
  float* data_;
};

struct MergeKernel {
  const std::vector<OuterSum>* shares;
  int64_t inner;
  const float* less_rows;     // [outer] or null: less_rows[i] * less_columns[j] is subtracted
  const float* less_columns;  // [inner]
  float* out;                 // [outer, inner]

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      float* __restrict__ o = out + i * inner;
      const float* first = shares->front().row(i);
      if (first != o) {
        for (int64_t j = 0; j < inner; ++j) o[j] = first[j];
      }
      for (size_t s = 1; s < shares->size(); ++s) {
        const float* __restrict__ next = (*shares)[s].row(i);
        for (int64_t j = 0; j < inner; ++j) o[j] += next[j];
      }
      if (less_rows) {
        for (int64_t j = 0; j < inner; ++j) o[j] -= less_rows[i] * less_columns[j];
      }
    }
  }
};

// The sums of all shares, and the result that they are merged to. The first share's lie in the result already where
// its rows are whole panels: a weight gradient may be larger than anything else in backward.
class OuterSums {
 public:
  OuterSums() = default;  // that are not wanted

  // shares: 0 where there are no rows.
  OuterSums(int64_t shares, int64_t outer, int64_t inner)
      : outer_(outer), inner_(inner),
        result_(uninitialized({outer, inner}, at::kFloat)) {
    if (shares == 0) result_.zero_();
    shares_.reserve(shares);
    if (shares > 0 && inner % panel_columns == 0) shares_.emplace_back(result_.mutable_data_ptr<float>(), inner);
    while (static_cast<int64_t>(shares_.size()) < shares) shares_.emplace_back(outer, inner);
  }

  bool empty() const { return shares_.empty(); }
  OuterSum* operator[](int64_t share) { return &shares_[share]; }

  // The shares' sums added in order, [outer, inner].
  at::Tensor merged(const float* less_rows = nullptr, const float* less_columns = nullptr) const {
    float* out = empty() ? nullptr : result_.mutable_data_ptr<float>();
    if (empty() || (shares_.size() == 1 && shares_.front().row(0) == out && !less_rows)) return result_;
    const MergeKernel kernel{&shares_, inner_, less_rows, less_columns, out};
    const int64_t grain = std::max<int64_t>(1, least_elements / std::max<int64_t>(1, inner_));
    at::parallel_for(0, outer_, grain, [&](int64_t begin, int64_t end) { run_best(kernel, begin, end); });
    return result_;
  }

 private:
  int64_t outer_ = 0;
  int64_t inner_ = 0;
  at::Tensor result_;
  std::vector<OuterSum> shares_;
};

}  // namespace resfuse
