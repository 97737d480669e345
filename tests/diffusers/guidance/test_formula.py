"""Whole runs beside the formula written out: plain calls of the denoiser, and SEGA's step by hand.

A near tie at a threshold would part the two; these seeds have none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from families import family
from families.estimates import first_estimates
from pipelines import PROMPT, close, pipeline
from torch import Tensor

from dense_attn import reference
from dense_attn.integrations.diffusers import Edit, semantic_guidance

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:edits.*warmup must be at most"),
]
EDITS = [
    Edit("snow", scale=4, threshold=0.8, warmup=1, cooldown=4),
    Edit("fog bank", scale=3, threshold=0.5, warmup=2, weight=0.5, reverse=True),
]
MOMENTUM = {"momentum_scale": 0.3, "momentum_beta": 0.6}
SIZE = {"height": 16, "width": 24, "max_sequence_length": 24}
# the pipeline, what its calls are given, what makes them guide, and from an output to an estimate
KINDS: dict[str, tuple[Callable[[], object], dict, dict, Callable[..., Tensor]]] = {
    "halves": (lambda: pipeline("sd3"), SIZE, {"guidance_scale": 5.0}, lambda out: out),
    "distilled": (lambda: pipeline("flux"), SIZE, {}, lambda out: out),
    "two calls": (
        lambda: pipeline("flux"),
        SIZE,
        {"true_cfg_scale": 3.0, "negative_prompt": "rain"},
        lambda out: out,
    ),
    "norms rescaled": (
        lambda: family("qwen"),
        {"height": 32, "width": 48},
        {"true_cfg_scale": 4.0, "negative_prompt": "rain"},
        lambda out: out,
    ),
    "prompt first": (
        lambda: family("z_image"),
        SIZE,
        {"guidance_scale": 4.0, "negative_prompt": "rain"},
        lambda out: -torch.stack(out).squeeze(2),
    ),
}


def run(kind: str, prompt: object = PROMPT, *, steps: int = 5, **options: object) -> Tensor:
    make, given, guided, _ = KINDS[kind]
    own = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": steps}
    return make()(prompt=prompt, output_type="latent", **given | guided | own | options).images


def channels_first(x: Tensor) -> Tensor:
    """Estimates [B, C, ...], packed ones with their channels before their tokens."""
    return x.mT if x.dim() == 3 else x


def stepped(
    eps: Tensor, base: Tensor, concepts: list[Tensor], momentum: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """SEGA's step: the estimate and the momentum, [B, C, ...]."""
    steer, partial, total, warm = 0.3 * momentum, 0, 0, []
    for edit, concept in zip(EDITS, concepts):
        d = (-1 if edit.reverse else 1) * edit.scale * (concept - base)
        threshold = reference.quantile(d.abs().flatten(2), edit.threshold)
        d = torch.where(d.abs() >= threshold.reshape(*d.shape[:2], *[1] * (d.dim() - 2)), d, 0)
        weight = edit.weight if edit.cooldown is None or step < edit.cooldown else 0
        steer = steer + weight * d
        warm.append(step >= edit.warmup)
        if warm[-1]:
            partial, total = partial + weight * d, total + weight
    after = 0.6 * momentum + 0.4 * steer
    if all(warm):
        return eps + steer, after
    return (eps + partial / total if any(warm) else eps), after


def arguments_of(kind: str, text: str) -> dict:
    """The denoiser's arguments in a plain run of one text without guidance."""
    make, given, _, _ = KINDS[kind]
    pipe, seen = make(), []
    takes = inspect.signature(type(pipe).__call__).parameters
    off = {"true_cfg_scale": 1.0} if "true_cfg_scale" in takes else {}
    off = off or {"guidance_scale": 0.0 if kind == "prompt first" else 1.0}
    signature = inspect.signature(type(pipe.transformer).forward)

    def hook(denoiser: object, args: tuple, kwargs: dict) -> None:
        seen.append(dict(signature.bind(denoiser, *args, **kwargs).arguments))

    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    own = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 1}
    with first_estimates(pipe.scheduler) as of:
        of(lambda: pipe(prompt=text, output_type="latent", **given | own | off))
    handle.remove()
    return {name: value for name, value in seen[0].items() if name != "self"}


def left(pipe: object) -> tuple:
    """Hooks, and what lies in the dictionaries of a pipeline and its parts."""
    denoiser = pipe.transformer
    hooks = len(denoiser._forward_pre_hooks), len(denoiser._forward_hooks)
    return hooks, set(vars(denoiser)), "step" in vars(pipe.scheduler), "encode_prompt" in vars(pipe)


def by_hand(kind: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A plain run, whose scheduler gets what the formula makes of plain calls of the denoiser."""
    make, _, guided, estimate = KINDS[kind]
    pipe = make()
    texts = [arguments_of(kind, edit.prompt) for edit in EDITS]
    negative = arguments_of(kind, guided.get("negative_prompt", "")) if guided else None
    seen, state = [], {"step": 0, "momentum": torch.zeros(())}
    signature, own = inspect.signature(type(pipe.transformer).forward), type(pipe.scheduler).step

    def hook(denoiser: object, args: tuple, kwargs: dict) -> None:
        seen.append(signature.bind(denoiser, *args, **kwargs).arguments)

    def plainly(text: dict, call: dict) -> Tensor:
        now = {}
        for name in ("hidden_states", "timestep", "x", "t"):
            if name in call:
                now[name] = call[name][: len(text[name])]  # of both halves' latents, which are one
        return channels_first(estimate(pipe.transformer.forward(**text | now)[0]))

    def step(scheduler: object, eps: Tensor, *args: object, **kwargs: object) -> object:
        concepts = [plainly(text, seen[-1]) for text in texts]
        eps = channels_first(eps)
        base = eps if negative is None else plainly(negative, seen[-1])
        eps, state["momentum"] = stepped(eps, base, concepts, state["momentum"], state["step"])
        state["step"] += 1
        return own(scheduler, channels_first(eps).contiguous(), *args, **kwargs)

    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(pipe.scheduler), "step", step)
        latents = run(kind)
    handle.remove()
    return latents


@pytest.mark.parametrize(
    "kind",
    ["halves", "distilled", *(pytest.param(k, marks=pytest.mark.full) for k in list(KINDS)[2:])],
)
def test_whole_runs_equal_the_formula(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, plain = by_hand(kind, monkeypatch), run(kind)
    before = left(KINDS[kind][0]())
    for batched in (True, False):
        with semantic_guidance(KINDS[kind][0](), EDITS, batch_concepts=batched, **MOMENTUM):
            guided = run(kind)
            assert torch.equal(run(kind), guided)  # of a momentum of its own
        assert close(guided, expected)
    assert not close(plain, expected)
    assert torch.equal(run(kind), plain)
    assert left(KINDS[kind][0]()) == before
