"""One image with regions, and models of every kind that see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dense_attn.integrations.comfyui import Region

from . import denoisers
from .sampling import BaseModel, ModelPatcher, sampling_function

SIGMA = 0.9  # of flows; of the others 14.6 times as much
FLOWS = "WanModel", "Flux", "QwenImageTransformer2DModel", "OpenAISignatureMMDITWrapper"
KINDS = ("UNetModel", *FLOWS)
LENGTHS = 5, 3, 4  # tokens of the prompt and of two regions


def made(kind: str) -> ModelPatcher:
    """A model of a kind, in float64."""
    torch.manual_seed(0)
    denoiser = getattr(denoisers, kind)().double().requires_grad_(False)
    return ModelPatcher(BaseModel(denoiser, kind in FLOWS))


def noise(kind: str, batch: int = 1, size: tuple[int, int] = (6, 10)) -> Tensor:
    """Latents that are not square; of a video's two frames where the model makes one."""
    shape = (batch, 4, 2, *size) if kind == "WanModel" else (batch, 4, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def text(seed: int, tokens: int) -> list[Any]:
    """A conditioning."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, denoisers.TEXT, generator=generator).double(), {}]]


POSITIVE, NEGATIVE = text(2, LENGTHS[0]), text(3, LENGTHS[0])
REGION_TEXTS = text(4, LENGTHS[1]), text(5, LENGTHS[2])


def box(rows: tuple[float, float], columns: tuple[float, float], size: int = 40) -> Tensor:
    """A mask of ones in a box, of fractions of its sides."""
    mask = torch.zeros(size, size)
    (top, bottom), (left, right) = (
        tuple(round(x * size) for x in ends) for ends in (rows, columns)
    )
    mask[top:bottom, left:right] = 1
    return mask


def regions(*masks: Tensor) -> list[Region]:
    """Two regions, of these masks or of two boxes that overlap."""
    masks = masks or (box((0, 0.5), (0, 0.6)), box((0.3, 1), (0.4, 1)))
    return [Region(mask, tokens) for mask, tokens in zip(masks, REGION_TEXTS)]


def sigma_of(model: ModelPatcher, part: float = SIGMA) -> Tensor:
    """A time of the run, one sigma."""
    top = 1.0 if model.model.model_sampling.flow else 14.6
    return torch.tensor([part * top], dtype=torch.float64)


def estimate(
    model: ModelPatcher, x: Tensor, chunks: tuple[int, ...] = (0,), part: float = SIGMA, **more: Any
) -> Tensor:
    """One call of the model for prompts (0) and negative prompts (1), in this order."""
    options = model.options()["transformer_options"] | {"cond_or_uncond": list(chunks)}
    context = torch.cat([(POSITIVE, NEGATIVE)[i][0][0].expand(len(x), -1, -1) for i in chunks])
    sigma = sigma_of(model, part).to(x.dtype)
    given = torch.cat([x] * len(chunks)), sigma.expand(len(x) * len(chunks))
    return model.model.apply_model(
        *given, c_crossattn=context.to(x), transformer_options=options, **more
    )


def guided(model: ModelPatcher, x: Tensor, sigmas: Tensor, step: int, scale: float = 4.0) -> Tensor:
    """One step of a sampler: the guided estimate of the denoised latents."""
    base = model.model
    conds = [[{"model_conds": {"c_crossattn": one[0][0]}}] for one in (NEGATIVE, POSITIVE)]
    return sampling_function(base, x, sigmas[step : step + 1], *conds, scale, model.options(sigmas))
