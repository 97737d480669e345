"""The study of optimised noise: DOODL and SGOOL towards two goals, and a gradient's costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dense_attn import _progress, ddim_step, spectral_residual_saliency
from dense_attn.integrations.diffusers import optimize
from dense_attn.integrations.diffusers.inversion import measured
from dense_attn.integrations.diffusers.inversion.chain import Chain, Settings

from .goals import GOALS, Goal, colour_goal, colour_loss
from .score import kernels, markdown, said, summary

SALIENCY = {"DOODL": None, "SGOOL": spectral_residual_saliency}
CLIP = 3e-2  # of an element of the gradient


def study(
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


def chains_of(pipe: StableDiffusionPipeline, steps: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Noise to latents, differentiable: reversible, and DDIM with a checkpoint a step or none."""
    edict, ddim = (
        Chain(pipe, Settings("a circle on gray", "", 1.0, steps, {"method": method}), 1)
        for method in ("edict", "ddim")
    )
    times, bars = ddim.sampler.timesteps, ddim.sampler.alpha_bars

    def step(x: Tensor, i: int) -> Tensor:
        return ddim_step(x, ddim.eps(x, times[i]), bars[i], bars[i + 1])

    def checkpointed(x: Tensor) -> Tensor:
        for i in range(steps):
            # the other kind of checkpoint grows by 2 MB a step, where a latent has 12 kB
            x = checkpoint(step, x, i, use_reentrant=True)
        return x

    return {
        "exact EDICT": lambda x: edict.sampler.sample(edict.eps, x)[0].float(),
        "DDIM, a checkpoint a step": checkpointed,
        "DDIM, everything kept": lambda x: ddim.sampler.sample(ddim.eps, x)[0],
    }


def _costs(pipe: StableDiffusionPipeline, steps: int) -> dict[str, dict[str, float]]:
    """Seconds and memory of one gradient of the noise."""
    loss = colour_loss("red")

    def gradient(chain: Callable[[Tensor], Tensor]) -> None:
        noise = torch.randn(1, 12, 16, 16, dtype=torch.float32, device="cpu").requires_grad_()
        loss(pipe.vae.decode(chain(noise)).sample).sum().backward()

    found = {}
    for name, chain in chains_of(pipe, steps).items():
        gradient(chain)
        _, seconds, peak = measured(partial(gradient, chain), torch.device("cpu"))
        found[name] = {"seconds": seconds, "peak_bytes": peak or 0}
    return found


def table(result: dict[str, Any]) -> str:
    """Losses, and the costs of a gradient, as Markdown."""
    rows = []
    for goal, ways in result["goals"].items():
        for way in SALIENCY:
            losses = [said(loss) for loss in ways[way]["loss"]]
            shares = [said(share, ".0%") for share in ways[way]["reached"]]
            paired = "-" if way == "DOODL" else said(ways["SGOOL - DOODL"], "+.3f")
            rows.append([f"{goal}, {way}", *losses, paired, *shares])
    title = f"{result['prompts']} prompts, {result['updates']} updates"
    head = [title, "loss before", "after", "over DOODL", "reached before", "after"]
    costs = result["gradient"]
    lengths = ["one gradient through", *(f"{steps} steps" for steps in costs)]
    ways = next(iter(costs.values()))
    gradients = [[way, *(_cost_of(found[way]) for found in costs.values())] for way in ways]
    return f"{markdown(head, rows)}\n\n{markdown(lengths, gradients)}"


def _cost_of(found: dict[str, float]) -> str:
    return f"{found['seconds']:.2f} s, {found['peak_bytes'] / 1e6:.0f} MB"
