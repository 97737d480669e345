// Reversible steps, each a line or two of arithmetic on registers. Compiled once per instruction set, with
// DENSE_ATTN_ISA as its name.
#include "cpu/reversible_blocks.h"
#include "cpu/reversible_grid.h"

namespace DENSE_ATTN_ISA {
namespace {

template <class F>
void with_accumulator(DType dtype, const F& f) {
  dtype == DType::kFloat64 ? f(double{}) : f(float{});
}

void ddim_step(const DdimStepParams& p, int64_t begin, int64_t end) {
  with_accumulator(p.x.dtype, [&](auto acc) {
    using Acc = decltype(acc);
    using Vec = VecOf<Acc>;
    const Acc a = p.a, b = p.b, guidance_scale = p.guidance_scale;
    const bool guided = p.eps_uncond.data != nullptr;
    const auto step = [=](Vec& out, Vec x, Vec eps, Vec uncond) {
      out = ::ddim_step(x, eps, uncond, a, b, guidance_scale, guided);
    };
    for_each<Acc>(begin, end, step, Output<Acc>(p.out), Input<Acc>(p.x), Input<Acc>(p.eps), Input<Acc>(p.eps_uncond));
  });
}

void leapfrog_step(const LeapfrogStepParams& p, int64_t begin, int64_t end) {
  with_accumulator(p.far.dtype, [&](auto acc) {
    using Acc = decltype(acc);
    using Vec = VecOf<Acc>;
    const Acc c_far = p.c_far, c_near = p.c_near, c_eps = p.c_eps;
    const auto step = [=](Vec& out, Vec far, Vec near, Vec eps) {
      out = ::leapfrog_step(far, near, eps, c_far, c_near, c_eps);
    };
    for_each<Acc>(begin, end, step, Output<Acc>(p.out), Input<Acc>(p.far), Input<Acc>(p.near), Input<Acc>(p.eps));
  });
}

// The coupling, then `mixing(x, y)`: the mix or its inverse.
template <class Acc, class F>
void edict(const EdictParams& p, int64_t begin, int64_t end, const F& mixing) {
  using Vec = VecOf<Acc>;
  const Acc a = p.a, b = p.b;
  const bool couple_x = p.eps.data && p.couple_x, couple_y = p.eps.data && !p.couple_x;
  const auto step = [=](Vec& x_out, Vec& y_out, Vec x, Vec y, Vec eps) {
    x = couple_x ? couple(x, eps, a, b) : x;
    y = couple_y ? couple(y, eps, a, b) : y;
    mixing(x, y);
    x_out = x, y_out = y;
  };
  for_each<Acc>(begin, end, step, Output<Acc>(p.x_out), Output<Acc>(p.y_out), Input<Acc>(p.x), Input<Acc>(p.y),
                Input<Acc>(p.eps));
}

void edict_mix(const EdictParams& p, int64_t begin, int64_t end) {
  with_accumulator(p.x.dtype, [&](auto acc) {
    using Acc = decltype(acc);
    const Acc mix = p.mix, rest = 1 - p.mix;
    edict<Acc>(p, begin, end, [=](VecOf<Acc>& x, VecOf<Acc>& y) { mix_pair(x, y, mix, rest); });
  });
}

void edict_unmix(const EdictParams& p, int64_t begin, int64_t end) {
  with_accumulator(p.x.dtype, [&](auto acc) {
    using Acc = decltype(acc);
    const Acc mix = p.mix, rest = 1 - p.mix;
    edict<Acc>(p, begin, end, [=](VecOf<Acc>& x, VecOf<Acc>& y) { unmix_pair(x, y, mix, rest); });
  });
}

double exact_leapfrog(const ExactLeapfrogParams& p, int64_t begin, int64_t end) {
  const double c_near = p.c_near, c_eps = p.c_eps, to_latent = p.to_latent;
  const auto step = [=](Real& off, Integer& z_out, Real& latent, Integer far, Integer near, Real eps) {
    const Real change = on_grid(c_near * from_grid(near) + c_eps * eps, off);
    const Real z = on_grid(from_grid(far) + round_to_grid(change), off);
    z_out = to_grid(z);
    latent = to_latent * z;
  };
  OffGrid off;
  for_each<double>(begin, end, step, off, Output<int64_t>(p.z_out), Output<double>(p.latent), Input<int64_t>(p.far),
                   Input<int64_t>(p.near), Input<double>(p.eps));
  return off.any();
}

// The coupling, then `shear(x, y, off)`: two shears or their inverses.
template <class F>
double exact_edict(const ExactEdictParams& p, int64_t begin, int64_t end, const F& shear) {
  const bool couple_x = p.eps.data && p.couple_x, couple_y = p.eps.data && !p.couple_x, latent_x = p.latent_x;
  const double step = p.step, to_latent = p.to_latent;
  const auto pair_step = [=](Real& off, Integer& x_out, Integer& y_out, Real& latent, Integer x_in, Integer y_in,
                             Real eps) {
    Real x = from_grid(x_in), y = from_grid(y_in);
    if (couple_x) x = on_grid(x + round_to_grid(on_grid(step * eps, off)), off);
    if (couple_y) y = on_grid(y + round_to_grid(on_grid(step * eps, off)), off);
    shear(x, y, off);
    x_out = to_grid(x), y_out = to_grid(y);
    latent = to_latent * (latent_x ? x : y);
  };
  OffGrid off;
  for_each<double>(begin, end, pair_step, off, Output<int64_t>(p.x_out), Output<int64_t>(p.y_out),
                   Output<double>(p.latent), Input<int64_t>(p.x), Input<int64_t>(p.y), Input<double>(p.eps));
  return off.any();
}

double exact_mix(const ExactEdictParams& p, int64_t begin, int64_t end) {
  const double x_shear = (1 - p.mix) / p.mix, y_shear = 1 - p.mix;
  return exact_edict(p, begin, end, [=](Real& x, Real& y, Real& off) {
    x = on_grid(x + round_to_grid(on_grid(x_shear * y, off)), off);
    y = on_grid(y + round_to_grid(on_grid(y_shear * x, off)), off);
  });
}

double exact_unmix(const ExactEdictParams& p, int64_t begin, int64_t end) {
  const double x_shear = (1 - p.mix) / p.mix, y_shear = 1 - p.mix;
  return exact_edict(p, begin, end, [=](Real& x, Real& y, Real& off) {
    y = on_grid(y - round_to_grid(on_grid(y_shear * x, off)), off);
    x = on_grid(x - round_to_grid(on_grid(x_shear * y, off)), off);
  });
}

}  // namespace

extern const ReversibleCpu kReversible;
const ReversibleCpu kReversible = {ddim_step,      leapfrog_step, edict_mix,  edict_unmix,
                                   exact_leapfrog, exact_mix,     exact_unmix};

}  // namespace DENSE_ATTN_ISA
