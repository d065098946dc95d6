// The features of optimizers/features.py and their derivatives, one vector of coordinates after the other.
//
// Rows lie kBlock apart; `at` is the first coordinate of the vector.
#pragma once

#include <cmath>
#include <limits>

#include "program.h"
#include "simd.h"

namespace l2l {

constexpr double kTiny = 1e-30;  // as in features.py

template <class T> L2L_INLINE Vec<T> magnitude(Vec<T> x) { return x < T(0) ? -x : x; }
template <class T> L2L_INLINE Vec<T> sign(Vec<T> x) {  // sign(±0) = 0, NaN stays NaN
  return x > T(0) ? broadcast<T>(1) : x < T(0) ? broadcast<T>(-1) : x;
}
template <class T> L2L_INLINE Vec<T> at_least(Vec<T> x, T low) { return x < low ? broadcast<T>(low) : x; }
template <class T> L2L_INLINE Vec<T> clip(Vec<T> x, T low, T high) {
  x = at_least<T>(x, low);
  return x > high ? broadcast<T>(high) : x;
}
template <class T> L2L_INLINE Vec<T> where_inside(Vec<T> x, T low, T high, Vec<T> value) {
  return ((x >= low) & (x <= high)) ? value : Vec<T>{};
}
template <class T> L2L_INLINE Vec<T> square_root(Vec<T> x) {
  for (int lane = 0; lane < lanes<T>; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}
// 1 − base^exponent without cancellation for bases near 1.
template <class T> L2L_INLINE Vec<T> one_minus_power(double base, Vec<T> exponent) {
  const double log = std::log(base);
  Vec<T> result = broadcast<T>(T(-std::expm1(log * exponent[0])));
  for (int lane = 1; lane < lanes<T>; ++lane) {  // neighbours mostly belong to one problem
    if (exponent[lane] != exponent[0]) result[lane] = T(-std::expm1(log * exponent[lane]));
  }
  return result;
}

// The quantities of one step of RNNprop that its outputs and its derivative share.
template <class T> struct RNNpropStep {
  Vec<T> m, v, step, correction1, correction2, unbiased, root, inverse;
  RNNpropStep(const L2LFeature& f, Vec<T> grad, const T* state) {
    const T b1 = T(f.a), b2 = T(f.b);
    m = b1 * load(state) + T(1 - f.a) * grad;
    v = b2 * load(state + kBlock) + T(1 - f.b) * grad * grad;
    step = load(state + 2 * kBlock) + T(1);
    correction1 = one_minus_power<T>(f.a, step);
    correction2 = one_minus_power<T>(f.b, step);
    unbiased = v / correction2;
    root = square_root<T>(at_least<T>(unbiased, T(kTiny)));
    inverse = T(1) / (root + T(f.c));
  }
};

template <class T>
L2L_INLINE void feature_forward(const L2LFeature& f, Vec<T> g, const T* state, T* next, T* out) {
  const T a = T(f.a), b = T(f.b), threshold = T(std::exp(-f.a)), gain = T(std::exp(f.a));
  switch (f.kind) {
    case kIdentity:
      store(out, a * g);
      break;
    case kLogSign:
      store(out, log(at_least<T>(magnitude<T>(g), threshold)) / a);
      store(out + kBlock, magnitude<T>(g) >= threshold ? sign<T>(g) : gain * g);
      break;
    case kLogSignClamp:
      store(out, at_least<T>(log(magnitude<T>(g) + std::numeric_limits<T>::epsilon()) / a, T(-1)));
      store(out + kBlock, clip<T>(gain * g, T(-1), T(1)));
      break;
    case kLogMagnitude:
      store(out, clip<T>(log(at_least<T>(magnitude<T>(g), T(kTiny))) / a, -b, b));
      break;
    case kRNNprop: {
      const RNNpropStep<T> s(f, g, state);
      store(out, s.m / s.correction1 * s.inverse);
      store(out + kBlock, g * s.inverse);
      if (f.log_scale) store(out + 2 * kBlock, clip<T>(log(s.root) / T(10), T(-2), T(2)));
      store(next, s.m);
      store(next + kBlock, s.v);
      store(next + 2 * kBlock, s.step);
      break;
    }
    case kInnerStep: {
      const Vec<T> step = load(state);
      store(out, tanh(step / a - T(1)));
      store(next, step + T(1));
      break;
    }
  }
}

// The derivative with respect to the gradient. d_state holds the adjoint of the state after the step, and then
// that of the state before.
template <class T>
L2L_INLINE Vec<T> feature_backward(const L2LFeature& f, Vec<T> g, const T* state, const T* d, T* d_state) {
  const T a = T(f.a), b = T(f.b), threshold = T(std::exp(-f.a)), gain = T(std::exp(f.a));
  switch (f.kind) {
    case kIdentity:
      return a * load(d);
    case kLogSign:
      return magnitude<T>(g) >= threshold ? load(d) / (a * g) : gain * load(d + kBlock);
    case kLogSignClamp: {
      const Vec<T> shifted = magnitude<T>(g) + std::numeric_limits<T>::epsilon();
      const Vec<T> through_log = log(shifted) / a >= T(-1) ? sign<T>(g) * load(d) / (a * shifted) : Vec<T>{};
      return through_log + where_inside<T>(gain * g, T(-1), T(1), gain * load(d + kBlock));
    }
    case kLogMagnitude: {
      const Vec<T> size = magnitude<T>(g);
      const Vec<T> slope = size >= T(kTiny) ? load(d) / (a * g) : Vec<T>{};
      return where_inside<T>(log(at_least<T>(size, T(kTiny))) / a, -b, b, slope);
    }
    case kRNNprop: {
      const RNNpropStep<T> s(f, g, state);
      const Vec<T> d_m = load(d_state) + load(d) * s.inverse / s.correction1;
      const Vec<T> d_inverse = load(d) * s.m / s.correction1 + load(d + kBlock) * g;
      Vec<T> d_root = -d_inverse * s.inverse * s.inverse;
      if (f.log_scale) {
        const Vec<T> slope = load(d + 2 * kBlock) / (T(10) * s.root);
        d_root += where_inside<T>(log(s.root) / T(10), T(-2), T(2), slope);
      }
      const Vec<T> slope = d_root / (T(2) * s.root * s.correction2);
      const Vec<T> d_v = load(d_state + kBlock) + (s.unbiased >= T(kTiny) ? slope : Vec<T>{});
      store(d_state, a * d_m);
      store(d_state + kBlock, b * d_v);
      return load(d + kBlock) * s.inverse + T(1 - f.a) * d_m + T(2 * (1 - f.b)) * g * d_v;
    }
    case kInnerStep:
      break;
  }
  return Vec<T>{};
}

// All features of a group: grad (G), rows of the packed state before and after, F rows of outputs.
template <class T>
void features_forward(const Program& p, const T* grad, const T* state, T* next, T* out) {
  for (int i = 0; i < p.num_features; ++i) {
    const L2LFeature& f = p.features[i];
    const int own = f.state_row * kBlock;
    for (int at = 0; at < group<T>; at += lanes<T>) {
      feature_forward<T>(f, load(grad + at), state + own + at, next + own + at, out + f.first_row * kBlock + at);
    }
  }
}

// Fills d_grad (G) from the adjoints of the outputs; d_state as in feature_backward.
template <class T>
void features_backward(const Program& p, const T* grad, const T* state, const T* d_out, T* d_state, T* d_grad) {
  for (int at = 0; at < group<T>; at += lanes<T>) {
    Vec<T> total{};
    for (int i = 0; i < p.num_features; ++i) {
      const L2LFeature& f = p.features[i];
      const int own = f.state_row * kBlock + at;
      total += feature_backward<T>(f, load(grad + at), state + own, d_out + f.first_row * kBlock + at, d_state + own);
    }
    store(d_grad + at, total);
  }
}

}  // namespace l2l
