// expand_dgrad: the gradient of a, the input of a product a @ W.T under BatchNorm:
//   da = g @ Wg - q_scale * (a @ q) - c, rounded once, zero where a's ReLU was, if asked
//
// u [M, C] stands for g @ Wg, or g [M, K] and Wg [K, C] are given. a [M, C], q [C, C], c [C]; q, q_scale and c are
// absent for constant statistics. Reads M*C*s twice (u, a), writes M*C*s. 2*M*C*C operations.
#include <memory>

#include "gradient_tensors.h"
#include "isa.h"
#include "panels.h"
#include "parallel.h"
#include "primitives.h"

namespace resfuse {

template <class T, class E>
struct ExpandDgradKernel {
  Gradient<T> g;
  const Panels<E>* wg;  // [K, C] or null: u is given
  const T* u;
  Activation<T> a;
  const Panels<E>* q;  // [C, C] or null
  float q_scale;
  const float* c;
  bool relu;
  T* da;

  RESFUSE_HD void operator()(int64_t begin, int64_t end) const {
    const int64_t inner = a.z.channels, stride = chunk_stride(inner), g_stride = chunk_stride(g.channels);
    const int64_t size = chunk_size(end - begin, chunk_rows);
    const Buffer<E> a_rows(size * stride), g_rows(wg ? size * g_stride : 0);
    const Buffer<float> from_g(wg ? size * stride : 0), from_a(q ? size * stride : 0);
    for (int64_t chunk = begin; chunk < end; chunk += size) {
      const int64_t count = std::min(size, end - chunk);
      if (q || relu) fill_rows<E>(a, chunk, count, static_cast<E*>(a_rows), stride);
      if (wg) {
        fill_gradient<E>(g, chunk, count, 0, g.channels, static_cast<E*>(g_rows), g_stride, nullptr);
        multiply<E>(count, inner, wg->depth(), by_rows<E>(g_rows, g_stride), wg->from(0), from_g, stride, false);
      }
      if (q) multiply<E>(count, inner, q->depth(), by_rows<E>(a_rows, stride), q->from(0), from_a, stride, false);
      for (int64_t r = 0; r < count; ++r) {
        const float* product = q ? from_a + r * stride : nullptr;
        if (wg) {
          write_row(from_g + r * stride, product, a_rows + r * stride, chunk + r);
        } else {
          write_row(u + (chunk + r) * inner, product, a_rows + r * stride, chunk + r);
        }
      }
    }
  }

  template <class S>
  RESFUSE_HD void write_row(
      const S* __restrict__ source, const float* __restrict__ product, const E* __restrict__ y, int64_t row) const {
    const int64_t inner = a.z.channels;
    T* __restrict__ out = da + row * inner;
    const float* __restrict__ less = c;
    if (product) {
      for (int64_t i = 0; i < inner; ++i) out[i] = store<T>(load(source[i]) - q_scale * product[i] - less[i]);
    } else {
      for (int64_t i = 0; i < inner; ++i) out[i] = store<T>(load(source[i]));
    }
    if (relu) {
      for (int64_t i = 0; i < inner; ++i) out[i] = passes_gradient(load(y[i])) ? out[i] : T{};
    }
  }
};

at::Tensor expand_dgrad(
    const at::Tensor& dout, const OptionalTensor& mask, const OptionalTensor& row_scale, double factor,
    const OptionalTensor& u, const at::Tensor& x, const OptionalTensor& x_scale, const OptionalTensor& x_shift,
    bool x_relu, const at::Tensor& wg, const OptionalTensor& q, const OptionalTensor& q_scale, const OptionalTensor& c,
    bool relu, bool /*tf32*/) {
  const OptionalTensor none;
  const GradientTensors g{dout, mask, row_scale, factor, none, none, none, none, none, none};
  g.check();
  const int64_t outer = dout.size(1), inner = x.dim() == 4 ? x.size(1) : 0, rows = row_count(dout);
  check_view_beside(x, "x", dout, inner);
  check_affine(x_scale, x_shift, "x_scale", "x_shift", inner);
  check_matrix(wg, "wg", dout.scalar_type(), outer, inner);
  if (u) check_rows_beside(*u, "u", dout, inner);
  TORCH_CHECK(q.has_value() == c.has_value() && q.has_value() == q_scale.has_value(),
              "q, q_scale and c must be given together");
  if (q) {
    check_matrix(*q, "q", dout.scalar_type(), inner, inner);
    TORCH_CHECK(q_scale->numel() == 1 && q_scale->scalar_type() == at::kFloat, "q_scale must be one float32");
    check_vector(*c, "c", inner);
  }

  const at::Tensor da = empty_rows(x, inner);
  with_types(dout, [&](auto stored, auto element) {
    using T = decltype(stored);
    using E = decltype(element);
    std::unique_ptr<Panels<E>> wg_panels, q_panels;
    if (!u) {
      wg_panels = std::make_unique<Panels<E>>(outer, inner);
      pack(data_of<T>(wg), *wg_panels, outer);
    }
    if (q) {
      q_panels = std::make_unique<Panels<E>>(inner, inner);
      pack(data_of<T>(*q), *q_panels, inner);
    }
    const ExpandDgradKernel<T, E> kernel{
        g.arguments<T>(), wg_panels.get(), u ? data_of<T>(*u) : nullptr,
        activation_of<T>(x, x_scale, x_shift, x_relu), q_panels.get(),
        q_scale ? *q_scale->const_data_ptr<float>() : 0.0f, vector_of(c), relu, mutable_data_of<T>(da)};
    for_shares(rows, share_count(rows, inner + outer),
               [&](int64_t, int64_t begin, int64_t end) { run_best(kernel, begin, end); });
  });
  return da;
}

}  // namespace resfuse
