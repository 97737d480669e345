"""What exact chains do: scenes inverted and made again, and noise optimised for a thing's colour or its place."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dense_attn import _memory, ddim_step, ddim_step_inverse, spectral_residual_saliency
from dense_attn.integrations.diffusers import invert, optimize, reconstruct

from .scenes import COLOURS, PRESENT, SHAPES, SIDE, Scene, colour_masks, draw_scene, render
from .score import only_palette, summary

WAYS = {
    "exact EDICT": (torch.float32, {}),
    "float64 EDICT": (torch.float64, {"exact": False}),
    "float32 EDICT": (torch.float32, {"exact": False}),
    "float16 EDICT": (torch.float16, {"exact": False}),
}
CLIP = 3e-2  # of an element of the gradient
CLOSE = 3.0  # pixels from where a thing should be


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


class Goal(NamedTuple):
    """Prompts that leave something open, and what decides it."""

    prompts: list[str]
    loss: Callable[[Tensor], Tensor]  # of images [B, 3, H, W] in -1..1, or of crops, to [B]
    weight: float  # of the loss
    reached: Callable[[Tensor], Tensor]  # images in 0..1 to bool [B]


def optimisation(
    pipe: StableDiffusionPipeline, count: int, updates: int, lengths: tuple[int, ...] = (10, 40)
) -> dict[str, Any]:
    """DOODL and SGOOL at equal updates, towards colours and places; costs of chains of lengths."""
    result: dict[str, Any] = {"prompts": count, "updates": updates, "goals": {}}
    for name, goal in {"colour": colour_goal(count), "place": place_goal(count)}.items():
        ways = {"DOODL": None, "SGOOL": spectral_residual_saliency}
        result["goals"][name] = {way: _before_and_after(pipe, goal, updates, fn) for way, fn in ways.items()}
    result["gradient"] = {str(steps): _cost(pipe, steps) for steps in lengths}
    return result


def _before_and_after(
    pipe: StableDiffusionPipeline, goal: Goal, updates: int, saliency: Callable[[Tensor], Tensor] | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"loss": [], "reached": []}
    for steps in (0, updates):
        found = optimize(
            pipe, goal.prompts, lambda images: goal.weight * goal.loss(images).sum(), saliency, num_inference_steps=10,
            generator=torch.Generator().manual_seed(0), output_type="pt", progress=False, steps=steps, clip=CLIP,
        )  # fmt: skip
        row["loss"].append(summary(goal.loss(found.images * 2 - 1), len(goal.prompts)))
        row["reached"].append(summary(goal.reached(found.images).float(), len(goal.prompts)))
    return row | {"seconds": found.seconds, "peak_bytes": found.peak_bytes or 0}


def colour_goal(count: int) -> Goal:
    """Things of no said colour; reached: the wanted colour and no other."""
    rng, names = random.Random(23), list(COLOURS)
    wanted = [names[i % len(names)] for i in range(count)]

    def reached(images: Tensor) -> Tensor:
        return torch.stack([only_palette(images[b : b + 1], [name])[0] for b, name in enumerate(wanted)])

    loss = colour_loss(torch.tensor([COLOURS[name] for name in wanted]) * 2 - 1)
    return Goal([f"a {rng.choice(SHAPES)} on gray" for _ in wanted], loss, 100.0, reached)


def place_goal(count: int) -> Goal:
    """Things of which no prompt says where; reached: the thing is there, and nearer than `CLOSE`."""
    rng, names = random.Random(29), list(COLOURS)
    own = [names[i % len(names)] for i in range(count)]
    loss = place_loss(torch.tensor([[rng.uniform(0.25 * SIDE, 0.75 * SIDE) for _ in "yx"] for _ in own]))

    def reached(images: Tensor) -> Tensor:
        found = colour_masks(images)
        there = torch.stack([found[name][b].sum() >= PRESENT for b, name in enumerate(own)])
        return there & (loss(images * 2 - 1) < CLOSE)

    return Goal([f"a {name} {rng.choice(SHAPES)} on gray" for name in own], loss, 10.0, reached)


def colour_loss(wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """How far the mean colour of what is not gray is from wanted [B, 3]: the same for a picture and a crop of it."""

    def loss(images: Tensor) -> Tensor:
        chroma = _chroma(images)
        mean = (chroma * images).sum((2, 3)) / chroma.sum((2, 3)).clamp(min=1e-6)
        return (mean - wanted).square().mean(1)

    return loss


def place_loss(wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """How many pixels the centre of what is not gray is from wanted [B, 2], y and x: in a crop, another place."""

    def loss(images: Tensor) -> Tensor:
        chroma, axis = _chroma(images), torch.arange(SIDE) + 0.5
        total = chroma.sum((1, 2, 3)).clamp(min=1e-6)
        centre = torch.stack([(chroma.sum((1, dim)) * axis).sum(1) / total for dim in (3, 2)], 1)
        return ((centre - wanted).square().sum(1) + 1e-6).sqrt()  # has a gradient at 0

    return loss


def _chroma(images: Tensor) -> Tensor:
    """How far each pixel is from gray, [B, 1, H, W]."""
    return images.amax(1, keepdim=True) - images.amin(1, keepdim=True)


def _cost(pipe: StableDiffusionPipeline, steps: int) -> dict[str, dict[str, float]]:
    """Seconds and memory of one gradient: reversible, and plain DDIM with a checkpoint a step."""
    prompt, options = "a circle on gray", {"num_inference_steps": steps, "output_type": "pt", "progress": False}
    eps, times, alphas = _eps(pipe, [prompt], steps)
    loss = colour_loss(torch.tensor([COLOURS["red"]]) * 2 - 1)

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
    for goal, ways in result["goals"].items():
        for name, row in ways.items():
            loss, reached = (
                " to ".join(f"{v['mean']:.3f} +- {v['error']:.3f}" for v in row[key]) for key in ("loss", "reached")
            )
            lines.append(f"{goal}, {name}: loss {loss}; reached {reached}; "
                         f"{row['seconds']:.1f} s, {row['peak_bytes'] / 1e6:.0f} MB")  # fmt: skip
    for steps, ways in result["gradient"].items():
        cells = (f"{name} {way['seconds']:.2f} s, {way['peak_bytes'] / 1e6:.0f} MB" for name, way in ways.items())
        lines.append(f"one gradient through {steps} steps: {'; '.join(cells)}")
    return "\n".join(lines)
