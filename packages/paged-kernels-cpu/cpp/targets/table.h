// Fills the table of one target's kernels.
#pragma once

#include "../few_rows.h"
#include "../kernels.h"

namespace paged {

template <class T>
constexpr Kernels kernels_of(const char* name) {
  return {name,
          {attend_few_rows<T, Float32>, attend_few_rows<T, BFloat16>, attend_few_rows<T, Float16>, attend_few_rows<T, Int8>,
           attend_few_rows<T, Float8E4M3>, attend_few_rows<T, Float8E5M2>, attend_few_rows<T, Int4>}};
}

}  // namespace paged
