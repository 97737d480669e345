"""VAEs that overflow in half precision: in float32 where their pipelines have them so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import IMAGE, diffusers
from torch import Tensor

from dense_attn import OptimizeResult
from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import invert, optimize, reconstruct

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:eps_fn must be an nn.Module"),  # parameters get none
]
HOW = {"num_inference_steps": 2, "progress": False}
SIZE = {"height": 16, "width": 16}
RULE = "pipe must have a VAE that makes finite"


def overflowing(kind: str = "StableDiffusionXLPipeline", *, told: bool = True) -> Any:
    """A pipeline in float16 whose VAE has values of 1e6 within."""
    pipe = tiny_pipeline(getattr(diffusers, kind)).to(torch.float16)
    for half in (pipe.vae.encoder, pipe.vae.decoder):
        half.mid_block.register_forward_hook(lambda _module, _args, made: 1e6 * made / 1e6)
    pipe.vae.register_to_config(force_upcast=told)
    return pipe


def bits(pipe: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pipe.vae.state_dict().items()}


def is_as_before(pipe: Any, before: dict[str, Tensor]) -> bool:
    same = all(torch.equal(value, before[name]) for name, value in bits(pipe).items())
    return same and pipe.vae.dtype == torch.float16


def test_encoder_decoder_and_gradient_are_in_float32() -> None:
    """With the bits of the same VAE in float32; its own float16 bits return."""
    pipe = overflowing()
    before = bits(pipe)
    with torch.inference_mode():
        found = invert(pipe, IMAGE, "a cat", **HOW)
    image = reconstruct(pipe, found, output_type="pt")
    changed = optimize(pipe, "a cat", torch.mean, steps=2, clip=None, noise=None, **SIZE, **HOW)
    assert changed.result.losses[1] < changed.result.losses[0]
    assert is_as_before(pipe, before)
    pipe.vae.float()
    assert torch.equal(reconstruct(pipe, found, output_type="pt"), image)
    assert torch.equal(invert(pipe, IMAGE, "a cat", **HOW).latents[0], found.latents[0])


def test_a_loss_that_raises_leaves_the_vae_as_it_was() -> None:
    pipe = overflowing()
    before = bits(pipe)

    def loss_fn(image: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimize(pipe, "a cat", loss_fn, **SIZE, **HOW)
    assert is_as_before(pipe, before)


@pytest.mark.parametrize(
    ("kind", "told"), [("StableDiffusionXLPipeline", False), ("StableDiffusionPipeline", True)]
)
def test_black_images_are_refused(kind: str, told: bool) -> None:
    """Where nothing says float32: config or pipeline. Optimised noise comes with the error."""
    pipe = overflowing(kind, told=told)
    with pytest.raises(ValueError, match=f"^{RULE} latents of image, got nan or inf in float16"):
        invert(pipe, IMAGE, "a cat", **HOW)
    sentence = f"^{RULE} images of latents, got nan or inf in float16"
    with pytest.raises(ValueError, match=sentence) as caught:
        optimize(pipe, "a cat", torch.mean, steps=0, **SIZE, **HOW)
    assert isinstance(caught.value.result, OptimizeResult)
