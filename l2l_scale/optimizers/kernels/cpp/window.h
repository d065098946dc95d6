// Whole windows over all coordinates, in parallel over blocks: the two entry points of the kernel.
//
// M coordinates (of all problems, one after the other) in B = ceil(M / kBlock) blocks; the packed state is
// (B, R, kBlock), its rows those of program.h. K inner steps.
#pragma once

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "outer.h"
#include "rule.h"

namespace l2l {

template <class T> Arena& thread_arena() {
  static thread_local Arena arena;
  return arena;
}

// Read or write the coordinates of a group, some of which may lie beyond M.
template <class T> void gather(const T* from, int64_t first, int64_t total, T* to) {
  const int count = int(std::clamp<int64_t>(total - first, 0, group<T>));
  if (count) std::memcpy(to, from + first, count * sizeof(T));
  for (int n = count; n < group<T>; ++n) to[n] = 0;
}
template <class T> void scatter(const T* from, int64_t first, int64_t total, T* to) {
  const int count = int(std::clamp<int64_t>(total - first, 0, group<T>));
  if (count) std::memcpy(to + first, from, count * sizeof(T));
}

// update (M) and the next packed state; `next` may be `state`.
template <class P, class T = typename P::Scalar>
void forward(const Program& p, const T* flat, int64_t total, const T* grad, const T* state, T* next, T* update,
             int threads) {
  const Weights<P> weights(p, flat, false);
  const int64_t blocks = (total + kBlock - 1) / kBlock, stride = int64_t(state_rows(p)) * kBlock;
  const size_t scratch_size = size_t(step_scratch_rows(p)) * kBlock;
  bool failed = false;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(|| : failed)
  {
    Arena& arena = thread_arena<T>();
    failed = !arena.reserve(Arena::bytes<T>(scratch_size) + 2 * Arena::bytes<T>(kBlock));
    T *scratch = arena.take<T>(scratch_size), *g = arena.take<T>(kBlock), *u = arena.take<T>(kBlock);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      for (int offset = 0; offset < kBlock && !failed; offset += group<T>) {
        const int64_t first = block * kBlock + offset;
        gather(grad, first, total, g);
        step_forward(p, weights, g, state + block * stride + offset, next + block * stride + offset, u, scratch);
        scatter(u, first, total, update);
      }
    }
  }
  if (failed) throw std::bad_alloc();
}

// What the backward pass of a window is given and gives back. Either loss_weights or d_updates is there.
template <class T> struct WindowAdjoint {
  int64_t total;           // M
  int64_t coordinates;     // N of one problem: coordinate j belongs to problem j / N
  int64_t steps;           // K
  const T* grads;          // (K, M), or (K + 1, M) with loss_weights: what entered the rule, and the last gradient
  const T* loss_weights;   // (K, M / N): ∂L/∂loss_k per problem; d_update_k = Σ_{j >= k} weight_j · grads[j + 1]
  const T* d_updates;      // (K, M)
  const T* state;          // packed, at the start of the window
  const T* d_state_end;    // packed, or null for zero
  T* d_weights;            // φ's layout
  T* d_state;              // packed, or null
  T* d_grads;              // (K, M), or null
};

// Add a layer's sums, (I + H + 1, padded(4H)), to the layout of its weights.
template <class T, class Sum> void unpack_layer(int inputs, int hidden, const Sum* sums, double* flat) {
  const int gates = 4 * hidden, rows = inputs + hidden + 1, stride = padded<T>(gates);
  double *recurrent = flat + gates * inputs, *bias = recurrent + gates * hidden;
  for (int row = 0; row < rows; ++row) {
    for (int gate = 0; gate < gates; ++gate) {
      double& target = row < inputs            ? flat[gate * inputs + row]
                       : row < inputs + hidden ? recurrent[gate * hidden + row - inputs]
                                               : bias[gate];
      target += sums[row * stride + gate];
    }
  }
}

// Sums over coordinates of everything that becomes a weight gradient.
template <class T> struct WeightSums {
  static size_t layer_size(const Program& p, int l) {
    return size_t(input_size(p, l) + p.hidden_size + 1) * padded<T>(4 * p.hidden_size);
  }
  static size_t output_size(const Program& p) { return size_t(head_size(p)) * (p.hidden_size + 1) * lanes<T>; }
  static size_t size(const Program& p) {
    size_t total = output_size(p);
    for (int l = 0; l < p.layers; ++l) total += layer_size(p, l);
    return total;
  }

  // Add sums in this layout to φ's layout.
  template <class Sum> static void unpack(const Program& p, const Sum* sums, double* flat) {
    const int hidden = p.hidden_size;
    for (int l = 0; l < p.layers; ++l) {
      unpack_layer<T>(input_size(p, l), hidden, sums, flat + layer_offset(p, l));
      sums += layer_size(p, l);
    }
    double* output = flat + output_offset(p);
    for (int o = 0; o < head_size(p); ++o) {
      for (int unit = 0; unit <= hidden; ++unit, sums += lanes<T>) {
        double& target = unit < hidden ? output[o * hidden + unit] : output[head_size(p) * hidden + o];
        for (int lane = 0; lane < lanes<T>; ++lane) target += sums[lane];
      }
    }
  }
};

}  // namespace l2l
