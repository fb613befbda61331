// The kernels of one instruction set, as a table of functions.
#pragma once

#include "softmax.h"
#include "work_list.h"

namespace paged {

// Attends a block to some of its keys. Overwrites `state`.
using ItemKernel = void (*)(const AttentionCall& call, const Block& block, KeyRange keys, SoftmaxState state);

struct Kernels {
  const char* name;
  ItemKernel few_rows[num_kv_types];   // for blocks of at most `few_rows` rows
  ItemKernel many_rows[num_kv_types];  // for the others

  ItemKernel for_block(KvType type, const Block& block) const {
    return (block.rows() <= paged::few_rows ? few_rows : many_rows)[static_cast<int>(type)];
  }
};

const Kernels& portable_kernels();
#ifdef PAGED_X86
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// Returns the kernels that this processor can run, best first. Ends with the portable ones.
const std::vector<const Kernels*>& usable_kernels();

}  // namespace paged
