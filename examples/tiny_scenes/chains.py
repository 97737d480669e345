"""What exact chains do: scenes inverted and made again, and noise optimised until a thing has the colour it should."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dense_attn import _memory, ddim_step, ddim_step_inverse, spectral_residual_saliency
from dense_attn.integrations.diffusers import invert, optimize, reconstruct

from .scenes import COLOURS, SHAPES, Scene, draw_scene, render
from .score import only_palette, summary

WAYS = {
    "exact EDICT": (torch.float32, {}),
    "float64 EDICT": (torch.float64, {"exact": False}),
    "float32 EDICT": (torch.float32, {"exact": False}),
    "float16 EDICT": (torch.float16, {"exact": False}),
}
WEIGHT, CLIP = 100.0, 3e-2  # of the colour's loss, and of an element of its gradient


def inversion(pipe: StableDiffusionPipeline, count: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """The error of scenes that were inverted and made again, root mean square over the latents' own."""
    rng = random.Random(19)
    scenes = [draw_scene(rng, 2) for _ in range(count)]
    rows: dict[str, dict[str, float | None]] = {"DDIM": {}} | {name: {} for name in WAYS}
    for steps in lengths:
        rows["DDIM"][str(steps)] = _ddim_error(pipe, scenes, steps)
        for name, (dtype, options) in WAYS.items():
            pipe.to(dtype)
            try:
                rows[name][str(steps)] = _edict_error(pipe, scenes, steps, dtype, options)
            except (ValueError, RuntimeError) as error:  # an exact chain too long for its grid says so
                rows[name][str(steps)] = None
                print(f"{name}, {steps} steps: {error}")
            finally:
                pipe.to(torch.float32)
    return {"scenes": count, "lengths": list(lengths), "rows": rows}


def _edict_error(
    pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int, dtype: torch.dtype, options: dict
) -> float:
    images, captions = render(scenes), [scene.caption for scene in scenes]
    found = invert(pipe, images, captions, num_inference_steps=steps, guidance_scale=1.0, **options)
    back = reconstruct(pipe, found, output_type="latent").double()
    return _error(back, _latents(pipe, images))


@torch.no_grad()
def _ddim_error(pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int) -> float:
    """The usual inversion: the estimate of a step taken at the latents before it."""
    start = _latents(pipe, render(scenes)).float()
    eps, times, alphas = _eps(pipe, [scene.caption for scene in scenes], steps)
    x = start
    for i in reversed(range(steps)):
        x = ddim_step_inverse(x, eps(x, times[i]), alphas[i], alphas[i + 1])
    for i in range(steps):
        x = ddim_step(x, eps(x, times[i]), alphas[i], alphas[i + 1])
    return _error(x.double(), start.double())


def _latents(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    return pipe.vae.encode(images.double() * 2 - 1).latent_dist.mode()


def _error(x: Tensor, y: Tensor) -> float:
    return ((x - y).square().mean() / y.square().mean()).sqrt().item()


def _eps(pipe: StableDiffusionPipeline, captions: list[str], steps: int) -> tuple[Callable, list[int], list[float]]:
    """The noise estimate, timesteps, and alpha_bar before each step and after the last."""
    text = pipe.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=False)[0].detach()
    pipe.scheduler.set_timesteps(steps)
    times = pipe.scheduler.timesteps.tolist()
    bars = pipe.scheduler.alphas_cumprod
    alphas = [bars[t].item() for t in times] + [pipe.scheduler.final_alpha_cumprod.item()]

    def eps(x: Tensor, t: int) -> Tensor:
        v = pipe.unet(x, t, encoder_hidden_states=text).sample
        return bars[t].sqrt() * v + (1 - bars[t]).sqrt() * x

    return eps, times, alphas


def optimisation(
    pipe: StableDiffusionPipeline, count: int, updates: int, lengths: tuple[int, ...] = (10, 40)
) -> dict[str, Any]:
    """DOODL and SGOOL at equal updates, towards colours that the prompts leave open; costs of chains of lengths."""
    rng = random.Random(23)
    prompts, names = [f"a {rng.choice(SHAPES)} on gray" for _ in range(count)], list(COLOURS)
    wanted = [names[i % len(names)] for i in range(count)]
    loss = _colour_loss(torch.tensor([COLOURS[name] for name in wanted]) * 2 - 1)
    result: dict[str, Any] = {"prompts": count, "updates": updates, "ways": {}}
    for name, saliency in (("DOODL", None), ("SGOOL", spectral_residual_saliency)):
        row: dict[str, Any] = {"loss": [], "right": []}
        for steps in (0, updates):
            found = optimize(
                pipe, prompts, lambda images: WEIGHT * loss(images).sum(), saliency, num_inference_steps=10,
                generator=torch.Generator().manual_seed(0), output_type="pt", progress=False, steps=steps, clip=CLIP,
            )  # fmt: skip
            row["loss"].append(summary(loss(found.images * 2 - 1), count))
            right = torch.stack([only_palette(found.images[b : b + 1], [c])[0] for b, c in enumerate(wanted)])
            row["right"].append(summary(right.float(), count))
        result["ways"][name] = row | {"seconds": found.seconds, "peak_bytes": found.peak_bytes or 0}
    result["gradient"] = {str(steps): _cost(pipe, steps) for steps in lengths}
    return result


def _colour_loss(wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """How far the mean colour of what is not gray is from wanted [B, 3]: the same for a picture and a crop of it."""

    def loss(images: Tensor) -> Tensor:  # [B, 3, H, W] in -1..1 to [B]
        chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
        mean = (chroma * images).sum((2, 3)) / chroma.sum((2, 3)).clamp(min=1e-6)
        return (mean - wanted).square().mean(1)

    return loss


def _cost(pipe: StableDiffusionPipeline, steps: int) -> dict[str, dict[str, float]]:
    """Seconds and memory of one gradient: reversible, and plain DDIM with a checkpoint a step."""
    prompt, options = "a circle on gray", {"num_inference_steps": steps, "output_type": "pt", "progress": False}
    eps, times, alphas = _eps(pipe, [prompt], steps)
    loss = _colour_loss(torch.tensor([COLOURS["red"]]) * 2 - 1)

    def checkpointed() -> None:
        x = torch.randn(1, 12, 16, 16, requires_grad=True)
        y = x
        for i in range(steps):
            y = checkpoint(
                lambda z, i=i: ddim_step(z, eps(z, times[i]), alphas[i], alphas[i + 1]), y, use_reentrant=False
            )
        loss(pipe.vae.decode(y).sample).sum().backward()

    ways = {
        "exact EDICT": lambda: optimize(pipe, prompt, lambda images: loss(images).sum(), steps=1, **options),
        "DDIM, a checkpoint a step": checkpointed,
    }
    found = {}
    for name, way in ways.items():
        way()
        start = time.perf_counter()
        peak, _ = _memory.peak_extra_bytes(way)
        found[name] = {"seconds": time.perf_counter() - start, "peak_bytes": peak or 0}
    return found


def inversion_table(result: dict[str, Any]) -> str:
    """The errors as text."""
    lines = [f"relative error of {result['scenes']} scenes after inversion and sampling"]
    lines.append(f"{'steps':16}" + "".join(f"{steps:>10}" for steps in result["lengths"]))
    for name, row in result["rows"].items():
        lines.append(f"{name:16}" + "".join(f"{'refused' if e is None else f'{e:.1e}':>10}" for e in row.values()))
    return "\n".join(lines)


def optimisation_table(result: dict[str, Any]) -> str:
    """Losses and costs as text."""
    lines = [f"{result['updates']} updates of the noise of {result['prompts']} prompts, before and after"]
    for name, row in result["ways"].items():
        loss, right = (
            " to ".join(f"{v['mean']:.3f} +- {v['error']:.3f}" for v in row[key]) for key in ("loss", "right")
        )
        lines.append(f"{name}: loss {loss}; right colour alone {right}; "
                     f"{row['seconds']:.1f} s, {row['peak_bytes'] / 1e6:.0f} MB")  # fmt: skip
    for steps, ways in result["gradient"].items():
        cells = (f"{name} {way['seconds']:.2f} s, {way['peak_bytes'] / 1e6:.0f} MB" for name, way in ways.items())
        lines.append(f"one gradient through {steps} steps: {'; '.join(cells)}")
    return "\n".join(lines)
