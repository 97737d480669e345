"""A run in HTML: what the page tells beside the images."""

from __future__ import annotations

from html import escape

from . import canvas
from .session import Cost, Run

MB = 1 << 20


def table(run: Run) -> str:
    """Each region's overlap and attention, without and with the layout, means over the samples."""
    head = "<th scope='col'>".join(
        ["", "region", "overlap, plain", "with layout", "attention inside, without", "with layout"]
    )
    rows = []
    for r, label in enumerate(run.settings.painted):
        cells = [_mean([s.plain_overlaps[r] for s in run.samples])]
        cells.append(_mean([s.overlaps[r] for s in run.samples]))
        shares = run.inside[r] if run.inside and run.settings.words_of(label) else (None, None)
        cells += [_number(share) for share in shares]
        words = escape(run.settings.words_of(label) or "no words")
        code = list(canvas.COLOURS.values())[label - 1]
        swatch = f"<span class='swatch' style='background:{code}'></span>"
        said = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><th scope='row'>{swatch}{label} {words}</th>{said}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return (
        f"<table class='scores'>{body}</table>"
        "<p class='small'>Overlap: the pixels of the phrase's colour and the region, intersection "
        "over union, where colours can be counted. Attention inside: the share of what a phrase "
        "gets in cross-attention that it gets inside its region, mean of the steps in which the "
        "layout acts, at the same queries and keys without and with it. – is not counted.</p>"
    )


def cost(run: Run) -> str:
    """Time and memory of an image."""
    return (
        f"An image took {_cost(run.plain_cost)} plain, {_cost(run.cost)} with the layout and what "
        "is counted here beside it."
    )


def notes(run: Run) -> str:
    """The library's warnings."""
    return "".join(f"<p class='note'>{escape(note)}</p>" for note in run.notes)


def refusal(sentence: str) -> str:
    """A sentence beside a field."""
    return f"<p class='refused' role='alert'>{escape(sentence)}</p>" if sentence else ""


def status(sentence: str) -> str:
    """A sentence on the run."""
    return f"<p role='status'>{escape(sentence)}</p>"


def _cost(cost: Cost) -> str:
    extra = "" if cost.extra_bytes is None else f" and at most {cost.extra_bytes / MB:.0f} MB more"
    return f"{cost.seconds:.2f} s{extra}"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(sum(known) / len(known) if known else None)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
