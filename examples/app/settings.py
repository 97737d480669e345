"""Settings: all that makes an image, as the page has it and as files keep it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import dense_attn
from dense_attn.integrations.diffusers import Edit, Region

from . import canvas
from .refused import refuse

MODULATIONS = ("range", "max", "bias", "mask")
MOST_BIAS = 8  # the weights of joint attention, whose own is 3
MOST_EDITS = 16
EDIT_ROWS = 3  # of the table where fewer are there
MOST_SEED = 2**63 - 1


class Number(NamedTuple):
    """A number's words on the page and its range."""

    label: str
    least: float
    most: float
    step: float


NUMBERS = {
    "cross_weight": Number("cross: degree of modulation at cross-attention layers", 0, 2, 0.05),
    "self_weight": Number("self: degree of modulation at self-attention layers", 0, 2, 0.05),
    "size_weight": Number("degree of mask-area adaptive adjustment", 0, 1, 0.05),
    "active": Number("active window: the share of the steps that it acts in", 0, 1, 0.05),
    "base_ratio": Number("share of the full prompt under prompts of their own", 0, 1, 0.05),
    "steps": Number("steps", 1, 100, 1),
    "guidance": Number("guidance scale", 1, 20, 0.5),
    "samples": Number("samples", 1, 4, 1),
}
WHOLE = ("steps", "samples")
EDIT_COLUMNS = ("concept", "scale", "threshold", "warm-up", "reverse")


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """Everything that an image depends on but the model.

    Args:
        prompt: the full prompt; empty: the words of all regions, joined by "and".
        labels: the canvas, uint8 [64, 64], 0 where nothing is painted.
        words: what each colour shows, by label from 1; "" for none.
        own_prompts: whether the words are prompts of their own, not phrases of the prompt.
        seed: of the first sample, others count up from it.
        samples, steps, guidance: how many images, and how each is made.
        cross_weight, self_weight, size_weight, active, modulation: as in `apply_layout`.
        base_ratio: as in `apply_layout`, where regions have prompts of their own.
        edits: concepts of semantic guidance.
    """

    prompt: str
    labels: np.ndarray
    words: tuple[str, ...]
    own_prompts: bool = False
    seed: int = 0
    samples: int = 1
    steps: int = 20
    guidance: float = 7.5
    cross_weight: float = 1.0
    self_weight: float = 0.3
    size_weight: float = 1.0
    active: float = 0.3
    base_ratio: float = 0.0
    modulation: str = "range"
    edits: tuple[Edit, ...] = ()

    @property
    def painted(self) -> list[int]:
        """The labels that are on the canvas, ascending."""
        return [int(label) for label in np.unique(self.labels) if label]

    @property
    def full_prompt(self) -> str:
        """The prompt, or the regions' words in its place."""
        said = [self.words_of(label) for label in self.painted]
        return self.prompt.strip() or " and ".join(word for word in said if word)

    def words_of(self, label: int) -> str:
        """The words of a colour; "" for none."""
        return self.words[label - 1].strip() if label <= len(self.words) else ""

    def regions(self) -> list[Any]:
        """The regions as `apply_layout` takes them."""
        masks = [
            (self.words_of(label), canvas.mask_of(self.labels, label)) for label in self.painted
        ]
        if self.own_prompts:
            return [Region(mask, words) for words, mask in masks]
        return [(words or None, mask) for words, mask in masks]

    def options(self) -> dict[str, Any]:
        """The options of `apply_layout`: those that count for this kind of regions."""
        if self.own_prompts:
            return {"base_ratio": self.base_ratio}
        options = {"modulation": self.modulation, "active": self.active}
        if self.modulation == "mask":  # which has no strength
            return options
        weights = {name: getattr(self, name) for name in ("cross_weight", "self_weight")}
        return options | weights | {"size_weight": self.size_weight}


def check(settings: Settings) -> Settings:
    """Settings without anything that every model would refuse, or Refused with the field."""
    if not settings.painted:
        refuse("canvas", "the canvas", "have a painted region", "none")
    for label, words in enumerate(settings.words, 1):
        name = f"colour {label} ({list(canvas.COLOURS)[label - 1]})"
        if words.strip() and label not in settings.painted:
            refuse("words", name, "be painted or have no words", repr(words.strip()))
        if settings.own_prompts and label in settings.painted and not words.strip():
            refuse("words", name, "have a prompt of its own where others have", "none")
    if not any(map(settings.words_of, settings.painted)):
        refuse("words", "one painted colour at least", "have words", "none")
    _check_numbers(settings)
    for number, edit in enumerate(settings.edits, 1):
        if not 0 <= edit.threshold <= 1:
            refuse("edits", f"threshold of edit {number}", "be in 0..1", edit.threshold)
        if edit.warmup < 0:
            refuse("edits", f"warm-up of edit {number}", "be at least 0", edit.warmup)
    if len(settings.edits) > MOST_EDITS:
        refuse("edits", "edits", f"be at most {MOST_EDITS}", len(settings.edits))
    return settings


def _check_numbers(settings: Settings) -> None:
    for name, number in NUMBERS.items():
        value = getattr(settings, name)
        most = (
            max(number.most, MOST_BIAS) if name in ("cross_weight", "self_weight") else number.most
        )
        if not number.least <= value <= most:
            refuse("numbers", name, f"be in {number.least}..{most}", value)
    if not 0 <= settings.seed <= MOST_SEED:
        refuse("numbers", "seed", f"be in 0..{MOST_SEED}, or -1 for any", settings.seed)
    if settings.modulation not in MODULATIONS:
        rule = f"be one of {', '.join(MODULATIONS)}"
        refuse("numbers", "modulation", rule, repr(settings.modulation))


def read_edits(rows: Sequence[Sequence[Any]]) -> tuple[Edit, ...]:
    """Rows of the page's table as edits; those without a concept are left out."""
    found = []
    for number, row in enumerate(rows, 1):
        concept, *values = (*row, *[None] * len(EDIT_COLUMNS))[: len(EDIT_COLUMNS)]
        if not str(concept or "").strip():
            continue
        numbers = [
            _number("edits", f"{name} of edit {number}", value)
            for name, value in zip(EDIT_COLUMNS[1:4], values)
        ]
        reverse = values[3] is True or str(values[3]).strip().lower() in ("true", "yes", "1")
        found.append(Edit(str(concept).strip(), *numbers[:2], warmup=numbers[2], reverse=reverse))
    return tuple(found)


def edit_rows(edits: Sequence[Edit]) -> list[list[Any]]:
    """The inverse of `read_edits`, with bare rows behind them for the table."""
    rows = [[e.prompt, e.scale, e.threshold, e.warmup, e.reverse] for e in edits]
    return rows + [["", 5.0, 0.9, 10, False]] * (EDIT_ROWS - len(rows))


def _number(field: str, name: str, value: Any, whole: bool = False) -> Any:
    """A finite number, of what may be typed text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ValueError
        return int(value) if whole else number
    except (TypeError, ValueError, OverflowError):
        refuse(field, name, "be a whole number" if whole else "be a number", repr(value))


def settings_of(given: dict[str, Any], field: str = "numbers") -> Settings:
    """Checked Settings of values by name, numbers among them as numbers or as typed text.

    `field`: where a number that is none is told of.
    """
    made = dict(given)
    for name in ("seed", *NUMBERS):
        made[name] = _number(field, name, given.get(name), name in (*WHOLE, "seed"))
    return check(Settings(**made))


def to_json(settings: Settings, model: str) -> str:
    """Settings and the name of their model as text."""
    fields = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    fields |= {"labels": canvas.packed(settings.labels), "edits": edit_rows(settings.edits)}
    fields["words"] = list(settings.words)
    return json.dumps({"dense_attn": dense_attn.__version__, "model": model, **fields})


def from_json(text: str) -> tuple[Settings, str]:
    """The settings of a text and the name of their model; Refused where it has none."""
    try:
        fields = json.loads(text)
        model = fields.pop("model")
        fields.pop("dense_attn")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        refuse("file", "the file", "hold settings of this page", "none")
    known = {f.name for f in dataclasses.fields(Settings)}
    words = fields.get("words")
    right = isinstance(words, list) and all(isinstance(word, str) for word in words)
    edits = fields.get("edits")
    rows = isinstance(edits, list) and all(isinstance(row, list) for row in edits)
    kinds = [type(fields.get(name)) for name in ("prompt", "own_prompts", "modulation")]
    if fields.keys() != known or not right or not rows or kinds != [str, bool, str]:
        refuse("file", "the file", "hold settings of this page", "others")
    if len(words) > canvas.MOST:
        refuse("file", "words", f"be of at most {canvas.MOST} colours", len(words))
    fields |= {
        "words": tuple(words),
        "labels": canvas.unpacked(fields["labels"]),
        "edits": read_edits(edits),
    }
    return settings_of(fields, "file"), re.sub(r"[^\x20-\x7e]", "?", str(model))[:200]
