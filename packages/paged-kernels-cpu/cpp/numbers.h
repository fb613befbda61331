// Numbers of 16 and 8 bits, one at a time. Vectors of them are in stored.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "call.h"

namespace paged {

template <class To, class From>
static inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A floating-point format of at most 16 bits: a sign, `exponent` bits, `mantissa` bits.
struct Format {
  int exponent;
  int mantissa;
  bool has_infinity;  // false: the largest exponent holds numbers, and only all ones is NaN

  constexpr int bias() const { return (1 << (exponent - 1)) - 1; }
  constexpr uint32_t sign() const { return 1u << (exponent + mantissa); }
  constexpr uint32_t infinity() const { return ((1u << exponent) - 1) << mantissa; }
  constexpr uint32_t nan() const { return has_infinity ? infinity() | 1u << (mantissa - 1) : sign() - 1; }
};

constexpr Format half_format{5, 10, true};
constexpr Format e4m3_format{4, 3, false};
constexpr Format e5m2_format{5, 2, true};

// Returns the value of these bits. Exact.
static inline float widen(uint32_t bits, Format format) {
  const uint32_t magnitude = bits & (format.sign() - 1);
  const uint32_t sign = bits & format.sign() ? 0x80000000u : 0;
  if (format.has_infinity ? magnitude > format.infinity() : magnitude == format.nan()) return NAN;
  if (format.has_infinity && magnitude == format.infinity()) return sign ? -INFINITY : INFINITY;
  const float value = std::ldexp(static_cast<float>(magnitude & ((1u << format.mantissa) - 1)), -format.mantissa);
  const int power = static_cast<int>(magnitude >> format.mantissa);
  const float scaled = power ? std::ldexp(1 + value, power - format.bias()) : std::ldexp(value, 1 - format.bias());
  return sign ? -scaled : scaled;
}

// Returns the bits of the nearest value, ties to even. Without infinity, what is too large becomes NaN.
static inline uint32_t narrow(float value, Format format) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t sign = bits >> 31 ? format.sign() : 0;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | format.nan();
  const int power = static_cast<int>(magnitude >> 23) - 127 + format.bias();  // the exponent in the new format
  // Below the smallest normal number, the mantissa has fewer bits.
  const int dropped = 23 - format.mantissa + (power < 1 ? 1 - power : 0);
  if (dropped > 25) return sign;
  const uint64_t whole =
      power < 1 ? (magnitude & 0x7fffffu) | 0x800000u : (static_cast<uint64_t>(power) << 23) | (magnitude & 0x7fffffu);
  const uint64_t half = 1ull << (dropped - 1), rest = whole & ((1ull << dropped) - 1);
  uint64_t kept = whole >> dropped;
  kept += rest > half || (rest == half && (kept & 1));
  const uint64_t limit = format.has_infinity ? format.infinity() : format.nan();
  return sign | static_cast<uint32_t>(kept < limit ? kept : limit);
}

static inline float bfloat16_to_float(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }

static inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Reads element `index` of rows of q, k or v.
static inline float load_row_element(const void* rows, RowType type, int64_t index) {
  if (type == RowType::f32) return static_cast<const float*>(rows)[index];
  const uint16_t bits = static_cast<const uint16_t*>(rows)[index];
  return type == RowType::bf16 ? bfloat16_to_float(bits) : widen(bits, half_format);
}

// Reads `size` elements of rows of q, k or v from `from` on as floats.
static inline void load_row(const void* rows, RowType type, int64_t from, int64_t size, float* to) {
  if (type == RowType::f32) {
    std::memcpy(to, static_cast<const float*>(rows) + from, size * sizeof(float));
  } else if (type == RowType::bf16) {
    const uint16_t* bits = static_cast<const uint16_t*>(rows) + from;
    for (int64_t i = 0; i < size; ++i) to[i] = bfloat16_to_float(bits[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = load_row_element(rows, type, from + i);
  }
}

static inline uint16_t float_to_half(float value) { return static_cast<uint16_t>(narrow(value, half_format)); }

}  // namespace paged
