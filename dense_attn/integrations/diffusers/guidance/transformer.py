"""Semantic guidance of transformers: estimates at the denoiser, their sum at the scheduler."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import SemanticGuidance, _checks

from ..hooks import arguments, watched
from ..rows import Rows
from ..steps import Steps
from ..text import encoding
from .apart import estimates_of
from .calls import FAMILIES, Arguments, Calls, encoded
from .exchange import exchanged
from .runs import Runs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Model

# whose schedulers get something else, or of some latents alone; or whose keys are kept
OTHERS = "SanaSprint|LTXImageToVideo|Kandinsky5I2V|Flux2KleinKV"


@contextmanager
def guided_transformer(
    pipe: DiffusionPipeline,
    model: Model,
    options: dict[str, Any],
    concepts: list[str],
    batched: bool,
) -> Iterator[SemanticGuidance]:
    """One block of a pipeline whose denoiser, or whose two, are transformers."""
    if model.denoiser not in FAMILIES:
        rule = f"have a {', '.join(FAMILIES)} or UNet2DConditionModel"
        _checks.refuse("pipe", rule, f"{type(pipe).__name__} with {model.denoiser}")
    if re.match(OTHERS, type(pipe).__name__):
        rule = "hand its scheduler its denoiser's estimate of all latents, and keep no keys"
        _checks.refuse("pipe", rule, type(pipe).__name__)
    lacking = encoding.missing(pipe)
    if concepts and lacking is not None:
        _checks.refuse("pipe", f"have its {lacking}, which reads concepts", "none")
    with ExitStack() as stack:
        block = GuidedTransformer(pipe, model, options, concepts, batched, stack)
        stack.enter_context(encoding.heard(pipe, block.hear))
        for denoiser in model.denoisers(pipe).values():
            stack.enter_context(watched(denoiser, block, block.before_call, block.after_call))
        block.follow_scheduler()
        yield block.runs.guidance


class GuidedTransformer:
    """One block: a step's estimates are kept until the pipeline hands its own to the scheduler."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        model: Model,
        options: dict[str, Any],
        concepts: list[str],
        batched: bool,
        stack: ExitStack,
    ) -> None:
        self.pipe, self.model, self.family = pipe, model, FAMILIES[model.denoiser]
        self.runs, self.concepts, self.batched = Runs(options), concepts, batched
        self.stack, self.scheduler = stack, None
        self.steps, self.rows = Steps(pipe), Rows(pipe, 1, model.branches)
        self.paused = 0  # blocks inside of this one
        self.manner: Arguments = {}  # of encode_prompt, as the last call had it
        self.texts: list[Arguments] | None = None  # the concepts' in that manner
        self.known: int | None = None  # texts that the call's encode_prompt made
        self.guides = False  # as it was told
        # a step's estimates, as the denoiser gave them: the prompt's, the negative one's, concepts'
        self.own: Any = None
        self.negative: Any = None
        self.edits: list[Any] = []
        self._span: tuple[int, int, int] | None = None  # a call's rows, the prompt's first and last
        self._apart: list[Arguments] = []  # calls of concepts by themselves

    def hear(self, given: dict[str, Any]) -> None:
        """Take the arguments of a call of encode_prompt: concepts are encoded as its prompt is."""
        self.known = encoding.rows_of(given)
        self.guides = bool(given.get("do_classifier_free_guidance", False))
        manner = encoding.manner_of(given)
        if self.texts is None or not encoding.same_manner(manner, self.manner):
            texts = [encoded(self.pipe, self.family, one, manner) for one in self.concepts]
            self.manner, self.texts = manner, texts

    def follow_scheduler(self) -> None:
        """Exchange estimates in the pipeline's scheduler, which may be another in each run."""
        if self.pipe.scheduler is not self.scheduler:
            self.scheduler = self.pipe.scheduler
            self.stack.enter_context(exchanged(self.scheduler, self.guided))

    def before_call(
        self, denoiser: torch.nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """The call with the concepts' rows behind its own, where they go together."""
        self._span, self._apart = None, []
        if self.paused:
            return None
        bound = arguments(denoiser, args, kwargs)
        call = self.model.read(bound.arguments)
        begins = self.steps.follow(call.timestep, self.model.unit)
        told = self.steps.repeated, self.known, self.guides
        rows = self.rows.of(call.latents, call.text, *told)
        if begins:
            self.follow_scheduler()
            self.runs.begin(self.steps.total)
        if not self.steps.repeated:
            self.own = self.negative = None
        if rows is None:
            return None
        self._check(bound.arguments)
        self._span = len(call.latents), *rows
        if not self.concepts:
            return None
        calls = Calls(bound.arguments, *self._span)
        concepts = [calls.alone(text) for text in self.texts]
        joined = calls.together(concepts) if self.batched else None
        if joined is None:
            self._apart = concepts
            return None
        bound.arguments.update(joined)
        return bound.args[1:], bound.kwargs

    def after_call(self, denoiser: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Keep the estimates, and give the pipeline its own."""
        if self.paused:
            return None
        estimates = output[0]
        if self._span is None:  # a call of the negative prompt
            self.negative = estimates
            return None
        rows, first, last = self._span
        self.own = estimates[first:last]
        if last - first < rows:
            self.negative = estimates[last:rows] if first == 0 else estimates[:first]
        if self._apart:
            self.edits, self._apart = estimates_of(denoiser, self._apart), []
            return None
        ends = range(rows, len(estimates), last - first)
        self.edits = [estimates[start : start + last - first] for start in ends]
        own = estimates[:rows]
        return (own, *output[1:]) if isinstance(output, tuple) else type(output)(sample=own)

    def guided(self, estimate: Tensor) -> Tensor:
        """The estimate that the scheduler gets, in the place of the pipeline's own."""
        if self.paused:
            return estimate
        if self.own is None:
            rule = "call its denoiser before each step of its scheduler"
            _checks.refuse("pipe", rule, "a step without a call")
        eps = self._channels_first(estimate)
        edits = [self._channels_first(self._like(estimate, one)) for one in self.edits]
        step, guidance = self.steps.index, self.runs.guidance
        if self.negative is None:  # the prompt's estimate alone, with what guidance is distilled
            guided = guidance(step, eps, eps, edits)
        else:
            base = self._channels_first(self._like(estimate, self.negative))
            guided = guidance.steer(step, eps, base, edits)
        self.own, self.negative, self.edits = None, None, []
        return guided.movedim(1, self.family.channels).contiguous()

    def _channels_first(self, estimate: Tensor) -> Tensor:
        """An estimate with the rows of thresholds in one piece, which kernels read faster."""
        return estimate.movedim(self.family.channels, 1).contiguous()

    def _like(self, estimate: Tensor, own: Any) -> Tensor:
        """A denoiser's estimates as the scheduler gets them; others of a pipeline's are its own."""
        own = torch.stack(own) if isinstance(own, list) else own
        if own.dim() == estimate.dim() + 1 and own.shape[2] == 1:  # one frame, Z-Image's
            own = own.squeeze(2)
        # variances stand behind channels, and images to edit behind an image's tokens
        own = own[:, : estimate.shape[1]] if own.dim() == estimate.dim() else own
        if own.shape != estimate.shape:
            rule = f"hand its scheduler its denoiser's estimate, {tuple(own.shape)}"
            _checks.refuse("pipe", rule, tuple(estimate.shape))
        own = own.to(estimate)
        return own if self.model.sign > 0 else -own

    def _check(self, given: Arguments) -> None:
        """Refuse calls whose concepts' estimates would be something else."""
        if self.own is not None:
            rule = "call its denoiser once a step for its prompt with semantic guidance"
            _checks.refuse("pipe", rule, "a second call of a step")
        adapted = (given.get("joint_attention_kwargs") or {}).get("ip_adapter_image_embeds")
        if adapted is not None:
            _checks.refuse("pipe", "have no IP-Adapter with semantic guidance", "its images")
        for name, value in given.items():
            if "control" in name and value is not None and "scale" not in name:
                _checks.refuse("pipe", "have no ControlNet or adapter with semantic guidance", name)
        if self.concepts and self.texts is None:
            _checks.refuse("pipe", "call its encode_prompt, which concepts follow", "none")
