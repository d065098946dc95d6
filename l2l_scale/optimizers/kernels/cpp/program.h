// What the kernel needs to know of a rule; the mirror of program.py.
#pragma once

#include <cstdint>

extern "C" {

struct L2LFeature {
  int32_t kind;         // FeatureKind
  int32_t first_row;    // of its outputs among the features
  int32_t state_row;    // of its own state among the rows of the packed state
  int32_t log_scale;    // RNNprop: whether the third feature is there
  double a, b, c;       // its numbers, in the order of the Python constructor
};

constexpr int kMaxFeatures = 16;

struct L2LProgram {
  int32_t hidden_size;   // H
  int32_t layers;
  int32_t feature_size;  // F
  int32_t feature_rows;  // rows of the packed state that belong to the features; h and c of the layers follow
  int32_t num_features;
  int32_t head;          // HeadKind
  double scale, exp_scale;
  L2LFeature features[kMaxFeatures];
};
}

namespace l2l {

enum FeatureKind : int32_t { kIdentity, kLogSign, kLogSignClamp, kLogMagnitude, kRNNprop, kInnerStep };
enum HeadKind : int32_t { kScaledLinear, kTanhExp };

using Program = L2LProgram;

inline int input_size(const Program& p, int layer) { return layer == 0 ? p.feature_size : p.hidden_size; }
inline int head_size(const Program& p) { return p.head == kTanhExp ? 2 : 1; }

// Rows of the packed state: the features' own, then h and c of every layer, from the bottom.
inline int state_rows(const Program& p) { return p.feature_rows + 2 * p.layers * p.hidden_size; }
inline int h_row(const Program& p, int layer) { return p.feature_rows + 2 * layer * p.hidden_size; }
inline int c_row(const Program& p, int layer) { return h_row(p, layer) + p.hidden_size; }

// φ as one flat array: per layer weight_input (4H, I), weight_hidden (4H, H), bias (4H); then the output
// layer's weight (O, H) and bias (O).
inline int layer_offset(const Program& p, int layer) {
  int offset = 0;
  for (int l = 0; l < layer; ++l) offset += 4 * p.hidden_size * (input_size(p, l) + p.hidden_size + 1);
  return offset;
}
inline int output_offset(const Program& p) { return layer_offset(p, p.layers); }
inline int num_weights(const Program& p) { return output_offset(p) + head_size(p) * (p.hidden_size + 1); }

}  // namespace l2l
