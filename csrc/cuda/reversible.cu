// Reversible steps: arithmetic on every element of dense memory, with the CPU's very roundings. Compiled without fused
// multiply-add, so that either device undoes the other's.
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace {

constexpr int kThreads = 128, kElements = 8;  // a block, and a thread of it: loads of 16 bytes in every dtype
static_assert(kMaxStepElements == kMaxBlocks * kThreads * kElements);

template <class Acc, class T>
__device__ Acc widen(T x) {
  if constexpr (sizeof(T) == 2) {
    return static_cast<float>(x);
  } else {
    return static_cast<Acc>(x);
  }
}

// A double becomes a 16-bit number by way of float, as in torch.
template <class T, class Acc>
__device__ T narrow(Acc x) {
  if constexpr (sizeof(T) == 2) {
    return T(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

template <class T>
struct Elements {
  alignas(16) T values[kElements];
};

// In 16 bytes at once, where they lie so; `count` of them.
template <class T>
__device__ Elements<T> load(const T* from, int count) {
  constexpr int kWords = sizeof(Elements<T>) / sizeof(uint4);
  Elements<T> loaded{};
  if (count == kElements && reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<uint4*>(loaded.values)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (i < count) loaded.values[i] = from[i];
    }
  }
  return loaded;
}

template <class T>
__device__ void store(T* to, const Elements<T>& stored, int count) {
  constexpr int kWords = sizeof(Elements<T>) / sizeof(uint4);
  if (count == kElements && reinterpret_cast<uintptr_t>(to) % sizeof(uint4) == 0) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(stored.values)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (i < count) to[i] = stored.values[i];
    }
  }
}

// f of the element type in memory of an operand that is computed with as Acc.
template <class Acc, class F>
__device__ void with_stored(DType dtype, const F& f) {
  if constexpr (std::is_same_v<Acc, int64_t>) {
    f(int64_t{});
  } else {
    with_dtype(dtype, f);
  }
}

// An operand that is read as Acc; zeros where it has no data.
template <class Acc>
struct Input {
  const FlatView& view;
  Acc values[kElements] = {};

  __device__ explicit Input(const FlatView& view) : view(view) {}
  __device__ void open(int64_t first, int count) {
    if (view.data == nullptr) return;
    with_stored<Acc>(view.dtype, [&](auto x) {
      using T = decltype(x);
      const Elements<T> loaded = load(static_cast<const T*>(view.data) + first, count);
#pragma unroll
      for (int i = 0; i < kElements; ++i) values[i] = widen<Acc>(loaded.values[i]);
    });
  }
  __device__ void close(int64_t, int) {}
};

// A result that is computed as Acc.
template <class Acc>
struct Output {
  const FlatView& view;
  Acc values[kElements];

  __device__ explicit Output(const FlatView& view) : view(view) {}
  __device__ void open(int64_t, int) {}
  __device__ void close(int64_t first, int count) {
    with_stored<Acc>(view.dtype, [&](auto x) {
      using T = decltype(x);
      Elements<T> stored;
#pragma unroll
      for (int i = 0; i < kElements; ++i) stored.values[i] = narrow<T>(values[i]);
      store(static_cast<T*>(view.data) + first, stored, count);
    });
  }
};

// f on the elements of each operand in turn: it takes those that it writes by reference, the others by value.
template <class F, class... Operands>
__device__ void for_each(int64_t numel, const F& f, Operands... operands) {
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements;
  if (first >= numel) return;
  const int count = numel - first < kElements ? static_cast<int>(numel - first) : kElements;
  (operands.open(first, count), ...);
#pragma unroll
  for (int i = 0; i < kElements; ++i) f(operands.values[i]...);
  (operands.close(first, count), ...);
}

template <class Acc>
__global__ void ddim_step_kernel(const __grid_constant__ DdimStepParams p, int64_t numel) {
  const Acc a = p.a, b = p.b, guidance_scale = p.guidance_scale;
  const bool guided = p.eps_uncond.data != nullptr;
  const auto step = [=](Acc& out, Acc x, Acc eps, Acc uncond) {
    out = ddim_step(x, eps, uncond, a, b, guidance_scale, guided);
  };
  for_each(numel, step, Output<Acc>(p.out), Input<Acc>(p.x), Input<Acc>(p.eps), Input<Acc>(p.eps_uncond));
}

template <class Acc>
__global__ void leapfrog_step_kernel(const __grid_constant__ LeapfrogStepParams p, int64_t numel) {
  const Acc c_far = p.c_far, c_near = p.c_near, c_eps = p.c_eps;
  const auto step = [=](Acc& out, Acc far, Acc near, Acc eps) {
    out = leapfrog_step(far, near, eps, c_far, c_near, c_eps);
  };
  for_each(numel, step, Output<Acc>(p.out), Input<Acc>(p.far), Input<Acc>(p.near), Input<Acc>(p.eps));
}

// The coupling, then the mix or its inverse.
template <class Acc, bool kInverse>
__global__ void edict_kernel(const __grid_constant__ EdictParams p, int64_t numel) {
  const Acc a = p.a, b = p.b, mix = p.mix, rest = 1 - p.mix;
  const bool couple_x = p.eps.data && p.couple_x, couple_y = p.eps.data && !p.couple_x;
  const auto step = [=](Acc& x_out, Acc& y_out, Acc x, Acc y, Acc eps) {
    if (couple_x) x = couple(x, eps, a, b);
    if (couple_y) y = couple(y, eps, a, b);
    kInverse ? unmix_pair(x, y, mix, rest) : mix_pair(x, y, mix, rest);
    x_out = x, y_out = y;
  };
  for_each(numel, step, Output<Acc>(p.x_out), Output<Acc>(p.y_out), Input<Acc>(p.x), Input<Acc>(p.y),
           Input<Acc>(p.eps));
}

// A coordinate as float64; NaN if it is lost.
__device__ double from_grid(int64_t z) {
  return z == kOffGrid ? __longlong_as_double(0x7ff8000000000000) : static_cast<double>(z);
}

// z + round(change), half to even; kOffGrid where the change or the sum is not on the grid, as that of a lost z never
// is.
__device__ int64_t move(int64_t z, double change) {
  if (!(fabs(change) <= kGridLimit)) return kOffGrid;  // NaN too
  const int64_t moved = z + __double2ll_rn(change);
  return fabs(static_cast<double>(moved)) <= kGridLimit ? moved : kOffGrid;
}

__global__ void exact_leapfrog_kernel(const __grid_constant__ ExactLeapfrogParams p, int64_t numel) {
  const double c_near = p.c_near, c_eps = p.c_eps, to_latent = p.to_latent;
  const bool has_near = p.near.data != nullptr;
  const auto step = [=](int64_t& z_out, double& latent, int64_t far, int64_t near, double eps) {
    z_out = move(far, has_near ? c_near * from_grid(near) + c_eps * eps : c_eps * eps);
    latent = to_latent * from_grid(z_out);
  };
  for_each(numel, step, Output<int64_t>(p.z_out), Output<double>(p.latent), Input<int64_t>(p.far),
           Input<int64_t>(p.near), Input<double>(p.eps));
}

// The coupling, then two shears or their inverses.
template <bool kInverse>
__global__ void exact_edict_kernel(const __grid_constant__ ExactEdictParams p, double x_shear, double y_shear,
                                   int64_t numel) {
  const double coupling = p.step, to_latent = p.to_latent;
  const bool couple_x = p.eps.data && p.couple_x, couple_y = p.eps.data && !p.couple_x, latent_x = p.latent_x;
  const auto step = [=](int64_t& x_out, int64_t& y_out, double& latent, int64_t x, int64_t y, double eps) {
    if (couple_x) x = move(x, coupling * eps);
    if (couple_y) y = move(y, coupling * eps);
    if constexpr (kInverse) {
      y = move(y, -(y_shear * from_grid(x)));
      x = move(x, -(x_shear * from_grid(y)));
    } else {
      x = move(x, x_shear * from_grid(y));
      y = move(y, y_shear * from_grid(x));
    }
    x_out = x, y_out = y;
    latent = to_latent * from_grid(latent_x ? x : y);
  };
  for_each(numel, step, Output<int64_t>(p.x_out), Output<int64_t>(p.y_out), Output<double>(p.latent),
           Input<int64_t>(p.x), Input<int64_t>(p.y), Input<double>(p.eps));
}

template <class... Parameters, class... Arguments>
cudaError_t launch_elements(void (*kernel)(Parameters...), int64_t numel, cudaStream_t stream,
                            const Arguments&... arguments) {
  constexpr int64_t kBlock = kThreads * kElements;
  if (numel == 0) return cudaSuccess;
  return launch(kernel, dim3(static_cast<unsigned>((numel + kBlock - 1) / kBlock)), dim3(kThreads), 0, stream,
                arguments..., numel);
}

template <bool kInverse>
cudaError_t edict(const EdictParams& p, int64_t numel, cudaStream_t stream) {
  const bool wide = p.x.dtype == DType::kFloat64;
  return launch_elements(wide ? edict_kernel<double, kInverse> : edict_kernel<float, kInverse>, numel, stream, p);
}

template <bool kInverse>
cudaError_t exact_edict(const ExactEdictParams& p, int64_t numel, cudaStream_t stream) {
  return launch_elements(exact_edict_kernel<kInverse>, numel, stream, p, (1 - p.mix) / p.mix, 1 - p.mix);
}

}  // namespace

cudaError_t ddim_step_cuda(const DdimStepParams& p, int64_t numel, cudaStream_t stream) {
  const bool wide = p.x.dtype == DType::kFloat64;
  return launch_elements(wide ? ddim_step_kernel<double> : ddim_step_kernel<float>, numel, stream, p);
}

cudaError_t leapfrog_step_cuda(const LeapfrogStepParams& p, int64_t numel, cudaStream_t stream) {
  const bool wide = p.far.dtype == DType::kFloat64;
  return launch_elements(wide ? leapfrog_step_kernel<double> : leapfrog_step_kernel<float>, numel, stream, p);
}

cudaError_t edict_mix_cuda(const EdictParams& p, int64_t numel, cudaStream_t stream) {
  return edict<false>(p, numel, stream);
}

cudaError_t edict_unmix_cuda(const EdictParams& p, int64_t numel, cudaStream_t stream) {
  return edict<true>(p, numel, stream);
}

cudaError_t exact_leapfrog_cuda(const ExactLeapfrogParams& p, int64_t numel, cudaStream_t stream) {
  return launch_elements(exact_leapfrog_kernel, numel, stream, p);
}

cudaError_t exact_mix_cuda(const ExactEdictParams& p, int64_t numel, cudaStream_t stream) {
  return exact_edict<false>(p, numel, stream);
}

cudaError_t exact_unmix_cuda(const ExactEdictParams& p, int64_t numel, cudaStream_t stream) {
  return exact_edict<true>(p, numel, stream);
}
