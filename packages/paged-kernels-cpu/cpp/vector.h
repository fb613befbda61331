// Vectors of floats, and the functions of them that attention needs.
//
// A target `T` has a width: the floats of one register of its instruction set (targets/). Vectors are the compiler's
// own vector types. Each function is a template over the target, so no two instruction sets share a compiled function.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#define PAGED_INLINE [[gnu::always_inline]] static inline

namespace paged {

template <class T>
struct VectorTypes {
  typedef float Floats __attribute__((vector_size(4 * T::width)));
  typedef int32_t Ints __attribute__((vector_size(4 * T::width)));
};
template <class T>
using Floats = typename VectorTypes<T>::Floats;
template <class T>
using Ints = typename VectorTypes<T>::Ints;

template <class T>
PAGED_INLINE Floats<T> load(const float* from) {
  Floats<T> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class T>
PAGED_INLINE void store(float* to, Floats<T> x) {
  std::memcpy(to, &x, sizeof x);
}

template <class T>
PAGED_INLINE Floats<T> all(float value) {
  return Floats<T>{} + value;
}

template <class T>
PAGED_INLINE Floats<T> as_floats(Ints<T> bits) {
  Floats<T> x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
PAGED_INLINE Ints<T> as_ints(Floats<T> x) {
  Ints<T> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <class T>
PAGED_INLINE Ints<T> lane_numbers() {
  Ints<T> lanes;
  for (int lane = 0; lane < T::width; ++lane) lanes[lane] = lane;
  return lanes;
}

template <class T>
PAGED_INLINE Floats<T> larger(Floats<T> a, Floats<T> b) {
  return a > b ? a : b;
}

template <class T>
PAGED_INLINE float sum(Floats<T> x) {
  float parts[T::width];
  store<T>(parts, x);
  for (int half = T::width / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) parts[lane] += parts[lane + half];
  }
  return parts[0];
}

template <class T>
PAGED_INLINE float largest(Floats<T> x) {
  float parts[T::width];
  store<T>(parts, x);
  for (int half = T::width / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane)
      parts[lane] = parts[lane] > parts[lane + half] ? parts[lane] : parts[lane + half];
  }
  return parts[0];
}

// Returns exp(x) to a few units in the last place; 0 below -87.3, also for -inf; NaN for NaN. `x` is at most 88.
//
// exp(x) = 2^n 2^f with n = round(x / ln 2), and a polynomial for 2^f, |f| <= 1/2, with a relative error of 8e-8.
template <class T>
PAGED_INLINE Floats<T> exp(Floats<T> x) {
  const float round = 12582912.f, per_ln2 = 1.44269504f;               // adding 1.5 * 2^23 rounds to a whole number
  const Floats<T> least = all<T>(-87.3f), kept = larger<T>(least, x);  // this order keeps a NaN
  const Floats<T> shifted = kept * per_ln2 + round, n = shifted - round, f = kept * per_ln2 - n;
  Floats<T> p = f * 1.3266971e-3f + 9.6754600e-3f;
  p = p * f + 5.5507425e-2f;
  p = p * f + 2.4022122e-1f;
  p = p * f + 6.9314694e-1f;
  p = p * f + 1.0000001f;
  const Ints<T> power = (as_ints<T>(shifted) - (as_ints<T>(all<T>(round)) - 127)) << 23;
  return x < least ? Floats<T>{} : p * as_floats<T>(power);
}

// Returns tanh(x); NaN for NaN.
template <class T>
PAGED_INLINE Floats<T> tanh(Floats<T> x) {
  const Floats<T> most = all<T>(20.f), below = x > most ? most : x, bounded = larger<T>(-most, below);
  return 1.f - 2.f / (exp<T>(bounded * 2.f) + 1.f);
}

// Returns every second lane of each quad of `a`, then of `b`, quad by quad. A quad is four lanes.
template <class T, int first, int... lane>
PAGED_INLINE Floats<T> half_of_quads(Floats<T> a, Floats<T> b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane / 4 * 4 + lane % 2 * 2 + first + (lane % 4 < 2 ? 0 : T::width))...);
}

// Returns every second quad of `a`, then of `b`.
template <class T, int first, int... lane>
PAGED_INLINE Floats<T> half_the_quads(Floats<T> a, Floats<T> b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane / 4 * 8 + first * 4 + lane % 4)...);
}

// Returns a vector of the sums of `T::width` vectors `x`, which it overwrites. Each step halves the number of vectors.
template <class T>
PAGED_INLINE Floats<T> sums(Floats<T>* x) {
  constexpr std::make_integer_sequence<int, T::width> lanes{};
  int count = T::width / 2;
  for (; count >= T::width / 4; count /= 2) {
    for (int i = 0; i < count; ++i) {
      x[i] = half_of_quads<T, 0>(x[2 * i], x[2 * i + 1], lanes) + half_of_quads<T, 1>(x[2 * i], x[2 * i + 1], lanes);
    }
  }
  for (; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) {
      x[i] = half_the_quads<T, 0>(x[2 * i], x[2 * i + 1], lanes) + half_the_quads<T, 1>(x[2 * i], x[2 * i + 1], lanes);
    }
  }
  return x[0];
}

}  // namespace paged
