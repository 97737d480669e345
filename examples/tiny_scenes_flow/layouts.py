"""The study of layouts on joint attention: which modulation, on which pairs, how strong, when."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dense_attn import _progress

from ..tiny_scenes.layouts import row, scores
from ..tiny_scenes.scenes import Scene, draw_scene
from ..tiny_scenes.score import markdown, said
from .extremes import of_the_text
from .model import OneEncoder

TO_TEXT, TO_IMAGE = "image->text", "image->image"
BLOCKS: dict[str, tuple[str, ...]] = {  # pairs of queries and keys
    "image->text": (TO_TEXT,),
    "image->text, text->image": (TO_TEXT, "text->image"),
    "image->text, image->image": (TO_TEXT, TO_IMAGE),
    "all pairs": (TO_TEXT, TO_IMAGE, "text->image", "text->text"),
    "image->image": (TO_IMAGE,),
    "text->image": ("text->image",),
}
ALONE = ("image->image", "text->image")  # are tried and not compared
WEIGHTS = {"bias": (1.0, 3.0, 6.0), "alone": (3.0,), "range": (1.0, 3.0), "block": (0.3, 1.0, 3.0)}
OF_TEXT = "range of the text block, first 50%"  # the extremes are
HALF = {"active": 0.5, "exponent": 0.0}  # of the steps, as strong in all of them
SHIFTS, WINDOWS = (1.0, 3.0), (0.3, 0.5, 0.75, 1.0)
DEFAULT = "bias 3 on image->text"
OTHERS: dict[str, dict[str, Any] | None] = {  # beside those whose weights are chosen
    "plain": None,
    DEFAULT: {},
    "range 1 and 0.3, first 30%": {"modulation": "range"},
    "mask on image->text": {"modulation": "mask", "blocks": (TO_TEXT,)} | HALF,
    "mask on all pairs": {"modulation": "mask", "blocks": BLOCKS["all pairs"]} | HALF,
    "a prompt per region": {"prompts": True},
    "a prompt per region, base_ratio 0.3": {"prompts": True, "base_ratio": 0.3},
}


Work = list[tuple[Scene, int]]  # a scene and the seed of its noise


def bias(blocks: tuple[str, ...], weight: float) -> dict[str, Any]:
    """The options of a constant on some pairs."""
    names = {"self_weight"} if TO_IMAGE in blocks else set()
    names |= {"cross_weight"} if blocks != (TO_IMAGE,) else set()
    return {"modulation": "bias", "blocks": blocks} | dict.fromkeys(sorted(names), weight) | HALF


SAME = bias(BLOCKS[TO_TEXT], 3.0)  # as the default says


def tried() -> dict[str, dict[str, dict[str, Any]]]:
    """Settings that have a weight to choose, and the options of each weight."""
    found = {
        f"bias on {name}": {
            str(weight): bias(blocks, weight)
            for weight in WEIGHTS["alone" if name in ALONE else "bias"]
        }
        for name, blocks in BLOCKS.items()
    }
    found["range, first 50%"] = {
        str(weight): {"modulation": "range", "cross_weight": weight, "self_weight": 0.3 * weight}
        | HALF
        for weight in WEIGHTS["range"]
    }
    found[OF_TEXT] = {
        str(weight): bias(BLOCKS[TO_TEXT], weight) | {"extremes": "text"}
        for weight in WEIGHTS["block"]
    }
    return found


def scored(pipe: OneEncoder, work: Work, setting: dict[str, Any] | None) -> dict[str, Tensor]:
    """The scores of a setting, which may have extremes of the text block."""
    with of_the_text() if setting and "extremes" in setting else nullcontext():
        return scores(pipe, work, setting and options_of(setting), "auto")


def options_of(setting: dict[str, Any]) -> dict[str, Any]:
    """The options of `apply_layout`, or of the first model's study, in a setting."""
    return {name: value for name, value in setting.items() if name != "extremes"}


def study(pipe: OneEncoder, count: int = 200, seeds: int = 3, tuning: int = 40) -> dict[str, Any]:
    """Weights and windows on layouts of their own, then all settings on the same ones and noises.

    Args:
        pipe: the model.
        count: of layouts, of two things.
        seeds: noises of each.
        tuning: layouts on which weights are chosen.
    """
    own, work = drawn(count, seeds, tuning)
    weights = weighed(pipe, own)
    settings = OTHERS | chosen(weights)
    rows = {
        name: scored(pipe, work, setting)
        for name, setting in _progress.track(settings.items(), "layouts", "setting")
    }
    return {
        "layouts": count,
        "seeds": seeds,
        "tuning": tuning,
        "settings": {name: setting for name, setting in settings.items() if setting},
        "weights": weights,
        "windows": windows(pipe, own),
        "rows": {name: row(name, rows, count, ("plain", DEFAULT)) for name in rows},
    }


def drawn(count: int, seeds: int, tuning: int) -> tuple[Work, Work]:
    """Layouts on which weights are chosen, and those on which settings are compared."""
    rng = random.Random(37)
    own = [(draw_scene(rng, 2), 5000 + i) for i in range(tuning)]
    scenes = [draw_scene(rng, 2) for _ in range(count)]
    return own, [(scenes[i], count * seed + i) for i in range(count) for seed in range(seeds)]


def weighed(pipe: OneEncoder, own: Work) -> dict[str, dict[str, dict[str, float]]]:
    """The scores of every weight of what has one."""
    return {
        name: {weight: _means(pipe, own, options) for weight, options in ways.items()}
        for name, ways in _progress.track(tried().items(), "weights", "kind")
    }


def chosen(weights: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """The settings of the weights whose images overlap best with their layouts."""
    ways, found = tried(), {}
    for name, scored in weights.items():
        best = max(scored, key=lambda weight, own=scored: own[weight]["iou"])
        if name.removeprefix("bias on ") not in ALONE and ways[name][best] != SAME:
            found[f"{name}, {float(best):g}"] = ways[name][best]
    return found


def windows(pipe: OneEncoder, own: Work) -> dict[str, dict[str, dict[str, float]]]:
    """The default's scores where it acts in parts of the steps, on two schedules."""
    return {
        f"{shift:g}": {
            f"{part:g}": _window(pipe, own, shift, part)
            for part in _progress.track(WINDOWS, f"windows, shift {shift:g}", "window")
        }
        for shift in SHIFTS
    }


def _means(pipe: OneEncoder, work: Work, options: dict[str, Any]) -> dict[str, float]:
    found = scored(pipe, work, options)
    return {name: found[name].mean().item() for name in ("iou", "present")}


def _window(pipe: OneEncoder, work: Work, shift: float, part: float) -> dict[str, float]:
    """The default's scores where it acts in a part of the steps, and the sigma where it ends."""
    with shifted(pipe, shift) as sigmas:
        end = sigmas[round(part * (len(sigmas) - 1))]
        return _means(pipe, work, {"active": part}) | {"sigma": end}


@contextmanager
def shifted(pipe: OneEncoder, shift: float) -> Iterator[list[float]]:
    """The pipeline on a schedule with more of its steps where noise is high, and its sigmas."""
    before = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(before.config, shift=shift)
    pipe.scheduler.set_timesteps(pipe.usual["num_inference_steps"])
    try:
        yield pipe.scheduler.sigmas.tolist()
    finally:
        pipe.scheduler = before


def table(result: dict[str, Any]) -> str:
    """Rows of all settings, then the weights and windows that were tried, as Markdown."""
    rows = []
    for name, found in result["rows"].items():
        paired = [
            "-" if name == other else said(found[f"iou - {other}"], "+.3f")
            for other in ("plain", DEFAULT)
        ]
        means = said(found["present"]), said(found["iou"]), f"{found['swapped']['mean']:.3f}"
        rows.append([name, *means, *paired, f"{found['off_palette']['mean']:.3f}"])
    seeds = "one seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    title = f"{result['layouts']} layouts of 2 things, {seeds} each"
    head = [title, "all things there", "IoU with the layout", "swapped layout", "IoU over plain"]
    head += ["IoU over the default", "off palette"]
    return "\n\n".join([markdown(head, rows), _weights(result), _windows(result)])


def _weights(result: dict[str, Any]) -> str:
    columns = sorted({float(weight) for ways in result["weights"].values() for weight in ways})
    rows = [
        [name, *(_pair(ways.get(str(weight))) for weight in columns)]
        for name, ways in result["weights"].items()
    ]
    title = f"IoU / all there on {result['tuning']} other layouts, weight"
    return markdown([title, *(f"{weight:g}" for weight in columns)], rows)


def _windows(result: dict[str, Any]) -> str:
    rows = []
    for shift, found in result["windows"].items():
        rows.append(
            [f"shift {shift}", *(f"{_pair(own)} ({own['sigma']:.2f})" for own in found.values())]
        )
    parts = next(iter(result["windows"].values()))
    title = "the default in the first part of the steps (sigma where it ends)"
    return markdown([title, *(f"{float(part):.0%}" for part in parts)], rows)


def _pair(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['iou']:.3f} / {found['present']:.2f}"
