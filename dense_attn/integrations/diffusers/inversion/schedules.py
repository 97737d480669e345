"""The schedule of a chain: DDIM's on a pipeline's noise schedule, or its flow's own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dense_attn import _checks

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiffusionPipeline

# taken from a config also where they are its defaults
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
NOISE += ("snr_shift_scale",)  # CogVideoX's


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is of a rectified flow."""
    told = scheduler.config.get("use_flow_sigmas")
    if told is None:
        return not hasattr(scheduler, "alphas_cumprod") and hasattr(scheduler, "scale_noise")
    return told


def of_flow(pipe: DiffusionPipeline) -> Any:
    """A copy of the pipeline's scheduler, which its own call sets to the steps."""
    if pipe.scheduler.config.get("stochastic_sampling"):
        kind = type(pipe.scheduler).__name__
        _checks.refuse(
            "pipe", "have a scheduler that adds no noise", f"{kind}, stochastic_sampling"
        )
    return copy.deepcopy(pipe.scheduler)


def of_noise(pipe: DiffusionPipeline, steps: int) -> DDIMScheduler:
    """DDIM on the pipeline's noise schedule, with the timesteps of a chain."""
    from diffusers import CogVideoXDDIMScheduler, DDIMScheduler

    config = pipe.scheduler.config
    if "beta_start" not in config:
        rule = "have a scheduler of Stable Diffusion's noise schedule (betas)"
        _checks.refuse("pipe", rule, type(pipe.scheduler).__name__)
    kind = CogVideoXDDIMScheduler if "snr_shift_scale" in config else DDIMScheduler
    try:
        scheduler = kind.from_config(
            config, **{name: config[name] for name in NOISE if name in config}
        )
    except NotImplementedError:
        _checks.refuse(
            "pipe",
            "have a scheduler of a beta_schedule that DDIM knows",
            repr(config["beta_schedule"]),
        )
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        _checks.refuse("pipe", "predict epsilon or v", scheduler.config.prediction_type)
    alphas, most = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
    if steps > most:
        _checks.refuse(
            "num_inference_steps", f"be at most {most}, the timesteps of pipe's schedule", steps
        )
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps[:steps]  # "trailing" may round to one more, -1
    first = int(scheduler.timesteps[0])
    if first >= len(alphas):
        rule = f"keep the timesteps of pipe's schedule below {len(alphas)}"
        _checks.refuse("num_inference_steps", rule, f"{steps}, which begin at {first}")
    if alphas[first] == 0:
        rule = "have a scheduler that leaves signal at the first timestep"
        rule += ", as timestep_spacing='leading' does"
        _checks.refuse("pipe", rule, f"alpha_bar 0 at timestep {first}")
    return scheduler


def velocities(scheduler: DDIMScheduler) -> Tensor | None:
    """alphas_cumprod where the network returns velocities, None where it returns noise."""
    told = scheduler.config.prediction_type == "v_prediction"
    return scheduler.alphas_cumprod if told else None


def noise_of(alphas: Tensor | None, t: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """The noise in x by a network's estimate, which may be a velocity."""
    if alphas is None:
        return out
    alpha = alphas[int(t)].to(out)
    return alpha.sqrt() * out + (1 - alpha).sqrt() * x
