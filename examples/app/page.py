"""The page in gradio: fields, what their events do, and nothing of what they mean."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from dense_attn import _files

from . import canvas, look, pictures, results, settings
from .layouts import layouts
from .refused import FIELDS, Refused
from .session import CancelledError, Run, Session, any_seed

BRUSHES = len(canvas.PAINTED)
KINDS = [("phrases of the full prompt", False), ("prompts of their own", True)]
PAIRS = ("cross_weight", "self_weight"), ("size_weight", "active"), ("steps", "guidance")
Update = dict[Any, Any]
TOLD = gr.Progress()  # the default by which gradio knows that a function tells of its progress


class Asked(NamedTuple):
    """A run that a browser has asked for."""

    settings: settings.Settings
    stop: threading.Event


class Page:
    """One page: its components by name, and the runs that wait or go on, by browser session."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder = session, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.fields: dict[str, Any] = {}  # what makes the settings
        self.shown: dict[str, Any] = {}  # what a run fills
        self.refusals: dict[str, Any] = {}
        self.asked: dict[str | None, Asked] = {}

    def blocks(self) -> gr.Blocks:
        """The page, ready to be served."""
        title = "dense_attn: layouts"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            gr.Markdown(
                "# Paint a layout\nPaint where things are to be, say what each colour shows, run. "
                f"Or begin with an example. Model: {self.session.model.name}."
            )
            self._examples()
            with gr.Row():
                with gr.Column(min_width=340):
                    self._canvas()
                    self._words()
                    self._numbers()
                    self._edits()
                with gr.Column(min_width=340):
                    self._results()
            self._events(blocks)
        return blocks

    def _refusal(self, field: str) -> None:
        where = f"refused-{field}"
        self.refusals[field] = gr.HTML(elem_id=where, visible=False, padding=False)

    def _canvas(self) -> None:
        self.fields["canvas"] = gr.HTML(
            canvas.paint(canvas.empty()), html_template=look.canvas(), js_on_load=look.SCRIPT,
            colours=list(canvas.COLOURS.values()), apply_default_css=False, elem_id="canvas",
        )  # fmt: skip
        self._refusal("canvas")
        with gr.Accordion("Without painting: a label map, or boxes", open=False):
            self.upload = gr.UploadButton(
                "Upload a label map (a picture, a colour for each region)", file_types=["image"]
            )
            self.boxes = gr.Textbox(
                label="Boxes: a line each, colour: x0 y0 x1 y1 in fractions of the canvas",
                lines=3, placeholder="1: 0 0.3 0.5 1\n2: 0.5 0 1 0.7",
            )  # fmt: skip
            self.draw = gr.Button("Draw the boxes on an empty canvas")

    def _words(self) -> None:
        self.fields["own_prompts"] = gr.Radio(
            KINDS, value=False, label="What a colour shows is said by"
        )
        with gr.Row():
            for label, name in enumerate(canvas.COLOURS, 1):
                said = name if label > BRUSHES else f"{label} {name}"
                self.fields[f"words {label}"] = gr.Textbox(
                    label=f"{said} shows", visible=label <= BRUSHES, min_width=200, max_lines=1,
                    elem_id=f"colour-{label}", elem_classes="words",
                )  # fmt: skip
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
        if self.session.model.joint and name.endswith("s_weight"):
            most = settings.MOST_BIAS
        self.fields[name] = gr.Slider(
            least, most, getattr(start, name), step=step, label=label, min_width=250,
            elem_id=name.replace("_", "-"),
        )  # fmt: skip

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
                headers=list(settings.EDIT_COLUMNS), type="array", interactive=True,
                datatype=["str", "number", "number", "number", "bool"], row_count=2,
                value=[["", 5, 0.9, 10, False]] * 2, column_count=(5, "fixed"), elem_id="edits",
                label="More of a concept, or less where reversed",
            )  # fmt: skip
        self._refusal("edits")

    def _examples(self) -> None:
        look = {"size": "sm", "min_width": 150, "elem_classes": "example"}
        with gr.Row():
            self.examples = [
                (gr.Button(made.prompt, icon=self._icon(number, made), **look), made)
                for number, made in enumerate(layouts())
            ]

    def _icon(self, number: int, made: settings.Settings) -> str:
        path = self.folder / f"example-{number}.png"
        _files.write_by(path, partial(canvas.painting(made.labels).save, format="PNG"))
        return str(path)

    def _results(self) -> None:
        with gr.Row():
            self.run = gr.Button("Run", variant="primary", elem_id="run")
            self.cancel = gr.Button("Cancel", elem_id="cancel")
        begun = results.status("Nothing has run yet.")
        self.status = gr.HTML(begun, elem_id="status", padding=False, min_height=60)
        self._refusal("run")
        look = {"columns": 2, "object_fit": "contain", "elem_classes": "pixels", "format": "png"}
        with gr.Row():
            for name, label in (("plain", "Plain"), ("placed", "With the layout")):
                self.shown[name] = gr.Gallery(
                    label=label, elem_id=name, min_width=260, height=340, **look
                )
        for name in ("table", "cost", "notes"):
            self.shown[name] = gr.HTML(elem_id=name, visible=False, padding=False)
        with gr.Row():
            self.shown["words"] = gr.Image(
                label="Region words on the latent grid", elem_id="grid", format="png",
                interactive=False, min_width=260, elem_classes="pixels", buttons=[],
            )  # fmt: skip
            self.shown["files"] = gr.File(
                label="The images, their settings inside", elem_id="files", min_width=260
            )
        self.load = gr.UploadButton(
            "Load the settings of an image of this page", file_types=[".png", ".json"]
        )
        self._refusal("file")
        self.shown["code"] = gr.Code(
            label="Python that makes the same image", language="python", elem_id="code",
            interactive=False, wrap_lines=True, buttons=["copy"], min_width=260,
        )  # fmt: skip

    def _events(self, blocks: gr.Blocks) -> None:
        self.ticket = ticket = gr.Number(0, visible="hidden")
        fields, quiet = set(self.fields.values()), {"api_visibility": "private"}
        told = [self.status, *self.refusals.values()]
        begun = {**quiet, "queue": False, "show_progress": "hidden"}
        self.run.click(self._begin, {*fields, ticket}, [ticket, *told], **begun)
        ticket.change(
            self._run, None, [*self.shown.values(), *told], concurrency_limit=1,
            show_progress="full", show_progress_on=[self.status], **quiet,
        )  # fmt: skip
        self.cancel.click(self._stop, None, self.status, **begun)
        blocks.unload(self._left)
        filled = [*self.fields.values(), *told]
        for trigger, source, read in (
            (self.upload.upload, self.upload, canvas.read_upload),
            (self.draw.click, self.boxes, canvas.read_boxes),
        ):
            trigger(partial(self._painted, read), source, filled, **begun)
        self.load.upload(self._loaded, self.load, filled, **begun)
        for button, made in self.examples:
            button.click(partial(self._filled, made), None, filled, **begun)

    def _answer(self, error: Refused | None = None) -> Update:
        """The sentences of all fields: that of an error, and none elsewhere."""
        said = {} if error is None else {error.field: str(error)}
        return {
            self.refusals[field]: gr.update(
                value=results.refusal(said.get(field, "")), visible=field in said
            )
            for field in FIELDS
        }

    def _settings(self, values: Update) -> settings.Settings:
        """The fields' settings, or Refused."""
        given = {name: values[field] for name, field in self.fields.items()}
        words = tuple(given.pop(f"words {n}") or "" for n in range(1, len(canvas.COLOURS) + 1))
        given["labels"] = canvas.painted(given.pop("canvas"))
        if given["seed"] == -1:
            given["seed"] = any_seed()
        given |= {"prompt": given["prompt"] or "", "words": words}
        given["edits"] = settings.read_edits(given["edits"] or [])
        return settings.settings_of(given)

    def _begin(self, values: Update, request: gr.Request) -> Update:
        """Look at the fields at once, whoever runs, and take a place in the queue."""
        try:
            asked = self._settings(values)
            self.session.model.check(asked)
        except Refused as error:
            return self._answer(error)
        self.asked[request.session_hash] = Asked(asked, threading.Event())
        waiting = results.status("Waiting for its turn.")
        return self._answer() | {self.ticket: values[self.ticket] + 1, self.status: waiting}

    def _run(self, request: gr.Request, progress: gr.Progress = TOLD) -> Update:
        """The images of what was asked for, and all that is told of them."""
        asked = self.asked.get(request.session_hash)
        if asked is None:  # asked for twice, and done
            return {}
        try:
            run = self.session.run(asked.settings, progress, asked.stop)
        except CancelledError as error:
            return {self.status: results.status(str(error))}
        except Refused as error:
            said = results.status("Nothing was made.")
            return self._answer(error) | {self.status: said}
        finally:
            if self.asked.get(request.session_hash) is asked:
                del self.asked[request.session_hash]
        return self._answer() | self._told(run, request.session_hash)

    def _told(self, run: Run, name: str | None) -> Update:
        folder, paths = self.folder / str(name), []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, data in run.files.items():
            paths.append(str(folder / file))
            _files.write(paths[-1], data)
        captions = [f"seed {sample.seed}" for sample in run.samples]
        values = {
            "plain": [(pictures.shown(s.plain), c) for s, c in zip(run.samples, captions)],
            "placed": [(pictures.shown(s.placed), c) for s, c in zip(run.samples, captions)],
            "table": gr.update(value=results.table(run), visible=True),
            "cost": gr.update(value=results.cost(run), visible=True),
            "notes": gr.update(value=results.notes(run), visible=bool(run.notes)),
            "words": run.words,
            "files": paths,
            "code": run.code,
        }
        done = results.status(f"Done: {', '.join(captions)}.")
        return {self.shown[name]: value for name, value in values.items()} | {self.status: done}

    def _stop(self, request: gr.Request) -> Update:
        """End this browser's run at its next step, also one that waits."""
        asked = self.asked.get(request.session_hash)
        if asked is None:
            return {self.status: results.status("There is no run to cancel.")}
        asked.stop.set()
        return {self.status: results.status("Cancelled.")}

    def _left(self, request: gr.Request) -> None:
        """End the run of a browser that is gone, and remove its files."""
        asked = self.asked.get(request.session_hash)
        if asked is not None:
            asked.stop.set()
        shutil.rmtree(self.folder / str(request.session_hash), ignore_errors=True)

    def _painted(self, read: Callable[[str], Any], source: str) -> Update:
        try:
            return self._answer() | self._canvas_of(read(source or ""))
        except Refused as error:
            return self._answer(error)

    def _canvas_of(self, labels: Any) -> Update:
        """The canvas with labels on it, and a field for the words of each."""
        there = set(labels.flat)
        seen = {
            self.fields[f"words {n}"]: gr.update(visible=n <= BRUSHES or n in there)
            for n in range(1, len(canvas.COLOURS) + 1)
        }
        return seen | {self.fields["canvas"]: canvas.paint(labels)}

    def _loaded(self, path: str) -> Update:
        try:
            made, model = pictures.read_settings(path)
        except Refused as error:
            return self._answer(error)
        here = self.session.model.name
        said = (
            "Loaded." if model == here else f"Loaded; they were made with {model}, here is {here}."
        )
        return self._filled(made) | {self.status: results.status(said)}

    def _filled(self, made: settings.Settings) -> Update:
        """All fields as settings have them."""
        update = self._canvas_of(made.labels)
        for n in range(1, len(canvas.COLOURS) + 1):
            field, words = self.fields[f"words {n}"], made.words_of(n)
            update[field] = gr.update(value=words, visible=update[field]["visible"] or bool(words))
        for name in ("prompt", "own_prompts", "seed", "modulation", *settings.NUMBERS):
            update[self.fields[name]] = getattr(made, name)
        rows = settings.edit_rows(made.edits) or [["", 5, 0.9, 10, False]]
        return self._answer() | update | {self.fields["edits"]: rows}
