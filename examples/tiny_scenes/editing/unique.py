"""Guidance vectors of one run, added to another image: on how many noises do they work?"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dense_attn import _progress
from dense_attn.integrations.diffusers import Edit, semantic_guidance

from ..edits import CURVES, USUAL, OpenPrompt, edited, open_prompts
from ..scenes import PRESENT, SHAPES, colour_masks
from ..score import generate, markdown, said, summary
from .ways import mean

SCALE = 12.0
ENOUGH = {"colour": PRESENT, "ground": 512}  # pixels gained, from which on an edit has worked
OWN, RECORDED, OTHER = "its own vectors", "vectors of another prompt", "and of another noise"


def study(pipe: DiffusionPipeline, count: int = 20) -> dict[str, Any]:
    """Vectors of `count` prompts and noises, each on the prompt with the next shape."""
    kinds = {}
    for kind in _progress.track(CURVES, "unique", "kind"):
        own = open_prompts(kind, count)
        others = [case._replace(prompt=_next_shape(case.prompt)) for case in own]
        plain = generate(pipe, [case.prompt for case in others], range(count))
        images = {
            OWN: edited(pipe, others, [[case.concept] for case in own], scale=SCALE),
            RECORDED: transferred(pipe, own, others, 0),
            OTHER: transferred(pipe, own, others, 1),
        }
        gains = {name: gained(made, plain, own) for name, made in images.items()}
        kinds[kind] = {
            name: {
                "works": summary((gain >= ENOUGH[kind]).float(), count),
                "gain": summary(gain, count),
                "difference": mean(gain - gains[OWN]),
            }
            for name, gain in gains.items()
        }
    return {"prompts": count, "scale": SCALE, "enough": ENOUGH, "kinds": kinds}


def transferred(
    pipe: DiffusionPipeline, own: list[OpenPrompt], others: list[OpenPrompt], shift: int
) -> Tensor:  # [B, 3, H, W]
    """Images of others, by the vectors of runs of one's own from noises `shift` places before."""
    images: dict[int, Tensor] = {}
    for concept in dict.fromkeys(case.concept for case in own):
        rows = [b for b, case in enumerate(own) if case.concept == concept]
        edit = Edit(concept, **(USUAL | {"scale": SCALE}))
        with semantic_guidance(pipe, [edit]) as guidance:
            recorded = guidance.record()
            generate(pipe, [own[b].prompt for b in rows], rows)
        moved = [(step, x if x is None else x.roll(shift, 0)) for step, x in recorded]
        prompts = [others[b].prompt for b in rows]
        made = generate(pipe, prompts, rows, semantic_guidance(pipe, apply=moved))
        images |= dict(zip(rows, made))
    return torch.stack([images[b] for b in range(len(own))])


def gained(images: Tensor, plain: Tensor, own: list[OpenPrompt]) -> Tensor:  # [B]
    """Pixels of each case's colour that are more than before."""
    sizes = [
        {name: mask.flatten(1).sum(1) for name, mask in colour_masks(each).items()}
        for each in (images, plain)
    ]
    more = [sizes[0][case.counted][b] - sizes[1][case.counted][b] for b, case in enumerate(own)]
    return torch.stack(more).float()


def _next_shape(prompt: str) -> str:
    following = dict(zip(SHAPES, (*SHAPES[1:], SHAPES[0])))
    return " ".join(following.get(word, word) for word in prompt.split())


def table(result: dict[str, Any]) -> str:
    """On how many noises vectors work, and what they gain, as Markdown."""
    head = [f"{result['prompts']} noises, scale {result['scale']:g}"]
    head += [name for kind in result["kinds"] for name in (f"{kind}: works", "pixels gained")]
    rows = []
    for name in (OWN, RECORDED, OTHER):
        cells = [found[name] for found in result["kinds"].values()]
        shown = ((said(cell["works"], ".0%"), said(cell["gain"], "+.0f")) for cell in cells)
        rows.append([name, *(text for pair in shown for text in pair)])
    return markdown(head, rows)
