// AVX-512 with its F, BW, DQ and VL parts: x86-64 servers since 2017.
#pragma once

#include <immintrin.h>

#include "../vector.h"

namespace paged {

struct Avx512 {
  static constexpr int width = 16;
  static constexpr int tile_rows = 12;
  static constexpr int tile_vectors = 2;

  PAGED_INLINE Ints<Avx512> widen(const int8_t* from) {
    return (Ints<Avx512>)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  PAGED_INLINE Ints<Avx512> widen(const uint8_t* from) {
    return (Ints<Avx512>)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  PAGED_INLINE Ints<Avx512> widen(const uint16_t* from) {
    return (Ints<Avx512>)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  PAGED_INLINE Floats<Avx512> to_floats(Ints<Avx512> x) { return (Floats<Avx512>)_mm512_cvtepi32_ps((__m512i)x); }
};

}  // namespace paged
