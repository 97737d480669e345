"""`python -m dense_attn demo`: layout attention on a real layout, a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from dense_attn import _files
from dense_attn._backends import table as backends
from dense_attn._command import UserError
from dense_attn.demo import picture
from dense_attn.demo.scene import Scene, load_scene
from dense_attn.demo.step import (
    NUM_HEADS,
    SD15_LAYERS,
    Measurement,
    measure,
    megabytes,
    peaks,
    totals,
)
from dense_attn.layout_attention.layout import MAX_REGIONS

GRIDS = tuple(dict.fromkeys(layer.grid for layer in SD15_LAYERS))
PICTURE_FORMATS = (".png", ".svg", ".pdf", ".jpg")
OFFICIAL = (
    "official: the formula as DenseDiffusion's code has it, in plain PyTorch, "
    "every score and mask in memory"
)
RANDOM = (
    "Queries, keys and values are random, smooth like an image's, of no trained model: "
    "this shows the op alone."
)


COLUMNS = "official  dense_attn"
HEAD = f"""\
{"":<30}{"time per layer (ms)":<32}{"extra peak memory (MB)":<27}largest
{"layer":<17}{"x count":<10}{f"{COLUMNS}   ratio":<34}{COLUMNS:<24}difference"""


def table(measurements: list[Measurement]) -> str:
    """The measurements and their sum as text."""
    lines = [HEAD]
    for one in measurements:
        name, times = (
            f"{one.layer.kind} {one.layer.grid} x {one.layer.grid}",
            map(median, one.seconds),
        )
        lines.append(_line(name, one.layer.count, *times, one.peak_bytes, one.difference))
    count = sum(one.layer.count for one in measurements)
    difference = max(one.difference for one in measurements)
    total = *totals(measurements), peaks(measurements)
    return "\n".join([*lines, _line("whole step", count, *total, difference)])


def _line(
    name: str,
    count: int,
    official: float,
    ours: float,
    peak_bytes: tuple[int | None, int | None],
    difference: float,
) -> str:
    memory = "  ".join(f"{megabytes(size):>10}" for size in peak_bytes)
    times = f"{1e3 * official:10.1f}  {1e3 * ours:10.1f} {official / ours:6.1f}x"
    return f"{name:<16} x {count:<5} {times}    {memory}   {difference:11.1e}"


def main(
    layout: Path | None,
    output: Path,
    phrases: list[str] | None,
    grids: list[int] | None,
    backend: str = "auto",
) -> None:
    """Print the table and draw the picture; a UserError says what the user can put right."""
    _check_output(output)
    scene = load_scene(layout, phrases)
    layers = tuple(layer for layer in SD15_LAYERS if layer.grid in (grids or GRIDS))
    try:
        probe = torch.empty(1, 1, 1, 1, dtype=torch.float32, device="cpu")
        name = backends.resolve(backend, "layout_attention", probe)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    print(f'"{scene.prompt}", {len(scene.layout)} of at most {MAX_REGIONS} regions')
    print(f"float32, batch 2, {NUM_HEADS} heads, backend {name}, {torch.get_num_threads()} threads")
    print(OFFICIAL)
    print(RANDOM)
    runs = _progress(measure(scene.layout, layers, backend), sum(layer.count for layer in layers))
    measurements = list({run.layer: run for run in runs}.values())
    print("\n" + table(measurements))
    picture.draw(scene, measurements, output)
    print(f"\nwrote {output}")
    _generate(scene if layout else None, _second(output), backend)


def _second(output: Path) -> Path:
    """Where the generated images go."""
    return output.with_name(f"{output.stem}-scenes{output.suffix}")


def _generate(users: Scene | None, output: Path, backend: str) -> None:
    """Images of a small trained model, under the user's layout or those of six prompts."""
    try:
        from dense_attn.examples.tiny_scenes import sheet
    except ImportError as error:
        print(f"no generated images: they need {error.name} (pip install dense_attn[diffusers])")
        return
    rows = sheet.shipped_rows()
    if users is not None:
        rows = [sheet.users_row(users.layout.masks, users.phrases)]
    if reasons := [reason for row in rows for reason in sheet.why_not(row)]:
        print(f"no generated images: {'; '.join(reasons)}")
        return
    print(f"{len(rows)} prompts to a model of 4 million parameters, each image in 20 steps")
    images = sheet.make(rows, backend=backend)
    for name in sheet.COLUMNS[1:]:
        overlaps = [sheet.overlap(image, row) for image, row in zip(images[name], rows)]
        shown = [f"{value:.2f}" for value in overlaps if value is not None]
        print(f"  {name:24} overlap with the layout: {', '.join(shown) or 'no colour is named'}")
    sheet.draw(rows, images, output)
    print(f"wrote {output}")


def _check_output(output: Path) -> None:
    """Refuse before the work what would fail after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        need = "the demo's picture needs matplotlib: pip install dense_attn[bench]"
        raise UserError(need) from None
    if output.suffix.lower() not in PICTURE_FORMATS:
        raise UserError(f"--output must end in one of {', '.join(PICTURE_FORMATS)}, got {output}")
    if not output.parent.is_dir():
        raise UserError(f"--output must be in a folder that exists, got {output}")
    for file in (output, _second(output)):
        _files.check(file)


def _progress(steps: Iterator[Measurement], total: int) -> Iterator[Measurement]:
    """The steps behind a progress bar, or with one line each where tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        for done, step in enumerate(steps, 1):
            kind, grid = step.layer.kind, step.layer.grid
            print(f"layer {done} of {total}: {kind}-attention, {grid} x {grid}")
            yield step
        return
    yield from tqdm(steps, total=total, unit="layer", desc="attention layers")
