// Attention over pages: the items of the work list, merged.
#pragma once

#include "kernels.h"
#include "threads.h"

namespace paged {

void attend(const AttentionCall& call, const Kernels& kernels, ThreadPool& pool);

}  // namespace paged
