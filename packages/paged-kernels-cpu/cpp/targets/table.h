// Fills the table of one target's kernels.
#pragma once

#include "../few_rows.h"
#include "../kernels.h"
#include "../many_rows.h"

namespace paged {

template <class T>
constexpr Kernels kernels_of(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  auto& few = kernels.few_rows;  // in the order of KvType
  few[0] = attend_few_rows<T, InPlace<T, Float32>>;
  few[1] = attend_few_rows<T, InPlace<T, BFloat16>>;
  few[2] = attend_few_rows<T, Unpacked<T, Float16>>;
  few[3] = attend_few_rows<T, InPlace<T, Int8>>;
  few[4] = attend_few_rows<T, Unpacked<T, Float8E4M3>>;
  few[5] = attend_few_rows<T, Unpacked<T, Float8E5M2>>;
  few[6] = attend_few_rows<T, Unpacked<T, Int4>>;
  auto& many = kernels.many_rows;
  many[0] = attend_many_rows<T, Float32>;
  many[1] = attend_many_rows<T, BFloat16>;
  many[2] = attend_many_rows<T, Float16>;
  many[3] = attend_many_rows<T, Int8>;
  many[4] = attend_many_rows<T, Float8E4M3>;
  many[5] = attend_many_rows<T, Float8E5M2>;
  many[6] = attend_many_rows<T, Int4>;
  return kernels;
}

}  // namespace paged
