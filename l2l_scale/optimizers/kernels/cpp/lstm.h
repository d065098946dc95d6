// The matrix products and gates of one group of coordinates; lanes are coordinates, rows lie kBlock apart.
//
// Notation: G coordinates of the group, I inputs, H hidden units, gate rows in the order of cells.py:
// input, forget, output, candidate.
#pragma once

#include <algorithm>

#include "program.h"
#include "simd.h"

namespace l2l {

// Activations of one layer at one step that the backward pass needs: 7 · H rows.
template <class T> struct LayerRecord {
  T *i, *f, *o, *g, *c, *tanh_c, *h;
  LayerRecord() = default;
  LayerRecord(T* base, int hidden) {
    T** parts[] = {&i, &f, &o, &g, &c, &tanh_c, &h};
    for (T** part : parts) *part = base, base += hidden * kBlock;
  }
  static constexpr int rows_per_unit = 7;
};

// Weights in the order in which the forward tiles read them: per tile of units, the biases, then for every
// input and hidden row the 4 gates of each unit.
template <class T>
void pack_forward(const T* weight_input, const T* weight_hidden, const T* bias, int inputs, int hidden, T* out) {
  for (int first = 0; first < hidden; first += kTileUnits) {
    const int last = std::min(first + kTileUnits, hidden);
    for (int row = -1; row < inputs + hidden; ++row) {
      for (int unit = first; unit < last; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          const int line = gate * hidden + unit;
          *out++ = row < 0        ? bias[line]
                   : row < inputs ? weight_input[line * inputs + row]
                                  : weight_hidden[line * hidden + row - inputs];
        }
      }
    }
  }
}

template <class T, int units>
L2L_INLINE const T* accumulate(const T* weight, const T* rows, int count, Vec<T> (&sums)[4 * units][kVectors]) {
  for (int row = 0; row < count; ++row, rows += kBlock, weight += 4 * units) {
    Vec<T> x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(rows + v * lanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < 4 * units; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weight[r] * x[v];
    }
  }
  return weight;
}

// Pre-activations of a tile of `units` hidden units, to rows of `gates` (4H rows).
template <class T, int units>
L2L_INLINE const T* gates_tile(const T* weight, const T* x, int inputs, const T* h, int hidden, int unit, T* gates) {
  Vec<T> sums[4 * units][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < 4 * units; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = broadcast(weight[r]);
  }
  weight = accumulate<T, units>(weight + 4 * units, x, inputs, sums);
  weight = accumulate<T, units>(weight, h, hidden, sums);
#pragma GCC unroll 16
  for (int r = 0; r < 4 * units; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(gates + (r % 4 * hidden + unit + r / 4) * kBlock + v * lanes<T>, sums[r][v]);
    }
  }
  return weight;
}

// One layer. c_before and c_after may be the same, h_before and h_after may not. With `keep`, the gates (4H
// rows) are left in `gates` and tanh(c) in `kept_tanh_c`; else `gates` is scratch.
//
// Products and activations are passes of their own: an activation is a long chain of operations, and the chains
// of many units must overlap.
template <class T, bool keep>
void layer_forward(const T* weight, const T* x, int inputs, const T* h_before, int hidden, const T* c_before,
                   T* c_after, T* h_after, T* gates, T* kept_tanh_c) {
  int unit = 0;
  for (; unit + kTileUnits <= hidden; unit += kTileUnits) {
    weight = gates_tile<T, kTileUnits>(weight, x, inputs, h_before, hidden, unit, gates);
  }
  static_assert(kTileUnits <= 2, "the rest of the units is one unit at most");
  if (unit < hidden) gates_tile<T, 1>(weight, x, inputs, h_before, hidden, unit, gates);
  const int size = hidden * kBlock;
  for (int row = 0; row < size; row += kBlock) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = row + v * lanes<T>;
      const Vec<T> i = sigmoid(load(gates + at)), f = sigmoid(load(gates + size + at));
      const Vec<T> o = sigmoid(load(gates + 2 * size + at)), g = tanh(load(gates + 3 * size + at));
      store(c_after + at, f * load(c_before + at) + i * g);
      store(gates + 2 * size + at, o);
      if (keep) {
        store(gates + at, i);
        store(gates + size + at, f);
        store(gates + 3 * size + at, g);
      }
    }
  }
  for (int row = 0; row < size; row += kBlock) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = row + v * lanes<T>;
      const Vec<T> tanh_c = tanh(load(c_after + at));
      store(h_after + at, load(gates + 2 * size + at) * tanh_c);
      if (keep) store(kept_tanh_c + at, tanh_c);
    }
  }
}

// Derivative of the gates: from d_h and d_c (after the step) to the pre-activations d_gates (4H rows) and
// d_c (before the step, in place).
template <class T>
void gates_backward(const LayerRecord<T>& r, const T* c_before, int hidden, const T* d_h, T* d_c, T* d_gates) {
  for (int unit = 0; unit < hidden; ++unit) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = unit * kBlock + v * lanes<T>;
      const Vec<T> i = load(r.i + at), f = load(r.f + at), o = load(r.o + at), g = load(r.g + at);
      const Vec<T> tanh_c = load(r.tanh_c + at), dh = load(d_h + at), o_tanh = o * tanh_c;
      const Vec<T> dc = load(d_c + at) + dh * (o - o_tanh * tanh_c);
      const Vec<T> dc_i = dc * i;
      store(d_gates + at, dc_i * g * (T(1) - i));
      store(d_gates + hidden * kBlock + at, dc * load(c_before + at) * (f - f * f));
      store(d_gates + 2 * hidden * kBlock + at, dh * o_tanh * (T(1) - o));
      store(d_gates + 3 * hidden * kBlock + at, dc_i - dc_i * g * g);
      store(d_c + at, dc * f);
    }
  }
}

// d_in[column] = Σ_gate weight[gate][column] · d_gates[gate] for `columns` columns; weight has `stride`.
template <class T, int columns>
L2L_INLINE void inputs_tile(const T* weight, int stride, int gates, const T* d_gates, T* d_in, bool add) {
  Vec<T> sums[columns][kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[k][v] = add ? load(d_in + k * kBlock + v * lanes<T>) : Vec<T>{};
    }
  }
  for (int gate = 0; gate < gates; ++gate, weight += stride, d_gates += kBlock) {
    Vec<T> d[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) d[v] = load(d_gates + v * lanes<T>);
#pragma GCC unroll 16
    for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[k][v] += weight[k] * d[v];
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(d_in + k * kBlock + v * lanes<T>, sums[k][v]);
  }
}

// As inputs_tile for any number of columns; with `add`, on top of what d_in holds.
template <class T>
void inputs_backward(const T* weight, int columns, int gates, const T* d_gates, T* d_in, bool add) {
  int k = 0;
  for (; k + kTileColumns <= columns; k += kTileColumns) {
    inputs_tile<T, kTileColumns>(weight + k, columns, gates, d_gates, d_in + k * kBlock, add);
  }
  for (; k + 2 <= columns; k += 2) inputs_tile<T, 2>(weight + k, columns, gates, d_gates, d_in + k * kBlock, add);
  if (k < columns) inputs_tile<T, 1>(weight + k, columns, gates, d_gates, d_in + k * kBlock, add);
}

}  // namespace l2l
