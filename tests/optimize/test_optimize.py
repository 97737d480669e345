"""The optimisation of latents against its loop on plain autograd, and how it goes on."""

from __future__ import annotations

import io
import math

import pytest
import torch
from tiny_chain import ALPHAS, MIX, TIMESTEPS, Network, decode, latents, loss, sampler
from torch import Tensor

from dense_attn import optimize_latents, spectral_residual_saliency

SMALL_BOX = (2, 10, 5, 13)


def small_box(image: Tensor) -> Tensor:
    """A saliency map of one box."""
    top, bottom, left, right = SMALL_BOX
    saliency = torch.zeros(image.shape[0], *image.shape[2:])
    saliency[:, top:bottom, left:right] = 1.0
    return saliency


def crop_by_hand(image: Tensor) -> Tensor:
    """The 8 x 8 box at double size: pixel i reads the place (i + 0.5)/2 - 0.5, held to the box."""
    top, bottom, left, right = SMALL_BOX
    place = ((torch.arange(16) + 0.5) / 2 - 0.5).clamp(0, 7).double()
    weights = (1 - (place[:, None] - torch.arange(8)).abs()).clamp_min(0)  # [16, 8]
    return torch.einsum("bcyx,iy,jx->bcij", image[:, :, top:bottom, left:right], weights, weights)


def chain(network: Network, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """EDICT as maths.md has it."""
    bars = [*(ALPHAS[t].item() for t in TIMESTEPS), ALPHAS[0].item()]
    for i, (t, now, prev) in enumerate(zip(TIMESTEPS, bars, bars[1:])):
        a = math.sqrt(prev / now)
        b = math.sqrt(1 - prev) - a * math.sqrt(1 - now)
        if i % 2 == 0:
            x = a * x + b * network(y, t)
            y = a * y + b * network(x, t)
        else:
            y = a * y + b * network(x, t)
            x = a * x + b * network(y, t)
        x = MIX * x + (1 - MIX) * y
        y = (1 - MIX) * x + MIX * y
    return x, y


def doodl(
    network: Network,
    x: Tensor,
    generator: torch.Generator,
    steps: int,
    *,
    clip: float | None,
    momentum: float,
    noise: float,
    renormalize: bool,
    tie: bool,
    salient_weight: float,
) -> tuple[list[Tensor], list[float]]:
    """The loop, written out."""
    norm = x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    pair, buffers, losses = [x, x], [None, None], []
    for _ in range(steps):
        leaves = [z.clone().requires_grad_() for z in pair]
        images = [decode(z) for z in chain(network, *leaves)]
        total = sum(loss(image) + salient_weight * loss(crop_by_hand(image)) for image in images)
        total.backward()
        losses.append(total.item() / 2)
        gradients = [-0.5 * leaf.grad for leaf in leaves]
        if tie:
            gradients = [(gradients[0] + gradients[1]) / 2] * 2
        shift = noise * torch.randn(x.shape, generator=generator, dtype=x.dtype) if noise else 0.0
        for i, gradient in enumerate(gradients):
            clipped = gradient if clip is None else gradient.clamp(-clip, clip)
            buffers[i] = clipped if buffers[i] is None else momentum * buffers[i] + clipped
            pair[i] = pair[i] + buffers[i] + shift
            if renormalize:
                pair[i] = pair[i] / pair[i].flatten(1).norm(dim=1).view(-1, 1, 1, 1) * norm
    return pair, losses


LOOPS: dict[str, dict[str, object]] = {
    "defaults": {},
    "untied": {"tie": False},
    "no momentum": {"momentum": 0.0},
    "no noise": {"noise": 0.0},
    "no clip": {"clip": None},
    "no norm": {"renormalize": False},
    "SGOOL": {"salient_weight": 0.7},
    "SGOOL untied": {"salient_weight": 0.7, "tie": False, "momentum": 0.5},
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_is_the_loop_on_plain_autograd(name: str, exact: bool) -> None:
    options = {
        "clip": 2e-3,
        "momentum": 0.9,
        "noise": 1e-4,
        "renormalize": True,
        "tie": True,
    } | LOOPS[name]
    options |= {"salient_weight": LOOPS[name].get("salient_weight", 0.0)}
    network, x = Network(), latents()
    expected, losses = doodl(network, x, torch.Generator().manual_seed(3), 4, **options)
    salient = {"saliency_fn": small_box} if options["salient_weight"] else {}
    generator = torch.Generator().manual_seed(3)
    result = optimize_latents(
        sampler(exact=exact),
        network,
        decode,
        loss,
        x,
        steps=4,
        progress=False,
        generator=generator,
        **salient,
        **options,
    )
    pair = result.latents if isinstance(result.latents, tuple) else (result.latents,) * 2
    assert isinstance(result.latents, Tensor) == options["tie"]
    tolerance = 1e-6 if exact else 1e-12  # of the latents: an exact chain rounds to a grid of 2^-26
    for got, wanted in zip(pair, expected):
        torch.testing.assert_close(got - x, wanted - x, rtol=0, atol=tolerance)
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=1e-6, atol=0)
    assert result.message == ""


def test_the_loop_of_the_test_clips_some_and_not_all() -> None:
    options = {"clip": None, "noise": None, "renormalize": False, "progress": False}
    x = latents()
    result = optimize_latents(sampler(), Network(), decode, loss, x, steps=1, **options)
    clipped = ((result.latents - x).abs() > 2e-3).float().mean()
    assert 0.1 < clipped < 0.9


@pytest.mark.parametrize("method", ["edict", "bdia", "belm", "ddim"])
def test_a_step_goes_down_the_slope_of_what_is_decoded(method: str) -> None:
    network, x, direction = Network(), latents(), latents()
    run = sampler(method, alternate=False)
    off = {"clip": None, "momentum": None, "noise": None, "renormalize": False, "progress": False}
    step = optimize_latents(run, network, decode, loss, x, steps=1, **off).latents - x

    def total(x: Tensor) -> float:
        decoded = run.sample(network, x)[: 2 if method == "edict" else 1]
        return sum(loss(decode(z)).item() for z in decoded)

    with torch.no_grad():
        slope = (total(x + 1e-5 * direction) - total(x - 1e-5 * direction)) / 2e-5
    share = -0.25 if method == "edict" else -1.0  # half, and half of the sum over x and y
    torch.testing.assert_close((step * direction).sum().item(), share * slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tie", [True, False])
def test_noise_is_the_same_for_both_and_norms_are_kept_sample_by_sample(tie: bool) -> None:
    x = latents() * torch.tensor([1.0, 5.0], dtype=torch.float64).view(2, 1, 1, 1)
    flat = {
        "decode_fn": lambda x: 0 * x,
        "loss_fn": torch.sum,
        "tie": tie,
        "noise": 0.1,
        "progress": False,
    }
    result = optimize_latents(sampler(), Network(), x=x, steps=2, **flat)
    pair = (result.latents,) if tie else result.latents
    assert all(torch.equal(pair[0], other) for other in pair)
    assert (pair[0] - x).abs().max() > 0.05
    torch.testing.assert_close(pair[0].flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


def test_the_saliency_function_sees_detached_images_in_0_to_1() -> None:
    seen = []

    def saliency(image: Tensor) -> Tensor:
        seen.append(image)
        return image.mean(1) > 0.5

    optimize_latents(
        sampler(),
        Network(),
        lambda x: 1.5 * decode(x),
        loss,
        latents(),
        steps=1,
        saliency_fn=saliency,
        progress=False,
    )
    assert len(seen) == 2
    assert not any(image.requires_grad for image in seen)
    assert all(image.min() == 0 and image.max() == 1 for image in seen)
    assert 0.2 < seen[0].median() < 0.8


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_three_steps_and_two_are_five(tie: bool, seeded: bool) -> None:
    arguments = (sampler(exact=True), Network(), decode, loss, latents(dtype=torch.float32))
    options = {"tie": tie, "progress": False, "saliency_fn": spectral_residual_saliency}

    def generator() -> dict[str, torch.Generator]:
        return {"generator": torch.Generator().manual_seed(7)} if seeded else {}

    torch.manual_seed(1)
    whole = optimize_latents(*arguments, steps=5, **generator(), **options)
    torch.manual_seed(1)
    part = optimize_latents(*arguments, steps=3, **generator(), **options)
    written = io.BytesIO()
    torch.save(part.state, written)
    written.seek(0)
    state = torch.load(written, weights_only=True)
    torch.manual_seed(2)
    rest = optimize_latents(*arguments, steps=2, state=state, **generator(), **options)
    assert rest.losses == whole.losses
    assert torch.equal(torch.stack([*rest.latents]), torch.stack([*whole.latents]))
    assert not torch.equal(torch.stack([*part.latents]), torch.stack([*whole.latents]))
    for given_out in part.latents, part.losses:  # the state is no view of them
        given_out.clear() if isinstance(given_out, list) else [z.zero_() for z in given_out]
    again = optimize_latents(*arguments, steps=2, state=part.state, **options)
    assert again.losses == whole.losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_optimised_in_float32(dtype: torch.dtype) -> None:
    network, x, decoded = Network(), latents(dtype=torch.float32).to(dtype), []

    def watched(x: Tensor) -> Tensor:
        decoded.append(x.dtype)
        return decode(x)

    options = {"steps": 2, "noise": None, "progress": False}
    result = optimize_latents(sampler(exact=True), network, watched, loss, x, **options)
    wide = optimize_latents(sampler(exact=True), network, decode, loss, x.float(), **options)
    assert set(decoded) == {torch.float32}
    assert torch.equal(result.latents, wide.latents)
    assert not torch.equal(result.latents, result.latents.to(dtype).float())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_where_gradients_are_off_and_leaves_parameters_alone(
    mode: type, recwarn: pytest.WarningsRecorder
) -> None:
    network, x, computed = Network(), latents(), []
    expected = optimize_latents(
        sampler(), network, decode, loss, x, steps=2, noise=None, progress=False
    )
    network.convolution.weight.register_hook(computed.append)
    with mode():
        x = x.clone()
        result = optimize_latents(
            sampler(), network, decode, loss, x, steps=2, noise=None, progress=False
        )
    assert torch.equal(result.latents, expected.latents)
    assert not result.latents.requires_grad
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert not computed
    assert not recwarn.list


def test_no_steps_give_back_x() -> None:
    result = optimize_latents(
        sampler(), Network(), decode, loss, x := latents(), steps=0, progress=False
    )
    assert torch.equal(result.latents, x)
    assert result.latents.data_ptr() != x.data_ptr()
    assert (result.losses, result.message, result.state["step"]) == ([], "", 0)


def test_noise_comes_from_the_generator_or_from_torchs_own_seed() -> None:
    arguments = (sampler(), Network(), decode, loss, latents())
    runs = {}
    for seed, generator in ((0, None), (0, None), (1, None), (0, 5), (1, 5)):
        torch.manual_seed(seed)
        given = None if generator is None else torch.Generator().manual_seed(generator)
        result = optimize_latents(*arguments, steps=1, generator=given, progress=False)
        runs.setdefault((seed, generator), []).append(result.latents)
    assert torch.equal(*runs[0, None])
    assert not torch.equal(runs[0, None][0], runs[1, None][0])
    assert torch.equal(runs[0, 5][0], runs[1, 5][0])


@pytest.mark.parametrize("saliency_fn", [None, spectral_residual_saliency])
def test_the_loss_falls(saliency_fn: object) -> None:
    options = {"clip": 1e-2, "saliency_fn": saliency_fn, "progress": False}
    arguments = (sampler(exact=True), Network(), decode, loss, latents())
    result = optimize_latents(*arguments, steps=20, **options)
    assert result.losses[-1] < 0.7 * result.losses[0]
    assert len(result.losses) == 20
