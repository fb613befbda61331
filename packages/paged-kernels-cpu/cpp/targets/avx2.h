// AVX2 with FMA: x86-64 processors since 2013.
#pragma once

#include <immintrin.h>

#include "../vector.h"

namespace paged {

struct Avx2 {
  static constexpr int width = 8;
  static constexpr int tile_rows = 6;
  static constexpr int tile_vectors = 2;

  PAGED_INLINE Ints<Avx2> widen(const int8_t* from) {
    return (Ints<Avx2>)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  PAGED_INLINE Ints<Avx2> widen(const uint8_t* from) {
    return (Ints<Avx2>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  PAGED_INLINE Ints<Avx2> widen(const uint16_t* from) {
    return (Ints<Avx2>)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  PAGED_INLINE Floats<Avx2> to_floats(Ints<Avx2> x) { return (Floats<Avx2>)_mm256_cvtepi32_ps((__m256i)x); }
};

}  // namespace paged
