"""The study of optimised noise on the flow: two exact chains at equal calls of the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dense_attn import _progress, optimize_latents

from ..tiny_scenes.goals import GOALS, Goal
from ..tiny_scenes.optimisation import CLIP
from ..tiny_scenes.score import markdown, said, summary
from .chains import WAYS, Network, sampler, sigmas
from .model import OneEncoder

CALLS = 20  # of the network from noise to image
CHAINS = {"exact EDICT": "edict", "exact leapfrog": "bdia"}
SHOWN = (0, 1, 2, 4, 6, 8)  # updates whose losses are shown, beside the last


def study(pipe: OneEncoder, count: int = 14, updates: int = 10) -> dict[str, Any]:
    """Losses before each update, and goals reached at the end, by both chains."""
    goals: dict[str, Any] = {}
    with _progress.bar(len(GOALS) * len(CHAINS), "optimisation", shown=True, unit="run") as advance:
        for name, goal_of in GOALS.items():
            goals[name] = {}
            for way in CHAINS:
                goals[name][way] = _run(pipe, goal_of(count), way, updates)
                advance()
    return {"prompts": count, "updates": updates, "calls": CALLS, "goals": goals}


def _run(pipe: OneEncoder, goal: Goal, way: str, updates: int) -> dict[str, Any]:
    network = Network(pipe, goal.prompts)
    chain = sampler(sigmas(CALLS // WAYS[way].calls), CHAINS[way])
    generator = torch.Generator().manual_seed(0)
    shape = (len(goal.prompts), 12, 16, 16)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def decode(latents: Tensor) -> Tensor:
        return pipe.vae.decode(latents).sample

    def loss(images: Tensor) -> Tensor:
        return goal.weight * goal.loss(images).sum()

    how = {"steps": updates, "clip": CLIP, "generator": generator, "progress": False}
    found = optimize_latents(chain, network, decode, loss, noise, **how)
    with torch.no_grad():
        images = [decode(chain.sample(network, x)[0].float()) for x in (noise, found.latents)]
    losses = [value / goal.weight / len(goal.prompts) for value in found.losses]
    return {
        "losses": losses,
        "loss": [summary(goal.loss(image), len(image)) for image in images],
        "reached": [
            summary(goal.reached((image / 2 + 0.5).clamp(0, 1)).float(), len(image))
            for image in images
        ],
    }


def table(result: dict[str, Any]) -> str:
    """Losses over updates, and the share that reached the goal, as Markdown."""
    shown = [update for update in SHOWN if update < result["updates"]]
    rows = []
    for goal, ways in result["goals"].items():
        for way, found in ways.items():
            losses = [f"{found['losses'][update]:.3f}" for update in shown]
            shares = [said(share, ".0%") for share in found["reached"]]
            rows.append([f"{goal}, {way}", *losses, said(found["loss"][1]), *shares])
    title = f"{result['prompts']} prompts, {result['calls']} calls, mean loss after updates"
    head = [title, *map(str, shown), str(result["updates"]), "reached before", "after"]
    return markdown(head, rows)
