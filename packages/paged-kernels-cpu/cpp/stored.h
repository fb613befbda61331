// The types of stored keys and values: how their lanes become vectors of floats.
//
// A stored type reads an entry in blocks: `vectors * T::width` neighbouring lanes become `vectors` vectors. bfloat16
// leaves them in another order, first the even lanes and then the odd ones (`even_odd`): a shift and a mask widen it.
#pragma once

#include "numbers.h"
#include "vector.h"

namespace paged {

// What all types have in common that store a lane as one `E`. `Self` has `widen`.
template <class T, class Self, class E, int count = 1>
struct WholeElements {
  using Element = E;
  static constexpr int vectors = count;
  static constexpr bool even_odd = count == 2;

  explicit WholeElements(const Pages&) {}

  // Reads one block of `entry` from `lane` on.
  [[gnu::always_inline]] void read(const E* entry, int64_t lane, Floats<T>* x) const { Self::widen(entry + lane, x); }

  // Reads the `size` lanes from `lane` on, at most one block. The lanes after them are zero.
  [[gnu::always_inline]] void read_some(const E* entry, int64_t lane, int64_t size, Floats<T>* x) const {
    E some[vectors * T::width] = {};
    std::memcpy(some, entry + lane, size * sizeof some[0]);
    Self::widen(some, x);
  }
};

template <class T>
struct Float32 : WholeElements<T, Float32<T>, float> {
  using WholeElements<T, Float32<T>, float>::WholeElements;
  PAGED_INLINE void widen(const float* from, Floats<T>* x) { x[0] = load<T>(from); }
};

template <class T>
struct BFloat16 : WholeElements<T, BFloat16<T>, uint16_t, 2> {
  using WholeElements<T, BFloat16<T>, uint16_t, 2>::WholeElements;
  PAGED_INLINE void widen(const uint16_t* from, Floats<T>* x) {
    Ints<T> pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    x[0] = as_floats<T>(pairs << 16);
    x[1] = as_floats<T>(pairs & static_cast<int32_t>(0xffff0000));
  }
};

// Returns numbers of a 16- or 8-bit format as floats: the bits move to their place, and the exponent gets a new bias.
template <class T>
PAGED_INLINE Floats<T> widen_format(Ints<T> bits, Format f) {
  const int up = 23 - f.mantissa, rebias = 127 - f.bias(), magnitude_bits = f.exponent + f.mantissa;
  const Ints<T> magnitude = bits & ((1 << magnitude_bits) - 1), sign = (bits >> magnitude_bits) << 31;
  const Ints<T> normal = (magnitude << up) + (rebias << 23);
  // The smallest numbers have no leading one: give it one, and subtract that again.
  const Floats<T> small = as_floats<T>(normal + (1 << 23)) - bits_as<float>((rebias + 1) << 23);
  Floats<T> x = magnitude < (1 << f.mantissa) ? small : as_floats<T>(normal);
  const int32_t last = static_cast<int32_t>(f.has_infinity ? f.infinity() : f.nan());
  const Ints<T> beyond = f.has_infinity ? (magnitude << up) | 0x7f800000 : Ints<T>{} + 0x7fc00000;
  x = magnitude >= last ? as_floats<T>(beyond) : x;
  return as_floats<T>(as_ints<T>(x) | sign);
}

template <class T>
struct Float16 : WholeElements<T, Float16<T>, uint16_t> {
  using WholeElements<T, Float16<T>, uint16_t>::WholeElements;
  PAGED_INLINE void widen(const uint16_t* from, Floats<T>* x) { x[0] = widen_format<T>(T::widen(from), half_format); }
};

template <class T>
struct Float8E4M3 : WholeElements<T, Float8E4M3<T>, uint8_t> {
  using WholeElements<T, Float8E4M3<T>, uint8_t>::WholeElements;
  PAGED_INLINE void widen(const uint8_t* from, Floats<T>* x) { x[0] = widen_format<T>(T::widen(from), e4m3_format); }
};

template <class T>
struct Float8E5M2 : WholeElements<T, Float8E5M2<T>, uint8_t> {
  using WholeElements<T, Float8E5M2<T>, uint8_t>::WholeElements;
  PAGED_INLINE void widen(const uint8_t* from, Floats<T>* x) { x[0] = widen_format<T>(T::widen(from), e5m2_format); }
};

template <class T>
struct Int8 : WholeElements<T, Int8<T>, int8_t> {
  using WholeElements<T, Int8<T>, int8_t>::WholeElements;
  PAGED_INLINE void widen(const int8_t* from, Floats<T>* x) { x[0] = T::to_floats(T::widen(from)); }
};

// Two values to a byte: lane i of the first half is the low nibble of byte i, lane i of the second half the high one.
template <class T>
struct Int4 {
  using Element = int8_t;
  static constexpr int vectors = 1;
  static constexpr bool even_odd = false;

  explicit Int4(const Pages& pages) : half(pages.storage_lanes) {}

  [[gnu::always_inline]] void read(const int8_t* entry, int64_t lane, Floats<T>* x) const {
    if (lane + T::width <= half) {
      x[0] = T::to_floats((T::widen(entry + lane) << 28) >> 28);
    } else if (lane >= half) {
      x[0] = T::to_floats(T::widen(entry + lane - half) >> 4);
    } else {  // V starts in one half and ends in the other
      read_some(entry, lane, T::width, x);
    }
  }

  [[gnu::always_inline]] void read_some(const int8_t* entry, int64_t lane, int64_t size, Floats<T>* x) const {
    float some[T::width] = {};
    for (int64_t i = 0; i < size; ++i) some[i] = static_cast<float>(value(entry, lane + i));
    x[0] = load<T>(some);
  }

  int value(const int8_t* entry, int64_t lane) const {
    return lane < half ? static_cast<int8_t>(static_cast<uint8_t>(entry[lane]) << 4) >> 4 : entry[lane - half] >> 4;
  }

  int64_t half;
};

// Returns the lanes a0 b0 a1 b1 ... of two vectors, as two vectors.
template <class T, int... lane>
PAGED_INLINE void zip(Floats<T>* x, std::integer_sequence<int, lane...>) {
  const Floats<T> even = x[0], odd = x[1];
  x[0] = __builtin_shufflevector(even, odd, (lane / 2 + lane % 2 * T::width)...);
  x[1] = __builtin_shufflevector(even, odd, (lane / 2 + lane % 2 * T::width + T::width / 2)...);
}

// Reads the `size` lanes of `entry` from `lane` on as floats in their own order. Writes whole blocks, padded with
// zeros.
template <class T, class Stored>
PAGED_INLINE void unpack(const Stored& stored, const typename Stored::Element* entry, int64_t lane, int64_t size,
                         float* to) {
  constexpr int block = Stored::vectors * T::width;
  for (int64_t i = 0; i < size; i += block) {
    Floats<T> x[Stored::vectors];
    if (i + block <= size) {
      stored.read(entry, lane + i, x);
    } else {
      stored.read_some(entry, lane + i, size - i, x);
    }
    if constexpr (Stored::even_odd) zip<T>(x, std::make_integer_sequence<int, T::width>{});
    for (int vector = 0; vector < Stored::vectors; ++vector) store<T>(to + i + vector * T::width, x[vector]);
  }
}

}  // namespace paged
