"""Every class of pipelines around a transformer is guided by concepts, or is refused."""

from __future__ import annotations

import pytest
import torch
from families.classes import call, kinds, made
from families.estimates import first_estimates

from dense_attn.integrations.diffusers import Edit, semantic_guidance
from dense_attn.integrations.diffusers.guidance.calls import FAMILIES
from dense_attn.integrations.diffusers.models import MODELS, model_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.full]
REFUSED = ("ControlNet", "SanaSprint", "LTXImageToVideo", "Kandinsky5I2V", "Flux2KleinKV")


def known(kind: type) -> bool:
    """Whether its record takes a class, and is one of a transformer."""
    try:
        return model_of(made(kind)).component == "transformer"
    except (ValueError, TypeError):
        return False


def test_every_family_has_its_record() -> None:
    assert FAMILIES.keys() <= {model.denoiser for model in MODELS} - {"UNet2DConditionModel"}
    assert len(FAMILIES) >= 21


@pytest.mark.parametrize("name", list(kinds()))
def test_a_class(name: str) -> None:
    kind = kinds()[name]
    if not known(kind):
        pytest.skip("its record takes no such class")
    pipe = made(kind)
    with first_estimates(pipe.scheduler) as of:
        plain = of(lambda: call(pipe))

        def guided(scale: float) -> torch.Tensor:
            edits = [Edit("snow", scale=scale, threshold=0, warmup=0)]
            with semantic_guidance(pipe, edits, batch_concepts=False):
                return of(lambda: call(pipe))

        unknown = model_of(pipe).denoiser not in FAMILIES
        if unknown or any(part in name for part in REFUSED):
            with pytest.raises(ValueError, match=r"^pipe must ha"):
                guided(3.0)
        else:
            assert torch.equal(guided(0.0), plain)
            assert not torch.equal(guided(3.0), plain)
