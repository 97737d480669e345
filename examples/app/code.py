"""The lines of Python that make an image of the page without the page."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from dense_attn.integrations.diffusers import Region

from . import canvas
from .models import Model
from .settings import Settings


def code_of(settings: Settings, model: Model, seed: int) -> str:
    """A program whose image is, bit for bit, that of the page for these settings and a seed."""
    regions = settings.regions()
    drawn = any(isinstance(_mask(region), np.ndarray) for region in regions)
    imported = ["apply_layout", *(["Region"] if settings.own_prompts else [])]
    imported += ["Edit", "semantic_guidance"] if settings.edits else []
    lines = ["import base64", "import zlib", "", "import numpy as np"] if drawn else []
    lines += ["import torch", model.code[0]]
    names = ", ".join(sorted(imported, key=lambda name: (name[0].islower(), name)))
    lines += [f"from dense_attn.integrations.diffusers import {names}", ""]
    lines += [*model.code[1:], f"prompt = {_text(settings.full_prompt)}"]
    if drawn:
        packed = f'base64.b64decode("{canvas.packed(settings.labels)}")'
        side = canvas.GRID
        lines.append(
            f"labels = np.frombuffer(zlib.decompress({packed}), np.uint8).reshape({side}, {side})"
        )
    lines.append("regions = [")
    lines += [f"    {_region(region, label)}," for region, label in zip(regions, settings.painted)]
    lines.append("]")
    lines += _call(settings, seed)
    return "\n".join([*lines, f'image.save("seed-{seed}.png")', ""])


def _call(settings: Settings, seed: int) -> list[str]:
    options = ", ".join(f"{name}={_text(value)}" for name, value in settings.options().items())
    lines, blocks = [f"options = dict({options})"], "apply_layout(pipe, prompt, regions, **options)"
    if settings.edits:
        made = [
            f"    Edit({_text(e.prompt)}, scale={e.scale!r}, threshold={e.threshold!r}, "
            f"warmup={e.warmup!r}, reverse={e.reverse}),"
            for e in settings.edits
        ]
        lines += ["edits = [", *made, "]"]
        blocks += ", semantic_guidance(pipe, edits)"
    numbers = f"num_inference_steps={settings.steps}, guidance_scale={settings.guidance}"
    call = f"pipe(prompt, {numbers}, generator=generator)"
    generator = f"generator = torch.Generator().manual_seed({seed})"
    return [*lines, generator, f"with {blocks}:", f"    image = {call}.images[0]"]


def _mask(region: Any) -> canvas.Mask:
    return region.mask if isinstance(region, Region) else region[1]


def _region(region: Any, label: int) -> str:
    mask = _mask(region)
    where = f"labels == {label}" if isinstance(mask, np.ndarray) else repr(mask)
    if isinstance(region, Region):
        return f"Region({where}, {_text(region.prompt)})"
    return f"({_text(region[0])}, {where})"


def _text(value: str | float | None) -> str:
    """A value as Python, strings in the quotes of formatted code."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
