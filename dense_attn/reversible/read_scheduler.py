"""The schedule of a scheduler of diffusers, by what it says: its kind is told by no name."""

from __future__ import annotations

from torch import Tensor

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
        rule = "have timesteps, and alphas_cumprod, or a flow's sigmas (with scale_noise)"
        _checks.refuse("scheduler", rule, kind, TypeError)
    if getattr(scheduler, "num_inference_steps", None) is None:
        _checks.refuse("scheduler", "know its steps, by set_timesteps", f"{kind} without them")
    order = getattr(scheduler, "order", 1)
    if order != 1:
        _checks.refuse("scheduler", "have one timestep a step", f"{kind}, which has {order}")
    predicts = getattr(config, "prediction_type", None)
    if not flow and predicts == "flow_prediction":
        _checks.refuse("scheduler", "use_flow_sigmas for flow_prediction", f"{kind} without")
    if isinstance(timesteps, Tensor):
        timesteps = timesteps.clone()  # what a chain hands out is its own
    if flow:
        if predicts not in (None, "flow_prediction"):
            rule = "have a prediction_type of flow_prediction on flow sigmas"
            _checks.refuse("scheduler", rule, f"{kind} with {predicts!r}")
        steps = schedule.from_flow(sigmas, timesteps)
        _check_direction(kind, [float(t) for t in timesteps], [float(s) for s in sigmas])
        return steps
    if sigmas is not None:
        return schedule.from_ratios(sigmas, timesteps)
    final = getattr(scheduler, "final_alpha_cumprod", 1.0)
    return schedule.from_alphas(alphas, timesteps, final)


def _check_direction(kind: str, timesteps: list[float], sigmas: list[float]) -> None:
    """Refuse a flow whose time runs against its sigmas: its velocity has another sign."""
    if (timesteps[-1] - timesteps[0]) * (sigmas[-1] - sigmas[0]) < 0:
        got = f"{kind}, whose go from {timesteps[0]:g} to {timesteps[-1]:g}"
        _checks.refuse("scheduler", "have timesteps that fall as its sigmas do", got)
