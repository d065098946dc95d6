// The matrix products and gates of one group of coordinates; lanes are coordinates, rows lie kBlock apart.
//
// Notation: G coordinates of the group, I inputs, H hidden units, gate rows in the order of cells.py:
// input, forget, output, candidate.
#pragma once

#include <algorithm>
#include <vector>

#include "program.h"
#include "products.h"

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

// Weights in the order in which the forward tiles read them: per tile of units, for every operand of the input
// and hidden rows, the 4 gates of each unit. The biases likewise.
template <class P> struct ForwardWeights {
  using T = typename P::Scalar;
  std::vector<T> biases;
  std::vector<typename P::Operand> operands;

  ForwardWeights(const T* weight_input, const T* weight_hidden, const T* bias, int inputs, int hidden)
      : biases(4 * hidden), operands(4 * hidden * (deep<P>(inputs) + deep<P>(hidden))) {
    auto* next = operands.data();
    for (int first = 0; first < hidden; first += kTileUnits) {
      const int last = std::min(first + kTileUnits, hidden);
      for (int unit = first; unit < last; ++unit) {
        for (int gate = 0; gate < 4; ++gate) biases[4 * unit + gate] = bias[gate * hidden + unit];
      }
      next = add(weight_input, inputs, hidden, first, last, next);
      next = add(weight_hidden, hidden, hidden, first, last, next);
    }
  }

 private:
  static typename P::Operand* add(const T* weight, int columns, int hidden, int first, int last,
                                  typename P::Operand* next) {
    for (int column = 0; column < columns; column += P::depth) {
      for (int unit = first; unit < last; ++unit) {
        for (int gate = 0; gate < 4; ++gate) {
          const T* line = weight + (gate * hidden + unit) * columns;
          const T second = P::depth > 1 && column + 1 < columns ? line[column + 1] : T(0);
          *next++ = P::operand(line[column], second);
        }
      }
    }
    return next;
  }
};

template <class P, int units>
L2L_INLINE const typename P::Operand* accumulate(const typename P::Operand* weight, const typename P::Operand* rows,
                                                 int count, Numbers<P> (&sums)[4 * units][kVectors]) {
  for (int row = 0; row < count; ++row, rows += kBlock, weight += 4 * units) {
    Operands<P> x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(rows + v * lanes<typename P::Operand>);
#pragma GCC unroll 16
    for (int r = 0; r < 4 * units; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = P::multiply_add(weight[r], x[v], sums[r][v]);
    }
  }
  return weight;
}

// Pre-activations of all units from `unit` on, a tile after the other, to rows of `gates` (4H rows); x and h are
// operands along the rows, so and so many deep.
template <class P, int units>
L2L_INLINE void gates_tile(const ForwardWeights<P>& w, const typename P::Operand*& weight,
                           const typename P::Operand* x, int inputs, const typename P::Operand* h, int hidden,
                           int unit, typename P::Scalar* gates) {
  using T = typename P::Scalar;
  Vec<T> sums[4 * units][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < 4 * units; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = broadcast(w.biases[4 * unit + r]);
  }
  weight = accumulate<P, units>(weight, x, deep<P>(inputs), sums);
  weight = accumulate<P, units>(weight, h, deep<P>(hidden), sums);
#pragma GCC unroll 16
  for (int r = 0; r < 4 * units; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      store(gates + (r % 4 * hidden + unit + r / 4) * kBlock + v * lanes<T>, sums[r][v]);
    }
  }
}

// One layer; x and h_before are operands along the rows. c_before and c_after may be the same. With `keep`, the
// gates (4H rows) are left in `gates` and tanh(c) in `kept_tanh_c`; else `gates` is scratch.
//
// Products and activations are passes of their own: an activation is a long chain of operations, and the chains
// of many units must overlap.
template <class P, bool keep, class T = typename P::Scalar>
void layer_forward(const ForwardWeights<P>& w, const typename P::Operand* x, int inputs,
                   const typename P::Operand* h_before, int hidden, const T* c_before, T* c_after, T* h_after,
                   T* gates, T* kept_tanh_c) {
  const typename P::Operand* weight = w.operands.data();
  int unit = 0;
  for (; unit + kTileUnits <= hidden; unit += kTileUnits) {
    gates_tile<P, kTileUnits>(w, weight, x, inputs, h_before, hidden, unit, gates);
  }
  static_assert(kTileUnits <= 2, "the rest of the units is one unit at most");
  if (unit < hidden) gates_tile<P, 1>(w, weight, x, inputs, h_before, hidden, unit, gates);
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

// Weights for the way back: operands along the gates, (4H / depth, columns).
template <class P> struct BackwardWeights {
  std::vector<typename P::Operand> operands;

  BackwardWeights(const typename P::Scalar* weight, int columns, int gates) : operands(deep<P>(gates) * columns) {
    auto* out = operands.data();
    for (int gate = 0; gate < gates; gate += P::depth) {  // 4H is even
      const auto *line = weight + gate * columns, *next = line + (P::depth - 1) * columns;
      for (int column = 0; column < columns; ++column) *out++ = P::operand(line[column], next[column]);
    }
  }
};

// d_in[column] = Σ_gate weight[gate][column] · d_gates[gate] for `columns` columns; weight has `stride`.
template <class P, int columns>
L2L_INLINE void inputs_tile(const typename P::Operand* weight, int stride, int count,
                            const typename P::Operand* d_gates, typename P::Scalar* d_in, bool add) {
  using T = typename P::Scalar;
  Vec<T> sums[columns][kVectors];
#pragma GCC unroll 16
  for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[k][v] = add ? load(d_in + k * kBlock + v * lanes<T>) : Vec<T>{};
    }
  }
  for (int gate = 0; gate < count; ++gate, weight += stride, d_gates += kBlock) {
    Operands<P> d[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) d[v] = load(d_gates + v * lanes<T>);
#pragma GCC unroll 16
    for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[k][v] = P::multiply_add(weight[k], d[v], sums[k][v]);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < columns; ++k) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(d_in + k * kBlock + v * lanes<T>, sums[k][v]);
  }
}

// As inputs_tile for any number of columns; d_gates are operands along the rows. With `add`, on top of what d_in
// holds.
template <class P>
void inputs_backward(const BackwardWeights<P>& w, int columns, int gates, const typename P::Operand* d_gates,
                     typename P::Scalar* d_in, bool add) {
  const auto* weight = w.operands.data();
  const int count = deep<P>(gates);
  int k = 0;
  for (; k + kTileColumns <= columns; k += kTileColumns) {
    inputs_tile<P, kTileColumns>(weight + k, columns, count, d_gates, d_in + k * kBlock, add);
  }
  for (; k + 2 <= columns; k += 2) inputs_tile<P, 2>(weight + k, columns, count, d_gates, d_in + k * kBlock, add);
  if (k < columns) inputs_tile<P, 1>(weight + k, columns, count, d_gates, d_in + k * kBlock, add);
}

}  // namespace l2l
