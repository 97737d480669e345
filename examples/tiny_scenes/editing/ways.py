"""Ways of making one edit: does what was asked appear, and does the rest stay?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dense_attn import _progress
from dense_attn.examples.prompt_to_prompt import PromptToPrompt

from ..edits import CHANGED, KINDS, OpenPrompt, edited, open_prompts, swapped
from ..scenes import COLOURS, colour_masks
from ..score import generate, has, markdown, only_palette, said, summary

LARGER = 1.25  # times its pixels of before, from which on a thing is larger
BASE = "prompt changed"
METRICS = {"success": "success", "unchanged": "rest unchanged", "stays": "thing in its place"}
Way = Callable[[DiffusionPipeline, list[OpenPrompt]], Tensor]  # images [B, 3, H, W]


def changed(pipe: DiffusionPipeline, own: list[OpenPrompt]) -> Tensor:
    """Images of the prompts that say it all, from the same noises."""
    return generate(pipe, [case.asked for case in own], range(len(own)))


def guided(pipe: DiffusionPipeline, own: list[OpenPrompt], scale: float) -> Tensor:
    """Semantic guidance by one concept each."""
    return edited(pipe, own, [[case.concept] for case in own], scale=scale)


def composed(pipe: DiffusionPipeline, own: list[OpenPrompt], scale: float) -> Tensor:
    """Composable diffusion: `eps_u + g*(eps_t - eps_u) + scale*(eps_e - eps_u)` in every step.

    A scale below 0 is a negation. Source: Liu et al., Compositional Visual Generation with
    Composable Diffusion Models, ECCV 2022.
    """
    concepts = [[case.concept] for case in own]
    everything = {"threshold": 0.0, "warmup": 0}
    return edited(pipe, own, concepts, {"momentum_scale": 0.0}, scale=scale, **everything)


def with_maps(
    pipe: DiffusionPipeline, own: list[OpenPrompt], cross: float, own_maps: float
) -> Tensor:
    """Prompt-to-Prompt: the maps of the prompt's image in the first steps of the other's."""
    sources, targets = [case.prompt for case in own], [case.asked for case in own]
    seeds = [*range(len(own))] * 2
    with PromptToPrompt(pipe, sources, targets, cross=cross, own=own_maps):
        return generate(pipe, sources + targets, seeds)[len(own) :]


WAYS: dict[str, Way] = {
    BASE: changed,
    "prompt swapped at step 2": partial(swapped, begin=2),
    "prompt swapped at step 5": partial(swapped, begin=5),
    "Prompt-to-Prompt, maps 0.4 and 0.2": partial(with_maps, cross=0.4, own_maps=0.2),
    "Prompt-to-Prompt, maps 0.8 and 0.4": partial(with_maps, cross=0.8, own_maps=0.4),
    "SEGA, scale 6": partial(guided, scale=6.0),
    "SEGA, scale 12": partial(guided, scale=12.0),
    "composable diffusion, scale 6": partial(composed, scale=6.0),
    "composable diffusion, scale 12": partial(composed, scale=12.0),
}


def study(
    pipe: DiffusionPipeline, count: int = 16, ways: Mapping[str, Way] | None = None
) -> dict[str, Any]:
    """Ways (all of them) on `count` prompts of each kind, each from the noise of its own seed."""
    ways = WAYS if ways is None else ways
    rows: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in ways}
    with _progress.bar(len(KINDS) * len(ways), "ways", shown=True, unit="way") as advance:
        for kind in KINDS:
            own = open_prompts(kind, count)
            plain = generate(pipe, [case.prompt for case in own], range(count))
            for name, way in ways.items():
                rows[name][kind] = scores(way(pipe, own), plain, own, kind)
                advance()
    return {"prompts": count, "kinds": list(KINDS), "ways": summaries(rows)}


def summaries(rows: dict[str, dict[str, dict[str, Tensor]]]) -> dict[str, Any]:
    """Means of each way's scores, all and of a kind, and those of its differences from `BASE`."""
    joined = {
        name: {metric: torch.cat([row[metric] for row in kinds.values()]) for metric in METRICS}
        for name, kinds in rows.items()
    }
    found = beside(joined, BASE)
    for name, kinds in rows.items():
        found[name]["kinds"] = {
            kind: {metric: mean(row[metric]) for metric in METRICS} for kind, row in kinds.items()
        }
    return found


def beside(rows: dict[str, dict[str, Tensor]], base: str) -> dict[str, Any]:
    """Means of each way's scores and of their differences from another's, which are paired."""
    return {
        name: {
            "all": {metric: mean(row[metric]) for metric in METRICS},
            "difference": {metric: mean(row[metric] - rows[base][metric]) for metric in METRICS},
        }
        for name, row in rows.items()
    }


def scores(
    images: Tensor, plain: Tensor, own: list[OpenPrompt], kind: str
) -> dict[str, Tensor]:  # of [B]
    """Each edit's success, the share of the rest that is unchanged, and of the thing in its place.

    - success: the colours of the whole prompt are there and no others; "ground": it is half of the
      image; "size": the thing has `LARGER` times its pixels.
    - unchanged: of the pixels that the edit leaves alone, those that change by less than `CHANGED`;
      for "ground" the thing's, otherwise those outside of it ("presence": of the new one).
    - stays: of the thing's pixels, those that have the colour that it should have now; NaN where
      the plain image has no thing.
    """
    before, after, kept = colour_masks(plain), colour_masks(images), same(images, plain)
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for b, case in enumerate(own):
        colours = [word for word in case.asked.split() if word in COLOURS]
        named = [word for word in case.prompt.split() if word in COLOURS] or list(COLOURS)
        thing = torch.stack([before[name][b] for name in named]).any(0)
        now = after[case.counted][b]
        alone = {"ground": thing, "presence": ~now, "size": ~(thing | now)}.get(kind, ~thing)
        right = bool(only_palette(images[b : b + 1], colours)[0])
        if kind == "ground":
            right = right and now.float().mean().item() >= 0.5
        if kind == "size":
            counts = (has(each[b : b + 1], case.counted).item() for each in (images, plain))
            right = right and next(counts) >= LARGER * next(counts)
        found["success"].append(float(right))
        found["unchanged"].append(kept[b][alone].float().mean().item())
        found["stays"].append(after[colours[0]][b][thing].float().mean().item())
    return {
        metric: torch.tensor(values, dtype=torch.float32, device="cpu")
        for metric, values in found.items()
    }


def same(images: Tensor, plain: Tensor) -> Tensor:
    """The pixels [B, H, W] that count as unchanged."""
    return (images - plain).abs().mean(1) <= CHANGED


def mean(values: Tensor) -> dict[str, float | None]:
    """The mean of the values that there are, and its standard error."""
    there = values[values.isfinite()]
    return summary(there, len(there))


def table(result: dict[str, Any]) -> str:
    """Scores of each way and their differences from the changed prompt, then those by kind."""
    name = f"{len(result['kinds'])} kinds of edits, {result['prompts']} prompts each"
    more = [
        [way, *(f"{row['success']['mean']:.0%}, {row['stays']['mean']:.2f}" for row in kinds)]
        for way, kinds in ((way, found["kinds"].values()) for way, found in result["ways"].items())
    ]
    kinds = markdown(["success, thing in its place", *result["kinds"]], more)
    return f"{compared(name, result['ways'], BASE)}\n\n{kinds}"


def compared(name: str, ways: dict[str, Any], base: str) -> str:
    """Scores of ways beside their differences from one of them, as Markdown."""
    head = [name, *(cell for label in METRICS.values() for cell in (label, f"over {base}"))]
    rows = []
    for way, found in ways.items():
        cells = []
        for metric in METRICS:
            beside = "-" if way == base else said(found["difference"][metric], "+.2f")
            cells += [said(found["all"][metric], ".2f"), beside]
        rows.append([way, *cells])
    return markdown(head, rows)
