"""The study of exact inversion: scenes inverted and made again, beside DDIM's and floats'."""

from __future__ import annotations

import random
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dense_attn import _progress, ddim_step, ddim_step_inverse
from dense_attn.integrations.diffusers import invert, reconstruct
from dense_attn.integrations.diffusers.inversion.chain import Chain, Settings

from .scenes import Scene, draw_scene, render
from .score import markdown

EXACT = "exact EDICT"
WAYS = {
    EXACT: (torch.float32, {}),
    "float64 EDICT": (torch.float64, {"exact": False}),
    "float32 EDICT": (torch.float32, {"exact": False}),
    "float16 EDICT": (torch.float16, {"exact": False}),
}


def study(pipe: StableDiffusionPipeline, count: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """The errors of scenes that were inverted and made again, for chains of several lengths."""
    rng = random.Random(19)
    scenes = [draw_scene(rng, 2) for _ in range(count)]
    rows: dict[str, dict[str, Any]] = {"DDIM": {}} | {name: {} for name in WAYS}
    with _progress.bar(len(rows) * len(lengths), "inversion", shown=True, unit="chain") as advance:
        for steps in lengths:
            rows["DDIM"][str(steps)] = _found(_ddim_errors(pipe, scenes, steps))
            advance()
            for name in WAYS:
                rows[name][str(steps)] = _edict_row(pipe, scenes, steps, name)
                advance()
    return {"scenes": count, "lengths": list(lengths), "rows": rows}


def _found(errors: Tensor) -> dict[str, Any]:
    """The error of all scenes, of the best and of the worst; None for what is no number."""
    together = {"all": errors.square().mean().sqrt(), "best": errors.min(), "worst": errors.max()}
    return {name: value.item() if value.isfinite() else None for name, value in together.items()}


def _edict_row(
    pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int, name: str
) -> dict[str, Any]:
    """The errors of one of WAYS; an exact chain too long for its grid is refused, in words."""
    dtype, options = WAYS[name]
    pipe.to(dtype)
    try:
        return _found(_edict_errors(pipe, scenes, steps, options))
    except (ValueError, RuntimeError) as error:
        if name != EXACT:
            raise
        return {"refused": str(error)}
    finally:
        pipe.to(torch.float32)


def _edict_errors(
    pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int, options: dict
) -> Tensor:
    images, captions = render(scenes), [scene.caption for scene in scenes]
    found = invert(pipe, images, captions, num_inference_steps=steps, guidance_scale=1.0, **options)
    back = reconstruct(pipe, found, output_type="latent").double()
    return _errors(back, _latents(pipe, images))


@torch.no_grad()
def _ddim_errors(pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int) -> Tensor:
    """Errors of the usual inversion: a step's estimate is taken at the latents before it."""
    start = _latents(pipe, render(scenes)).float()
    captions = [scene.caption for scene in scenes]
    chain = Chain(pipe, Settings(captions, "", 1.0, steps, {"method": "ddim"}), len(captions))
    times, bars, x = chain.sampler.timesteps, chain.sampler.alpha_bars, start
    for i in reversed(range(steps)):
        x = ddim_step_inverse(x, chain.eps(x, times[i]), bars[i], bars[i + 1])
    for i in range(steps):
        x = ddim_step(x, chain.eps(x, times[i]), bars[i], bars[i + 1])
    return _errors(x.double(), start.double())


def _latents(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    return pipe.vae.encode(images.double() * 2 - 1).latent_dist.mode()


def _errors(x: Tensor, y: Tensor) -> Tensor:
    """Each scene's error, root mean square over the latents' own [B]."""
    return ((x - y).flatten(1).square().mean(1) / y.flatten(1).square().mean(1)).sqrt()


def table(result: dict[str, Any]) -> str:
    """The errors as Markdown."""
    head = [
        f"error of {result['scenes']} scenes, steps",
        *(str(steps) for steps in result["lengths"]),
    ]
    return markdown(
        head, [[name, *map(_shown, row.values())] for name, row in result["rows"].items()]
    )


def _shown(found: dict[str, Any]) -> str:
    if "refused" in found:
        return "refused"
    return "NaN" if found["all"] is None else f"{found['all']:.1e}"
