// conv_stats: a 1x1 convolution z = a @ W.T and the statistics of z as it was stored.
//
// a [M, C] is a tensor, a strided view or act(scale * x + shift), W [K, C]. Reads M*C*s (a) and K*C*s, writes M*K*s
// (z); z's statistics are taken while its chunk is in cache. 2*M*K*C operations.
#include "isa.h"
#include "moments.h"
#include "operands.h"
#include "panels.h"
#include "primitives.h"

namespace resfuse {

template <class T, class E>
struct ConvStatsKernel {
  Activation<T> a;
  const Panels<E>* weight;  // [C, K]
  T* z;
  Moments* moments;  // of this share, or null

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t inner = a.z.channels, outer = weight->columns();
    const int64_t a_stride = chunk_stride(inner), stride = chunk_stride(outer);
    const int64_t size = chunk_size(end - begin, chunk_rows);
    const bool in_place = readable_in_place<E>(a);
    const Buffer<E> rows(in_place ? 0 : size * a_stride);
    const Buffer<float> product(size * stride);
    for (int64_t chunk = begin; chunk < end; chunk += size) {
      const int64_t count = std::min(size, end - chunk);
      Left left = by_rows<E>(rows, a_stride);
      if (in_place) {
        left = {a.z.row(chunk), inner / word_elements<E>, 1};
      } else {
        fill_rows<E>(a, chunk, count, static_cast<E*>(rows), a_stride);
      }
      Ahead ahead;
      a.z.fetch(ahead, chunk + size, size, end);
      ahead.add(z + chunk * outer, count * outer * int64_t{sizeof(T)});
      ahead.spread(tile_words(count, outer, weight->depth()));
      multiply<E>(count, outer, weight->depth(), left, weight->from(0), product, stride, false, &ahead);
      for (int64_t r = 0; r < count; ++r) {
        const float* __restrict__ from = product + r * stride;
        T* __restrict__ to = z + (chunk + r) * outer;
        for (int64_t k = 0; k < outer; ++k) to[k] = store<T>(from[k]);
      }
      if (moments) moments->add(z + chunk * outer, count, outer);
    }
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_stats(
    const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift, bool x_relu,
    const at::Tensor& weight, bool want_stats, bool /*tf32*/) {
  check_view(x, "x");
  check_affine(x_scale, x_shift, "x_scale", "x_shift", x.size(1));
  const int64_t inner = x.size(1), outer = weight.size(0), rows = row_count(x);
  check_matrix(weight, "weight", x.scalar_type(), outer, inner);

  const at::Tensor z = empty_rows(x, outer);
  const int64_t shares = share_count(rows, inner + outer);
  std::vector<Moments> moments(want_stats ? shares : 0, Moments(outer));
  with_types(x, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    Panels<E> panels(inner, outer);
    pack_transposed(data_of<T>(weight), panels, inner);
    for_shares(rows, shares, [&](int64_t share, int64_t begin, int64_t end) {
      run_best(
          ConvStatsKernel<T, E>{activation_of<T>(x, x_scale, x_shift, x_relu), &panels, mutable_data_of<T>(z),
                                want_stats ? &moments[share] : nullptr},
          begin, end);
    });
  });
  if (!want_stats) return {z, uninitialized({0}, at::kFloat), uninitialized({0}, at::kFloat)};
  auto [mean, var] = merged(moments);
  return {z, mean, var};
}

}  // namespace resfuse
