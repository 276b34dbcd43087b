// Both products of a gradient dz [M, K] with one visit of it: by rows with a weight W [K, C], by columns with the
// activation a [M, C] that the weight met:
//   rows = dz @ W + add [M, C]     outer = dz.T @ (a - mean) [K, C]     total = sum(dz) [K]
//
// dz and a are made from their recipes in cache. 4*M*K*C operations. `conv_backward` and `expand_products` are this.
#pragma once

#include <vector>

#include "gradient.h"
#include "outer_product.h"
#include "panels.h"

namespace resfuse {

// What is multiplied, and where the results go.
template <class T, class E>
struct GradientProducts {
  Gradient<T> g;
  Activation<T> a;
  const float* mean;  // [C] to be subtracted from floats, or null
  int64_t chunk;      // rows at a time
  // The row products, of all channels; null in a pass of the sums alone, or if they are not wanted.
  const Panels<E>* weight;  // [K, C]
  const Gradient<T>* add;   // [M, C] or null
  T* rows;
  double* total = nullptr;  // of this share, or null
  // The outer products of g's channels begin_channel .. end_channel, or null.
  OuterSum* outer = nullptr;
  int64_t begin_channel = 0;
  int64_t end_channel = g.channels;
};

// Runs the kernel over a grid: in one pass, or the row products and totals first and the sums second (`OuterGrid`).
// sums: one a share, none if they are not wanted; totals: one for each share of the row pass, or null.
template <class T, class E>
void run_gradient_products(
    const GradientProducts<T, E>& whole, int64_t rows, const OuterGrid& grid, OuterSums& sums,
    std::vector<std::vector<double>>* totals);

}  // namespace resfuse
