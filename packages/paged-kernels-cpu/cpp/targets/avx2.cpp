#include "avx2.h"

#include "table.h"

namespace paged {

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels = kernels_of<Avx2>("avx2");
  return kernels;
}

}  // namespace paged
