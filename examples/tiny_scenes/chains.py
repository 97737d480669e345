"""What exact chains do: scenes inverted and made again, and noise optimised for a thing's colour or
its place.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dense_attn import (
    ReversibleSampler,
    _memory,
    _progress,
    ddim_step,
    ddim_step_inverse,
    spectral_residual_saliency,
)
from dense_attn.integrations.diffusers import invert, optimize, reconstruct

from .scenes import COLOURS, PRESENT, SHAPES, SIDE, Scene, colour_masks, draw_scene, render
from .score import kernels, markdown, only_palette, said, summary

WAYS = {
    "exact EDICT": (torch.float32, {}),
    "float64 EDICT": (torch.float64, {"exact": False}),
    "float32 EDICT": (torch.float32, {"exact": False}),
    "float16 EDICT": (torch.float16, {"exact": False}),
}
SALIENCY = {"DOODL": None, "SGOOL": spectral_residual_saliency}
CLIP = 3e-2  # of an element of the gradient
CLOSE = 3.0  # pixels from where a thing should be


def inversion(
    pipe: StableDiffusionPipeline, count: int, lengths: tuple[int, ...]
) -> dict[str, Any]:
    """The error of scenes that were inverted and made again, root mean square over the latents'
    own.
    """
    rng = random.Random(19)
    scenes = [draw_scene(rng, 2) for _ in range(count)]
    rows: dict[str, dict[str, Any]] = {"DDIM": {}} | {name: {} for name in WAYS}
    with _progress.bar(len(rows) * len(lengths), "inversion", shown=True, unit="chain") as advance:
        for steps in lengths:
            rows["DDIM"][str(steps)] = _found(_ddim_errors(pipe, scenes, steps))
            advance()
            for name, (dtype, options) in WAYS.items():
                pipe.to(dtype)
                try:
                    rows[name][str(steps)] = _found(_edict_errors(pipe, scenes, steps, options))
                except (ValueError, RuntimeError) as error:
                    if name != "exact EDICT":
                        raise
                    rows[name][str(steps)] = {
                        "refused": str(error)
                    }  # a chain too long for its grid says so
                finally:
                    pipe.to(torch.float32)
                advance()
    return {"scenes": count, "lengths": list(lengths), "rows": rows}


def _found(errors: Tensor) -> dict[str, Any]:
    """Of all scenes, and of the best and the worst; None for what is not a number any more."""
    together = {"all": errors.square().mean().sqrt(), "best": errors.min(), "worst": errors.max()}
    return {name: value.item() if value.isfinite() else None for name, value in together.items()}


def _edict_errors(
    pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int, options: dict
) -> Tensor:
    images, captions = render(scenes), [scene.caption for scene in scenes]
    found = invert(pipe, images, captions, num_inference_steps=steps, guidance_scale=1.0, **options)
    back = reconstruct(pipe, found, output_type="latent").double()
    return _errors(back, _latents(pipe, images))


@torch.no_grad()
def _ddim_errors(pipe: StableDiffusionPipeline, scenes: list[Scene], steps: int) -> Tensor:
    """The usual inversion: the estimate of a step taken at the latents before it."""
    start = _latents(pipe, render(scenes)).float()
    eps, times, alphas = _eps(pipe, [scene.caption for scene in scenes], steps)
    x = start
    for i in reversed(range(steps)):
        x = ddim_step_inverse(x, eps(x, times[i]), alphas[i], alphas[i + 1])
    for i in range(steps):
        x = ddim_step(x, eps(x, times[i]), alphas[i], alphas[i + 1])
    return _errors(x.double(), start.double())


def _latents(pipe: StableDiffusionPipeline, images: Tensor) -> Tensor:
    return pipe.vae.encode(images.double() * 2 - 1).latent_dist.mode()


def _errors(x: Tensor, y: Tensor) -> Tensor:
    """Of each scene."""
    return ((x - y).flatten(1).square().mean(1) / y.flatten(1).square().mean(1)).sqrt()


def _eps(
    pipe: StableDiffusionPipeline, captions: list[str], steps: int
) -> tuple[Callable, list[int], list[float]]:
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
    pipe: StableDiffusionPipeline, count: int, updates: int, lengths: tuple[int, ...] = (10, 20, 40)
) -> dict[str, Any]:
    """DOODL and SGOOL at equal updates, towards colours and places; costs of chains of lengths."""
    goals: dict[str, Any] = {}
    with _progress.bar(
        len(GOALS) * len(SALIENCY), "optimisation", shown=True, unit="run"
    ) as advance:
        for name, goal_of in GOALS.items():
            goal, losses, goals[name] = goal_of(count), {}, {}
            for way in SALIENCY:
                goals[name][way], losses[way] = _before_and_after(pipe, goal, way, updates)
                advance()
            goals[name]["SGOOL - DOODL"] = summary(losses["SGOOL"] - losses["DOODL"], count)
    gradient = {
        str(steps): _costs(pipe, steps) for steps in _progress.track(lengths, "gradients", "length")
    }
    return {"prompts": count, "updates": updates, "goals": goals, "gradient": gradient}


def _before_and_after(
    pipe: StableDiffusionPipeline, goal: Goal, way: str, updates: int, backend: str = "auto"
) -> tuple[dict[str, Any], Tensor]:
    """Losses [B] at the end, too."""
    row: dict[str, Any] = {"loss": [], "reached": []}
    for steps in (0, updates):
        found = optimize(
            pipe,
            goal.prompts,
            lambda images: goal.weight * goal.loss(images).sum(),
            SALIENCY[way],
            num_inference_steps=10,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            progress=False,
            steps=steps,
            clip=CLIP,
            sampler={"backend": backend},
        )
        losses = goal.loss(found.images * 2 - 1)
        row["loss"].append(summary(losses, len(losses)))
        row["reached"].append(summary(goal.reached(found.images).float(), len(losses)))
    return row | {"seconds": found.seconds, "peak_bytes": found.peak_bytes or 0}, losses


def same_tables(pipe: StableDiffusionPipeline, count: int, updates: int) -> dict[str, Any]:
    """How far the losses of kernels and reference are apart after an optimisation."""
    name, goal = kernels("ReversibleSampler"), colour_goal(count)
    ours, theirs = (
        _before_and_after(pipe, goal, "DOODL", updates, backend)[1]
        for backend in ("auto", "reference")
    )
    apart = (ours - theirs).abs().max().item()
    return {"prompts": count, "updates": updates, "backend": name, "of a loss": apart}


def colour_goal(count: int) -> Goal:
    """Things of no said colour; reached: the wanted colour and no other."""
    rng, names = random.Random(23), list(COLOURS)
    wanted = [names[i % len(names)] for i in range(count)]

    def reached(images: Tensor) -> Tensor:
        return torch.stack(
            [only_palette(images[b : b + 1], [name])[0] for b, name in enumerate(wanted)]
        )

    loss = colour_loss(torch.tensor([COLOURS[name] for name in wanted]) * 2 - 1)
    return Goal([f"a {rng.choice(SHAPES)} on gray" for _ in wanted], loss, 100.0, reached)


def place_goal(count: int) -> Goal:
    """Things of which no prompt says where; reached: the thing is there, and nearer than
    `CLOSE`.
    """
    rng, names = random.Random(29), list(COLOURS)
    own = [names[i % len(names)] for i in range(count)]
    loss = place_loss(
        torch.tensor([[rng.uniform(0.25 * SIDE, 0.75 * SIDE) for _ in "yx"] for _ in own])
    )

    def reached(images: Tensor) -> Tensor:
        found = colour_masks(images)
        there = torch.stack([found[name][b].sum() >= PRESENT for b, name in enumerate(own)])
        return there & (loss(images * 2 - 1) < CLOSE)

    return Goal([f"a {name} {rng.choice(SHAPES)} on gray" for name in own], loss, 10.0, reached)


GOALS = {"colour": colour_goal, "place": place_goal}


def colour_loss(wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """How far the mean colour of what is not gray is from wanted [B, 3]: the same for a picture and
    a crop of it.
    """

    def loss(images: Tensor) -> Tensor:
        chroma = _chroma(images)
        mean = (chroma * images).sum((2, 3)) / chroma.sum((2, 3)).clamp(min=1e-6)
        return (mean - wanted).square().mean(1)

    return loss


def place_loss(wanted: Tensor) -> Callable[[Tensor], Tensor]:
    """How many pixels the centre of what is not gray is from wanted [B, 2], y and x: in a crop,
    another place.
    """

    def loss(images: Tensor) -> Tensor:
        chroma, axis = _chroma(images), torch.arange(SIDE) + 0.5
        total = chroma.sum((1, 2, 3)).clamp(min=1e-6)
        centre = torch.stack([(chroma.sum((1, dim)) * axis).sum(1) / total for dim in (3, 2)], 1)
        return ((centre - wanted).square().sum(1) + 1e-6).sqrt()  # has a gradient at 0

    return loss


def _chroma(images: Tensor) -> Tensor:
    """How far each pixel is from gray, [B, 1, H, W]."""
    return images.amax(1, keepdim=True) - images.amin(1, keepdim=True)


def chains_of(pipe: StableDiffusionPipeline, steps: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Noise to latents, differentiable: reversible, and DDIM with a checkpoint a step or with
    none.
    """
    eps, times, alphas = _eps(pipe, ["a circle on gray"], steps)
    bars, last = pipe.scheduler.alphas_cumprod, pipe.scheduler.final_alpha_cumprod

    def sampled(x: Tensor, method: str = "edict") -> Tensor:
        return (
            ReversibleSampler(bars, times, method=method, final_alpha_cumprod=last)
            .sample(eps, x)[0]
            .float()
        )

    def checkpointed(x: Tensor) -> Tensor:
        def step(z: Tensor, i: int) -> Tensor:
            return ddim_step(z, eps(z, times[i]), alphas[i], alphas[i + 1])

        for i in range(
            steps
        ):  # the other kind of checkpoint grows by 2 MB a step, where a latent has 12 kB
            x = checkpoint(step, x, i, use_reentrant=True)
        return x

    return {
        "exact EDICT": sampled,
        "DDIM, a checkpoint a step": checkpointed,
        "DDIM, everything kept": lambda x: sampled(x, "ddim"),
    }


def _costs(pipe: StableDiffusionPipeline, steps: int) -> dict[str, dict[str, float]]:
    """Seconds and memory of one gradient of the noise."""
    loss = colour_loss(torch.tensor([COLOURS["red"]]) * 2 - 1)

    def gradient(chain: Callable[[Tensor], Tensor]) -> None:
        noise = torch.randn(1, 12, 16, 16, requires_grad=True)
        loss(pipe.vae.decode(chain(noise)).sample).sum().backward()

    found = {}
    for name, chain in chains_of(pipe, steps).items():
        gradient(chain)
        start = time.perf_counter()
        peak, _ = _memory.peak_extra_bytes(lambda: gradient(chain))  # noqa: B023
        found[name] = {"seconds": time.perf_counter() - start, "peak_bytes": peak or 0}
    return found


def inversion_table(result: dict[str, Any]) -> str:
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


def optimisation_table(result: dict[str, Any]) -> str:
    """Losses, and the costs of a gradient, as Markdown."""
    rows = []
    for goal, ways in result["goals"].items():
        for way in SALIENCY:
            losses, shares = (
                map(said, ways[way]["loss"]),
                (said(share, ".0%") for share in ways[way]["reached"]),
            )
            paired = "-" if way == "DOODL" else said(ways["SGOOL - DOODL"], "+.3f")
            rows.append([f"{goal}, {way}", *losses, paired, *shares])
    head = [
        f"{result['prompts']} prompts, {result['updates']} updates",
        "loss before",
        "after",
        "over DOODL",
    ]
    costs = result["gradient"]
    return "\n\n".join(
        (
            markdown([*head, "reached before", "after"], rows),
            markdown(
                ["one gradient through", *(f"{steps} steps" for steps in costs)],
                [
                    [way, *(_cost_of(found[way]) for found in costs.values())]
                    for way in next(iter(costs.values()))
                ],
            ),
        )
    )


def _cost_of(found: dict[str, float]) -> str:
    return f"{found['seconds']:.2f} s, {found['peak_bytes'] / 1e6:.0f} MB"
