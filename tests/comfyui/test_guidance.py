"""semantic_guidance on a sampler of ComfyUI's beside the loop of SemanticGuidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comfyui.scene import KINDS, NEGATIVE, POSITIVE, guided, made, noise, regions, text
from torch import Tensor

from dense_attn import SemanticGuidance
from dense_attn.integrations.comfyui import Edit, apply_layout, semantic_guidance
from dense_attn.integrations.edits import Edit as InWords

pytestmark = pytest.mark.usefixtures("installed")
CONCEPTS = text(6, 5), text(7, 3)
STEPS = 4
HOW = {"warmup": 1, "threshold": 0.5}


def edits() -> list[Edit]:
    first, second = CONCEPTS
    return [Edit(first, scale=3, **HOW), Edit(second, reverse=True, weight=2, cooldown=3, **HOW)]


def loop(guidance: SemanticGuidance, kind: str, x: Tensor, sigmas: Tensor, scale: float) -> Any:
    """The latents before and without noise at each of Euler's steps, in the library's own loop."""
    guidance.guidance_scale, base, outs = scale, made(kind).model, []

    def noise_of(conditioning: list, sigma: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        how = {"c_crossattn": conditioning[0][0], "transformer_options": options}
        return (x - base.apply_model(x, sigma[None], **how)) / sigma

    for step, sigma in enumerate(sigmas[:-1]):
        every = [noise_of(one, sigma) for one in (NEGATIVE, POSITIVE, *CONCEPTS)]
        eps = guidance(step, every[0], every[1], every[2:])
        outs.append((x, x - eps * sigma))
        x = x + (sigmas[step + 1] - sigma) * eps
    return outs


@pytest.mark.parametrize("scale", [4.0, 1.0])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_run_is_the_librarys_own_loop(kind: str, scale: float) -> None:
    """Twice, so that the second run begins without the momentum of the first."""
    x = noise(kind)
    sigmas = torch.linspace(1, 0, STEPS + 1).double()  # small enough for a softmax of many keys
    own = SemanticGuidance(
        edit_guidance_scale=[3.0, 5.0],
        edit_threshold=0.5,
        edit_warmup_steps=1,
        edit_cooldown_steps=[None, 3],
        edit_weights=[1.0, 2.0],
        reverse_editing_direction=[False, True],
    )
    right = loop(own, kind, x, sigmas, scale)
    model = semantic_guidance(made(kind), edits())
    for _ in range(2):
        for step, (here, expected) in enumerate(right):
            out = guided(model, here, sigmas, step, scale)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
    plain = guided(made(kind), x, sigmas, 1, scale)
    assert (plain - guided(model, x, sigmas, 1, scale)).abs().max() > 1e-3


def test_it_comes_on_top_of_other_guidance() -> None:
    x, sigmas = noise("Flux"), torch.tensor([1.0, 0.5, 0.0]).double()
    model = made("Flux")
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 2)
    plain = guided(made("Flux"), x, sigmas, 1)
    alone = guided(semantic_guidance(made("Flux"), edits()), x, sigmas, 1)
    both = guided(semantic_guidance(model, edits()), x, sigmas, 1)
    torch.testing.assert_close(both, 2 * plain + (alone - plain), rtol=0, atol=1e-12)


def test_concepts_see_no_regions() -> None:
    """A layout leaves their estimates as they are, and the addition with them."""
    x, sigmas = noise("UNetModel"), torch.tensor([14.6, 14.0, 0.0]).double()
    placed = apply_layout(made("UNetModel"), regions())
    added = [
        guided(semantic_guidance(model, edits()), x, sigmas, 1) - guided(model, x, sigmas, 1)
        for model in (made("UNetModel"), placed)
    ]
    torch.testing.assert_close(*added, rtol=0, atol=1e-9)


def test_concepts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = semantic_guidance(made("Flux"), edits())
    seen: list[object] = []
    monkeypatch.setattr(
        model.model,
        "extra_conds",
        lambda **given: seen.append(1) or {"c_crossattn": given["cross_attn"]},
    )
    sigmas = torch.tensor([1.0, 0.5, 0.0]).double()
    for step in range(2):
        guided(model, noise("Flux"), sigmas, step)
    assert len(seen) == 2
    guided(model, noise("Flux", size=(4, 4)), sigmas, 0)
    assert len(seen) == 4


def refusal(run: Any) -> str:
    with pytest.raises((ValueError, TypeError)) as refused:
        run()
    return str(refused.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (Edit(CONCEPTS[0], scale=math.nan), "edits[1].scale must be finite, got nan"),
        (Edit(CONCEPTS[0], warmup=-1), "edits[1].warmup must be at least 0, got -1"),
        (
            InWords("fog"),
            "edits[1].prompt must hold one text (not a combination of several), got str",
        ),
        (CONCEPTS[0], "edits[1] must be an Edit, got list"),
    ],
)
def test_a_concept_is_refused_by_its_place(edit: Any, said: str) -> None:
    concepts = [Edit(CONCEPTS[1]), edit]
    assert refusal(lambda: semantic_guidance(made("Flux"), concepts)) == said


@pytest.mark.parametrize(
    ("conditioning", "said"),
    [
        ([], "conditioning must hold one text (not a combination of several), got 0"),
        ("fog", "conditioning must hold one text (not a combination of several), got str"),
        (
            [[torch.zeros(2), {}]],
            "conditioning must hold tokens [1, number, channels], at least one, got",
        ),
    ],
)
def test_a_conditioning_is_refused_where_its_concept_is_made(conditioning: Any, said: str) -> None:
    assert refusal(lambda: Edit(conditioning)).startswith(said)


def test_concepts_compare() -> None:
    """Conditionings, whose tensors do not, by identity; words by value."""
    one, other = Edit(CONCEPTS[0]), Edit(CONCEPTS[0])
    assert one == one != other
    assert len({one, other, one}) == 2
    assert InWords("fog", 3) == InWords("fog", 3) != InWords("fog", 4)
    assert len({InWords("fog", 3), InWords("fog", 3), InWords("fog", 4)}) == 2


def test_a_concept_that_cannot_act_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"edits\[0\].cooldown must be above its warmup") as told:
        semantic_guidance(made("Flux"), [Edit(CONCEPTS[0], cooldown=3)])
    assert told[0].filename == __file__


@pytest.mark.parametrize("name", ["momentum_scale", "momentum_beta"])
def test_momentum_is_refused_by_its_names(name: str) -> None:
    said = refusal(lambda: semantic_guidance(made("Flux"), edits(), **{name: math.nan}))
    assert said == f"{name} must be finite, got nan"


def test_what_cannot_be_is_refused_in_one_sentence() -> None:
    model, x = made("Flux"), noise("Flux")
    none = refusal(lambda: semantic_guidance(None, edits()))
    assert none == "model must be a ModelPatcher, got NoneType"
    said = "edits must be a list of Edit, got "
    assert refusal(lambda: semantic_guidance(model, [])) == f"{said}none"
    assert refusal(lambda: semantic_guidance(model, edits()[0])) == f"{said}Edit"
    (added,) = semantic_guidance(model, edits()).model_options["sampler_post_cfg_function"]
    args = {"input": x, "denoised": x, "uncond_denoised": x, "uncond": None}
    assert "negative prompt" in refusal(lambda: added(args))
    args |= {"uncond": [], "sigma": torch.ones(1), "model_options": {}, "model": model.model}
    assert "sample_sigmas" in refusal(lambda: added(args))
