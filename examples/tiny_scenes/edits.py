"""What semantic guidance does: monotone in the scale, confined, isolated, reversible; thresholds and warm-ups."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dense_attn.integrations.diffusers import Edit, semantic_guidance

from .scenes import BACKGROUNDS, COLOURS, SHAPES, colour_masks
from .score import generate, has

SCALES = (-8.0, -4.0, 0.0, 2.0, 4.0, 8.0, 12.0)
THRESHOLDS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
WARMUPS = (0, 2, 5, 10, 15)
USUAL = {"scale": 6.0, "threshold": 0.9, "warmup": 2}


class Case(NamedTuple):
    """A prompt, the concept that is added, and the colour whose pixels tell how much of it there is."""

    name: str
    prompt: str
    concept: str
    counted: str


def cases(count: int) -> list[Case]:
    """Backgrounds, presence, size and colour in turn."""
    rng, found = random.Random(17), []
    for i in range(count):
        first, second = rng.sample(list(COLOURS), 2)
        shape, other = rng.choice(SHAPES), rng.choice(SHAPES)
        prompt, ground = f"a {first} {shape}", rng.choice([name for name in BACKGROUNDS if name != "gray"])
        found.append((
            Case("background", prompt, f"{prompt} on {ground}", ground),
            Case("presence", prompt, f"a {second} {other}", second),
            Case("size", prompt, f"a large {first} {shape}", first),
            Case("colour", prompt, f"a {second} {shape}", second),
        )[i % 4])  # fmt: skip
    return found


def study(pipe: StableDiffusionPipeline, count: int) -> dict[str, Any]:
    """All curves on `count` prompts of each kind."""
    everything = cases(4 * count)
    result: dict[str, Any] = {"prompts": count, "usual": USUAL, "kinds": {}}
    for kind in ("background", "presence", "size", "colour"):
        own = [case for case in everything if case.name == kind]
        plain = _plain(pipe, own)
        result["kinds"][kind] = {
            "control": _control(pipe, own, plain),
            "scales": {str(scale): _effect(pipe, own, plain, scale=scale) for scale in SCALES},
        }
    own = [case for case in everything if case.name == "background"]
    plain = _plain(pipe, own)
    result["thresholds"] = {str(level): _effect(pipe, own, plain, threshold=level) for level in THRESHOLDS}
    result["warmups"] = {str(step): _effect(pipe, own, plain, warmup=step) for step in WARMUPS}
    result["isolation"] = _isolation(pipe, own, plain)
    return result


def _edited(pipe: StableDiffusionPipeline, own: list[Case], options: dict[str, Any], more: str = "") -> Tensor:
    """One prompt at a time: each has a concept of its own."""
    options = USUAL | options
    reverse, scale = options["scale"] < 0, abs(options["scale"])
    edits = options | {"scale": scale, "reverse": reverse}
    images = []
    for seed, case in enumerate(own):
        concepts = [Edit(case.concept, **edits)] + [Edit(more, **edits)] * bool(more)
        images.append(generate(pipe, [case.prompt], [seed], semantic_guidance(pipe, concepts)))
    return torch.cat(images)


def _plain(pipe: StableDiffusionPipeline, own: list[Case]) -> Tensor:
    return generate(pipe, [case.prompt for case in own], range(len(own)))


def _counts(images: Tensor, own: list[Case]) -> Tensor:
    """Pixels of each case's colour."""
    return torch.stack([has(images[b : b + 1], case.counted)[0] for b, case in enumerate(own)]).float()


def _effect(pipe: StableDiffusionPipeline, own: list[Case], plain: Tensor, **options: Any) -> dict[str, float]:
    """More of the concept in pixels, and how much changed where the thing was and elsewhere."""
    edited = _edited(pipe, own, options)
    change = (edited - plain).abs().mean(1)  # [B, H, W]
    things = [colour_masks(plain[b : b + 1])[case.prompt.split()[1]][0] for b, case in enumerate(own)]
    inside = torch.stack([change[b][thing].sum() / thing.sum().clamp(min=1) for b, thing in enumerate(things)])
    outside = torch.stack([change[b][~thing].mean() for b, thing in enumerate(things)])
    gain = _counts(edited, own) - _counts(plain, own)
    return {
        "gain": gain.mean().item(), "error": (gain.std() / len(own) ** 0.5).item() if len(own) > 1 else 0.0,
        "inside": inside.mean().item(), "outside": outside.mean().item(),
        "changed": (change > 0.1).float().mean().item(),
    }  # fmt: skip


def _control(pipe: StableDiffusionPipeline, own: list[Case], plain: Tensor) -> float:
    """The gain when the concept is the whole prompt from the first step on: what the model can express."""
    asked = generate(pipe, [case.concept for case in own], range(len(own)))
    return (_counts(asked, own) - _counts(plain, own)).mean().item()


def _isolation(pipe: StableDiffusionPipeline, own: list[Case], plain: Tensor) -> dict[str, float]:
    """The gain of a concept alone, and beside a second one."""
    before, beside = _counts(plain, own), "a large triangle"
    return {
        "alone": (_counts(_edited(pipe, own, {}), own) - before).mean().item(),
        "beside another": (_counts(_edited(pipe, own, {}, beside), own) - before).mean().item(),
    }


def table(result: dict[str, Any]) -> str:
    """The curves as text."""
    lines = [
        f"semantic guidance, {result['prompts']} prompts of a kind; more pixels of the concept (change inside/outside)"
    ]
    lines.append(f"{'scale':12}" + "".join(f"{scale:>17}" for scale in SCALES) + f"{'whole prompt':>14}")
    for kind, found in result["kinds"].items():
        cells = (found["scales"][str(scale)] for scale in SCALES)
        row = "".join(f"{c['gain']:>+7.0f} ({c['inside']:.2f}/{c['outside']:.2f})" for c in cells)
        lines.append(f"{kind:12}{row}{found['control']:>+14.0f}")
    for name in ("thresholds", "warmups"):
        cells = "   ".join(f"{key}: {c['gain']:+.0f} ({c['changed']:.0%} changed)" for key, c in result[name].items())
        lines.append(f"background, {name}: {cells}")
    alone, beside = result["isolation"]["alone"], result["isolation"]["beside another"]
    lines.append(f"background alone {alone:+.0f}, beside a second concept {beside:+.0f}")
    return "\n".join(lines)
