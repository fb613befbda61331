#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace paged {
namespace {

constexpr int64_t line_bytes = 64;

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

struct Memory {
  std::unique_ptr<float, Free> floats;
  int64_t size = 0;

  float* of_size(int64_t wanted) {
    if (wanted > size) grow(whole_lines(wanted));
    return floats.get();
  }

  void grow(int64_t wanted) {
    floats.reset();
    size = 0;
    floats.reset(static_cast<float*>(std::aligned_alloc(line_bytes, wanted * sizeof(float))));
    if (!floats) throw std::bad_alloc();
    size = wanted;
  }
};

}  // namespace

float* scratch(ScratchFor purpose, int64_t floats) {
  thread_local Memory memories[4];
  return memories[static_cast<int>(purpose)].of_size(floats);
}

}  // namespace paged
