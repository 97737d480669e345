"""The page in gradio: its fields and results, from top to bottom."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from dense_attn import _files

from . import canvas, look, results, settings
from .events import Events
from .layouts import layouts
from .session import Session

BRUSHES = len(canvas.PAINTED)
KINDS = [("phrases of the full prompt", False), ("prompts of their own", True)]
WEIGHTS = ("cross_weight", "self_weight")
PAIRS = WEIGHTS, ("size_weight", "active"), ("steps", "guidance")


class Page:
    """The components of one page, by name."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder = session, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.fields: dict[str, Any] = {}  # what makes the settings
        self.shown: dict[str, Any] = {}  # what a run fills
        self.refusals: dict[str, Any] = {}

    def blocks(self) -> gr.Blocks:
        """The page, ready to be served."""
        title = "dense_attn: layouts"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            gr.Markdown(
                "# Paint a layout\nPaint where things are to be, say what each colour shows, run. "
                f"Or begin with an example. Model: {self.session.model.name}."
            )
            self._examples()
            with gr.Row(elem_id="sides"):
                with gr.Column(min_width=340):
                    self._canvas()
                    self._words()
                    self._numbers()
                    self._edits()
                with gr.Column(min_width=340):
                    self._results()
            # of the last run that was asked for
            self.ticket = gr.Number(0, visible="hidden", elem_id="ticket")
            Events(self).wire(blocks)
        return blocks

    def _refusal(self, field: str) -> None:
        where = f"refused-{field}"
        self.refusals[field] = gr.HTML(elem_id=where, visible=False, padding=False)

    def _canvas(self) -> None:
        self.fields["canvas"] = gr.HTML(
            canvas.paint(canvas.empty()),
            html_template=look.canvas(),
            js_on_load=look.SCRIPT,
            colours=list(canvas.COLOURS.values()),
            apply_default_css=False,
            elem_id="canvas",
        )
        self._refusal("canvas")
        with gr.Accordion("Without painting: a label map, or boxes", open=False):
            self.upload = gr.UploadButton(
                "Upload a label map (a picture, a colour for each region)", file_types=["image"]
            )
            self.boxes = gr.Textbox(
                label="Boxes: a line each, colour: x0 y0 x1 y1 in fractions of the canvas",
                lines=3,
                placeholder="1: 0 0.3 0.5 1\n2: 0.5 0 1 0.7",
            )
            self.draw = gr.Button("Draw the boxes on an empty canvas")

    def _words(self) -> None:
        self.fields["own_prompts"] = gr.Radio(
            KINDS, value=False, label="What a colour shows is said by"
        )
        with gr.Row():
            for label, name in enumerate(canvas.COLOURS, 1):
                said = name if label > BRUSHES else f"{label} {name}"
                self.fields[f"words {label}"] = gr.Textbox(
                    label=f"{said} shows",
                    visible=label <= BRUSHES,
                    min_width=200,
                    max_lines=1,
                    placeholder="what is there",
                    elem_id=f"colour-{label}",
                    elem_classes="words",
                )
        self._refusal("words")
        known = self.session.model.known
        info = f"The model knows: {', '.join(known)}." if known else None
        self.fields["prompt"] = gr.Textbox(
            label="Full prompt (empty: the colours' words, joined by “and”)",
            info=info,
            lines=2,
            elem_id="prompt",
        )
        self._refusal("prompt")

    def _numbers(self) -> None:
        start = self.start()
        with gr.Accordion("Numbers"):
            with gr.Row():
                self.fields["seed"] = gr.Number(
                    start.seed, label="seed (-1: any)", precision=0, min_width=250
                )
                self._slider("samples", start)
            for pair in PAIRS:
                with gr.Row():
                    for name in pair:
                        self._slider(name, start)
            self.fields["modulation"] = gr.Radio(
                list(settings.MODULATIONS), value=start.modulation, label="modulation"
            )
            self._slider("base_ratio", start)
            self._refusal("numbers")

    def _slider(self, name: str, start: settings.Settings) -> None:
        label, least, most, step = settings.NUMBERS[name]
        if self.session.model.joint and name in WEIGHTS:
            most = settings.MOST_BIAS
        self.fields[name] = gr.Slider(
            least,
            most,
            getattr(start, name),
            step=step,
            label=label,
            min_width=250,
            elem_id=name.replace("_", "-"),
        )

    def start(self) -> settings.Settings:
        """The numbers that a page begins with: DenseDiffusion's, or joint attention's own."""
        plain = settings.Settings("", canvas.empty(), ())
        if not self.session.model.joint:
            return plain
        bias = {"cross_weight": 3.0, "self_weight": 0.0, "active": 0.5, "modulation": "bias"}
        return dataclasses.replace(plain, **bias)

    def _edits(self) -> None:
        with gr.Accordion("Semantic edits", open=False):
            self.fields["edits"] = gr.Dataframe(
                headers=list(settings.EDIT_COLUMNS),
                type="array",
                interactive=True,
                datatype=["str", "number", "number", "number", "bool"],
                row_count=settings.EDIT_ROWS,
                value=settings.edit_rows(()),
                column_count=(5, "fixed"),
                elem_id="edits",
                label="More of a concept, or less where reversed",
            )
        self._refusal("edits")

    def _examples(self) -> None:
        how = {"size": "sm", "min_width": 150, "elem_classes": "example"}
        with gr.Row():
            self.examples = [
                (gr.Button(made.prompt, icon=self._icon(number, made), **how), made)
                for number, made in enumerate(layouts())
            ]

    def _icon(self, number: int, made: settings.Settings) -> str:
        path = self.folder / f"example-{number}.png"
        _files.write_by(path, partial(canvas.painting(made.labels).save, format="PNG"))
        return str(path)

    def _results(self) -> None:
        with gr.Column(elem_id="press"):
            with gr.Row():
                self.run = gr.Button("Run", variant="primary", elem_id="run", min_width=100)
                self.cancel = gr.Button("Cancel", elem_id="cancel", min_width=100)
            begun = results.status("Nothing has run yet.")
            self.status = gr.HTML(begun, elem_id="status", padding=False, min_height=60)
            self._refusal("run")
        how = {"columns": 2, "object_fit": "contain", "elem_classes": "pixels", "format": "png"}
        with gr.Row():
            for name, label in (("plain", "Plain"), ("placed", "With the layout")):
                self.shown[name] = gr.Gallery(
                    label=label, elem_id=name, min_width=260, height=340, **how
                )
        for name in ("table", "cost", "notes"):
            self.shown[name] = gr.HTML(elem_id=name, visible=False, padding=False)
        with gr.Row():
            self.shown["words"] = gr.Image(
                label="The regions on the latent grid",
                elem_id="grid",
                format="png",
                interactive=False,
                min_width=260,
                elem_classes="pixels",
                buttons=[],
            )
            self.shown["files"] = gr.File(
                label="The images, their settings inside", elem_id="files", min_width=260
            )
        self.load = gr.UploadButton(
            "Load the settings of an image of this page", file_types=[".png", ".json"]
        )
        self._refusal("file")
        self.shown["code"] = gr.Code(
            label="Python that makes the same image",
            language="python",
            elem_id="code",
            interactive=False,
            buttons=["copy"],
            min_width=260,
        )
