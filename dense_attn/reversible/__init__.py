"""DDIM's step and its inverse; samplers of DDIM and flows that run backwards to the last bit."""

from dense_attn.reference import OffGridError
from dense_attn.reversible.ddim import ddim_step, ddim_step_inverse
from dense_attn.reversible.sampler import ReversibleSampler

__all__ = ["OffGridError", "ReversibleSampler", "ddim_step", "ddim_step_inverse"]
