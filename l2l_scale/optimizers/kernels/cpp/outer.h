// Gradients of weights: sums over coordinates, which are the lanes everywhere else. So the gates' adjoints are
// transposed, and here the lanes are gates.
#pragma once

#include "lstm.h"

namespace l2l {

// Gate rows, rounded up to whole vectors.
template <class T> int padded(int gates) { return (gates + lanes<T> - 1) / lanes<T> * lanes<T>; }

// From d_gates, operands along the lanes (gates rows; rows up to padded(gates) exist), to (G / depth,
// padded(gates)).
template <class P> void transpose_gates(const typename P::Operand* d_gates, int gates, typename P::Operand* out) {
  using Operand = typename P::Operand;
  constexpr int n = lanes<Operand>;
  const int stride = padded<Operand>(gates);
  for (int gate = 0; gate < stride; gate += n) {
    for (int v = 0; v < kVectors / P::depth; ++v) {
      Vec<Operand> rows[n];
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) rows[r] = load(d_gates + (gate + r) * kBlock + v * n);
      transpose<Operand>(rows);
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) store(out + (v * n + r) * stride + gate, rows[r]);
    }
  }
}

// sums[row][gate] += Σ_n x[row][n] · d[n][gate] for a tile of `count` rows and `vectors` vectors of gates.
template <class P, int vectors, int count>
L2L_INLINE void outer_tile(const typename P::Operand* d, int stride, const typename P::Operand* const* x,
                           typename P::Scalar* sums) {
  using T = typename P::Scalar;
  Vec<T> tile[count][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < count; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) tile[r][v] = load(sums + r * stride + v * lanes<T>);
  }
  for (int n = 0; n < group<T> / P::depth; ++n, d += stride) {
    Operands<P> gates[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) gates[v] = load(d + v * lanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) {
      const typename P::Operand value = x[r][n];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) tile[r][v] = P::multiply_add(value, gates[v], tile[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < count; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(sums + r * stride + v * lanes<T>, tile[r][v]);
  }
}

template <class P, int vectors>
void outer_rows(const typename P::Operand* d, int stride, const typename P::Operand* const* x, int rows,
                typename P::Scalar* sums) {
  int row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    outer_tile<P, vectors, kTileRows>(d, stride, x + row, sums + row * stride);
  }
  for (; row < rows; ++row) outer_tile<P, vectors, 1>(d, stride, x + row, sums + row * stride);
}

// sums (rows, padded(gates)) += Σ_n x[row][n] · d[n]; x points to `rows` rows of operands along the lanes.
template <class P>
void outer_product(const typename P::Operand* d, int gates, const typename P::Operand* const* x, int rows,
                   typename P::Scalar* sums) {
  constexpr int n = lanes<typename P::Scalar>, step = kTileVectors * n;
  const int stride = padded<typename P::Scalar>(gates);
  int left = stride / n;
  for (; left >= kTileVectors; left -= kTileVectors, d += step, sums += step) {
    outer_rows<P, kTileVectors>(d, stride, x, rows, sums);
  }
  for (; left >= 2; left -= 2, d += 2 * n, sums += 2 * n) outer_rows<P, 2>(d, stride, x, rows, sums);
  if (left) outer_rows<P, 1>(d, stride, x, rows, sums);
}

}  // namespace l2l
