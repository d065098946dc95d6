// Vectors of L lanes in the compiler's own vector extension, so that one source serves every processor.
//
// One lane is one coordinate. What the extension lacks (clamping) is written per instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace l2l {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kTileUnits = 2, kTileColumns = 10, kTileVectors = 5, kTileRows = 5;
#elif defined(__AVX2__)
constexpr int kBytes = 32, kTileUnits = 1, kTileColumns = 5, kTileVectors = 5, kTileRows = 2;
#else
constexpr int kBytes = 16, kTileUnits = 1, kTileColumns = 5, kTileVectors = 5, kTileRows = 2;
#endif

// Coordinates of one block of the packed state, whatever the instruction set.
constexpr int kBlock = 32;

template <class T> struct Simd {
  static constexpr int lanes = kBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kBytes)));
};
template <class T> using Vec = typename Simd<T>::Vector;
template <class T> constexpr int lanes = Simd<T>::lanes;

// Coordinates processed together: two vectors keep the multiply-add units busy while a weight is broadcast.
constexpr int kVectors = 2;
template <class T> constexpr int group = kVectors * lanes<T>;

#define L2L_INLINE inline __attribute__((always_inline))

template <class T> L2L_INLINE Vec<T> load(const T* from) { return *reinterpret_cast<const Vec<T>*>(from); }
template <class T> L2L_INLINE void store(T* to, Vec<T> value) { *reinterpret_cast<Vec<T>*>(to) = value; }
template <class T> L2L_INLINE Vec<T> broadcast(T value) { return Vec<T>{} + value; }

template <class T> L2L_INLINE T sum(Vec<T> value) {
  T total = 0;
  for (int lane = 0; lane < lanes<T>; ++lane) total += value[lane];
  return total;
}

// --- float: polynomials -----------------------------------------------------------------------------------

// NaN must stay NaN: min and max return their second operand when one is NaN.
L2L_INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)x));
#else
  x = x < low ? broadcast<float>(low) : x;
  return x > high ? broadcast<float>(high) : x;
#endif
}

// 2^t = scale · (1 + rest) with |t| <= 126 and scale a power of two. Minimax polynomials on [-1/2, 1/2]: relative
// error of 2^t 8.1e-8, and with one more degree also of `rest` alone, 2e-8.
struct Power {
  Vec<float> scale, rest;
};
template <bool precise_rest = false> L2L_INLINE Power power_of_two(Vec<float> t) {
  constexpr float magic = 12582912.0f + 127.0f;  // 1.5 · 2^23: adding it rounds to a whole number
  const Vec<float> shifted = t + magic;
  const Vec<float> f = t - (shifted - magic);
  typedef int32_t Ints __attribute__((vector_size(kBytes)));
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  Power result;
  std::memcpy(&result.scale, &bits, sizeof bits);
  Vec<float> p;
  if (precise_rest) {
    p = broadcast<float>(1.54033695e-4f);
    p = p * f + 1.33907342e-3f;
    p = p * f + 9.61823797e-3f;
    p = p * f + 5.55035744e-2f;
    p = p * f + 2.40226498e-1f;
    p = p * f + 6.93147188e-1f;
  } else {
    p = broadcast<float>(1.327463337e-3f);
    p = p * f + 9.671961680e-3f;
    p = p * f + 5.550678369e-2f;
    p = p * f + 2.402223532e-1f;
    p = p * f + 6.931470616e-1f;
  }
  result.rest = p * f;
  return result;
}

L2L_INLINE Vec<float> sigmoid(Vec<float> x) {
  const Power e = power_of_two(clamp(x * -1.44269504f, -80.0f, 80.0f));
  return 1.0f / (e.scale * e.rest + (e.scale + 1.0f));
}

// (e^2x − 1) / (e^2x + 1), with e^2x − 1 free of cancellation near zero.
L2L_INLINE Vec<float> tanh(Vec<float> x) {
  const Power e = power_of_two<true>(clamp(x * 2.88539008f, -40.0f, 40.0f));
  const Vec<float> less_one = e.scale * e.rest + (e.scale - 1.0f);
  return less_one / (less_one + 2.0f);
}

L2L_INLINE Vec<float> exp(Vec<float> x) {
  const Power e = power_of_two(clamp(x * 1.44269504f, -126.0f, 126.0f));
  return e.scale * e.rest + e.scale;
}

// x = 2^e · m with m in [√½, √2), and log m by Cephes' polynomial (logf). Normal numbers, ∞ and NaN only.
L2L_INLINE Vec<float> log(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(kBytes)));
  Ints bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Ints exponent = (bits - 0x3f3504f3) >> 23;
  bits -= exponent << 23;
  Vec<float> m;
  std::memcpy(&m, &bits, sizeof m);
  const Vec<float> e = __builtin_convertvector(exponent, Vec<float>), f = m - 1.0f, square = f * f;
  Vec<float> p = broadcast<float>(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec<float> rest = p * f * square - 2.12194440e-4f * e - 0.5f * square;
  const Vec<float> result = f + rest + 0.693359375f * e;
  return x < std::numeric_limits<float>::infinity() ? result : x;
}

// --- double: the oracle's own functions ---------------------------------------------------------------------

L2L_INLINE Vec<double> sigmoid(Vec<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = 1.0 / (1.0 + std::exp(-x[lane]));
  return x;
}
L2L_INLINE Vec<double> log(Vec<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = std::log(x[lane]);
  return x;
}
L2L_INLINE Vec<double> exp(Vec<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}
L2L_INLINE Vec<double> tanh(Vec<double> x) {
  for (int lane = 0; lane < lanes<double>; ++lane) x[lane] = std::tanh(x[lane]);
  return x;
}

// --- transposition ------------------------------------------------------------------------------------------

// Lanes of two vectors by number; those of the second one follow those of the first.
template <int... lane, class V> L2L_INLINE V shuffle(V first, V second, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(first, second, lane...);
#else
  using Index = std::conditional_t<sizeof(first[0]) == 2, int16_t,
                                   std::conditional_t<sizeof(first[0]) == 4, int32_t, int64_t>>;
  typedef Index Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(first, second, Mask{lane...});
#endif
}

// A lane of `low` and one of `high` in turn, as in a riffle, from lane `offset` on.
template <int offset, class V, int... i> L2L_INLINE V riffle(V low, V high, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  return shuffle(low, high, std::integer_sequence<int, (offset + i / 2 + (i % 2) * n)...>());
}

// L rows of L lanes become L columns, in log2 L rounds of interleaving.
template <class T> L2L_INLINE void transpose(Vec<T> (&rows)[lanes<T>]) {
  constexpr int n = lanes<T>;
  constexpr auto order = std::make_integer_sequence<int, n>();
#pragma GCC unroll 6
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = riffle<0>(rows[i], rows[i + n / 2], order);
      next[2 * i + 1] = riffle<n / 2>(rows[i], rows[i + n / 2], order);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace l2l
