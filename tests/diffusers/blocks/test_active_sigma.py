"""A layout that acts until a flow's noise has fallen to a sigma, beside steps that are counted."""

from __future__ import annotations

import functools

import pytest
import torch
from families import family, run
from pipelines import PROMPT, REGIONS, diffusers, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS, SIGMA = 5, 0.45
WHOLE = [Region((0.0, 0.0, 0.5, 1.0), "a cat")]
NAMES = [
    *("sd3", "wan_2_2"),
    *(pytest.param(name, marks=pytest.mark.full) for name in ("flux", "qwen", "lumina2", "sana")),
]


def named(name: str) -> tuple[object, object]:
    """A pipeline, and its run of a prompt."""
    if name in ("sd3", "flux"):
        pipe = pipeline(name)
        return pipe, functools.partial(latents, pipe, steps=STEPS)
    return family(name), functools.partial(run, name, PROMPT, steps=STEPS)


def counted(pipe: object, sigma: float) -> int:
    """The steps of the last run that begin above a sigma."""
    sigmas = pipe.scheduler.sigmas.tolist()
    assert len(sigmas) == STEPS + 1
    return sum(each > sigma for each in sigmas[:STEPS])


@pytest.mark.parametrize("regions", [REGIONS, WHOLE])
@pytest.mark.parametrize("name", NAMES)
def test_a_sigma_is_a_number_of_steps(name: str, regions: list) -> None:
    """Equal bits, for regions with phrases and with prompts."""
    pipe, run_of = named(name)
    ended = []
    for sigma in (SIGMA, 0.85):
        with apply_layout(pipe, PROMPT, regions, active_sigma=sigma):
            until = run_of()
        ended.append(counted(pipe, sigma))
        with apply_layout(pipe, PROMPT, regions, active=ended[-1] / STEPS):
            assert torch.equal(run_of(), until)
    assert 0 < ended[1] < ended[0] < STEPS
    for sigma, part in ((0.0, 1.0), (1.0, 0.0)):
        with apply_layout(pipe, PROMPT, regions, active_sigma=sigma):
            until = run_of()
        with apply_layout(pipe, PROMPT, regions, active=part):
            assert torch.equal(run_of(), until)


@pytest.mark.parametrize(("shift", "last"), [(1.0, 6), (3.0, 8)])
def test_a_shift_moves_the_last_step(
    shift: float, last: int, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sigma `s x / (1 + (s - 1) x)` of x = 1, 0.9, ..., 0.1 is above 0.45 in so many steps."""
    pipe = pipeline("flux")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    layers = sum(hasattr(module, "processor") for module in pipe.transformer.modules())
    with apply_layout(pipe, PROMPT, REGIONS, active_sigma=SIGMA):
        latents(pipe, steps=10)
    assert len(calls) == last * layers


def test_a_run_that_begins_later() -> None:
    """An image to image call has the sigmas of its own steps."""
    pipe = diffusers.FluxImg2ImgPipeline(**pipeline("flux").components)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))

    def made(**window: float) -> Tensor:
        options = {"height": 16, "width": 24, "num_inference_steps": 8, "output_type": "latent"}
        options |= {"strength": 0.5, "max_sequence_length": 24}
        with apply_layout(pipe, PROMPT, REGIONS, **window):
            generator = torch.Generator().manual_seed(0)
            return pipe(PROMPT, image=image, generator=generator, **options).images

    half = made(active=0.5)
    sigmas = pipe.scheduler.sigmas.tolist()[4:8]
    assert torch.equal(made(active_sigma=(sigmas[1] + sigmas[2]) / 2), half)
    assert torch.equal(made(active_sigma=sigmas[2]), half)
    assert not torch.equal(made(active_sigma=(sigmas[2] + sigmas[3]) / 2), half)


@pytest.mark.parametrize("regions", [REGIONS, WHOLE])
def test_what_is_refused(regions: list) -> None:
    rules = [
        ("sd", {"active_sigma": 0.5}, r"active_sigma must be None for a scheduler that is no flow"),
        ("flux", {"active_sigma": 1.5}, r"active_sigma must be from 0 to 1, got 1\.5$"),
        ("flux", {"active_sigma": 0.5, "active": 0.5}, r"active must be None beside active_sigma"),
    ]
    for name, options, rule in rules:
        pipe = pipeline(name)
        with (
            pytest.raises(ValueError, match=f"^{rule}"),
            apply_layout(pipe, PROMPT, regions, **options),
        ):
            pytest.fail("the block must not run")
    cover = [Region((0.0, 0.0, 1.0, 1.0), "a cat")]
    with (
        pytest.raises(ValueError, match=r"^active_sigma must be None where prompt is None, got 0"),
        apply_layout(pipeline("flux"), None, cover, active_sigma=0.5),
    ):
        pytest.fail("the block must not run")


class Rising(diffusers.FlowMatchEulerDiscreteScheduler):
    """A schedule that rises, whose config does not say so."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: object = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu)
        self.timesteps, self.sigmas = self.timesteps.flip(0), self.sigmas.flip(0)


@pytest.mark.parametrize("regions", [REGIONS, WHOLE])
def test_sigmas_that_rise(regions: list, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout's first steps would be the last: the block says it, or else the first step."""
    pipe, rule = pipeline("flux"), "^active_sigma must be None for a scheduler whose sigmas rise, "
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    with (
        pytest.raises(ValueError, match=f"{rule}got FlowMatchEulerDiscreteScheduler$"),
        apply_layout(pipe, PROMPT, regions, active_sigma=0.5),
    ):
        pytest.fail("the block must not run")
    monkeypatch.setattr(pipe, "scheduler", Rising())
    with (
        pytest.raises(ValueError, match=f"{rule}got Rising$"),
        apply_layout(pipe, PROMPT, regions, active_sigma=0.5),
    ):
        latents(pipe, steps=3)
    assert not calls


@pytest.mark.parametrize("regions", [REGIONS, WHOLE])
@pytest.mark.parametrize("last", [0.9, 0.0])
def test_a_calls_own_sigmas_that_rise(regions: list, last: float, calls: list) -> None:
    """Be it before a last 0, which schedules end with: before the pipeline runs."""
    pipe, encoded = pipeline("flux"), []
    handle = pipe.text_encoder_2.register_forward_hook(lambda *_: encoded.append(1))
    rule = "^active_sigma must be None for a scheduler whose sigmas rise, got the call's sigmas$"
    with apply_layout(pipe, PROMPT, regions, active_sigma=0.5):
        encoded.clear()
        with pytest.raises(ValueError, match=rule):
            latents(pipe, steps=3, sigmas=[0.1, 0.5, last])
        assert not encoded
        assert not calls
        latents(pipe, steps=3, sigmas=[0.9, 0.5, 0.1])
    handle.remove()
    assert calls


@pytest.mark.parametrize("sigmas", [["high", "low"], [None, 0.5], [[0.9, 0.5]], 0.5])
def test_a_calls_own_sigmas_that_are_no_numbers(sigmas: object, calls: list) -> None:
    pipe, rule = pipeline("flux"), r"^sigmas must be a list of numbers, got .+$"
    with (
        apply_layout(pipe, PROMPT, REGIONS, active_sigma=0.5),
        pytest.raises(TypeError, match=rule),
    ):
        latents(pipe, steps=2, sigmas=sigmas)
    assert not calls


def test_a_scheduler_that_is_exchanged_inside() -> None:
    """The call says it before its first step."""
    pipe = pipeline("sd3")
    other = diffusers.EulerDiscreteScheduler()
    with apply_layout(pipe, PROMPT, REGIONS, active_sigma=0.5):
        own, pipe.scheduler = pipe.scheduler, other
        try:
            with pytest.raises(ValueError, match=r"^active_sigma must be None for a scheduler"):
                latents(pipe, steps=2)
        finally:
            pipe.scheduler = own
