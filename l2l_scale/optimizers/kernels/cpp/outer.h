// Gradients of weights: sums over coordinates, which are the lanes everywhere else. So the gates' adjoints are
// transposed, and here the lanes are gates.
#pragma once

#include "lstm.h"

namespace l2l {

// Gate rows, rounded up to whole vectors.
template <class T> int padded(int gates) { return (gates + lanes<T> - 1) / lanes<T> * lanes<T>; }

// From d_gates (gates rows of G coordinates; rows up to padded(gates) exist) to (G, padded(gates)).
template <class T> void transpose_gates(const T* d_gates, int gates, T* out) {
  constexpr int n = lanes<T>;
  const int stride = padded<T>(gates);
  for (int gate = 0; gate < stride; gate += n) {
    for (int v = 0; v < kVectors; ++v) {
      Vec<T> rows[n];
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) rows[r] = load(d_gates + (gate + r) * kBlock + v * n);
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) store(out + (v * n + r) * stride + gate, rows[r]);
    }
  }
}

// sums[row][gate] += Σ_n x[row][n] · d[n][gate] for a tile of `count` rows and `vectors` vectors of gates.
template <class T, int vectors, int count>
L2L_INLINE void outer_tile(const T* d, int stride, const T* const* x, T* sums) {
  Vec<T> tile[count][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < count; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) tile[r][v] = load(sums + r * stride + v * lanes<T>);
  }
  for (int n = 0; n < group<T>; ++n, d += stride) {
    Vec<T> gates[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) gates[v] = load(d + v * lanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < count; ++r) {
      const T value = x[r][n];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) tile[r][v] += value * gates[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < count; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(sums + r * stride + v * lanes<T>, tile[r][v]);
  }
}

template <class T, int vectors>
void outer_rows(const T* d, int stride, const T* const* x, int rows, T* sums) {
  int row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    outer_tile<T, vectors, kTileRows>(d, stride, x + row, sums + row * stride);
  }
  for (; row < rows; ++row) outer_tile<T, vectors, 1>(d, stride, x + row, sums + row * stride);
}

// sums (rows, padded(gates)) += Σ_n x[row][n] · d[n]; x points to `rows` rows of G coordinates.
template <class T> void outer_product(const T* d, int gates, const T* const* x, int rows, T* sums) {
  const int stride = padded<T>(gates);
  int left = stride / lanes<T>;
  for (; left >= kTileVectors; left -= kTileVectors, d += kTileVectors * lanes<T>, sums += kTileVectors * lanes<T>) {
    outer_rows<T, kTileVectors>(d, stride, x, rows, sums);
  }
  for (; left >= 2; left -= 2, d += 2 * lanes<T>, sums += 2 * lanes<T>) outer_rows<T, 2>(d, stride, x, rows, sums);
  if (left) outer_rows<T, 1>(d, stride, x, rows, sums);
}

}  // namespace l2l
