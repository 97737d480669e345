"""The schedules of pipelines as chains, and whose words the sampler's refusals use."""

from __future__ import annotations

import pytest
import torch
from pipelines import IMAGE, close, diffusers, encoded, on_schedule, refused
from torch import Tensor

from dense_attn import ReversibleSampler, percentile_mask
from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import invert, optimize, reconstruct

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
def test_schedules_of_zero_terminal_signal(scheduler: str) -> None:
    """Taken where no timestep comes to the end, refused with what helps where one does."""
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    pipe = on_schedule(scheduler, **zero)
    found = invert(pipe, IMAGE, "a cat", num_inference_steps=4)
    again = reconstruct(pipe, found, output_type="latent")
    torch.testing.assert_close(again, encoded(pipe), rtol=0, atol=1e-6)
    rule = (
        "pipe must have a scheduler that leaves signal at the first timestep, as "
        "timestep_spacing='leading' does"
    )
    refused(
        on_schedule(scheduler, **zero, timestep_spacing="trailing"),
        f"{rule}, got alpha_bar 0 at timestep 999",
    )
    refused(
        on_schedule(scheduler, **zero),
        f"{rule}, got alpha_bar 0 at timestep 999",
        num_inference_steps=500,
    )


@pytest.mark.parametrize(
    ("config", "options", "sentence"),
    [
        (
            {},
            {"num_inference_steps": 1001},
            "num_inference_steps must be at most 1000, the timesteps of pipe",
        ),
        (
            {},
            {"num_inference_steps": 1000},
            "num_inference_steps must keep the timesteps of .* below 1000, got 1000",
        ),
        (
            {"trained_betas": [0.5, 0.5, -0.5, -0.5, -0.5], "num_train_timesteps": 5},
            {},
            (
                "the noise schedule of pipe must not rise with the timesteps used, got 0.5625 "
                "at timestep 3 and 0.25 at"
            ),
        ),
        (
            {"trained_betas": [0.5, -0.5, 0.5, 0.5, 0.5], "num_train_timesteps": 5},
            {},
            (
                "the noise schedule of pipe must not rise with the timesteps used, got 0.75 at "
                "timestep 1 and 0.5 at"
            ),
        ),
        ({"prediction_type": "sample"}, {}, "pipe must predict epsilon or v, got sample"),
    ],
)
def test_schedules_that_cannot_be_chains_are_refused(
    config: dict, options: dict, sentence: str
) -> None:
    refused(on_schedule(**config), sentence, **options)


def test_a_beta_schedule_that_ddim_has_not_is_refused() -> None:
    sentence = "pipe must have a scheduler of a beta_schedule that DDIM knows, got 'sigmoid'"
    refused(on_schedule("DDPM", beta_schedule="sigmoid"), sentence)


def test_the_schedule_is_the_pipelines_own_also_by_default() -> None:
    """LCMScheduler's defaults are Stable Diffusion's schedule, those of DDIMScheduler are not."""
    pipe, other = (tiny_pipeline(diffusers.StableDiffusionPipeline) for _ in range(2))
    pipe.scheduler = diffusers.LCMScheduler()
    other.scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    found, expected = (
        invert(one, IMAGE, "a cat", num_inference_steps=4).latents for one in (pipe, other)
    )
    assert all(map(torch.equal, found, expected))


def test_spacings_that_round_to_one_timestep_more() -> None:
    """numpy's arange has 62 entries for 61 steps, the last of them -1."""
    pipe = on_schedule(timestep_spacing="trailing")
    pipe.scheduler.set_timesteps(61)
    assert len(pipe.scheduler.timesteps) == 62
    found = invert(pipe, IMAGE, "a cat", num_inference_steps=61, guidance_scale=1.0)
    assert close(reconstruct(pipe, found, output_type="latent"), encoded(pipe))


def test_refusals_of_the_sampler_speak_of_what_the_caller_gave() -> None:
    """Nobody who calls invert has given timesteps, alphas_cumprod, eps_fn or x."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    given = {"guidance_scale": 1.0, "num_inference_steps": 4}
    for options, sentence in (
        (
            {"num_inference_steps": 900, "mix": 0.5},
            "num_inference_steps must be at most .* with mix=0.5 and",
        ),
        ({"mix": 2.0}, r"mix must be in \(0, 1\], got 2.0"),
        ({"method": "ddim"}, "method must be edict, bdia or belm for invert"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            invert(pipe, IMAGE, "a cat", **given | options)
    same = on_schedule(steps_offset=0)
    with pytest.raises(
        ValueError,
        match=r"^the noise schedule of pipe must grow at every step, .* for method='belm'",
    ):
        invert(same, IMAGE, "a cat", **given, method="belm", exact=False)
    handle = pipe.unet.register_forward_hook(lambda _module, _args, out: (out[0] + torch.rand(1),))
    with pytest.raises(ValueError, match=r"^pipe.unet must be deterministic for exact inversion"):
        invert(pipe, IMAGE, "a cat", **given)
    handle.remove()
    handle = pipe.unet.register_forward_hook(lambda _module, _args, out: (out[0] * torch.nan,))
    with pytest.raises(RuntimeError, match=r"^pipe.unet's result must be finite and keep"):
        invert(pipe, IMAGE, "a cat", **given)
    handle.remove()
    found = invert(pipe, IMAGE, "a cat", **given)
    far = type(found)(tuple(1e9 + x for x in found.latents), found.settings, 0.0, None)
    with pytest.raises(ValueError, match=r"^the latents of inversion must be finite and at most"):
        reconstruct(pipe, far)
    with pytest.raises(ValueError, match=r"^latents must be finite and at most"):
        optimize(
            pipe,
            "a",
            torch.mean,
            latents=torch.full((1, 4, 8, 8), 1e9),
            num_inference_steps=2,
            progress=False,
        )


def test_further_arguments_of_invert_are_no_sampler_that_was_given() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    with pytest.raises(
        ValueError, match=r"^a further argument must be one of method, .*, got 'strength'"
    ):
        invert(pipe, IMAGE, "a cat", num_inference_steps=2, strength=0.5)


def test_a_state_of_another_chain_is_refused_in_the_callers_words() -> None:
    pipe, given = tiny_pipeline(diffusers.StableDiffusionPipeline), {"steps": 1, "progress": False}
    state = optimize(pipe, "a cat", torch.mean, num_inference_steps=2, **given).result.state
    rule = (
        "the chain of pipe, num_inference_steps and sampler must be that of state, with 2 "
        "timesteps, got 3"
    )
    with pytest.raises(ValueError, match=f"^{rule}"):
        optimize(pipe, "a cat", torch.mean, num_inference_steps=3, state=state, **given)
    with pytest.raises(
        ValueError,
        match=r"^state must hold float32 latents of shape \(1, 4, 8, 10\), got float32 \(1",
    ):
        optimize(pipe, "a cat", torch.mean, num_inference_steps=2, width=20, state=state, **given)


class UsersError(ValueError):
    """A user's error keeps its attribute, which means something to the user."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.argument = ["x"]


def test_refusals_in_a_users_function_keep_their_words() -> None:
    """Their arguments are those that the user's function gave."""

    def wrong_table(image: Tensor) -> Tensor:
        ReversibleSampler([0.9, 0.8], [5])
        return image.mean()

    def wrong_dtype(image: Tensor) -> Tensor:
        return percentile_mask(image.long(), 0.5)[0].mean()

    def of_the_user(image: Tensor) -> Tensor:
        raise UsersError("too bright")

    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    for function, kind, sentence in (
        (wrong_table, ValueError, "timesteps must be below the 2 of alphas_cumprod"),
        (wrong_dtype, TypeError, "x must be one of float32"),
        (of_the_user, UsersError, "too bright$"),
    ):
        for functions in ((function,), (torch.mean, function)):
            with pytest.raises(kind, match=f"^{sentence}"):
                optimize(pipe, "a cat", *functions, num_inference_steps=2, steps=1, progress=False)
    for functions, argument in (((None,), "loss_fn"), ((torch.mean, 3), "saliency_fn")):
        with pytest.raises(TypeError, match=f"^{argument} must be callable"):
            optimize(pipe, "a cat", *functions, num_inference_steps=2, steps=1, progress=False)
