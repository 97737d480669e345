"""Refusals of the optimisation of latents, and numbers at the ends of their dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tiny_chain import Network, decode, latents, loss, sampler

from dense_attn import optimize_latents


@pytest.mark.parametrize("size", [1e-25, 1e25])  # their squares are 0 and infinite in float32
def test_norms_are_kept_where_squares_overflow(size: float) -> None:
    x = latents(dtype=torch.float32)
    options = {"clip": None, "noise": None, "steps": 1, "progress": False}
    large = optimize_latents(
        sampler(), Network(), decode, lambda image: 1e25 * loss(image), x, **options
    )
    torch.testing.assert_close(large.latents.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    small = optimize_latents(sampler(), lambda x, t: 0.1 * x, decode, loss, size * x, **options)
    torch.testing.assert_close(
        small.latents.double().flatten(1).norm(dim=1), size * x.double().flatten(1).norm(dim=1)
    )
    assert (large.message, small.message) == ("", "")


def test_a_clip_beyond_the_dtype_is_none() -> None:
    same = {"eps_fn": Network(), "x": latents(dtype=torch.float32), "noise": None}
    clipped, free = (call(clip=clip, **same).latents for clip in (1e300, None))
    assert torch.equal(clipped, free)


def test_two_large_losses_have_a_finite_mean() -> None:
    result = call(loss_fn=lambda image: image.sum() * 0 + 1.5e308)
    assert result.losses == [1.5e308]


def call(**changes: object) -> object:
    arguments = {
        "sampler": sampler(),
        "eps_fn": Network(),
        "decode_fn": decode,
        "loss_fn": loss,
        "x": latents(),
    }
    return optimize_latents(**arguments | {"steps": 1, "progress": False} | changes)


def state(**changes: object) -> dict[str, object]:
    return call().state | changes


SCALAR = "loss_fn must return a scalar tensor that depends on the image, got "
IMAGES = "decode_fn must return images, a tensor that depends on the latents, got "
OF_FOUR = "decode_fn must return images [batch, channels, height, width] for a saliency_fn, got "
REAL = "decode_fn must return real images, none of them empty, for a saliency_fn, got "
MAP = "saliency_fn must return a tensor of shape (2, 16, 16), got "
STATE = "state must be the state of an OptimizeResult, got "
WRONG_KIND: dict[str, Callable[[], dict[str, object]]] = {
    "sampler must be a ReversibleSampler, got NoneType": lambda: {"sampler": None},
    "eps_fn must be callable, got Tensor": lambda: {"eps_fn": torch.ones(1)},
    "decode_fn must be callable, got int": lambda: {"decode_fn": 3},
    "loss_fn must be callable, got NoneType": lambda: {"loss_fn": None},
    "saliency_fn must be callable, got str": lambda: {"saliency_fn": "spectral"},
    "x must be a tensor, got list": lambda: {"x": [1.0]},
    "x must be one of float32, bfloat16, float16, float64, got int64": lambda: {
        "x": torch.ones(2, 2).long()
    },
    "steps must be an integer, got 2.0": lambda: {"steps": 2.0},
    "steps must be an integer, got True": lambda: {"steps": True},
    "salient_weight must be a number, got NoneType": lambda: {"salient_weight": None},
    "clip must be a number or None, got str": lambda: {"clip": "1"},
    "momentum must be a number or None, got bool": lambda: {"momentum": True},
    "noise must be a number or None, got list": lambda: {"noise": [0.1]},
    "renormalize must be True or False, got 1": lambda: {"renormalize": 1},
    "tie must be True or False, got 'yes'": lambda: {"tie": "yes"},
    "progress must be True or False, got None": lambda: {"progress": None},
    "generator must be a torch.Generator or None, got int": lambda: {"generator": 3},
    STATE + "OptimizeResult": lambda: {"state": call()},
    "loss_fn must return a real number, got a complex128 tensor of shape ()": lambda: {
        "loss_fn": lambda image: image.sum() * 1j
    },
    "saliency_fn must return real numbers, got a complex64 tensor of shape (2, 16, 16)": lambda: {
        "saliency_fn": lambda image: image.mean(1).to(torch.complex64)
    },
    STATE + "one with a list of float for latents": lambda: {"state": state(latents=[0.5])},
    STATE + "one with int for latents": lambda: {"state": state(latents=3)},
    STATE + "one with NoneType for losses": lambda: {"state": state(losses=None)},
    STATE + "one with NoneType for momentum": lambda: {"state": state(momentum=None)},
    STATE + "one with str for step": lambda: {"state": state(step="a")},
    STATE + "one with bool for step": lambda: {"state": state(step=True)},
    STATE + "one with int for previous": lambda: {"state": state(previous=3)},
    STATE + "one with NoneType for generator": lambda: {"state": state(generator=None)},
    STATE + "one with NoneType for norms": lambda: {"state": state(norms=None)},
    STATE + "one with device for generator_device": lambda: {
        "state": state(generator_device=torch.device("cpu"))
    },
    STATE + "one with str for previous step": lambda: {
        "state": state(previous=state()["previous"] | {"step": "a"})
    },
}
WRONG_MEANING: dict[str, Callable[[], dict[str, object]]] = {
    "x must have a batch dimension and others, none of them empty, got (3,)": lambda: {
        "x": torch.ones(3)
    },
    "x must have a batch dimension and others, none of them empty, got (0, 3)": lambda: {
        "x": torch.ones(0, 3)
    },
    "x must be finite, got nan": lambda: {"x": latents() * math.nan},
    "steps must be at least 0, got -1": lambda: {"steps": -1},
    "salient_weight must be finite, got nan": lambda: {"salient_weight": math.nan},
    "clip must be above 0 or None, got 0": lambda: {"clip": 0},
    "momentum must be from 0 to 1, 1 excluded, got 1.0": lambda: {"momentum": 1.0},
    "momentum must be from 0 to 1, 1 excluded, got -0.1": lambda: {"momentum": -0.1},
    "noise must be at least 0, got -0.0001": lambda: {"noise": -1e-4},
    "noise must be finite, got inf": lambda: {"noise": math.inf},
    SCALAR + "float": lambda: {"loss_fn": lambda image: 0.0},
    SCALAR + "a float64 tensor of shape (2,)": lambda: {
        "loss_fn": lambda image: image.sum((1, 2, 3))
    },
    SCALAR + "a float64 tensor of shape () without gradient": lambda: {
        "loss_fn": lambda image: image.detach().sum()
    },
    SCALAR + "one that does not": lambda: {
        "loss_fn": lambda image: torch.ones((), requires_grad=True)
    },
    IMAGES + "tuple": lambda: {"decode_fn": lambda x: (x,)},
    IMAGES + "a float64 tensor of shape (2, 3, 8, 8) without gradient": lambda: {
        "decode_fn": torch.no_grad()(lambda x: x.clone())
    },
    OF_FOUR + "a float64 tensor of shape (2, 192)": lambda: {
        "decode_fn": lambda x: x.flatten(1),
        "saliency_fn": lambda image: image,
    },
    MAP + "a float64 tensor of shape (2, 3, 16, 16)": lambda: {"saliency_fn": lambda image: image},
    MAP + "NoneType": lambda: {"saliency_fn": lambda image: None},
    "saliency_fn must return finite values, got nan": lambda: {
        "saliency_fn": lambda image: image.mean(1) * math.nan
    },
    STATE + "a dict with the keys ['step']": lambda: {"state": {"step": 1}},
    STATE + "one with a dict with the keys [] for previous": lambda: {"state": state(previous={})},
    STATE + "one with -1 for step": lambda: {"state": state(step=-1)},
    STATE + "one with what is not 1 numbers for losses": lambda: {
        "state": state(losses=[1.0, 2.0])
    },
    STATE + "one with 0 tensors after 1 steps for momentum": lambda: {"state": state(momentum=[])},
    STATE + "one with what is not finite for latents": lambda: {
        "state": state(latents=[latents() * math.nan])
    },
    STATE + "one with a float64 tensor of shape (3,) for norms": lambda: {
        "state": state(norms=torch.ones(3, dtype=torch.float64))
    },
    STATE + "one with a float32 tensor of shape (2,) for norms": lambda: {
        "state": state(norms=torch.ones(2))
    },
    STATE + "one with what is not at least 0 for norms": lambda: {
        "state": state(norms=torch.tensor([1.0, math.nan], dtype=torch.float64))
    },
    STATE + "one with 'foo' for generator_device": lambda: {"state": state(generator_device="foo")},
    STATE + "one with 'meta' for generator_device": lambda: {
        "state": state(generator_device="meta")
    },
    STATE + "one with a float32 tensor of shape (8,) for generator": lambda: {
        "state": state(generator=torch.ones(8))
    },
    STATE + "one with 8 bytes that no generator of cpu has for generator": lambda: {
        "state": state(generator=torch.ones(8, dtype=torch.uint8))
    },
    STATE + "one with a state for previous previous": lambda: {
        "state": state(previous=state()["previous"] | {"previous": state()})
    },
    STATE + "one with 1 for previous step": lambda: {
        "state": state(previous=state() | {"previous": None})
    },
    "x must hold numbers, got a meta tensor": lambda: {"x": torch.ones(1, 3, 8, 8, device="meta")},
    REAL + "a float64 tensor of shape (2, 3, 0, 16)": lambda: {
        "decode_fn": lambda x: decode(x)[:, :, :0],
        "saliency_fn": lambda image: image[:, 0],
    },
    REAL + "a complex128 tensor of shape (2, 3, 16, 16)": lambda: {
        "decode_fn": lambda x: decode(x) + 0j,
        "loss_fn": lambda image: image.abs().sum(),
        "saliency_fn": lambda image: image[:, 0],
    },
    "state must hold 2 latents for this sampler and tie, got 1": lambda: {
        "state": state(),
        "tie": False,
    },
    "state must hold float64 latents of shape (1, 3, 8, 8), got float64 (2, 3, 8, 8)": lambda: {
        "state": state(),
        "x": latents(1),
    },
    "state must hold float32 latents of shape (2, 3, 8, 8), got float64 (2, 3, 8, 8)": lambda: {
        "state": state(),
        "x": latents().half(),
    },
}
REFUSALS = [(TypeError, *item) for item in WRONG_KIND.items()] + [
    (ValueError, *item) for item in WRONG_MEANING.items()
]


@pytest.mark.parametrize(
    ("error", "message", "changes"), REFUSALS, ids=[message for _, message, _ in REFUSALS]
)
def test_refusals(
    error: type[Exception], message: str, changes: Callable[[], dict[str, object]]
) -> None:
    changes = changes()
    with pytest.raises(error) as caught:
        call(**changes)
    assert str(caught.value) == message
