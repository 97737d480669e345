"""Calls of ComfyUI: rows, other overrides, masks, sizes; and what is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui.denoisers import TEXT, UNetModel
from comfyui.sampling import BaseModel, ModelPatcher
from comfyui.scene import (
    KINDS,
    NEGATIVE,
    POSITIVE,
    box,
    estimate,
    made,
    noise,
    regions,
    text,
)
from torch import Tensor

from dense_attn.integrations.comfyui import Region, apply_layout, apply_region_prompts

pytestmark = pytest.mark.usefixtures("installed")
ROUNDING = {"rtol": 0, "atol": 1e-12}  # float64, in batches of other sizes
WAYS = [apply_layout, apply_region_prompts]
FLOATS = torch.zeros(1, 3, 4)
INTS = FLOATS.int()


@pytest.mark.parametrize("put", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [(1, 0), (0, 1), (1,), (0, 0, 1)])
def test_negative_rows_are_the_plain_ones(kind: str, chunks: tuple, put: Callable) -> None:
    x = noise(kind, 2)
    model = put(made(kind), regions())
    outs = estimate(model, x, chunks).chunk(len(chunks))
    positive, negative = estimate(model, x), estimate(made(kind), x, (1,))
    for chunk, out in zip(chunks, outs):
        torch.testing.assert_close(out, negative if chunk else positive, **ROUNDING)
    assert (positive - estimate(made(kind), x)).abs().max() > 1e-3


class Seen:
    """Another node's override, which notes what it gets."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, func: Callable, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((len(q), args[0].shape[-2]))
        return func(q, *args, **kwargs)


@pytest.mark.parametrize("first", [True, False])
def test_another_override_has_the_rest(first: bool) -> None:
    """In either order of the two nodes: of the image alone, and the negative prompt's rows."""
    other, model = Seen(), made("UNetModel")
    if first:
        model.model_options["transformer_options"]["optimized_attention_override"] = other
    model = apply_region_prompts(model, regions())
    if not first:
        model.model_options["transformer_options"]["optimized_attention_override"] = other
    x = noise("UNetModel")
    out = estimate(model, x, (1, 0))
    own = len(POSITIVE[0][0][0])
    assert other.calls == [(2, 60), (1, own), (2, 15), (1, own)]
    plain = estimate(apply_region_prompts(made("UNetModel"), regions()), x, (1, 0))
    assert torch.equal(out, plain)


@pytest.mark.parametrize("put", WAYS)
def test_other_steps_are_plain(put: Callable) -> None:
    x = noise("Flux")
    model = put(made("Flux"), regions(), start=0.3, end=0.6)
    for part in (0.9, 0.3):
        assert torch.equal(estimate(model, x, part=part), estimate(made("Flux"), x, part=part))
    assert not torch.equal(estimate(model, x, part=0.5), estimate(made("Flux"), x, part=0.5))


def test_a_layout_ends_where_the_model_has_it() -> None:
    for kind, on, off in (("UNetModel", 0.71, 0.69), ("Flux", 0.51, 0.49)):
        model, x = apply_layout(made(kind), regions()), noise(kind)
        plain = [estimate(made(kind), x, part=part) for part in (on, off)]
        assert not torch.equal(estimate(model, x, part=on), plain[0])
        assert torch.equal(estimate(model, x, part=off), plain[1])


@pytest.mark.parametrize("put", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_its_mask(kind: str, put: Callable) -> None:
    """A batch of masks is one for each latent; each is what it is alone."""
    x = noise(kind, 2)
    masks = torch.stack([box((0, 1), (0, 0.5)), box((0.5, 1), (0, 1))])
    other = box((0, 0.4), (0.6, 1), size=24)  # of another size
    both = estimate(put(made(kind), regions(masks, other)), x)
    for i in range(2):
        alone = estimate(put(made(kind), regions(masks[i], other)), x[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, **ROUNDING)
    with pytest.raises(ValueError, match="mask must be one, or one for each of the 3 latents"):
        estimate(put(made(kind), regions(masks, other)), noise(kind, 3))
    with pytest.raises(ValueError, match="mask must be one, or one for each of the 4 latents"):
        estimate(put(made(kind), regions(masks, other)), noise(kind, 4))


@pytest.mark.parametrize("size", [(5, 9), (1, 9), (8, 8)])
@pytest.mark.parametrize("put", WAYS)
@pytest.mark.parametrize("kind", ["UNetModel", "Flux"])
def test_sizes_that_are_odd_or_small(kind: str, put: Callable, size: tuple) -> None:
    out = estimate(put(made(kind), regions()), noise(kind, size=size))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("put", WAYS)
def test_masks_of_any_dtype(put: Callable, dtype: torch.dtype) -> None:
    x = noise("UNetModel")
    masks = [one.mask for one in regions()]
    out = estimate(put(made("UNetModel"), regions(*(mask.to(dtype) for mask in masks))), x)
    assert torch.equal(out, estimate(put(made("UNetModel"), regions(*masks)), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("put", WAYS)
@pytest.mark.parametrize("kind", ["UNetModel", "Flux"])
def test_models_in_half_floats(kind: str, put: Callable, dtype: torch.dtype) -> None:
    """Their distance to float64 is at most twice that of the same model without regions."""
    x, half = noise(kind), {}
    for name, model in (("plain", made(kind)), ("put", put(made(kind), regions()))):
        exact = estimate(model, x)
        model.model.diffusion_model.to(dtype)
        half[name] = (estimate(model, x.to(dtype)).double() - exact).abs().max()
    assert half["put"] <= 2 * half["plain"] + torch.finfo(dtype).eps


@pytest.mark.parametrize("put", WAYS)
@pytest.mark.parametrize("kind", ["Flux", "QwenImageTransformer2DModel"])
def test_an_attention_mask_counts(kind: str, put: Callable) -> None:
    """Tokens that it removes have no say: their values do not matter."""
    x, own = noise(kind), POSITIVE[0][0].shape[1]
    mask = torch.ones(1, own)
    mask[:, 3:] = 0
    model, outs = put(made(kind), regions()), []
    removed = mask.bool()
    for change in (0.0, 1.0):
        context = POSITIVE[0][0].clone()
        context[:, 3:] += change
        options = model.options()["transformer_options"] | {"cond_or_uncond": [0]}
        how = {"c_crossattn": context, "transformer_options": options, "attention_mask": removed}
        outs.append(model.model.apply_model(x, torch.tensor([0.9]).double(), **how))
    torch.testing.assert_close(*outs, **ROUNDING)
    assert (outs[0] - estimate(model, x)).abs().max() > 1e-6


@pytest.mark.parametrize("put", WAYS)
def test_reference_images_are_left_alone(put: Callable) -> None:
    """They are behind the image, and belong to no region."""
    x = noise("Flux")
    model = put(made("Flux"), regions())
    out = estimate(model, x, (1, 0), ref_latents=torch.cat([noise("Flux", size=(4, 4))] * 2))
    assert torch.isfinite(out).all()
    plain = estimate(made("Flux"), x, (1,), ref_latents=noise("Flux", size=(4, 4)))
    torch.testing.assert_close(out[:1], plain, **ROUNDING)


class Merging(UNetModel):
    """A U-Net whose second layers another node's patch gives half of the tokens."""

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict, **how: Any) -> Tensor:
        out = super().forward(x, context, transformer_options, **how)
        from comfyui.denoisers import HEADS, optimized_attention

        half = self.lift(x.movedim(1, -1)).flatten(1, 2)[:, ::2]
        given = self.layers[1][1](half, context)
        self.merged = optimized_attention(*given, HEADS, transformer_options=transformer_options)
        return out


def test_layers_of_other_tokens_see_the_prompt_alone() -> None:
    torch.manual_seed(0)
    denoiser = Merging().double().requires_grad_(False)
    model, x = ModelPatcher(BaseModel(denoiser, False)), noise("UNetModel")
    estimate(model, x)
    plain = denoiser.merged
    estimate(apply_region_prompts(model, regions()), x)
    torch.testing.assert_close(denoiser.merged, plain, **ROUNDING)


def test_the_given_model_stays_as_it_is() -> None:
    model, x = made("UNetModel"), noise("UNetModel")
    before = estimate(model, x)
    patched = apply_layout(model, regions())
    assert torch.equal(estimate(model, x), before)
    assert not torch.equal(estimate(patched, x), before)
    assert torch.equal(estimate(patched.clone(), x), estimate(patched, x))


class Other(torch.nn.Module):
    """A denoiser that no record knows."""


class Deaf(UNetModel):
    """A denoiser that asks no override."""

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict, **_: Any) -> Tensor:
        return x


class Equal(UNetModel):
    """A denoiser, under a name of its own, of a known kind."""


def test_a_derived_class_is_of_its_kind() -> None:
    model = ModelPatcher(BaseModel(Equal().double().requires_grad_(False), False))
    assert torch.isfinite(estimate(apply_layout(model, regions()), noise("UNetModel"))).all()


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises((ValueError, TypeError)) as refused:
        run()
    return str(refused.value)


@pytest.mark.parametrize("model", [None, "model", Other()], ids=["none", "name", "denoiser"])
@pytest.mark.parametrize("put", WAYS)
def test_what_is_no_model_is_refused_in_one_sentence(put: Callable, model: object) -> None:
    said = refusal(lambda: put(model, regions()))
    assert said == f"model must be a ModelPatcher, got {type(model).__name__}"


def test_what_cannot_be_is_refused_in_one_sentence() -> None:
    model = made("UNetModel")
    other = ModelPatcher(BaseModel(Other(), True))
    assert "got Other" in refusal(lambda: apply_layout(other, regions()))
    faint = regions(torch.full((4, 4), 0.5), torch.ones(4, 4))
    assert "above 0.5 in each image" in refusal(lambda: apply_layout(model, faint))
    twice = apply_layout(model, regions())
    assert "in one list" in refusal(lambda: apply_region_prompts(twice, regions()))
    assert "start must be at most end" in refusal(
        lambda: apply_layout(model, regions(), start=0.5, end=0.2)
    )
    assert "modulation must be one of" in refusal(
        lambda: apply_layout(model, regions(), modulation="mask")
    )
    assert "regions must hold 1 to 30" in refusal(lambda: apply_layout(model, []))
    assert "regions must be a list of Region" in refusal(lambda: apply_layout(model, [1]))
    counts = [Region(torch.ones(n, 4, 4), text(1, 3)) for n in (2, 3)]
    assert "masks of as many images" in refusal(lambda: apply_layout(model, counts))


def test_what_a_call_cannot_be_is_refused_in_one_sentence() -> None:
    x, deaf = noise("UNetModel"), ModelPatcher(BaseModel(Deaf(), False))
    assert refusal(lambda: estimate(apply_layout(deaf, regions()), x)).endswith(
        "got no call of optimized_attention"
    )
    flat = apply_layout(made("UNetModel"), regions())
    square = noise("UNetModel", size=(3, 4))  # 12 tokens, as the texts are
    assert "number of tokens is not that of the text" in refusal(lambda: estimate(flat, square))
    wide = [Region(torch.ones(4, 4), [[torch.zeros(1, 3, TEXT + 1), {}]])]
    wrong = apply_layout(made("UNetModel"), wide)
    assert "text encoder, 8 channels, got 9" in refusal(lambda: estimate(wrong, x))
    context = {
        "c_crossattn": NEGATIVE[0][0],
        "transformer_options": flat.options()["transformer_options"],
    }
    sigma = torch.tensor([13.0]).double()
    assert "cond_or_uncond" in refusal(lambda: flat.model.apply_model(x, sigma, **context))


@pytest.mark.parametrize(
    ("mask", "conditioning", "weight", "rule"),
    [
        (torch.zeros(4, 4), text(1, 3), 1.0, "mask must have a pixel above 0 in each image"),
        (torch.full((4, 4), 2.0), text(1, 3), 1.0, "mask must hold values in 0..1"),
        (torch.ones(4), text(1, 3), 1.0, "mask must have shape [height, width]"),
        (torch.ones(4, 4).int(), text(1, 3), 1.0, "mask must hold floats, got int32"),
        (torch.ones(4, 4), text(1, 3) * 2, 1.0, "conditioning must hold one text"),
        (torch.ones(4, 4), [[torch.zeros(3, 4), {}]], 1.0, "conditioning must hold tokens"),
        (torch.ones(4, 4), text(1, 0), 1.0, "hold tokens [1, number, channels], at least one, got"),
        (torch.ones(4, 4), [[INTS, {}]], 1.0, "conditioning must hold tokens of floats, got int32"),
        (torch.ones(4, 4), [[None, {}]], 1.0, "conditioning must be a tensor, got NoneType"),
        (torch.ones(4, 4), [[]], 1.0, "conditioning must be [[tokens, {...}]] of one text, got ["),
        (torch.ones(4, 4), [5], 1.0, "must be [[tokens, {...}]] of one text, got [int]"),
        (torch.ones(4, 4), [[FLOATS]], 1.0, "must be [[tokens, {...}]] of one text, got [list]"),
        (torch.ones(4, 4), text(1, 3), 0.0, "weight must be above 0"),
    ],
)
def test_regions_are_refused_in_one_sentence(
    mask: Tensor, conditioning: list, weight: float, rule: str
) -> None:
    assert rule in refusal(lambda: Region(mask, conditioning, weight))
