#include "portable.h"

#include "table.h"

namespace paged {

const Kernels& portable_kernels() {
  static constexpr Kernels kernels = kernels_of<Portable>("portable");
  return kernels;
}

}  // namespace paged
