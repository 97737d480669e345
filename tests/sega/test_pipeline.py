"""Whole runs of diffusers' own SemanticStableDiffusionPipeline, random weights, against the loop of
the example.

A run in float32 may be off by rounding alone: the pipeline's float32 run is held to the one rule of
accuracy, with our float64 run as what is exact and our float32 run as the measure of rounding. Both
runs part where a threshold falls between two magnitudes that differ by less than rounding; such
near ties, seen in the float64 run, are set aside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from accuracy import assert_accurate
from cases import backends
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_attn import SemanticGuidance, percentile_mask

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from dense_attn.examples._tiny_pipeline import tiny_pipeline  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu", op="sega_guidance"))
STEPS = 5
PROMPTS, CONCEPTS = ["a castle", "two dogs"], ["winter", "a hat", "fog"]
NEAR_TIE = 1e-4  # of a magnitude, ample beside the rounding of five steps
Options = dict[str, object]


@cache
def pipeline(dtype: torch.dtype) -> diffusers.SemanticStableDiffusionPipeline:
    return tiny_pipeline(diffusers.SemanticStableDiffusionPipeline).to(dtype)


def noise(batch: int) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def theirs(
    options: Options, count: int, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Latents of a whole run of the pipeline."""
    prompts, concepts = PROMPTS[:batch], CONCEPTS[:count]
    pipe, latents = pipeline(dtype), noise(batch).to(dtype)
    return pipe(
        prompts,
        num_inference_steps=STEPS,
        editing_prompt=concepts,
        latents=latents,
        output_type="latent",
        **options,
    ).images


@torch.no_grad()
def denoise(
    pipe: diffusers.DiffusionPipeline,
    prompts: list[str],
    concepts: list[str],
    guidance: Callable,
    noise: Tensor,
    steps: int,
) -> Tensor:
    """Latents [B, C, H, W] of B prompts under E concepts, one call of the U-Net a step."""
    texts = [""] * len(prompts) + prompts + [concept for concept in concepts for _ in prompts]
    tokens = pipe.tokenizer(
        texts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    embeddings = pipe.text_encoder(tokens.input_ids.to(noise.device))[0]
    pipe.scheduler.set_timesteps(steps, device=noise.device)
    latents = noise * pipe.scheduler.init_noise_sigma
    for step, t in enumerate(pipe.scheduler.timesteps):
        inputs = pipe.scheduler.scale_model_input(torch.cat([latents] * (2 + len(concepts))), t)
        eps = pipe.unet(inputs, t, encoder_hidden_states=embeddings).sample.unflatten(
            0, (-1, len(prompts))
        )
        latents = pipe.scheduler.step(
            guidance(step, eps[0], eps[1], eps[2:]), t, latents
        ).prev_sample
    return latents


class Watched(SemanticGuidance):
    """The library's class, and the narrowest relative gap that a threshold fell into."""

    narrowest = float("inf")

    def __call__(
        self, step: int, eps_uncond: Tensor, eps_text: Tensor, eps_edits: Tensor
    ) -> Tensor:
        levels = self.levels if isinstance(self.levels, list) else [self.levels] * len(eps_edits)
        for difference, level in zip(eps_edits - eps_uncond, levels):
            kept = percentile_mask(difference, level, backend="reference")[0] != 0
            above = difference.abs().where(kept, torch.inf).amin((2, 3))
            below = difference.abs().where(~kept, 0).amax((2, 3))
            self.narrowest = min(self.narrowest, (1 - below / above).min().item())
        return super().__call__(step, eps_uncond, eps_text, eps_edits)


def ours(
    options: Options,
    count: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "reference",
) -> tuple[Tensor, float]:
    """Latents of the same run by the library, and the narrowest gap around a threshold."""
    guidance = Watched(**options, backend=backend)
    guidance.levels = options.get("edit_threshold", 0.9)
    latents = denoise(
        pipeline(dtype), PROMPTS[:batch], CONCEPTS[:count], guidance, noise(batch).to(dtype), STEPS
    )
    return latents, guidance.narrowest


def divides_zero_by_zero(options: Options, count: int) -> bool:
    """Whether at some step all warm concepts, but not all, lack weight: the pipeline's NaN."""

    def each(name: str, default: object) -> list:
        value = options.get(name, default)
        return value if isinstance(value, list) else [value] * count

    rows = list(
        zip(
            each("edit_warmup_steps", 10),
            each("edit_cooldown_steps", None),
            each("edit_weights", None),
        )
    )
    for step in range(STEPS):
        warm = [(end, weight) for first, end, weight in rows if step >= first]
        left = [w for end, w in warm if (end is None or step < end) and (w is None or w > 0)]
        if 0 < len(warm) < count and not left:
            return True
    return False


@st.composite
def runs(draw: st.DrawFn) -> tuple[Options, int, int]:
    """Arguments of the pipeline (none, one or one a concept), number of concepts, batch."""
    count = draw(st.integers(1, 3))
    steps = st.integers(0, STEPS + 1)
    each = {
        "edit_guidance_scale": st.sampled_from([5.0, 1.0, 12.5, -3.0]),
        "edit_threshold": st.sampled_from([0.0, 1.0, 0.5, 0.9, 0.95]) | st.floats(0, 1),
        "edit_warmup_steps": steps,
        "edit_cooldown_steps": steps,
        "reverse_editing_direction": st.booleans(),
    }
    options = {"edit_warmup_steps": 1}
    for name, values in each.items():
        choice = draw(st.sampled_from(["default", "one", "each", "each"]))
        if choice != "default":
            options[name] = draw(
                values if choice == "one" else st.lists(values, min_size=count, max_size=count)
            )
    if draw(st.booleans()):
        weights = st.sampled_from([1.0, 0.3, 2.5, 0.0, -1.0])
        options["edit_weights"] = draw(st.lists(weights, min_size=count, max_size=count))
    options["guidance_scale"] = draw(st.sampled_from([7.5, 1.5, 3.0]))
    options["edit_momentum_scale"] = draw(st.sampled_from([0.1, 0.0, 0.7, -0.4]))
    options["edit_mom_beta"] = draw(st.sampled_from([0.4, 0.0, 0.9, 1.0]))
    return options, count, draw(st.integers(1, 2))


@every_backend
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(run=runs())
def test_whole_runs_equal_the_pipeline(backend: str, run: tuple[Options, int, int]) -> None:
    exact, gap = ours(*run, torch.float64, backend)
    assert exact.isfinite().all()
    expected = theirs(*run)
    if divides_zero_by_zero(*run[:2]):
        assert expected.isnan().all()
        return
    assume(gap > NEAR_TIE)
    assert_accurate(
        "the pipeline's latents", expected, exact, ours(*run, backend=backend)[0], torch.float32
    )


FULL = {  # every rule at work: partial warm-up, a cool-down, weights, a reversed concept
    "guidance_scale": 7.5,
    "edit_guidance_scale": [5.0, 4.0, 8.0],
    "edit_threshold": [0.9, 0.8, 0.95],
    "edit_warmup_steps": [0, 2, 1],
    "edit_cooldown_steps": [4, 6, 9],
    "edit_weights": [1.0, 2.0, 0.5],
    "reverse_editing_direction": [False, True, False],
    "edit_momentum_scale": 0.3,
    "edit_mom_beta": 0.6,
}
WRONG = {
    "guidance_scale": 7.4,
    "edit_guidance_scale": [5.0, 4.0, 7.9],
    "edit_threshold": [0.9, 0.8, 0.93],
    "edit_warmup_steps": [0, 2, 2],
    "edit_cooldown_steps": [3, 6, 9],
    "edit_weights": [1.0, 2.0, 0.6],
    "reverse_editing_direction": [False, True, True],
    "edit_momentum_scale": 0.31,
    "edit_mom_beta": 0.61,
}


@every_backend
def test_a_run_in_float64_equals_the_pipeline(backend: str) -> None:
    """Float32 would not show it; its rounding of thresholds, between two values, moves nothing."""
    expected = theirs(FULL, 3, 2, torch.float64)
    torch.testing.assert_close(
        ours(FULL, 3, 2, torch.float64, backend)[0], expected, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("argument", FULL)
def test_a_wrong_argument_is_seen(argument: str) -> None:
    exact, gap = ours(FULL, 3, 2, torch.float64)
    assert gap > NEAR_TIE
    plain = ours(FULL, 3, 2)[0]
    assert_accurate("the pipeline's latents", theirs(FULL, 3, 2), exact, plain, torch.float32)
    with pytest.raises(AssertionError, match="is off by"):
        assert_accurate(
            "a", theirs({**FULL, argument: WRONG[argument]}, 3, 2), exact, plain, torch.float32
        )


@every_backend
def test_zero_over_zero_adds_nothing(backend: str) -> None:
    """Concept 0 is warm and over from the start, concept 1 never warm: the pipeline's NaN."""
    options = {"edit_warmup_steps": [0, STEPS + 1], "edit_cooldown_steps": [0, STEPS + 1]}
    assert theirs(options, 2).isnan().all()
    assert divides_zero_by_zero(options, 2)
    exact, plain = (
        ours(options, 2, dtype=torch.float64, backend=backend)[0],
        ours(options, 2, backend=backend)[0],
    )
    assert_accurate("latents without edits", theirs({}, 0), exact, plain, torch.float32)


def test_near_ties_are_seen() -> None:
    guidance = Watched(edit_threshold=0.5, backend="reference")
    guidance.levels = 0.5
    eps = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    guidance(0, eps, eps, torch.tensor([1.0, 1.0 - 1e-6], dtype=torch.float64).view(1, 1, 1, 1, 2))
    assert 0 < guidance.narrowest < 1e-5
