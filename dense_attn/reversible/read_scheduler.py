"""The schedule of a scheduler of diffusers, by what it says: its kind is told by no name."""

from __future__ import annotations

from dense_attn import _checks
from dense_attn.reversible import schedule
from dense_attn.reversible.schedule import Schedule

# what is refused in its numbers, as a caller knows it
_READ = ("timesteps", "alphas_cumprod", "final_alpha_cumprod", "sigmas")
WORDS = {name: f"scheduler's {name}" for name in _READ}


def read(scheduler: object) -> Schedule:
    """The schedule that set_timesteps has left, without the scheduler's own rule of a step."""
    kind = type(scheduler).__name__
    timesteps, alphas, sigmas = (
        getattr(scheduler, name, None) for name in ("timesteps", "alphas_cumprod", "sigmas")
    )
    config = getattr(scheduler, "config", None)
    flow = getattr(config, "use_flow_sigmas", None)
    if flow is None:
        flow = alphas is None and hasattr(scheduler, "scale_noise")
    if timesteps is None or (sigmas is None if flow else alphas is None):
        rule = "have timesteps, and alphas_cumprod or the sigmas of a rectified flow"
        _checks.refuse("scheduler", rule, kind, TypeError)
    if getattr(scheduler, "num_inference_steps", None) is None:
        _checks.refuse("scheduler", "know its steps, by set_timesteps", f"{kind} without them")
    order = getattr(scheduler, "order", 1)
    if order != 1:
        _checks.refuse("scheduler", "have one timestep a step", f"{kind}, which has {order}")
    if not flow and getattr(config, "prediction_type", None) == "flow_prediction":
        _checks.refuse("scheduler", "use_flow_sigmas for flow_prediction", f"{kind} without")
    if flow:
        return schedule.from_flow(sigmas, timesteps)
    if sigmas is not None:
        return schedule.from_ratios(sigmas, timesteps)
    final = getattr(scheduler, "final_alpha_cumprod", 1.0)
    return schedule.from_alphas(alphas, timesteps, final)
