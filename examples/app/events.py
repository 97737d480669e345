"""The page's events: fields to settings, runs to what is shown, errors to sentences."""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from dense_attn import _files

from . import canvas, pictures, results, settings
from .refused import FIELDS, Refused
from .session import CancelledError, Run, any_seed

if TYPE_CHECKING:
    from .page import Page

Update = dict[Any, Any]
TOLD = gr.Progress()  # the default by which gradio knows that a function tells of its progress


class Asked(NamedTuple):
    """A run that a browser has asked for."""

    settings: settings.Settings
    stop: threading.Event


class Events:
    """The events of one page, and the runs that wait or go on, by browser session."""

    def __init__(self, page: Page) -> None:
        self.page, self.session, self.fields = page, page.session, page.fields
        self.asked: defaultdict[str | None, list[Asked]] = defaultdict(list)

    def wire(self, blocks: gr.Blocks) -> None:
        """Tie the events to the page's components."""
        page, ticket, quiet = self.page, self.page.ticket, {"api_visibility": "private"}
        fields, told = set(self.fields.values()), [page.status, *page.refusals.values()]
        begun = {**quiet, "queue": False, "show_progress": "hidden"}
        page.run.click(self._begin, {*fields, ticket}, [ticket, *told], **begun)
        ticket.change(
            self._run,
            None,
            [*page.shown.values(), *told],
            concurrency_limit=1,
            show_progress="full",
            show_progress_on=[page.status],
            **quiet,
        )
        page.cancel.click(self._stop, None, page.status, **begun)
        blocks.unload(self._left)
        filled = [*self.fields.values(), *told]
        for trigger, source, read in (
            (page.upload.upload, page.upload, canvas.read_upload),
            (page.draw.click, page.boxes, canvas.read_boxes),
        ):
            trigger(partial(self._painted, read), source, filled, **begun)
        page.load.upload(self._loaded, page.load, filled, **begun)
        for button, made in page.examples:
            button.click(partial(self._filled, made), None, filled, **begun)

    def _answer(self, error: Refused | None = None) -> Update:
        """The sentences of all fields: that of an error, and none elsewhere."""
        said = {} if error is None else {error.field: str(error)}
        return {
            self.page.refusals[field]: gr.update(
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
        self.asked[request.session_hash].append(Asked(asked, threading.Event()))
        waiting = results.status("Waiting for its turn.")
        return self._answer() | {
            self.page.ticket: values[self.page.ticket] + 1,
            self.page.status: waiting,
        }

    def _run(self, request: gr.Request, progress: gr.Progress = TOLD) -> Update:
        """The images of what was asked for last, and all that is told of them."""
        waiting = self.asked[request.session_hash]
        if not waiting:  # asked for twice, and done
            return gr.skip()
        asked = waiting[-1]
        try:
            run = self.session.run(asked.settings, progress, asked.stop)
        except CancelledError as error:
            return {self.page.status: results.status(str(error))}
        except Refused as error:
            said = results.status("Nothing was made.")
            return self._answer(error) | {self.page.status: said}
        finally:
            del waiting[: waiting.index(asked) + 1]
        return self._answer() | self._told(run, request.session_hash)

    def _told(self, run: Run, name: str | None) -> Update:
        folder, paths = self.page.folder / str(name), []
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        place = Path(mkdtemp(dir=folder))  # no browser takes the next run's files for these
        for file, data in run.files.items():
            paths.append(str(place / file))
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
        return {self.page.shown[name]: value for name, value in values.items()} | {
            self.page.status: done
        }

    def _stop(self, request: gr.Request) -> Update:
        """End this browser's run at its next step, and those that wait."""
        if not self.asked[request.session_hash]:
            return {self.page.status: results.status("There is no run to cancel.")}
        for asked in self.asked[request.session_hash]:
            asked.stop.set()
        return gr.skip()  # a run says itself how far it came, perhaps before this answer is there

    def _left(self, request: gr.Request) -> None:
        """End the runs of a browser that is gone, and remove its files."""
        for asked in self.asked.pop(request.session_hash, []):
            asked.stop.set()
        shutil.rmtree(self.page.folder / str(request.session_hash), ignore_errors=True)

    def _painted(self, read: Callable[[str], Any], source: str) -> Update:
        try:
            return self._answer() | self._canvas_of(read(source or ""))
        except Refused as error:
            return self._answer(error)

    def _canvas_of(self, labels: Any) -> Update:
        """The canvas with labels on it, and a field for the words of each."""
        there = set(labels.flat)
        seen = {
            self.fields[f"words {n}"]: gr.update(visible=n <= len(canvas.PAINTED) or n in there)
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
        return self._filled(made) | {self.page.status: results.status(said)}

    def _filled(self, made: settings.Settings) -> Update:
        """All fields as settings have them."""
        update = self._canvas_of(made.labels)
        for n in range(1, len(canvas.COLOURS) + 1):
            field, words = self.fields[f"words {n}"], made.words_of(n)
            update[field] = gr.update(value=words, visible=update[field]["visible"] or bool(words))
        for name in ("prompt", "own_prompts", "seed", "modulation", *settings.NUMBERS):
            update[self.fields[name]] = getattr(made, name)
        update[self.fields["edits"]] = settings.edit_rows(made.edits)
        return self._answer() | update
