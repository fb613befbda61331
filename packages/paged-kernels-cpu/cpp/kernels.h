// The kernels of one instruction set, as a table of functions.
#pragma once

#include "softmax.h"
#include "work_list.h"

namespace paged {

// Attends a block to some of its keys. Overwrites `state`.
using ItemKernel = void (*)(const AttentionCall& call, const Block& block, KeyRange keys, SoftmaxState state);

struct Kernels {
  const char* name;
  ItemKernel few_rows[num_kv_types];
};

const Kernels& portable_kernels();
#ifdef PAGED_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// Returns the kernels that this processor can run, best first. Ends with the portable ones.
const std::vector<const Kernels*>& usable_kernels();

}  // namespace paged
