"""Gradients through whole chains of pipelines, their memory, and optimised noise."""

from __future__ import annotations

import copy

import chains
import flows
import pytest
import torch
from families.chained import FLOWS, NAMES, call_of, chain_of, frames_of, image_of, pipe_of, size_of
from pipelines import diffusers
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import optimize
from dense_attn.integrations.diffusers.inversion.rehearsed import Rehearsed
from dense_attn.integrations.diffusers.inversion.settings import Settings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:eps_fn must be an nn.Module"),  # parameters get none
]
QUICK = ("flux", "wan")
# networks that make some tensors in float32 whatever they are in; SANA's tiny linear attention
# divides by sums of few of them: 1e-7 added to its noise changes these gradients by 2e-3
# 1e-7 of PixArt's noise changes its gradients by 1e-4, and a network in float32 by 7e-4
FLOAT64 = ("pixart",)
FLOAT32 = {"kandinsky5": 1e-4, "kandinsky5_t2v": 1e-4, "sana": 1e-3}


def each(*names: str) -> pytest.MarkDecorator:
    """A test of some families, of which few are quick."""
    marked = [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in names
    ]
    return pytest.mark.parametrize("name", marked)


def in_float64(name: str, chain: Rehearsed) -> Rehearsed:
    """A chain of the same settings on a pipeline in float64."""
    pipe = copy.copy(pipe_of(name))
    for part, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            vars(pipe)[part] = copy.deepcopy(module).double()
    return Rehearsed(pipe, chain.settings, len(chain.latents), torch.Generator())


@each(*NAMES)
def test_gradients_are_those_of_plain_autograd_in_float64(name: str) -> None:
    """EDICT as its formulas have it, through all steps of both branches.

    A network that is no other than in float32 has latents in float64 around it.
    """
    chain = chain_of(name, 3)
    chain = in_float64(name, chain) if name in FLOAT64 else chain
    x = chain.latents.clone().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    a, b = chain.sampler.sample(chain.eps, x)
    (found,) = torch.autograd.grad((weights * a).sum() + (weights * b.sin()).sum(), x)
    exact = chain if name in FLOAT32 else in_float64(name, chain)
    times = exact.sampler.timesteps

    def network(x: Tensor, t: float) -> Tensor:
        return exact.eps(x, min(times, key=lambda time: abs(time.item() - t)))

    x, moments = chain.latents.double().requires_grad_(), chain.sampler.schedule.moments
    if name in FLOWS:
        a, b = flows.plain(network, [moment.u for moment in moments], x, method="edict")
    else:
        a, b = chains.edict(exact.eps, times, [moment.signal for moment in moments], x, x)
    (expected,) = torch.autograd.grad((weights * a).sum() + (weights * b.sin()).sum(), x)
    allowed = FLOAT32.get(name, 1e-4)
    assert (found - expected).abs().max() <= allowed * expected.abs().max()


@each("flux", "z_image", "sd3", "wan", "cogvideox")
def test_what_is_kept_for_gradients_does_not_grow_with_the_steps(name: str) -> None:
    kept = {}
    for steps in (5, 50):
        chain, counted = chain_of(name, steps, guided=False, exact=False), []
        x = chain.latents.clone().requires_grad_()

        def pack(tensor: Tensor, counted: list[int] = counted) -> Tensor:
            counted.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chain.sampler.sample(chain.eps, x)
        kept[steps] = sum(counted)
    assert kept[50] == kept[5] > 0


@each("flux", "qwen", "z_image", "sdxl", "wan", "ltx", "cogvideox", "kandinsky5_t2v")
def test_optimised_noise_is_the_pipelines_own_and_lowers_the_loss(name: str) -> None:
    height, width = size_of(name)
    options = {"height": height, "width": width, "call": call_of(name), "progress": False}
    options |= {
        "num_frames": frames_of(name),
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(3),
    }
    pipe = pipe_of(name)
    untouched = optimize(pipe, "a cat dog", torch.mean, steps=0, **options)
    assert torch.equal(untouched.result.latents, chain_of(name, 2).latents)
    how = {"latents": untouched.result.latents, "clip": None, "noise": None}
    found = optimize(pipe, "a cat dog", torch.mean, steps=3, **options, **how, output_type="pt")
    assert found.images.shape == image_of(name).shape
    assert found.result.losses[-1] < found.result.losses[0]


def test_latents_say_how_large_images_are() -> None:
    """Where they are no tokens; and those of another shape are refused."""
    pipe = tiny_pipeline(diffusers.StableDiffusion3Pipeline)
    options = {"num_inference_steps": 1, "steps": 0, "progress": False}
    options["call"] = {"max_sequence_length": 24}
    seed = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 8, 12, generator=seed, dtype=torch.float32)
    found = optimize(pipe, "a", torch.mean, latents=latents, output_type="pt", **options)
    assert found.images.shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match=r"latents must have pipe's shape \(1, 16, 8, 12\), got"):
        optimize(pipe, "a", torch.mean, latents=latents[:, :4], **options)


def test_settings_of_one_chain_make_another() -> None:
    chain = chain_of("flux", 2)
    again = Rehearsed(pipe_of("flux"), chain.settings, 1, torch.Generator().manual_seed(3))
    assert isinstance(chain.settings, Settings)
    assert torch.equal(again.latents, chain.latents)
