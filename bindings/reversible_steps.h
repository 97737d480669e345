// The reversible steps as ops, for every device: each fills its params and hands them to `run`.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "memory.h"
#include "reversible.h"
#include "tensor_view.h"

// One block of memory without gaps or overlaps, in whatever order of the axes; an axis of one has no stride.
inline bool is_dense(const Tensor& tensor) {
  std::vector<int64_t> axes;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1) axes.push_back(i);
  }
  std::sort(axes.begin(), axes.end(), [&](int64_t a, int64_t b) { return tensor.stride(a) < tensor.stride(b); });
  int64_t expected = 1;
  for (const int64_t axis : axes) {
    if (tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
  }
  return true;
}

// As many elements as the kernels of a library's device take.
int64_t most_elements();

// The first operand of a step, which the others must resemble.
class Operands {
 public:
  Operands(const char* name, const Tensor& first, std::optional<ScalarType> dtype = std::nullopt)
      : name_(name), first_(first) {
    require_kind(name, first, dtype.value_or(first.scalar_type()));
    REQUIRE(first.numel() == 0 || is_dense(first), name, " must be dense, got shape ", shape_of(first), " and strides ",
            strides_of(first));
    REQUIRE(first.numel() <= most_elements(), name, " must have at most ", most_elements(), " elements, got ",
            first.numel());
  }

  FlatView floats(const char* name, const Tensor& tensor) const {
    const DType dtype = dtype_of(name, tensor);
    return {memory(name, tensor, tensor.scalar_type()), dtype};
  }
  FlatView floats(const char* name, const std::optional<Tensor>& tensor) const {
    return tensor ? floats(name, *tensor) : FlatView{};
  }
  // Of the first operand's dtype.
  FlatView twin(const char* name, const Tensor& tensor) const {
    void* data = memory(name, tensor, first_.scalar_type());
    return {data, dtype_of(name, tensor)};
  }
  FlatView grid(const char* name, const Tensor& tensor) const { return {memory(name, tensor, ScalarType::Long), {}}; }

  // New memory in the first operand's order.
  Tensor empty() const { return allocate_like(first_); }
  Tensor empty(ScalarType dtype) const { return allocate_like(first_, dtype); }

 private:
  void* memory(const char* name, const Tensor& tensor, ScalarType dtype) const {
    require_kind(name, tensor, dtype);
    if (kOnGpu) require_device(name, tensor, name_, first_);
    bool same_shape = tensor.dim() == first_.dim(), same_strides = true;
    for (int64_t i = 0; same_shape && i < tensor.dim(); ++i) {
      same_shape = tensor.size(i) == first_.size(i);
      same_strides &= tensor.size(i) < 2 || tensor.stride(i) == first_.stride(i);
    }
    REQUIRE(same_shape, name, " must have ", name_, "'s shape ", shape_of(first_), ", got ", shape_of(tensor));
    REQUIRE(same_strides || tensor.numel() == 0, name, " must be dense and have ", name_, "'s strides ",
            strides_of(first_), ", got ", strides_of(tensor));
    return tensor.data_ptr();
  }

  const char* name_;
  const Tensor& first_;
};

template <void (*run)(const DdimStepParams&, const Tensor&)>
Tensor ddim_step(const Tensor& x, const Tensor& eps, const std::optional<Tensor>& eps_uncond, double a, double b,
                 double guidance_scale) {
  const Operands operands("x", x);
  DdimStepParams p{};
  p.a = a, p.b = b, p.guidance_scale = guidance_scale;
  p.x = operands.twin("x", x), p.eps = operands.floats("eps", eps);
  p.eps_uncond = operands.floats("eps_uncond", eps_uncond);
  if (eps_uncond) require_kind("eps_uncond", *eps_uncond, eps.scalar_type());
  const Tensor out = operands.empty();
  p.out = operands.twin("out", out);
  run(p, x);
  return out;
}

template <void (*run)(const LeapfrogStepParams&, const Tensor&)>
Tensor leapfrog_step(const Tensor& far, const Tensor& near, const Tensor& eps, double c_far, double c_near,
                     double c_eps) {
  const Operands operands("far", far);
  LeapfrogStepParams p{};
  p.c_far = c_far, p.c_near = c_near, p.c_eps = c_eps;
  p.far = operands.twin("far", far), p.near = operands.twin("near", near), p.eps = operands.floats("eps", eps);
  const Tensor out = operands.empty();
  p.out = operands.twin("out", out);
  run(p, far);
  return out;
}

template <void (*run)(const EdictParams&, const Tensor&)>
std::tuple<Tensor, Tensor> edict(const Tensor& x, const Tensor& y, const std::optional<Tensor>& eps, double a, double b,
                                 double mix, bool couple_x) {
  const Operands operands("x", x);
  EdictParams p{};
  p.a = a, p.b = b, p.mix = mix, p.couple_x = couple_x;
  p.x = operands.twin("x", x), p.y = operands.twin("y", y), p.eps = operands.floats("eps", eps);
  const Tensor x_out = operands.empty(), y_out = operands.empty();
  p.x_out = operands.twin("x_out", x_out), p.y_out = operands.twin("y_out", y_out);
  run(p, x);
  return {x_out, y_out};
}

// far, of this name, moved; near may have no data.
template <void (*run)(const ExactLeapfrogParams&, const Tensor&)>
std::tuple<Tensor, Tensor> exact_move(const Operands& operands, const char* name, const Tensor& far,
                                      const FlatView& near, const Tensor& eps, double c_near, double c_eps,
                                      double to_latent, ScalarType dtype) {
  ExactLeapfrogParams p{};
  p.c_near = c_near, p.c_eps = c_eps, p.to_latent = to_latent;
  dtype_of("dtype", dtype);
  p.far = operands.grid(name, far), p.near = near, p.eps = operands.floats("eps", eps);
  const Tensor z_out = operands.empty(), latent = operands.empty(dtype);
  p.z_out = operands.grid("z_out", z_out), p.latent = operands.floats("latent", latent);
  run(p, far);
  return {z_out, latent};
}

template <void (*run)(const ExactLeapfrogParams&, const Tensor&)>
std::tuple<Tensor, Tensor> exact_leapfrog(const Tensor& far, const Tensor& near, const Tensor& eps, double c_near,
                                          double c_eps, double to_latent, ScalarType dtype) {
  const Operands operands("far", far, ScalarType::Long);
  const FlatView near_view = operands.grid("near", near);
  return exact_move<run>(operands, "far", far, near_view, eps, c_near, c_eps, to_latent, dtype);
}

template <void (*run)(const ExactLeapfrogParams&, const Tensor&)>
std::tuple<Tensor, Tensor> exact_couple(const Tensor& z, const Tensor& eps, double step, double to_latent,
                                        ScalarType dtype) {
  const Operands operands("z", z, ScalarType::Long);
  return exact_move<run>(operands, "z", z, {}, eps, 0, step, to_latent, dtype);
}

template <void (*run)(const ExactEdictParams&, const Tensor&)>
std::tuple<Tensor, Tensor, Tensor> exact_edict(const Tensor& x, const Tensor& y, const std::optional<Tensor>& eps,
                                               double step, double mix, bool couple_x, double to_latent, bool latent_x,
                                               ScalarType dtype) {
  const Operands operands("x", x, ScalarType::Long);
  ExactEdictParams p{};
  p.step = step, p.mix = mix, p.to_latent = to_latent, p.couple_x = couple_x, p.latent_x = latent_x;
  REQUIRE(mix != 0, "mix must not be 0, got ", mix);
  dtype_of("dtype", dtype);
  p.x = operands.grid("x", x), p.y = operands.grid("y", y), p.eps = operands.floats("eps", eps);
  const Tensor x_out = operands.empty(), y_out = operands.empty(), latent = operands.empty(dtype);
  p.x_out = operands.grid("x_out", x_out), p.y_out = operands.grid("y_out", y_out);
  p.latent = operands.floats("latent", latent);
  run(p, x);
  return {x_out, y_out, latent};
}
