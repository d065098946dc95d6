// The backward pass of a window for one group of coordinates: recompute its K steps in cache, then go back.
#pragma once

#include "parts.h"

namespace l2l {

template <class P> class GroupBackward {
  using T = typename P::Scalar;
  using Operand = typename P::Operand;

 public:
  GroupBackward(const Program& p, const Weights<P>& w, const WindowAdjoint<T>& a, Arena& arena)
      : p_(p), w_(w), a_(a), h_(p.layers), c_(p.layers) {
    const int gates = 4 * p.hidden_size;
    const size_t record_size = size_t(StepRecord<T>::rows(p)) * kBlock;
    T* records = arena.take<T>(record_size * a.steps);
    for (int k = 0; k < a.steps; ++k) records_.emplace_back(p, records + k * record_size);
    grads_ = arena.take<T>(size_t(a.steps + 1) * kBlock);
    start_ = arena.take<T>(size_t(state_rows(p)) * kBlock);
    adjoint_ = arena.take<T>(size_t(state_rows(p)) * kBlock);
    feature_end_ = arena.take<T>(size_t(p.feature_rows) * kBlock);
    d_update_ = arena.take<T>(kBlock);
    d_outputs_ = arena.take<T>(size_t(head_size(p)) * kBlock);
    d_features_ = arena.take<T>(size_t(p.feature_size) * kBlock);
    d_gates_ = arena.take<T>(size_t(padded<T>(gates)) * kBlock);
    operands_ = arena.take<Operand>(size_t(padded<T>(gates)) * kBlock);
    transposed_ = arena.take<Operand>(size_t(padded<T>(gates)) * kBlock);
    row_operands_ = arena.take<Operand>(size_t(operand_rows(p) + 1) * kBlock);
    ones_ = arena.take<T>(kBlock);
    std::fill_n(ones_, kBlock, T(1));
    std::fill_n(d_gates_, size_t(padded<T>(gates)) * kBlock, T(0));
    rows_.resize(operand_rows(p) + 1);
  }

  static size_t bytes(const Program& p, int64_t steps) {
    const size_t rows = size_t(StepRecord<T>::rows(p)) * steps + steps + 1 + 2 * state_rows(p) + p.feature_rows +
                        3 + head_size(p) + p.feature_size + 3 * padded<T>(4 * p.hidden_size) + operand_rows(p);
    return rows * kBlock * sizeof(T) + 16 * 64;
  }

  // Adds the group's weight gradients to `sums`.
  void run(int64_t block, int offset, T* sums) {
    first_ = block * kBlock + offset;
    const int rows = state_rows(p_);
    const int64_t base = block * rows * kBlock + offset;
    copy_rows(a_.state + base, rows, start_);
    if (a_.d_state_end) {
      copy_rows(a_.d_state_end + base, rows, adjoint_);
    } else {
      std::fill_n(adjoint_, size_t(rows) * kBlock, T(0));
    }
    recompute();
    std::fill_n(d_update_, kBlock, T(0));
    for (int64_t k = a_.steps - 1; k >= 0; --k) back(k, sums);
    if (a_.d_state) copy_rows(adjoint_, rows, a_.d_state + base);
  }

 private:
  static void copy_rows(const T* from, int rows, T* to) {
    for (int row = 0; row < rows; ++row) std::memcpy(to + row * kBlock, from + row * kBlock, group<T> * sizeof(T));
  }

  const T* h_before(int64_t k, int l) const { return k ? records_[k - 1].layers[l].h : start_ + h_row(p_, l) * kBlock; }
  const T* c_before(int64_t k, int l) const { return k ? records_[k - 1].layers[l].c : start_ + c_row(p_, l) * kBlock; }

  void recompute() {
    const int64_t kept = a_.loss_weights ? a_.steps + 1 : a_.steps;
    for (int k = 0; k < kept; ++k) gather(a_.grads + k * a_.total, first_, a_.total, grads_ + k * kBlock);
    copy_rows(start_, p_.feature_rows, feature_end_);
    for (int k = 0; k < a_.steps; ++k) {
      for (int l = 0; l < p_.layers; ++l) h_[l] = h_before(k, l), c_[l] = c_before(k, l);
      copy_rows(feature_end_, p_.feature_rows, records_[k].feature_state);
      step_record(p_, w_, grads_ + k * kBlock, h_.data(), c_.data(), feature_end_, row_operands_,
                  records_[k]);
    }
  }

  void back(int64_t k, T* sums) {
    if (a_.loss_weights) {
      // First order: the update moves every later θ, and ∇f there is a constant.
      const T* weights = a_.loss_weights + k * ((a_.total + a_.coordinates - 1) / a_.coordinates);
      const int count = int(std::min<int64_t>(group<T>, a_.total - first_));
      for (int n = 0; n < count; ++n) {
        d_update_[n] += weights[(first_ + n) / a_.coordinates] * grads_[(k + 1) * kBlock + n];
      }
    } else {
      gather(a_.d_updates + k * a_.total, first_, a_.total, d_update_);
    }
    StepRecord<T>& record = records_[k];
    head_backward(p_, record.outputs, d_update_, d_outputs_);
    output_backward(record.layers.back().h, sums);
    for (int l = p_.layers - 1; l >= 0; --l) layer_backward(k, l, sums);
    if (a_.d_grads || a_.d_state) {
      alignas(64) T d_grad[kBlock];
      inputs_backward<P>(w_.input[0], p_.feature_size, 4 * p_.hidden_size, gate_operands(), d_features_, false);
      features_backward<T>(p_, grads_ + k * kBlock, record.feature_state, d_features_, adjoint_, d_grad);
      if (a_.d_grads) scatter(d_grad, first_, a_.total, a_.d_grads + k * a_.total);
    }
  }

  void output_backward(const T* h, T* sums) {
    for (int l = 0; l < p_.layers; ++l) sums += WeightSums<T>::layer_size(p_, l);
    T* d_h = adjoint_ + h_row(p_, p_.layers - 1) * kBlock;
    for (int o = 0; o < head_size(p_); ++o) {
      for (int unit = 0; unit <= p_.hidden_size; ++unit, sums += lanes<T>) {
        Vec<T> total = load(sums);
        for (int v = 0; v < kVectors; ++v) {
          const int at = v * lanes<T>;
          const Vec<T> d = load(d_outputs_ + o * kBlock + at);
          if (unit == p_.hidden_size) {
            total += d;
            continue;
          }
          const int row = unit * kBlock + at;
          total += d * load(h + row);
          store(d_h + row, load(d_h + row) + w_.output[o * p_.hidden_size + unit] * d);
        }
        store(sums, total);
      }
    }
  }

  void layer_backward(int64_t k, int l, T* sums) {
    const int hidden = p_.hidden_size, gates = 4 * hidden, inputs = input_size(p_, l);
    for (int below = 0; below < l; ++below) sums += WeightSums<T>::layer_size(p_, below);
    T *d_h = adjoint_ + h_row(p_, l) * kBlock, *d_c = adjoint_ + c_row(p_, l) * kBlock;
    gates_backward(records_[k].layers[l], c_before(k, l), hidden, d_h, d_c, d_gates_);
    const T* x = l ? records_[k].layers[l - 1].h : records_[k].features;
    int row = 0;
    point_to(x, inputs, row);
    point_to(h_before(k, l), hidden, row);
    point_to(ones_, 1, row);
    transpose_gates<P>(P::along_lanes(d_gates_, padded<T>(gates), operands_), gates, transposed_);
    outer_product<P>(transposed_, gates, rows_.data(), row, sums);
    const Operand* d = gate_operands();
    inputs_backward<P>(w_.hidden[l], hidden, gates, d, d_h, false);
    if (l) inputs_backward<P>(w_.input[l], inputs, gates, d, adjoint_ + h_row(p_, l - 1) * kBlock, true);
  }

  // The adjoints of the gates of the layer that was last gone through, as operands along the rows.
  const Operand* gate_operands() { return P::along_rows(d_gates_, 4 * p_.hidden_size, operands_); }

  // Append rows, as operands along the lanes, to the rows of an outer product.
  void point_to(const T* from, int count, int& row) {
    const Operand* operands = P::along_lanes(from, count, row_operands_ + row * kBlock);
    for (int i = 0; i < count; ++i) rows_[row++] = operands + i * kBlock;
  }

  const Program& p_;
  const Weights<P>& w_;
  const WindowAdjoint<T>& a_;
  int64_t first_ = 0;
  std::vector<StepRecord<T>> records_;
  std::vector<const Operand*> rows_;
  std::vector<const T*> h_, c_;
  T *grads_, *start_, *adjoint_, *feature_end_, *d_update_, *d_outputs_, *d_features_, *d_gates_, *ones_;
  Operand *operands_, *transposed_, *row_operands_;
};

// φ's gradient of a window, and where asked for the adjoints of the state at its start and of its gradients.
template <class P, class T = typename P::Scalar>
void backward(const Program& p, const T* flat, const WindowAdjoint<T>& a, int threads) {
  const Weights<P> weights(p, flat, true);
  const int64_t blocks = (a.total + kBlock - 1) / kBlock;
  const size_t size = WeightSums<T>::size(p);
  const auto worker = [&](Arena& arena) {
    return [group_backward = GroupBackward<P>(p, weights, a, arena)](int64_t block, T* sums) mutable {
      for (int offset = 0; offset < kBlock; offset += group<T>) group_backward.run(block, offset, sums);
    };
  };
  const size_t bytes = GroupBackward<P>::bytes(p, a.steps);
  const auto totals = sum_parts<T>(divide(a.total, a.steps, size), blocks, size, bytes, threads, worker);
  std::vector<double> result(num_weights(p), 0.0);
  WeightSums<T>::unpack(p, totals.data(), result.data());
  std::copy(result.begin(), result.end(), a.d_weights);
}

}  // namespace l2l
