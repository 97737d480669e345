// What the CUDA library says of itself; its ops are defined in Python and find their kernels here.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "cuda/device.h"

void refuse_launch(cudaError_t error) { refuse("the GPU must run the kernel, got ", cudaGetErrorString(error)); }

// Of the libtorch_cuda that is loaded where there are tensors of a GPU: one library serves torch with and without.
cudaStream_t current_stream(int32_t device) {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const CurrentStream ask = []() {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* function = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    REQUIRE(function != nullptr, "torch must be a build for CUDA, got one without a current stream");
    return reinterpret_cast<CurrentStream>(function);
  }();
  void* stream = nullptr;
  REQUIRE(ask(device, &stream) == AOTI_TORCH_SUCCESS, "torch must have a current stream, got none of GPU ", device);
  return static_cast<cudaStream_t>(stream);
}

// The kind of tensors that the ops take.
static std::string device() { return kDeviceName; }

static std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// The reason why this machine's driver runs no kernel of this library, empty if it may: one of an older CUDA does not
// know its runtime, or how its kernels are compressed. Where there is none, there is no GPU either. Asking initialises
// the driver.
static std::string driver_error() {
  constexpr int kCompressed = 12040, kRuntime = CUDART_VERSION / 1000 * 1000;
  constexpr int kOldest = kRuntime > kCompressed ? kRuntime : kCompressed;
  if constexpr (kOnGpu) {
    int driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0 && driver < kOldest) {
      return "needs a driver for CUDA " + version(kOldest) + ", got one for " + version(driver);
    }
  }
  return "";
}

// The digest of the schemas that the kernels were compiled for.
static std::string contract() { return DENSE_ATTN_CONTRACT; }

// The digest of what the library is made of, to which a verdict on its kernels belongs.
static std::string sources() { return DENSE_ATTN_CUDA_SOURCES; }

STABLE_TORCH_LIBRARY_FRAGMENT(dense_attn_cuda, m) {
  m.def("device() -> str");
  m.def("contract() -> str");
  m.def("sources() -> str");
  m.def("driver_error() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dense_attn_cuda, CompositeExplicitAutograd, m) {
  m.impl("device", TORCH_BOX(&device));
  m.impl("contract", TORCH_BOX(&contract));
  m.impl("sources", TORCH_BOX(&sources));
  m.impl("driver_error", TORCH_BOX(&driver_error));
}
