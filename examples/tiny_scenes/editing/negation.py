"""A thing that is to be of another colour than the prompt would have it: not this one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dense_attn import _progress

from ..edits import OpenPrompt, open_prompts
from ..scenes import COLOURS, PRESENT, colour_masks
from ..score import generate
from .ways import Way, beside, compared, composed, guided, same

BASE = "negative prompt"


def refused(pipe: DiffusionPipeline, own: list[OpenPrompt]) -> Tensor:
    """Images whose unconditional estimate is that of the concept."""
    prompts, concepts = [case.prompt for case in own], [case.concept for case in own]
    return generate(pipe, prompts, range(len(own)), negative_prompt=concepts)


WAYS: dict[str, Way] = {
    BASE: refused,
    "SEGA, scale -6": partial(guided, scale=-6.0),
    "SEGA, scale -12": partial(guided, scale=-12.0),
    "composable diffusion, scale -6": partial(composed, scale=-6.0),
    "composable diffusion, scale -12": partial(composed, scale=-12.0),
}


def study(pipe: DiffusionPipeline, count: int = 20) -> dict[str, Any]:
    """Images of prompts without a colour, turned away from the one that each image has."""
    own = open_prompts("colour", count)
    plain = generate(pipe, [case.prompt for case in own], range(count))
    sizes = {name: mask.flatten(1).sum(1) for name, mask in colour_masks(plain).items()}
    most = torch.stack([sizes[name] for name in COLOURS]).argmax(0)
    seen = [list(COLOURS)[colour] for colour in most]
    own = [case._replace(concept=f"a {name} thing", counted=name) for case, name in zip(own, seen)]
    ways = _progress.track(WAYS, "negation", "way")
    rows = {name: scores(WAYS[name](pipe, own), plain, own) for name in ways}
    return {"prompts": count, "ways": beside(rows, BASE)}


def scores(images: Tensor, plain: Tensor, own: list[OpenPrompt]) -> dict[str, Tensor]:  # of [B]
    """As those of `ways`, of which success is that the colour is gone and a thing is there."""
    before, after = colour_masks(plain), colour_masks(images)
    thing, things = (
        torch.stack([masks[name] for name in COLOURS]).any(0) for masks in (before, after)
    )
    gone = torch.stack([after[case.counted][b].sum() < PRESENT for b, case in enumerate(own)])
    success = gone & (things.flatten(1).sum(1) >= PRESENT)
    kept = same(images, plain) & ~thing
    stays = (things & thing).flatten(1).sum(1) / thing.flatten(1).sum(1)
    unchanged = kept.flatten(1).sum(1) / (~thing).flatten(1).sum(1)
    return {"success": success.float(), "unchanged": unchanged, "stays": stays}


def table(result: dict[str, Any]) -> str:
    """Scores of each way beside those of the negative prompt, as Markdown."""
    return compared(f"not this colour, {result['prompts']} prompts", result["ways"], BASE)
