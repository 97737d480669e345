"""The study of semantic guidance: scales, thresholds, warm-ups, and two concepts at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dense_attn import _files, _progress
from dense_attn.integrations.diffusers import Edit, semantic_guidance

from .scenes import COLOURS, SHAPES, colour_masks
from .score import generate, has, kernels, markdown, said, summary

SCALES = (-12.0, -6.0, -3.0, 3.0, 6.0, 12.0, 18.0)
THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
WARMUPS = (0, 2, 4, 6, 8, 10)
USUAL = {"scale": 6.0, "threshold": 0.8, "warmup": 2}
CURVES = ("colour", "ground")  # whose thresholds and warm-ups are tried
CHANGED = 0.1  # of a pixel's mean difference, from which on it counts as changed


class OpenPrompt(NamedTuple):
    """A prompt that leaves something open, and the concept that decides it."""

    prompt: str
    concept: str
    asked: str  # the prompt that says it all
    counted: str  # the colour whose pixels tell


def open_prompts(kind: str, count: int) -> list[OpenPrompt]:
    """Prompts of a kind; few concepts, so that those of one make a batch."""
    rng, found = random.Random(17), []
    for i in range(count):
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        target = ("blue", "yellow")[i % 2]
        other = rng.choice([name for name in COLOURS if name != target])
        ground = ("white", "black")[i % 2]
        plain, own = f"a {shape} on gray", f"a {colour} {shape}"
        thing, more = f"a {other} {shape} on gray", f"a {target} square"
        asked, large = f"a {target} {shape} on gray", f"a large {colour} {shape} on gray"
        both = f"a {other} {shape} and {more} on gray"
        fields = {
            "colour": (plain, f"a {target} thing", asked, target),
            "ground": (own, f"on {ground}", f"{own} on {ground}", ground),
            "presence": (thing, more, both, target),
            "size": (f"{own} on gray", "a large thing", large, colour),
            "contradiction": (thing, asked, asked, target),
        }[kind]
        found.append(OpenPrompt(*fields))
    return found


KINDS = ("colour", "ground", "presence", "size", "contradiction")


def study(pipe: DiffusionPipeline, count: int = 12) -> dict[str, Any]:
    """All curves on `count` prompts of each kind."""
    result: dict[str, Any] = {
        "prompts": count,
        "usual": USUAL,
        "kinds": {},
        "thresholds": {},
        "warmups": {},
    }
    total = len(KINDS) * (len(SCALES) + 1) + len(CURVES) * (len(THRESHOLDS) + len(WARMUPS)) + 1
    with _progress.bar(total, "edits", shown=True, unit="setting") as advance:
        for kind in KINDS:
            own = open_prompts(kind, count)
            plain = generate(pipe, [case.prompt for case in own], range(count))
            found = result["kinds"][kind] = {"control": _gain(swapped(pipe, own), plain, own)}
            advance()

            def curve(name: str, values: Sequence[float]) -> dict[str, Any]:
                row = {}
                for value in values:
                    row[str(value)] = effect(pipe, own, plain, **{name: value})  # noqa: B023
                    advance()
                return row

            found["scales"] = curve("scale", SCALES)
            if kind in CURVES:
                result["thresholds"][kind] = curve("threshold", THRESHOLDS)
                result["warmups"][kind] = curve("warmup", WARMUPS)
        result["isolation"] = isolation(pipe, count)
        advance()
    return result


def effect(
    pipe: DiffusionPipeline, own: list[OpenPrompt], plain: Tensor, **options: Any
) -> dict[str, Any]:
    """The pixels that become a colour, and the change where things were and elsewhere."""
    made = edited(pipe, own, [[case.concept] for case in own], **options)
    change = (made - plain).abs().mean(1)  # [B, H, W]
    thing = torch.stack(
        [mask for name, mask in colour_masks(plain).items() if name in COLOURS]
    ).any(0)
    changed = change > CHANGED
    there = thing.flatten(1).any(1)  # not every plain image has one
    inside, outside = (
        (change * part).sum((1, 2))[there] / part.sum((1, 2))[there] for part in (thing, ~thing)
    )
    return _gain(made, plain, own) | {
        "inside": summary(inside, len(inside)),
        "outside": summary(outside, len(outside)),
        "changed": changed.float().mean().item(),
        "elsewhere": (~thing).float().mean().item(),
        "changed elsewhere": ((changed & ~thing).sum().float() / changed.sum().clamp(min=1)).item(),
    }


def same_tables(pipe: DiffusionPipeline, count: int) -> dict[str, Any]:
    """How far kernels and reference are apart under edits: in a pixel, and in pixels gained."""
    name, pixel, gained = kernels("sega_guidance"), 0.0, 0
    for kind in _progress.track(KINDS, "edits, both backends", "kind"):
        own = open_prompts(kind, count)
        concepts = [[case.concept] for case in own]
        ours, theirs = (
            edited(pipe, own, concepts, backend=backend) for backend in ("auto", "reference")
        )
        pixel = max(pixel, (ours - theirs).abs().max().item())
        for b, case in enumerate(own):
            gained = max(
                gained,
                abs(int(has(ours[b : b + 1], case.counted) - has(theirs[b : b + 1], case.counted))),
            )
    return {
        "prompts": count,
        "kinds": list(KINDS),
        "backend": name,
        "of a pixel": pixel,
        "of pixels gained": gained,
    }


def isolation(pipe: DiffusionPipeline, count: int) -> dict[str, Any]:
    """The gain of a ground and of a colour, each alone and both at once."""
    own = open_prompts("colour", count)
    own = [case._replace(prompt=case.prompt.removesuffix(" on gray")) for case in own]
    grounds = [case._replace(concept="on white", counted="white") for case in own]
    plain = generate(pipe, [case.prompt for case in own], range(count))
    both = edited(pipe, own, [[case.concept, "on white"] for case in own])
    return {
        "colour": {"alone": effect(pipe, own, plain), "together": _gain(both, plain, own)},
        "ground": {"alone": effect(pipe, grounds, plain), "together": _gain(both, plain, grounds)},
    }


def edited(
    pipe: DiffusionPipeline,
    own: list[OpenPrompt],
    concepts: list[list[str]],
    momentum: dict[str, float] | None = None,
    backend: str = "auto",
    **options: Any,
) -> Tensor:  # [B, 3, H, W]
    """Images of prompts under their concepts; a scale below 0 is the other direction."""
    options, momentum = USUAL | options, momentum or {}
    chosen = options | {"scale": abs(options["scale"]), "reverse": options["scale"] < 0}
    images: dict[int, Tensor] = {}
    for concept in {tuple(names): None for names in concepts}:
        rows = [b for b, names in enumerate(concepts) if tuple(names) == concept]
        edits = [Edit(name, **chosen) for name in concept]
        made = generate(
            pipe,
            [own[b].prompt for b in rows],
            rows,
            semantic_guidance(pipe, edits, backend=backend, **momentum),
        )
        images |= dict(zip(rows, made))
    return torch.stack([images[b] for b in range(len(own))])


def swapped(pipe: DiffusionPipeline, own: list[OpenPrompt], begin: int | None = None) -> Tensor:
    """Images whose prompt turns into the one that says it all at a step, that of an edit's."""
    begin = USUAL["warmup"] if begin is None else begin
    first, then = (
        embeddings(pipe, [getattr(case, name) for case in own]) for name in ("prompt", "asked")
    )
    names = [name for name in first if not name.startswith("negative_")]
    both = {name: torch.cat([then[f"negative_{name}"], then[name]]) for name in names}

    def swap(_: Any, step: int, __: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | (both if step + 1 == begin else {})

    return generate(
        pipe,
        None,
        range(len(own)),
        **first,
        callback_on_step_end=swap,
        callback_on_step_end_tensor_inputs=names,
    )


def embeddings(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
    """A call's embeddings of prompts and of as many empty ones, by the names of its arguments."""
    texts = {"prompt": prompts, "negative_prompt": [""] * len(prompts), "device": pipe.device}
    if hasattr(pipe, "tokenizer_3"):
        texts |= {"prompt_2": None, "prompt_3": None}
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    found = pipe.encode_prompt(**texts, **options)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return dict(zip((*names, "pooled_prompt_embeds", "negative_pooled_prompt_embeds"), found))


def _gain(images: Tensor, plain: Tensor, own: list[OpenPrompt]) -> dict[str, Any]:
    """Pixels of each case's colour that are more than before, and of all other things' colours."""
    before, after = colour_masks(plain), colour_masks(images)
    more = {name: (after[name].sum((1, 2)) - before[name].sum((1, 2))).float() for name in after}
    gain = torch.stack([more[case.counted][b] for b, case in enumerate(own)])
    others = torch.stack(
        [
            sum(more[name][b] for name in COLOURS if name != case.counted)
            for b, case in enumerate(own)
        ]
    )
    return {"gain": summary(gain, len(own)), "others": summary(others, len(own))}


def table(result: dict[str, Any]) -> str:
    """Pixels gained over scales, and what else happens at the usual one, as Markdown."""
    gains, more = [], []
    for kind, found in result["kinds"].items():
        cells, control = [found["scales"][str(scale)] for scale in SCALES], found["control"]
        gained = (said(cell["gain"], "+.0f") for cell in (*cells, control))
        gains.append([kind, *gained])
        usual = found["scales"][str(result["usual"]["scale"])]
        others = (said(of["others"], "+.0f") for of in (usual, cells[-2], control))
        changes = (said(usual[where], ".2f") for where in ("inside", "outside"))
        shares = (f"{usual[where]:.0%}" for where in ("changed elsewhere", "elsewhere"))
        more.append([kind, *others, *changes, *shares])
    scales = [f"{scale:g}" for scale in SCALES]
    usual_scale = f"scale {result['usual']['scale']:g}"
    title = f"{result['prompts']} prompts a kind, pixels gained at scale"
    head = ["pixels of other things gained", usual_scale, scales[-2], "swapped"]
    head += [f"change inside, {usual_scale}", "outside", "changed pixels outside", "of all pixels"]
    return f"{markdown([title, *scales, 'prompt swapped'], gains)}\n\n{markdown(head, more)}"


def curves(result: dict[str, Any]) -> str:
    """Pixels gained, and pixels changed, over thresholds and warm-ups, and two edits at once."""
    lines = []
    for name in ("thresholds", "warmups"):
        for kind, curve in result[name].items():
            cells = (
                f"{key}: {said(cell['gain'], '+.0f')} ({cell['changed']:.0%} changed)"
                for key, cell in curve.items()
            )
            lines.append(f"{kind}, {name}: {'  '.join(cells)}")
    for name, found in result["isolation"].items():
        alone, beside = (said(found[key]["gain"], "+.0f") for key in ("alone", "together"))
        lines.append(f"{name} alone {alone}, beside the other {beside}")
    return "\n".join(lines)


def plot(result: dict[str, Any], output: Path) -> None:
    """The three curves as a picture: pixels gained over scale, threshold and warm-up."""
    from matplotlib.figure import Figure

    figure = Figure((11, 3.4), dpi=110, layout="constrained")
    curves = {"scale": {kind: found["scales"] for kind, found in result["kinds"].items()}}
    curves |= {"threshold": result["thresholds"], "warm-up steps": result["warmups"]}
    for axes, (name, rows) in zip(figure.subplots(1, 3), curves.items()):
        for kind, row in rows.items():
            gains = [cell["gain"] for cell in row.values()]
            errors = [gain["error"] or 0.0 for gain in gains]
            axes.errorbar(
                [float(key) for key in row],
                [gain["mean"] for gain in gains],
                errors,
                color=f"C{KINDS.index(kind)}",
                marker="o",
                markersize=3,
                capsize=2,
                label=kind,
            )
        axes.axhline(0, color="#888888", linewidth=0.6)
        axes.set_yscale("symlog", linthresh=10)
        axes.set(xlabel=name, ylabel="pixels gained" if name == "scale" else "")
        axes.legend(fontsize=8)
    _files.write_by(output, partial(figure.savefig, format=output.suffix[1:]))
