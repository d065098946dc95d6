// The features of optimizers/features.py, one coordinate after the other: two of thousands of operations.
//
// Rows lie kBlock apart. `width` coordinates are processed.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "program.h"
#include "simd.h"

namespace l2l {

constexpr double kTiny = 1e-30;  // as in features.py

template <class T> T sign(T x) { return x > 0 ? T(1) : x < 0 ? T(-1) : x; }  // sign(±0) = 0, NaN stays NaN
template <class T> T clip(T x, T low, T high) { return x < low ? low : x > high ? high : x; }  // likewise
template <class T> bool inside(T x, T low, T high) { return x >= low && x <= high; }

// The quantities of one step of RNNprop that its outputs and its derivative share.
template <class T> struct RNNpropStep {
  T m, v, step, correction1, correction2, root, inverse;
  bool above;
  RNNpropStep(const L2LFeature& f, T grad, T m0, T v0, T step0) {
    const T b1 = T(f.a), b2 = T(f.b);
    step = step0 + 1;
    m = b1 * m0 + (T(1) - b1) * grad;
    v = b2 * v0 + (T(1) - b2) * grad * grad;
    correction1 = 1 - std::pow(b1, step);
    correction2 = 1 - std::pow(b2, step);
    const T unbiased = v / correction2;
    above = !(unbiased < T(kTiny));
    root = std::sqrt(above ? unbiased : T(kTiny));
    inverse = 1 / (root + T(f.c));
  }
};

template <class T>
void features_forward(const Program& p, int width, const T* grad, const T* state, T* next_state, T* out) {
  for (int i = 0; i < p.num_features; ++i) {
    const L2LFeature& f = p.features[i];
    T* rows = out + f.first_row * kBlock;
    const T* own = state + f.state_row * kBlock;
    T* own_next = next_state + f.state_row * kBlock;
    const T threshold = T(std::exp(-f.a)), gain = T(std::exp(f.a)), a = T(f.a), b = T(f.b);
    for (int n = 0; n < width; ++n) {
      const T g = grad[n], magnitude = std::abs(g);
      switch (f.kind) {
        case kIdentity:
          rows[n] = a * g;
          break;
        case kLogSign:
          rows[n] = std::log(magnitude < threshold ? threshold : magnitude) / a;
          rows[n + kBlock] = magnitude >= threshold ? sign(g) : g * gain;
          break;
        case kLogSignClamp: {
          const T log = std::log(magnitude + std::numeric_limits<T>::epsilon()) / a;
          rows[n] = log < T(-1) ? T(-1) : log;
          rows[n + kBlock] = clip(g * gain, T(-1), T(1));
          break;
        }
        case kLogMagnitude:
          rows[n] = clip(std::log(magnitude < T(kTiny) ? T(kTiny) : magnitude) / a, -b, b);
          break;
        case kRNNprop: {
          const RNNpropStep<T> s(f, g, own[n], own[n + kBlock], own[n + 2 * kBlock]);
          rows[n] = s.m / s.correction1 * s.inverse;
          rows[n + kBlock] = g * s.inverse;
          if (f.log_scale) rows[n + 2 * kBlock] = clip(std::log(s.root) / 10, T(-2), T(2));
          own_next[n] = s.m;
          own_next[n + kBlock] = s.v;
          own_next[n + 2 * kBlock] = s.step;
          break;
        }
      }
    }
  }
}

// Adds to d_grad; d_state holds the adjoint of the state after the step, and then that of the state before.
template <class T>
void features_backward(const Program& p, int width, const T* grad, const T* state, const T* d_out, T* d_state,
                       T* d_grad) {
  for (int i = 0; i < p.num_features; ++i) {
    const L2LFeature& f = p.features[i];
    const T* d = d_out + f.first_row * kBlock;
    const T* own = state + f.state_row * kBlock;
    T* d_own = d_state + f.state_row * kBlock;
    const T threshold = T(std::exp(-f.a)), gain = T(std::exp(f.a)), a = T(f.a), b = T(f.b);
    for (int n = 0; n < width; ++n) {
      const T g = grad[n], magnitude = std::abs(g);
      switch (f.kind) {
        case kIdentity:
          d_grad[n] += a * d[n];
          break;
        case kLogSign:
          d_grad[n] += magnitude >= threshold ? d[n] / (a * g) : gain * d[n + kBlock];
          break;
        case kLogSignClamp: {
          const T shifted = magnitude + std::numeric_limits<T>::epsilon();
          if (std::log(shifted) / a >= T(-1)) d_grad[n] += sign(g) * d[n] / (a * shifted);
          if (inside(g * gain, T(-1), T(1))) d_grad[n] += gain * d[n + kBlock];
          break;
        }
        case kLogMagnitude:
          if (magnitude >= T(kTiny) && inside(std::log(magnitude) / a, -b, b)) d_grad[n] += d[n] / (a * g);
          break;
        case kRNNprop: {
          const RNNpropStep<T> s(f, g, own[n], own[n + kBlock], own[n + 2 * kBlock]);
          T d_m = d_own[n] + d[n] * s.inverse / s.correction1;
          const T d_inverse = d[n] * s.m / s.correction1 + d[n + kBlock] * g;
          T d_root = -d_inverse * s.inverse * s.inverse;
          if (f.log_scale && inside(std::log(s.root) / 10, T(-2), T(2))) {
            d_root += d[n + 2 * kBlock] / (10 * s.root);
          }
          T d_v = d_own[n + kBlock];
          if (s.above) d_v += d_root / (2 * s.root * s.correction2);
          d_grad[n] += d[n + kBlock] * s.inverse + (1 - a) * d_m + 2 * (1 - b) * g * d_v;
          d_own[n] = a * d_m;
          d_own[n + kBlock] = b * d_v;
          break;
        }
      }
    }
  }
}

}  // namespace l2l
