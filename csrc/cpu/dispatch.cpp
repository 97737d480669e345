// Which instruction sets this library was built with, and which of them the processor has.
#include <cstring>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define DENSE_ATTN_DECLARE(isa)                                                            \
  namespace isa {                                                                          \
  extern const LayoutAttentionCpu kLayoutAttention;                                        \
  extern const SegaCpu kSega;                                                              \
  extern const ReversibleCpu kReversible;                                                  \
  const CpuKernels kKernels = {#isa, isa::kLayoutAttention, isa::kSega, isa::kReversible}; \
  }
#if defined(__x86_64__)
DENSE_ATTN_DECLARE(amx_bf16)
DENSE_ATTN_DECLARE(avx512_bf16)
DENSE_ATTN_DECLARE(avx512)
DENSE_ATTN_DECLARE(avx2)
#endif
DENSE_ATTN_DECLARE(portable)

namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // leaf 7.1: bit 5 of eax
  return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

// Tiles are state that the system saves and lends: Linux to a process that asks, from 5.16 on.
bool may_use_tiles() {
#if defined(__linux__)
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 1u << 17 | 1u << 18;  // of XCR0: configuration and data
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
bool has_amx_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // leaf 7.0: bits 22 (products of bfloat16) and 24 (tiles) of edx
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1) && (edx >> 24 & 1) &&
         may_use_tiles();
}
#endif
bool always() { return true; }

struct Entry {
  const CpuKernels& kernels;
  bool (*supported)();
};

const Entry kEntries[] = {// best first
#if defined(__x86_64__)
                          {amx_bf16::kKernels, has_amx_bf16},
                          {avx512_bf16::kKernels, has_avx512_bf16},
                          {avx512::kKernels, has_avx512},
                          {avx2::kKernels, has_avx2},
#endif
                          {portable::kKernels, always}};

}  // namespace

const CpuKernels* cpu_kernels(const char* isa, const char** reason) {
  for (const Entry& entry : kEntries) {
    if (isa == nullptr || *isa == 0) {
      if (entry.supported()) return &entry.kernels;
    } else if (std::strcmp(isa, entry.kernels.isa) == 0) {
      *reason = "name an instruction set that this processor has";
      return entry.supported() ? &entry.kernels : nullptr;
    }
  }
  *reason = "be one of amx_bf16, avx512_bf16, avx512, avx2, portable";
  return nullptr;
}
