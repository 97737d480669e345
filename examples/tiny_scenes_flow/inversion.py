"""The study of inversion: what comes back, what an edit does, and how far a pair strays."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dense_attn import _progress

from ..tiny_scenes.edits import CHANGED
from ..tiny_scenes.scenes import COLOURS, Scene, colour_masks, draw_scene, masks, render
from ..tiny_scenes.score import iou, markdown, only_palette, said, summary
from .chains import WAYS, Network, euler, second_order, sigmas
from .model import OneEncoder

GUIDANCES = (1.0, 4.0)  # of an edit; images are inverted without guidance
CALLS = (8, 16, 28, 56, 100)  # of the network, for all ways alike
FINE = 200  # steps of the flow's own end
EDITS = ("new colour alone", "in its place", "rest kept")


@torch.no_grad()
def study(
    pipe: OneEncoder,
    count: int = 16,
    lengths: Sequence[int] = (8, 28, 50),
    calls: Sequence[int] = CALLS,
    fine: int = FINE,
) -> dict[str, Any]:
    """Errors and edits of scenes of one thing, for chains of several lengths; and distances."""
    rng = random.Random(41)
    scenes = [draw_scene(rng, 1) for _ in range(count)]
    targets = [rng.choice([name for name in COLOURS if name != _colour(s)]) for s in scenes]
    rows: dict[str, dict[str, Any]] = {name: {} for name in WAYS}
    with _progress.bar(len(WAYS) * len(lengths), "inversion", shown=True, unit="chain") as advance:
        for name in WAYS:
            for steps in lengths:
                rows[name][str(steps)] = _round_trip(pipe, scenes, targets, name, steps)
                advance()
    far = _distances(pipe, scenes, calls, fine)
    return {"scenes": count, "lengths": list(lengths), "rows": rows, "fine": fine, "distances": far}


def _colour(scene: Scene) -> str:
    return scene.things[0].colour


def _round_trip(
    pipe: OneEncoder, scenes: list[Scene], targets: list[str], name: str, steps: int
) -> dict[str, Any]:
    """The error of the way back, and what edits from the same noise are like."""
    way, levels, images = WAYS[name], sigmas(steps), render(scenes)
    start = pipe.vae.encode(images * 2 - 1).latent_dist.mode()
    captions = [scene.caption for scene in scenes]
    network = Network(pipe, captions)
    ends = way.back(network, (start, start.clone()), levels)
    again = way.there(network, ends, levels)[0].double()
    error = (again - start).square().mean().sqrt() / start.square().mean().sqrt()
    asked = [text.replace(_colour(s), t) for text, s, t in zip(captions, scenes, targets)]
    edits = {}
    for guidance in GUIDANCES:
        made = way.there(Network(pipe, asked, guidance), ends, levels)[0].float()
        found = pipe.vae.decode(made).sample / 2 + 0.5
        edits[f"{guidance:g}"] = edited(found.clamp(0, 1), images, scenes, targets)
    noise = ends[0].double()
    return {"error": error.item(), "noise": noise.std().item(), "edits": edits}


def edited(
    found: Tensor, images: Tensor, scenes: list[Scene], targets: list[str]
) -> dict[str, dict[str, float | None]]:
    """How often the new colour is there alone, where the thing was, and the rest as it was."""
    things = torch.cat([masks(scene) for scene in scenes])
    seen = colour_masks(found)
    alone = [float(only_palette(found[b : b + 1], [t])[0]) for b, t in enumerate(targets)]
    place = [iou(seen[target][b], things[b]) for b, target in enumerate(targets)]
    same = (found - images).abs().mean(1) <= CHANGED
    kept = [same[b][~things[b]].float().mean().item() for b in range(len(scenes))]
    values = (torch.tensor(row, dtype=torch.float32, device="cpu") for row in (alone, place, kept))
    return {name: summary(row, len(scenes)) for name, row in zip(EDITS, values)}


def _distances(
    pipe: OneEncoder, scenes: list[Scene], calls: Sequence[int], fine: int
) -> dict[str, dict[str, Any]]:
    """Mean distances of images of equal network calls, from Euler's and from the flow's own end."""
    network = Network(pipe, [scene.caption for scene in scenes])
    shape, generator = (len(scenes), 12, 16, 16), torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    end = second_order(network, noise, sigmas(fine))
    found: dict[str, dict[str, Any]] = {}
    for count in _progress.track(calls, "distances", "length"):
        plain = euler(network, noise, sigmas(count))
        found[str(count)] = row = {"Euler": {"flow": _far(plain, end)}}
        for name, way in WAYS.items():
            if name != "Euler":
                levels = sigmas(count // way.calls)
                made = way.there(network, (noise, noise.clone()), levels)[0].float()
                row[name] = {"flow": _far(made, end), "Euler": _far(made, plain)}
    return found


def _far(x: Tensor, y: Tensor) -> dict[str, float | None]:
    return summary((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1), len(x))


def table(result: dict[str, Any]) -> str:
    """Errors and edits, then distances, as Markdown."""
    rows = []
    for name, row in result["rows"].items():
        for steps, found in row.items():
            cells = [
                said(found["edits"][f"{guidance:g}"][what], ".2f")
                for guidance in GUIDANCES
                for what in EDITS
            ]
            calls = str(WAYS[name].calls * int(steps))
            error, noise = f"{found['error']:.1e}", f"{found['noise']:.2f}"
            rows.append([f"{name}, {steps} steps", calls, error, noise, *cells])
    head = [
        f"{result['scenes']} scenes of one thing",
        "network calls a way",
        "error",
        "noise's std",
    ]
    head += [f"{what}, guidance {guidance:g}" for guidance in GUIDANCES for what in EDITS]
    return f"{markdown(head, rows)}\n\n{_far_table(result)}"


def _far_table(result: dict[str, Any]) -> str:
    pairs = [name for name in WAYS if name != "Euler"]
    rows = [
        [
            calls,
            *(said(found[name]["Euler"], ".1%") for name in pairs),
            *(said(found[name]["flow"], ".1%") for name in WAYS),
        ]
        for calls, found in result["distances"].items()
    ]
    head = ["network calls", *(f"{name} from Euler" for name in pairs)]
    return markdown([*head, *(f"{name} from the flow" for name in WAYS)], rows)
