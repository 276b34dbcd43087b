// expand: the sum (sum.h) whose main branch is scale * (a @ W.T) + shift, its mask and its statistics. The product is
// never stored; nor is that of a second 1x1 convolution that stands for the residual,
//   residual = second_scale * (b @ V.T) + second_shift.
//
// a [M, C] and b [M, D] are tensors, strided views or recipes; W [K, C], V [K, D]. Reads M*C*s (a), M*K*s (a residual)
// or M*D*s (b), writes M*K*s (out) and M*ceil(K/8) (mask). 2*M*K*(C + D) operations.
#include <memory>

#include "isa.h"
#include "panels.h"
#include "primitives.h"
#include "sum_tensors.h"

namespace resfuse {

// Columns of a chunk's product that are in cache at a time.
constexpr int64_t expand_columns = 512;
static_assert(expand_columns <= sum_columns && expand_columns % panel_columns == 0);

template <class T, class E>
struct ExpandKernel {
  Activation<T> a;
  const Panels<E>* weight;  // [C, K]
  Activation<T> second;
  const Panels<E>* second_weight;  // [D, K] or null
  SumArgs<T> sum;
  Moments* moments;  // of this share, or null

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t a_stride = chunk_stride(a.z.channels);
    const int64_t b_stride = second_weight ? chunk_stride(second.z.channels) : 0;
    const int64_t stride = chunk_stride(std::min(expand_columns, sum.channels));
    const int64_t size = chunk_size(end - begin, chunk_rows);
    const Buffer<E> a_rows(size * a_stride), b_rows(size * b_stride);
    const Buffer<float> product(size * stride), beside(second_weight ? size * stride : 0);
    for (int64_t chunk = begin; chunk < end; chunk += size) {
      const int64_t count = std::min(size, end - chunk);
      fill_rows<E>(a, chunk, count, static_cast<E*>(a_rows), a_stride);
      if (second_weight) fill_rows<E>(second, chunk, count, static_cast<E*>(b_rows), b_stride);
      Ahead ahead;
      sum.fetch(ahead, chunk + size, size, end);
      a.z.fetch(ahead, chunk + size, size, end);
      if (second_weight) second.z.fetch(ahead, chunk + size, size, end);
      ahead.spread(tile_words(count, sum.channels, weight->depth() + (second_weight ? second_weight->depth() : 0)));
      for (int64_t first = 0; first < sum.channels; first += expand_columns) {
        const int64_t columns = std::min(expand_columns, sum.channels - first);
        multiply<E>(count, columns, weight->depth(), by_rows<E>(a_rows, a_stride), weight->from(first), product,
                    stride, false, &ahead);
        if (second_weight) {
          multiply<E>(count, columns, second_weight->depth(), by_rows<E>(b_rows, b_stride),
                      second_weight->from(first), beside, stride, false, &ahead);
        }
        for (int64_t r = 0; r < count; ++r) {
          const float* wide = second_weight ? beside + r * stride : nullptr;
          sum_row(sum, product + r * stride, wide, chunk + r, first, columns);
        }
      }
      if (moments) moments->add(sum.out + chunk * sum.channels, count, sum.channels);
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> expand(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& shift, const OptionalTensor& second,
    const OptionalTensor& second_scale, const OptionalTensor& second_shift, bool second_relu,
    const OptionalTensor& second_weight, const OptionalTensor& residual, const OptionalTensor& residual_scale,
    const OptionalTensor& residual_shift, bool residual_relu, int64_t before, const OptionalTensor& row_scale,
    const OptionalTensor& gate, double total_scale, bool relu, bool want_mask, bool want_stats, bool /*tf32*/) {
  check_view(x, "x");
  check_affine(x_scale, x_shift, "x_scale", "x_shift", x.size(1));
  const int64_t inner = x.size(1), outer = weight.size(0), rows = row_count(x);
  check_matrix(weight, "weight", x.scalar_type(), outer, inner);
  check_vector(scale, "scale", outer);
  check_vector(shift, "shift", outer);
  TORCH_CHECK(second.has_value() == second_weight.has_value(), "second and second_weight must be given together");
  if (second) {
    check_view_beside(*second, "second", x, second->dim() == 4 ? second->size(1) : 0);
    check_affine(second_scale, second_shift, "second_scale", "second_shift", second->size(1));
    check_matrix(*second_weight, "second_weight", x.scalar_type(), outer, second->size(1));
    TORCH_CHECK(!residual && residual_scale, "second needs residual_scale and residual_shift, and no residual");
  }
  const SumTensors sum{residual,    residual_scale, residual_shift, residual_relu, before,    row_scale,
                       gate,        total_scale,    relu,           want_mask,     want_stats};
  sum.check(x, outer, second.has_value());

  const SumResult result(sum, x, outer);
  const int64_t shares = share_count(rows, inner + outer);
  std::vector<Moments> moments(want_stats ? shares : 0, Moments(outer));
  with_types(x, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    Panels<E> panels(inner, outer);
    pack_transposed(data_of<T>(weight), panels, inner);
    std::unique_ptr<Panels<E>> beside;
    Activation<T> b{};
    if (second) {
      beside = std::make_unique<Panels<E>>(second->size(1), outer);
      pack_transposed(data_of<T>(*second_weight), *beside, second->size(1));
      b = activation_of<T>(*second, second_scale, second_shift, second_relu);
    }
    const auto arguments = result.arguments<T>(sum, vector_of(scale), vector_of(shift));
    for_shares(rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
      run_best(
          ExpandKernel<T, E>{activation_of<T>(x, x_scale, x_shift, x_relu), &panels, b, beside.get(), arguments,
                             want_stats ? &moments[share] : nullptr},
          begin, end);
    });
  });
  return result.with(moments);
}

}  // namespace resfuse
