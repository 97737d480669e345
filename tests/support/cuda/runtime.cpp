// A stand-in for CUDA's runtime: kernels stand in the library as PTX, and a launch calls back with that text. It is
// linked in the place of libcudart_static, under the same host code that ships.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

struct Kernel {
  const void* image;  // the fat binary that holds it
  std::string name;
};

// The storage of a tensor that the host code asked the memory of.
struct Span {
  const char* begin;
  const char* end;
};

// What the one who runs launches sees of one.
struct Launch {
  const char* kernel;
  const void* image;
  int32_t grid[3], block[3];
  uint64_t shared_bytes;
  void** arguments;
};

using Launcher = int (*)(const Launch*);

std::map<const void*, Kernel> kernels;   // by their host function
std::map<const void*, int> most_shared;  // what was asked for them
std::vector<Span> spans;
std::string told = "no launcher is set";
Launcher launcher = nullptr;
cudaError_t last_error = cudaSuccess;
constexpr int kAlwaysShared = 47 << 10, kOwnShared = 1 << 10;  // kernels have less than the latter of their own
int device_shared = 227 << 10;  // bytes that a block of the GPU can have: of sm_90, and 99 KB of sm_86, 89 and 120

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
} configuration;

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t refused(const std::string& text) {
  told = text;
  return failed(cudaErrorLaunchFailure);
}

}  // namespace

EXPORTED void set_launcher(Launcher to) { launcher = to; }
EXPORTED int launch_nothing(const Launch*) { return 0; }
EXPORTED void set_error(const char* text) { told = text; }
EXPORTED void set_device_shared(int bytes) { device_shared = bytes; }
EXPORTED int count_spans() { return static_cast<int>(spans.size()); }
EXPORTED void get_span(int i, const void** both) { both[0] = spans[i].begin, both[1] = spans[i].end; }

// Every tensor that a binding makes a view of is what its launches may touch.
using Handle = void*;
extern "C" {
int32_t aoti_torch_get_storage_size(Handle, int64_t*);
int32_t aoti_torch_get_storage_offset(Handle, int64_t*);
int32_t aoti_torch_get_dtype(Handle, int32_t*);
int32_t aoti_torch_get_device_type(Handle, int32_t*);
size_t aoti_torch_dtype_element_size(int32_t);
int32_t __real_aoti_torch_get_data_ptr(Handle, void**);

int32_t __wrap_aoti_torch_get_data_ptr(Handle tensor, void** data) {
  int64_t offset = 0, bytes = 0;
  int32_t dtype = 0;
  const int32_t error = __real_aoti_torch_get_data_ptr(tensor, data);
  if (error || aoti_torch_get_storage_offset(tensor, &offset) || aoti_torch_get_storage_size(tensor, &bytes) ||
      aoti_torch_get_dtype(tensor, &dtype)) {
    return 1;
  }
  if (*data == nullptr) return 0;  // of no elements, whatever its storage
  const char* begin = static_cast<const char*>(*data) - offset * aoti_torch_dtype_element_size(dtype);
  const Span span{begin, begin + bytes};
  // Memory that was given back and handed out anew: the newest holds.
  std::erase_if(spans, [&](const Span& old) { return old.begin < span.end && span.begin < old.end; });
  if (bytes > 0) spans.push_back(span);
  return 0;
}

void** __cudaRegisterFatBinary(void* binary) {
  struct Wrapper {
    int magic, version;
    const void* image;
    void* unused;
  };
  return new void*(const_cast<void*>(static_cast<const Wrapper*>(binary)->image));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) { delete handle; }
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels[host] = {*handle, name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared_bytes = configuration.shared_bytes;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return kernels.count(host) ? cudaSuccess : failed(cudaErrorInvalidDeviceFunction);
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const auto found = kernels.find(host);
  if (found == kernels.end()) return refused("a kernel that is not registered is launched");
  if (launcher == nullptr) return refused("no launcher is set");
  const auto asked = most_shared.find(host);
  const size_t most = asked == most_shared.end() ? kAlwaysShared : std::max(asked->second, kAlwaysShared);
  if (shared_bytes > most) {
    return refused(found->second.name + " takes " + std::to_string(shared_bytes) + " bytes of shared memory, and " +
                   std::to_string(most) + " are allowed");
  }
  const Launch launch{found->second.name.c_str(),
                      found->second.image,
                      {static_cast<int32_t>(grid.x), static_cast<int32_t>(grid.y), static_cast<int32_t>(grid.z)},
                      {static_cast<int32_t>(block.x), static_cast<int32_t>(block.y), static_cast<int32_t>(block.z)},
                      shared_bytes,
                      arguments};
  return launcher(&launch) ? failed(cudaErrorLaunchFailure) : cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                               cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > device_shared - kOwnShared) return failed(cudaErrorInvalidValue);
    most_shared[host] = value;
  }
  return kernels.count(host) ? cudaSuccess : failed(cudaErrorInvalidDeviceFunction);
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? told.c_str() : "an error that the stand-in has no words for";
}
}
