// The page write: new keys and values go to their slots, and nothing else changes.
#pragma once

#include "call.h"
#include "threads.h"

namespace paged {

void write(const WriteCall& call, ThreadPool& pool);

}  // namespace paged
