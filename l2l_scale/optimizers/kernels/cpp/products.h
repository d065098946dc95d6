// The arithmetic of matrix products: exact (float or double), or bfloat16 operands with float sums.
//
// A product policy P names the numbers (Scalar), what is multiplied (Operand), and how many numbers one operand
// holds (depth). With bfloat16 an operand is a pair of neighbours along the summed axis, in 32 bits.
#pragma once

#include "simd.h"

namespace l2l {

template <class P> using Numbers = Vec<typename P::Scalar>;
template <class P> using Operands = Vec<typename P::Operand>;

// Operands that hold `count` numbers.
template <class P> constexpr int deep(int count) { return (count + P::depth - 1) / P::depth; }

template <class T> struct Exact {
  using Scalar = T;
  using Operand = T;
  static constexpr int depth = 1;

  static L2L_INLINE Vec<T> multiply_add(T weight, Vec<T> x, Vec<T> sum) { return weight * x + sum; }
  static T operand(T first, T) { return first; }
  // Rows as operands along the rows, or along the lanes: here both are the rows themselves.
  static const T* along_rows(const T* rows, int, T*) { return rows; }
  static const T* along_lanes(const T* rows, int, T*) { return rows; }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {
  using Scalar = float;
  using Operand = uint32_t;
  static constexpr int depth = 2;

  static L2L_INLINE Vec<float> multiply_add(uint32_t weight, Vec<uint32_t> x, Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(weight)), (__m512bh)x);
  }
  static uint32_t operand(float first, float second) {
    const __m128bh both = _mm_cvtne2ps_pbh(_mm_set_ss(second), _mm_set_ss(first));
    typedef uint16_t Shorts __attribute__((vector_size(16)));
    const Shorts parts = (Shorts)both;
    return uint32_t(parts[0]) | uint32_t(parts[4]) << 16;
  }
  // Operand (row / 2, lane): this row's number and the next one's; zero beyond the last row.
  static const uint32_t* along_rows(const float* rows, int count, uint32_t* out) {
    typedef uint16_t Shorts __attribute__((vector_size(kBytes)));
    for (int row = 0; row < count; row += 2) {
      for (int at = 0; at < group<float>; at += lanes<float>) {
        const float* low = rows + row * kBlock + at;
        const Vec<float> high = row + 1 < count ? load(low + kBlock) : Vec<float>{};
        const Shorts both = (Shorts)_mm512_cvtne2ps_pbh((__m512)high, (__m512)load(low));
        store(out + row / 2 * kBlock + at, (Vec<uint32_t>)interleave(both, std::make_integer_sequence<int, 32>()));
      }
    }
    return out;
  }
  // Operand (row, lane / 2): this lane's number and the next one's.
  static const uint32_t* along_lanes(const float* rows, int count, uint32_t* out) {
    for (int row = 0; row < count; ++row, rows += kBlock) {
      const __m512bh both = _mm512_cvtne2ps_pbh((__m512)load(rows + lanes<float>), (__m512)load(rows));
      store(out + row * kBlock, (Vec<uint32_t>)both);
    }
    return out;
  }

 private:
  template <class V, int... i> static L2L_INLINE V interleave(V halves, std::integer_sequence<int, i...>) {
    return shuffle(halves, halves, std::integer_sequence<int, (i / 2 + (i % 2) * 16)...>());
  }
};
#endif

}  // namespace l2l
