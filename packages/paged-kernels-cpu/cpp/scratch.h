// Memory of a thread for what it computes now.
#pragma once

#include <cstdint>

namespace paged {

enum class ScratchFor : int { state, few_rows, many_rows, unpacked };

// Returns this thread's memory of at least `floats` floats for one purpose. It is kept until the thread ends, and its
// next user overwrites it.
float* scratch(ScratchFor purpose, int64_t floats);

// Returns `n` rounded up to whole cache lines of floats.
constexpr int64_t whole_lines(int64_t n) { return (n + 15) / 16 * 16; }

}  // namespace paged
