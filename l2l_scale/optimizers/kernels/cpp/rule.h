// One inner step of the whole rule for one group of coordinates: features, layers, head.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "features.h"
#include "lstm.h"

namespace l2l {

// Memory for one thread, aligned for vectors, kept between calls: fresh pages cost more than the arithmetic.
class Arena {
 public:
  ~Arena() { std::free(memory_); }
  template <class T> T* take(size_t count) {
    T* result = reinterpret_cast<T*>(static_cast<char*>(memory_) + used_);
    used_ += bytes<T>(count);
    return result;
  }
  // Start over with room for so many bytes; what was taken before is void. False if there is no memory: an
  // exception must not leave a thread.
  bool reserve(size_t size) {
    used_ = 0;
    if (size <= size_) return true;
    std::free(memory_);
    memory_ = std::aligned_alloc(64, (size + 63) / 64 * 64);
    size_ = memory_ ? size : 0;
    return memory_ != nullptr;
  }
  template <class T> static size_t bytes(size_t count) { return (count * sizeof(T) + 63) / 64 * 64; }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// φ in the forms in which the passes read it; what only the way back needs is made only for it.
template <class P> struct Weights {
  using T = typename P::Scalar;
  std::vector<ForwardWeights<P>> forward;
  std::vector<BackwardWeights<P>> input, hidden;
  const T *output, *output_bias;

  Weights(const Program& p, const T* flat, bool backward)
      : output(flat + output_offset(p)), output_bias(output + head_size(p) * p.hidden_size) {
    const int gates = 4 * p.hidden_size;
    for (int l = 0; l < p.layers; ++l) {
      const int inputs = input_size(p, l);
      const T *first = flat + layer_offset(p, l), *recurrent = first + gates * inputs;
      forward.emplace_back(first, recurrent, recurrent + gates * p.hidden_size, inputs, p.hidden_size);
      if (!backward) continue;
      input.emplace_back(first, inputs, gates);
      hidden.emplace_back(recurrent, p.hidden_size, gates);
    }
  }
};

// Everything of one step that the backward pass needs.
template <class T> struct StepRecord {
  T *feature_state, *features, *outputs;
  std::vector<LayerRecord<T>> layers;
  static int rows(const Program& p) {
    const int layer_rows = LayerRecord<T>::rows_per_unit * p.hidden_size;
    return p.feature_rows + p.feature_size + head_size(p) + p.layers * layer_rows;
  }
  StepRecord(const Program& p, T* base) {
    feature_state = base;
    features = feature_state + p.feature_rows * kBlock;
    outputs = features + p.feature_size * kBlock;
    base = outputs + head_size(p) * kBlock;
    for (int l = 0; l < p.layers; ++l, base += LayerRecord<T>::rows_per_unit * p.hidden_size * kBlock) {
      layers.emplace_back(base, p.hidden_size);
    }
  }
};

// The linear outputs w·h + b, head_size rows.
template <class P, class T = typename P::Scalar>
void outputs_forward(const Program& p, const Weights<P>& w, const T* h, T* outputs) {
  for (int output = 0; output < head_size(p); ++output, outputs += kBlock) {
    Vec<T> sums[kVectors];
    for (int v = 0; v < kVectors; ++v) sums[v] = broadcast(w.output_bias[output]);
    for (int unit = 0; unit < p.hidden_size; ++unit) {
      const T weight = w.output[output * p.hidden_size + unit];
      for (int v = 0; v < kVectors; ++v) sums[v] += weight * load(h + unit * kBlock + v * lanes<T>);
    }
    for (int v = 0; v < kVectors; ++v) store(outputs + v * lanes<T>, sums[v]);
  }
}

// The head of optimizers/heads.py.
template <class T> void head_forward(const Program& p, const T* outputs, T* update) {
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * lanes<T>;
    Vec<T> value = T(p.scale) * load(outputs + at);
    if (p.head == kTanhExp) {
      value = T(p.scale) * tanh(load(outputs + at)) * exp(T(p.exp_scale) * load(outputs + kBlock + at));
    }
    store(update + at, value);
  }
}

// From the adjoint of the update to those of the linear outputs.
template <class T> void head_backward(const Program& p, const T* outputs, const T* d_update, T* d_outputs) {
  for (int v = 0; v < kVectors; ++v) {
    const int at = v * lanes<T>;
    const Vec<T> d = T(p.scale) * load(d_update + at);
    if (p.head == kTanhExp) {
      const Vec<T> direction = tanh(load(outputs + at));
      const Vec<T> size = exp(T(p.exp_scale) * load(outputs + kBlock + at));
      store(d_outputs + at, d * size * (T(1) - direction * direction));
      store(d_outputs + kBlock + at, d * size * direction * T(p.exp_scale));
    } else {
      store(d_outputs + at, d);
    }
  }
}

// Rows of scratch that a step needs: operands of inputs and h; and without a record features, h, gates, outputs.
inline int operand_rows(const Program& p) { return std::max(p.feature_size, p.hidden_size) + p.hidden_size; }
inline int step_scratch_rows(const Program& p) {
  return operand_rows(p) + p.feature_size + 5 * p.hidden_size + head_size(p);
}

// One step that keeps nothing. `state` and `next` (rows of the packed state) may be the same memory.
template <class P, class T = typename P::Scalar>
void step_forward(const Program& p, const Weights<P>& w, const T* grad, const T* state, T* next, T* update,
                  T* scratch) {
  auto* operands = reinterpret_cast<typename P::Operand*>(scratch);
  auto* h_operands = operands + std::max(p.feature_size, p.hidden_size) * kBlock;
  T *features = scratch + operand_rows(p) * kBlock, *h = features + p.feature_size * kBlock;
  T *gates = h + p.hidden_size * kBlock, *outputs = gates + 4 * p.hidden_size * kBlock;
  features_forward<T>(p, grad, state, next, features);
  const T* x = features;
  for (int l = 0; l < p.layers; ++l) {
    T* h_next = next + h_row(p, l) * kBlock;
    layer_forward<P, false>(w.forward[l], P::along_rows(x, input_size(p, l), operands), input_size(p, l),
                            P::along_rows(state + h_row(p, l) * kBlock, p.hidden_size, h_operands), p.hidden_size,
                            state + c_row(p, l) * kBlock, next + c_row(p, l) * kBlock, h, gates, (T*)nullptr);
    for (int unit = 0; unit < p.hidden_size; ++unit) {
      for (int v = 0; v < kVectors; ++v) {
        store(h_next + unit * kBlock + v * lanes<T>, load(h + unit * kBlock + v * lanes<T>));
      }
    }
    x = h_next;
  }
  outputs_forward(p, w, x, outputs);
  head_forward(p, outputs, update);
}

// One step that keeps everything in `record`; h and c before it are given per layer. `feature_state` is that
// after the step; `operands` has operand_rows.
template <class P, class T = typename P::Scalar>
void step_record(const Program& p, const Weights<P>& w, const T* grad, const T* const* h_before,
                 const T* const* c_before, T* feature_state, typename P::Operand* operands, StepRecord<T>& record) {
  auto* h_operands = operands + std::max(p.feature_size, p.hidden_size) * kBlock;
  features_forward<T>(p, grad, record.feature_state, feature_state, record.features);
  const T* x = record.features;
  for (int l = 0; l < p.layers; ++l) {
    LayerRecord<T>& layer = record.layers[l];
    layer_forward<P, true>(w.forward[l], P::along_rows(x, input_size(p, l), operands), input_size(p, l),
                           P::along_rows(h_before[l], p.hidden_size, h_operands), p.hidden_size, c_before[l],
                           layer.c, layer.h, layer.i, layer.tanh_c);
    x = layer.h;
  }
  if (p.head == kTanhExp) outputs_forward(p, w, x, record.outputs);
}

}  // namespace l2l
