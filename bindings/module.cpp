// What the library says of itself; its ops are defined in Python and find their kernels here.
#include <cstdlib>

#include "cpu.h"

const CpuKernels& kernels() {
  static const CpuKernels& chosen = []() -> const CpuKernels& {
    const char* isa = std::getenv("DENSE_ATTN_ISA");
    const char* reason = nullptr;
    const CpuKernels* found = cpu_kernels(isa, &reason);
    REQUIRE(found != nullptr, "DENSE_ATTN_ISA must ", reason, ", got ", isa);
    return *found;
  }();
  return chosen;
}

static std::string cpu_isa() { return kernels().isa; }

// The digest of the schemas that the kernels were compiled for.
static std::string contract() { return DENSE_ATTN_CONTRACT; }

STABLE_TORCH_LIBRARY_FRAGMENT(dense_attn, m) {
  m.def("cpu_isa() -> str");
  m.def("contract() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dense_attn, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("contract", TORCH_BOX(&contract));
}
