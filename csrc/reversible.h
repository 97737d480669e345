// Reversible DDIM steps: parameters and entry points, shared by every device. The maths is in dense_attn/reference/.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/tensor_view.h"

// Dense memory without axes: element i of one operand meets element i of the others.
struct FlatView {
  void* data = nullptr;
  DType dtype{};
};

constexpr double kGridLimit = 0x1p50;
constexpr int64_t kOffGrid = int64_t{1} << 62;  // marks a coordinate that left the grid, where no error can be raised

struct DdimStepParams {
  double a, b, guidance_scale;
  FlatView x, eps, eps_uncond;  // eps_uncond may have no data
  FlatView out;
};

struct LeapfrogStepParams {
  double c_far, c_near, c_eps;
  FlatView far, near, eps;
  FlatView out;
};

struct EdictParams {
  double a, b, mix;
  bool couple_x;
  FlatView x, y, eps;  // eps may have no data
  FlatView x_out, y_out;
};

// On the grid: far, near, x, y and what becomes of them are int64, whatever their view says.
struct ExactLeapfrogParams {
  double c_near, c_eps, to_latent;
  FlatView far, near, eps;
  FlatView z_out, latent;
};

struct ExactEdictParams {
  double step, mix, to_latent;
  bool couple_x, latent_x;
  FlatView x, y, eps;  // eps may have no data
  FlatView x_out, y_out, latent;
};

// The steps on numbers, or on vectors V of numbers S. No product melts into a sum where they are compiled.
template <class V, class S>
HOST_DEVICE V ddim_step(V x, V eps, V uncond, S a, S b, S guidance_scale, bool guided) {
  return a * x + b * (guided ? uncond + guidance_scale * (eps - uncond) : eps);
}

template <class V, class S>
HOST_DEVICE V leapfrog_step(V far, V near, V eps, S c_far, S c_near, S c_eps) {
  return c_far * far + c_near * near + c_eps * eps;
}

template <class V, class S>
HOST_DEVICE V couple(V x, V eps, S a, S b) {
  return a * x + b * eps;
}

// The mix and its inverse; rest is 1 - mix.
template <class V, class S>
HOST_DEVICE void mix_pair(V& x, V& y, S mix, S rest) {
  x = mix * x + rest * y;
  y = rest * x + mix * y;
}

template <class V, class S>
HOST_DEVICE void unmix_pair(V& x, V& y, S mix, S rest) {
  y = (y - rest * x) / mix;
  x = (x - rest * y) / mix;
}

// CPU: work is a range of elements. Steps on the grid return 0, or a number that left it.
struct ReversibleCpu {
  void (*ddim_step)(const DdimStepParams&, int64_t begin, int64_t end);
  void (*leapfrog_step)(const LeapfrogStepParams&, int64_t begin, int64_t end);
  void (*edict_mix)(const EdictParams&, int64_t begin, int64_t end);
  void (*edict_unmix)(const EdictParams&, int64_t begin, int64_t end);
  double (*exact_leapfrog)(const ExactLeapfrogParams&, int64_t begin, int64_t end);
  double (*exact_mix)(const ExactEdictParams&, int64_t begin, int64_t end);
  double (*exact_unmix)(const ExactEdictParams&, int64_t begin, int64_t end);
};
