// expand_stats: statistics of a @ W.T from those of a; expand_coefficients: the [K, C] algebra of its backward pass.
//
//   mean3 = W @ mean     var3 = max(0, rowsum((W @ cov) * W))
//   dgamma = invstd * rowsum(P * W)     dW = scale * (P - dgamma * invstd * (W @ cov))
//   Q = W.T @ diag(scale * invstd * dgamma / M) @ W = q_scale * q     c = (sum_g / M) @ Wg - q_scale * (mean @ q)
//
// W, Wg [K, C] in storage dtype, cov [C, C], P [K, C]. All products in float32, c in double from the rounded Wg and q.
// 2*K*C*C operations for W @ cov and half as many for Q, which is symmetric.
#include <cmath>

#include "operands.h"
#include "outer_product.h"
#include "panels.h"
#include "primitives.h"

namespace resfuse {

// In 16 partial sums, so that every instruction set gives the same bits; those added in double.
RESFUSE_HD float dot(const float* __restrict__ a, const float* __restrict__ b, int64_t count) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int64_t j = 0; j < 16; ++j) lanes[j] += a[i + j] * b[i + j];
  }
  double total = 0.0;
  for (; i < count; ++i) total += static_cast<double>(a[i]) * b[i];
  for (const float lane : lanes) total += lane;
  return static_cast<float>(total);
}

template <class T>
Activation<T> matrix_rows(const T* w, int64_t columns) {
  return {{w, columns, 1, 1, 0, 0, 0, true}, nullptr, nullptr, 0.0f};
}

template <class T>
struct StatsOfProductKernel {
  Activation<T> weight;  // [K, C]
  const Panels<float>* cov;
  const float* mean;
  float* mean_out;  // [K]
  float* var_out;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t inner = weight.z.channels, stride = chunk_stride(inner), size = chunk_size(end - begin, chunk_rows);
    const Buffer<float> w(size * stride), product(size * stride);
    for (int64_t first = begin; first < end; first += size) {
      const int64_t count = std::min(size, end - first);
      fill_rows<float>(weight, first, count, static_cast<float*>(w), stride);
      multiply<float>(count, inner, inner, by_rows<float>(w, stride), cov->from(0), product, stride, false);
      for (int64_t r = 0; r < count; ++r) {
        const float var = dot(w + r * stride, product + r * stride, inner);
        mean_out[first + r] = dot(w + r * stride, mean, inner);
        var_out[first + r] = clamp_below(var, 0.0f);
      }
    }
  }
};

std::tuple<at::Tensor, at::Tensor> expand_stats(
    const at::Tensor& weight, const at::Tensor& mean, const at::Tensor& cov) {
  const int64_t inner = mean.numel(), outer = weight.size(0);
  check_matrix(weight, "weight", weight.scalar_type(), outer, inner);
  check_vector(mean, "mean", inner);
  check_matrix(cov, "cov", at::kFloat, inner, inner);
  const at::Tensor mean_out = uninitialized({outer}, at::kFloat), var_out = uninitialized({outer}, at::kFloat);
  Panels<float> panels(inner, inner);
  pack(data_of<float>(cov), panels, inner);
  with_type(weight, [&](auto stored) {
    using T = decltype(stored);
    const StatsOfProductKernel<T> kernel{matrix_rows(data_of<T>(weight), inner), &panels, data_of<float>(mean),
                                         mutable_data_of<float>(mean_out), mutable_data_of<float>(var_out)};
    for_shares(outer, share_count(outer, inner * inner),
               [&](int64_t, int64_t begin, int64_t end) { run_best(kernel, begin, end); });
  });
  return {mean_out, var_out};
}

template <class T>
struct CoefficientsKernel {
  Activation<T> weight;  // [K, C]
  const T* wg;           // [K, C]
  const float* products;
  const float* sum_g;
  const float* scale;
  const float* invstd;
  float count;
  const Panels<float>* cov;
  float* dgamma;
  float* dweight;
  OuterSum* q;  // of this share
  double* c;    // sum_g @ Wg of this share

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t inner = weight.z.channels, stride = chunk_stride(inner), size = chunk_size(end - begin, chunk_rows);
    const Buffer<float> w(size * stride), weighed(size * stride), product(size * stride);
    const Buffer<Word> w_columns(column_words<float>(size, inner)), weighed_columns(column_words<float>(size, inner));
    for (int64_t first = begin; first < end; first += size) {
      const int64_t rows = std::min(size, end - first);
      fill_rows<float>(weight, first, rows, static_cast<float*>(w), stride);
      multiply<float>(rows, inner, inner, by_rows<float>(w, stride), cov->from(0), product, stride, false);
      for (int64_t r = 0; r < rows; ++r) {
        write_row(first + r, w + r * stride, product + r * stride, weighed + r * stride);
      }
      const auto left = by_columns<float>(weighed, rows, round_up(inner, panel_columns), stride, weighed_columns);
      const auto right = by_columns<float>(w, rows, round_up(inner, panel_columns), stride, w_columns);
      for (int64_t i = 0; i < inner; i += panel_columns) {  // q is symmetric: its lower half, by panels
        q->add<float>(i, std::min(panel_columns, inner - i), 0, std::min(inner, i + panel_columns),
                      ByColumns{left.words + i * left.depth, left.depth}, right, first > begin);
      }
    }
  }

  RESFUSE_HD void write_row(
      int64_t k, const float* __restrict__ w, const float* __restrict__ product, float* __restrict__ weighed) const {
    const int64_t inner = weight.z.channels;
    const float* __restrict__ p = products + k * inner;
    float* __restrict__ dw = dweight + k * inner;
    const float own = invstd[k] * dot(p, w, inner), s = scale[k], less = own * invstd[k];
    const float weigh = s * invstd[k] * own / count;
    const double share = static_cast<double>(sum_g[k]) / count;
    dgamma[k] = own;
    for (int64_t j = inner; j < round_up(inner, panel_columns); ++j) weighed[j] = 0.0f;
    for (int64_t j = 0; j < inner; ++j) {
      dw[j] = s * (p[j] - less * product[j]);
      weighed[j] = weigh * w[j];
      c[j] += share * load(wg[k * inner + j]);
    }
  }
};

template <class T>
struct RoundKernel {
  const float* values;  // [C, C]
  float power;
  int64_t inner;
  const float* mean;
  T* q;
  double* from_a;  // mean @ q of this share's rows

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const float* __restrict__ from = values + i * inner;
      T* __restrict__ to = q + i * inner;
      double* __restrict__ sum = from_a;
      const double weigh = mean[i];
      for (int64_t j = 0; j < inner; ++j) {
        to[j] = store<T>(from[j] / power);
        sum[j] += weigh * load(to[j]);
      }
    }
  }
};

// The upper half of a symmetric matrix [size, size] from its lower one, by panels.
inline void mirror(float* values, int64_t size) {
  constexpr int64_t line = 16;
  at::parallel_for(0, (size + panel_columns - 1) / panel_columns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * panel_columns; first < std::min(size, end * panel_columns); first += panel_columns) {
      const int64_t right = first + panel_columns;
      for (int64_t j = right; j < size; j += line) {
        for (int64_t i = first; i < right; ++i) {
          for (int64_t k = j; k < std::min(size, j + line); ++k) values[i * size + k] = values[k * size + i];
        }
      }
    }
  });
}

// The power of two at or below a positive finite value, else 1.
inline float power_of_two(float largest) {
  if (!(largest > 0.0f) || !std::isfinite(largest)) return 1.0f;
  const float power = std::ldexp(1.0f, std::ilogb(largest));
  return power > 0.0f && std::isfinite(1.0f / power) ? power : 1.0f;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand_coefficients(
    const at::Tensor& products, const at::Tensor& sum_g, const at::Tensor& weight, const at::Tensor& wg,
    const at::Tensor& mean, const at::Tensor& cov, const at::Tensor& scale, const at::Tensor& invstd, int64_t count) {
  const int64_t inner = mean.numel(), outer = weight.size(0);
  check_matrix(weight, "weight", weight.scalar_type(), outer, inner);
  check_matrix(wg, "wg", weight.scalar_type(), outer, inner);
  check_matrix(products, "products", at::kFloat, outer, inner);
  check_matrix(cov, "cov", at::kFloat, inner, inner);
  check_vector(sum_g, "sum_g", outer);
  check_vector(scale, "scale", outer);
  check_vector(invstd, "invstd", outer);
  check_vector(mean, "mean", inner);

  const at::Tensor dgamma = uninitialized({outer}, at::kFloat), dweight = uninitialized({outer, inner}, at::kFloat);
  const at::Tensor q = uninitialized({inner, inner}, weight.options()), q_scale = uninitialized({}, at::kFloat);
  const at::Tensor c = uninitialized({inner}, at::kFloat);
  Panels<float> panels(inner, inner);
  pack(data_of<float>(cov), panels, inner);
  const int64_t shares = share_count(outer, inner * inner);
  OuterSums sums(shares, inner, inner);
  std::vector<std::vector<double>> from_g(shares, std::vector<double>(inner, 0.0)), from_a = from_g;
  with_type(weight, [&](auto stored) {
    using T = decltype(stored);
    for_shares(outer, shares, [&](int64_t share, int64_t begin, int64_t end) {
      run_best(
          CoefficientsKernel<T>{matrix_rows(data_of<T>(weight), inner), data_of<T>(wg), data_of<float>(products),
                                data_of<float>(sum_g), data_of<float>(scale), data_of<float>(invstd),
                                static_cast<float>(count), &panels, mutable_data_of<float>(dgamma),
                                mutable_data_of<float>(dweight), sums[share], from_g[share].data()},
          begin, end);
    });
    const at::Tensor whole = sums.merged();
    mirror(whole.mutable_data_ptr<float>(), inner);
    const float* values = data_of<float>(whole);
    std::vector<float> largest(inner, 0.0f);
    at::parallel_for(0, inner, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < inner; ++j) largest[i] = std::max(largest[i], std::abs(values[i * inner + j]));
      }
    });
    const float power = power_of_two(inner ? *std::max_element(largest.begin(), largest.end()) : 0.0f);
    *mutable_data_of<float>(q_scale) = power;
    const RoundKernel<T> kernel{values, power, inner, data_of<float>(mean), mutable_data_of<T>(q), nullptr};
    for_shares(inner, shares, [&](int64_t share, int64_t begin, int64_t end) {
      auto own = kernel;
      own.from_a = from_a[share].data();
      run_best(own, begin, end);
    });
    for (int64_t j = 0; j < inner; ++j) {
      double value = 0.0;
      for (const auto& share : from_a) value -= static_cast<double>(power) * share[j];
      for (const auto& share : from_g) value += share[j];
      mutable_data_of<float>(c)[j] = static_cast<float>(value);
    }
  });
  return {dgamma, dweight, q, q_scale, c};
}

}  // namespace resfuse
