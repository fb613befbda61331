// The portable target: what every compiler has. On arm64 the compiler turns it into NEON, on x86-64 into SSE2.
#pragma once

#include "../vector.h"

namespace paged {

struct Portable {
  static constexpr int width = 4;
  static constexpr int tile_rows = 4;     // of the register tile in many_rows.h
  static constexpr int tile_vectors = 2;  // the same, in columns

  // Each returns `width` numbers of 8 or 16 bits as 32-bit integers.
  PAGED_INLINE Ints<Portable> widen(const int8_t* from) { return Ints<Portable>{from[0], from[1], from[2], from[3]}; }
  PAGED_INLINE Ints<Portable> widen(const uint8_t* from) { return Ints<Portable>{from[0], from[1], from[2], from[3]}; }
  PAGED_INLINE Ints<Portable> widen(const uint16_t* from) { return Ints<Portable>{from[0], from[1], from[2], from[3]}; }
  PAGED_INLINE Floats<Portable> to_floats(Ints<Portable> x) { return __builtin_convertvector(x, Floats<Portable>); }
};

}  // namespace paged
