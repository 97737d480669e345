"""Prompt-to-Prompt: a prompt changed and its image's composition kept, without an attention map.

The changed prompt's image attends, in its first steps, by the maps of the source's:
`M = softmax(scale * q k^T)`. Words that were swapped, are new or weigh more are a matrix on a map's
columns, and `(M A) v = M (A v)`: q and k of the source, and other values, in one call of the op.

Source: Hertz et al., Prompt-to-Prompt Image Editing with Cross-Attention Control, ICLR 2023.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dense_attn import _checks, layout_attention
from dense_attn.examples._tiny_pipeline import command, load, side_by_side
from dense_attn.integrations.diffusers.hooks import arguments, watched
from dense_attn.integrations.diffusers.steps import Steps
from dense_attn.integrations.diffusers.text.encoding import heard

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SOURCE, TARGET = (
    "a red circle and a blue square on gray",
    "a red circle and a yellow square on gray",
)


class PromptToPrompt(TorchFunctionMode):
    """Inside the block, images of `targets` have the attention of those of `sources`.

    The pipeline, one of a U-Net, is called with the prompts `[*sources, *targets]`, each target
    from its source's noise, with guidance, as often as wanted. Blocks inside of a block: the
    innermost counts.

    Args:
        pipe: whose tokenizer tells the words apart.
        sources, targets: prompts. Where words differ they are swapped (those of the target get the
            map of those that stood there), where there are more of them the new ones have a map of
            their own (refinement).
        cross, own: the shares of the steps, 0 to 1, in which maps across to the text, and of the
            image to itself, are the source's.
        weights: factors of words of the targets (reweighting), while `cross` lasts.
        largest: image tokens up to which a map of the image to itself is the source's.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names; in the call,
            other prompts, attention with a mask, without guidance or by other functions, or a layer
            with as many image tokens as the text has, which looks like one across to the text.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        sources: Sequence[str],
        targets: Sequence[str],
        *,
        cross: float = 0.8,
        own: float = 0.4,
        weights: Mapping[str, float] | None = None,
        largest: int = 1024,
    ) -> None:
        super().__init__()
        if getattr(pipe, "unet", None) is None:
            _checks.refuse("pipe", "have a U-Net", type(pipe).__name__)
        self.prompts = [*_prompts("sources", sources), *_prompts("targets", targets)]
        if len(sources) != len(targets):
            got = f"{len(targets)} and {len(sources)}"
            _checks.refuse("targets", "be as many as sources", got)
        shares = _checks.fraction("cross", cross), _checks.fraction("own", own)
        self.shares = dict(zip(("cross", "own"), shares))
        self.largest = _checks.number("largest", largest)
        tokens = pipe.tokenizer
        before, after = (
            tokens(list(prompts), padding="max_length", truncation=True).input_ids
            for prompts in (sources, targets)
        )
        factors = _factors(tokens, after, weights)[:, None].to(pipe.device)  # [B, 1, N]
        pairs = [alignment(*pair) for pair in zip(before, after)]
        moved, new = (torch.stack(parts).to(pipe.device) for parts in zip(*pairs))
        self.moved, self.new = moved * factors, new * factors  # A and diag(1 - a), [B, N, N]
        self.pipe, self.steps, self.paused = pipe, Steps(pipe), 0
        self.done, self.reached = 0.0, set[str]()  # of the steps; kinds of softmax in this one

    def __enter__(self) -> PromptToPrompt:
        """Follow the pipeline's prompts and steps."""
        with ExitStack() as stack:
            stack.enter_context(heard(self.pipe, self._hear))
            stack.enter_context(watched(self.pipe.unet, self, self._before, self._after))
            self._following = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Leave the pipeline as it was."""
        self._following.close()
        super().__exit__(*error)

    def _hear(self, given: dict[str, Any]) -> None:
        """Refuse a call with other prompts; embeddings say nothing of theirs."""
        prompt, images = given.get("prompt"), given.get("num_images_per_prompt", 1)
        if self.paused or prompt is None:
            return
        if isinstance(prompt, str) or list(prompt) != self.prompts:
            _checks.refuse("prompt", f"be [*sources, *targets], {self.prompts}", repr(prompt))
        if images != 1:
            _checks.refuse("num_images_per_prompt", "be 1", images)

    def _before(self, unet: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Find out which step of which run this is; a run may have broken off."""
        if not self.paused:
            self.steps.follow(arguments(unet, args, kwargs).arguments["timestep"])
            self.done, self.reached = self.steps.index / self.steps.total, set()

    def _after(self, *_: Any) -> None:
        """Refuse a step in which maps were to be exchanged, and none of the kind was seen."""
        for kind, share in self.shares.items():
            if not self.paused and self.done < share and kind not in self.reached:
                rule = "reach scaled_dot_product_attention with both halves of guidance"
                _checks.refuse("pipe", rule, f"a step without one, for {kind}={share}")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Every function of torch as it is, but for a softmax whose map is the source's."""
        if func is scaled_dot_product_attention and self._meant(*args[:2]):
            return self._exchange(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _meant(self, q: Tensor, k: Tensor) -> bool:
        """Whether this softmax is the denoiser's, at a step and of a size that are exchanged."""
        image, keys, text = q.shape[2], k.shape[2], self.moved.shape[1]
        over = self.done >= max(self.shares.values())
        if self.paused or over or len(q) != 4 * len(self.moved) or keys not in (image, text):
            return False
        if image == text:
            rule = f"have no layer of as many image tokens as the text's {text}"
            _checks.refuse("pipe", rule, "one: take another height or width")
        kind = "cross" if keys == text else "own"
        self.reached.add(kind)
        return self.done < self.shares[kind] and (kind == "cross" or image <= self.largest)

    def _exchange(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Attention of q, k, v [4B, H, N, D], whose last B samples have the maps of those before.

        `out = softmax(q_s k_s^T) A v + softmax(q k^T) (1 - a) v`, the second where words are new.
        """
        if attn_mask is not None:
            _checks.refuse("attn_mask", "be None", "a mask")
        count = len(self.moved)
        source = slice(2 * count, 3 * count)
        rows = [slice(0, 3 * count), source]
        values = v[3 * count :]
        parts = [v[: 3 * count], values]
        if k.shape[2] != q.shape[2]:
            moved, new = (each[:, None].to(values) for each in (self.moved, self.new))
            parts[1] = moved @ values
            if self.new.any():
                rows.append(slice(3 * count, None))
                parts.append(new @ values)
        q, k = (torch.cat([each[row] for row in rows]) for each in (q, k))
        words = [torch.zeros(x.shape[2], dtype=torch.int32, device=x.device) for x in (q, k)]
        scale = options.get("scale")
        out = layout_attention(q, k, torch.cat(parts), *words, 0.0, modulation="bias", scale=scale)
        if len(rows) > 2:
            out = torch.cat([out[: 3 * count], out[3 * count : 4 * count] + out[4 * count :]])
        return out


def alignment(source: Sequence[int], target: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The matrices [N, N] that take a target's values to the source's keys, and to its own.

    Tokens that are the same, or as many in the same place, meet one to one; others of one place
    share the weight of those that stood there; those in no place of the source's are new.
    """
    moved, new = torch.zeros(2, len(source), len(source), dtype=torch.float32, device="cpu")
    for kind, i, i_end, j, j_end in SequenceMatcher(None, source, target, False).get_opcodes():
        if i_end - i == j_end - j:
            moved[range(i, i_end), range(j, j_end)] = 1
        elif kind == "replace":
            moved[i:i_end, j:j_end] = 1 / (j_end - j)
        else:
            new[range(j, j_end), range(j, j_end)] = 1
    return moved, new


def _prompts(argument: str, value: object) -> Sequence[str]:
    """Require a list of prompts, one or more."""
    listed = isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)
    if not listed or not value:
        kind = ValueError if listed else TypeError
        _checks.refuse(argument, "be a list of one prompt or more", repr(value), kind)
    return value


def _factors(
    tokenizer: Any, targets: list[list[int]], weights: Mapping[str, float] | None
) -> Tensor:
    """The factor of each token of each target, [B, N]."""
    factors = torch.ones(len(targets), len(targets[0]), dtype=torch.float32, device="cpu")
    if not isinstance(weights, Mapping | None):
        _checks.refuse("weights", "be factors by words", type(weights).__name__, TypeError)
    for word, weight in (weights or {}).items():
        factor = _checks.number(f"weights[{word!r}]", weight, torch.float32)
        ids = tokenizer(word, add_special_tokens=False).input_ids if isinstance(word, str) else []
        ends = [(b, i) for b, target in enumerate(targets) for i in range(len(target))]
        found = [(b, i) for b, i in ends if ids and targets[b][i : i + len(ids)] == ids]
        if not found:
            _checks.refuse("weights", "be of words of the targets", repr(word))
        for b, start in found:
            factors[b, start : start + len(ids)] = factor
    return factors


def main(
    model: str | None = None,
    steps: int = 20,
    source: str = SOURCE,
    target: str = TARGET,
    weights: Mapping[str, float] | None = None,
) -> list[Image.Image]:
    """The image of a prompt, of another from the same noise, and of that with the first's maps."""
    if model is None:
        from dense_attn.examples.tiny_scenes.model import load_pipeline

        pipe = load_pipeline()
    else:
        pipe = load("StableDiffusionPipeline", model)

    def images(prompts: list[str], **options: Any) -> list[Image.Image]:
        noises = [torch.Generator().manual_seed(0) for _ in prompts]
        return pipe(prompts, num_inference_steps=steps, generator=noises, **options).images

    (plain,) = images([target])
    with PromptToPrompt(pipe, [source], [target], weights=weights):
        first, edited = images([source, target])
    return [first, plain, edited]


def _command() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", metavar="PATH_OR_ID", help=f"such as {MODEL}; none: the small one, of shapes")
    add("--steps", type=int, default=20, help="of denoising (%(default)s)")
    add("--source", default=SOURCE, help="the image's prompt (%(default)s)")
    add("--target", default=TARGET, help="what becomes of it (%(default)s)")
    weight = "factor of a word of the target; may be repeated"
    add("--weight", action="append", default=[], metavar="WORD=FACTOR", help=weight)
    given = parser.parse_args()
    try:
        weights = {word: float(x) for word, x in (each.split("=") for each in given.weight)}
    except ValueError:
        parser.error(f"--weight must be WORD=FACTOR, got {given.weight}")
    images = main(given.model, given.steps, given.source, given.target, weights)
    side_by_side(images, "prompt_to_prompt.png")


if __name__ == "__main__":
    command(_command)
