// One LSTM layer by itself, for rules in which something else stands between the layers: global averaging cells, a
// memory. Inputs, h and c are (M, I) and (M, H) as torch has them; blocks are turned in cache.
#pragma once

#include "parts.h"

namespace l2l {

// Weights of a cell as one flat array: weight_input (4H, I), weight_hidden (4H, H), bias (4H).
struct Cell {
  int inputs, hidden;
  int gates() const { return 4 * hidden; }
  int num_weights() const { return gates() * (inputs + hidden + 1); }
  template <class T> const T* recurrent(const T* flat) const { return flat + gates() * inputs; }
  template <class T> const T* bias(const T* flat) const { return recurrent(flat) + gates() * hidden; }
};

// From (M, columns) to rows of a group, and back; lanes beyond M are zero. The inner loop runs along memory.
template <class T> void gather_rows(const T* from, int columns, int64_t first, int64_t total, T* to) {
  const int count = int(std::clamp<int64_t>(total - first, 0, group<T>));
  if (count < group<T>) std::fill_n(to, size_t(columns) * kBlock, T(0));
  from += first * columns;
  for (int n = 0; n < count; ++n, from += columns) {
    for (int column = 0; column < columns; ++column) to[column * kBlock + n] = from[column];
  }
}
template <class T> void scatter_rows(const T* from, int columns, int64_t first, int64_t total, T* to) {
  const int count = int(std::clamp<int64_t>(total - first, 0, group<T>));
  to += first * columns;
  for (int n = 0; n < count; ++n, to += columns) {
    for (int column = 0; column < columns; ++column) to[column] = from[column * kBlock + n];
  }
}

// h and c after a step.
template <class P, class T = typename P::Scalar>
void cell_forward(const Cell& cell, const T* flat, int64_t total, const T* x, const T* h, const T* c, T* h_after,
                  T* c_after, int threads) {
  using Operand = typename P::Operand;
  const ForwardWeights<P> weights(flat, cell.recurrent(flat), cell.bias(flat), cell.inputs, cell.hidden);
  const int64_t groups = (total + group<T> - 1) / group<T>;
  const int inputs = cell.inputs, hidden = cell.hidden;
  const size_t rows = size_t(inputs) + 8 * hidden, operands = size_t(inputs) + hidden;
  bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(|| : failed)
  {
    Arena& arena = thread_arena<T>();
    failed = !arena.reserve(Arena::bytes<T>(rows * kBlock) + Arena::bytes<Operand>(operands * kBlock));
    T *xs = arena.take<T>(rows * kBlock), *hs = xs + inputs * kBlock, *cs = hs + hidden * kBlock;
    T *h_new = cs + hidden * kBlock, *c_new = h_new + hidden * kBlock, *gates = c_new + hidden * kBlock;
    Operand *x_operands = arena.take<Operand>(operands * kBlock), *h_operands = x_operands + inputs * kBlock;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
      if (failed) continue;
      const int64_t first = g * group<T>;
      gather_rows(x, inputs, first, total, xs);
      gather_rows(h, hidden, first, total, hs);
      gather_rows(c, hidden, first, total, cs);
      layer_forward<P, false>(weights, P::along_rows(xs, inputs, x_operands), inputs,
                              P::along_rows(hs, hidden, h_operands), hidden, cs, c_new, h_new, gates, (T*)nullptr);
      scatter_rows(h_new, hidden, first, total, h_after);
      scatter_rows(c_new, hidden, first, total, c_after);
    }
  }
  if (failed) throw std::bad_alloc();
}

// What the backward pass of a cell is given and gives back.
template <class T> struct CellAdjoint {
  int64_t total;       // M
  const T *x, *h, *c;  // before the step
  const T *d_h, *d_c;  // after it
  T* d_weights;        // the cell's layout
  T *d_x, *d_h_before, *d_c_before;
};

template <class P> class CellBackward {
  using T = typename P::Scalar;
  using Operand = typename P::Operand;

 public:
  CellBackward(const Cell& cell, const T* flat, const CellAdjoint<T>& a)
      : cell_(cell),
        a_(a),
        forward_(flat, cell.recurrent(flat), cell.bias(flat), cell.inputs, cell.hidden),
        input_(flat, cell.inputs, cell.gates()),
        hidden_(cell.recurrent(flat), cell.hidden, cell.gates()) {}

  size_t bytes() const {
    return Arena::bytes<T>(rows() * kBlock) + Arena::bytes<Operand>(operands() * kBlock);
  }

  // Sums of the weight gradients: a layer's part of WeightSums.
  size_t sums() const { return size_t(cell_.inputs + cell_.hidden + 1) * padded<T>(cell_.gates()); }

  // The working memory of one thread.
  struct Scratch {
    T *x, *h, *c, *d_h, *d_c, *d_x, *ones, *d_gates, *record;
    Operand *along_lanes, *along_rows, *transposed;
    std::vector<const Operand*> rows;
  };

  Scratch take(Arena& arena) const {
    const int inputs = cell_.inputs, hidden = cell_.hidden, gates = padded<T>(cell_.gates());
    Scratch s;
    s.x = arena.take<T>(rows() * kBlock);
    s.h = s.x + inputs * kBlock;
    s.c = s.h + hidden * kBlock;
    s.d_h = s.c + hidden * kBlock;
    s.d_c = s.d_h + hidden * kBlock;
    s.d_x = s.d_c + hidden * kBlock;
    s.ones = s.d_x + inputs * kBlock;
    s.d_gates = s.ones + kBlock;
    s.record = s.d_gates + gates * kBlock;
    s.along_lanes = arena.take<Operand>(operands() * kBlock);
    s.along_rows = s.along_lanes + (inputs + hidden + 1) * kBlock;
    s.transposed = s.along_rows + std::max(gates, inputs + hidden) * kBlock;
    s.rows.resize(inputs + hidden + 1);
    std::fill_n(s.ones, kBlock, T(1));
    std::fill_n(s.d_gates, size_t(gates) * kBlock, T(0));
    return s;
  }

  // One group of coordinates; adds its weight gradients to `sums`.
  void run(int64_t first, Scratch& s, T* sums) const {
    const int inputs = cell_.inputs, hidden = cell_.hidden, gates = cell_.gates();
    gather_rows(a_.x, inputs, first, a_.total, s.x);
    gather_rows(a_.h, hidden, first, a_.total, s.h);
    gather_rows(a_.c, hidden, first, a_.total, s.c);
    gather_rows(a_.d_h, hidden, first, a_.total, s.d_h);
    gather_rows(a_.d_c, hidden, first, a_.total, s.d_c);
    LayerRecord<T> record(s.record, hidden);
    const Operand* x = P::along_rows(s.x, inputs, s.along_rows);
    const Operand* h = P::along_rows(s.h, hidden, s.along_rows + inputs * kBlock);
    layer_forward<P, true>(forward_, x, inputs, h, hidden, s.c, record.c, record.h, record.i, record.tanh_c);
    gates_backward(record, s.c, hidden, s.d_h, s.d_c, s.d_gates);
    int row = 0;
    for (const auto& [rows, count] : {std::pair{s.x, inputs}, std::pair{s.h, hidden}, std::pair{s.ones, 1}}) {
      const Operand* lanes = P::along_lanes(rows, count, s.along_lanes + row * kBlock);
      for (int i = 0; i < count; ++i) s.rows[row++] = lanes + i * kBlock;
    }
    transpose_gates<P>(P::along_lanes(s.d_gates, padded<T>(gates), s.along_rows), gates, s.transposed);
    outer_product<P>(s.transposed, gates, s.rows.data(), row, sums);
    const Operand* d_gates = P::along_rows(s.d_gates, gates, s.along_rows);
    inputs_backward<P>(hidden_, hidden, gates, d_gates, s.d_h, false);
    inputs_backward<P>(input_, inputs, gates, d_gates, s.d_x, false);
    scatter_rows(s.d_x, inputs, first, a_.total, a_.d_x);
    scatter_rows(s.d_h, hidden, first, a_.total, a_.d_h_before);
    scatter_rows(s.d_c, hidden, first, a_.total, a_.d_c_before);
  }

 private:
  size_t rows() const {
    return size_t(2 * cell_.inputs) + 4 * cell_.hidden + 1 + padded<T>(cell_.gates()) +
           LayerRecord<T>::rows_per_unit * cell_.hidden;
  }
  size_t operands() const {
    const int own = cell_.inputs + cell_.hidden, gates = padded<T>(cell_.gates());
    return size_t(own) + 1 + std::max(gates, own) + gates;
  }

  Cell cell_;
  const CellAdjoint<T>& a_;
  ForwardWeights<P> forward_;
  BackwardWeights<P> input_, hidden_;
};

template <class P, class T = typename P::Scalar>
void cell_backward(const Cell& cell, const T* flat, const CellAdjoint<T>& a, int threads) {
  const CellBackward<P> backward(cell, flat, a);
  const int64_t groups = (a.total + group<T> - 1) / group<T>;
  const auto worker = [&](Arena& arena) {
    return [&backward, scratch = backward.take(arena)](int64_t g, T* sums) mutable {
      backward.run(g * group<T>, scratch, sums);
    };
  };
  const Parts parts = divide(a.total, 1, backward.sums());
  const std::vector<double> totals =
      sum_parts<T>(parts, groups, backward.sums(), backward.bytes(), threads, worker);
  std::vector<double> result(cell.num_weights(), 0.0);
  unpack_layer<T>(cell.inputs, cell.hidden, totals.data(), result.data());
  std::copy(result.begin(), result.end(), a.d_weights);
}

}  // namespace l2l
