"""A first step of every family: the concept's own estimate, as a run of it alone makes it.

Estimates of the prompt, the negative prompt and the concept are those of plain runs without
guidance, one of each text, so that nothing of the block is used to check it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from families import FAMILIES, family, made_of, video
from families.estimates import first_estimates
from pipelines import MODELS, PROMPT, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import Edit, semantic_guidance

pytestmark = pytest.mark.usefixtures("one_thread")
CONCEPT, SCALE = "snow", 3.0
QUOTED = dict.fromkeys(("hunyuan_image", "hunyuan_video15"), 'snow "rain"')  # a second encoder's
OFTEN = "sd3", "flux", "z_image"
REFUSED = ("flux2_kv",)  # which keeps keys
OTHERS = [name for name in (*FAMILIES, *video.FAMILIES) if name not in OFTEN + REFUSED]
every_family = pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.full) for name in OTHERS)]
)
# texts stand in other words than the prompt, or its estimate has another length than the sum's
UNLIKE = {"sana": {"guidance_scale": 2.0}}
UNLIKE["lumina2"] = UNLIKE["sana"] | {"cfg_normalization": False}


def made(name: str) -> tuple[object, dict]:
    """A pipeline and what its calls are given."""
    if name in MODELS:
        return pipeline(name), {"height": 16, "width": 24, **MODELS[name][1]}
    return family(name), dict(made_of(name)[1])


@contextmanager
def unguided(pipe: object) -> Iterator[dict[str, float]]:
    """The argument that turns guidance off, or none while a pipeline's guider is off.

    FLUX's scale is the network's.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    if "true_cfg_scale" in takes:
        yield {"true_cfg_scale": 1.0}
    elif "guidance_scale" in takes:
        yield {"guidance_scale": 0.0 if "ZImage" in type(pipe).__name__ else 1.0}
    else:
        pipe.guider.disable()
        yield {}
        pipe.guider.enable()


@cache
def parts(name: str) -> tuple[Callable[..., Callable[[], object]], Tensor, Tensor, Tensor, Tensor]:
    """How to call a pipeline, and its estimate, its concept's and the one concepts are apart from.

    That is the negative prompt's, or the prompt's where there is none.
    """
    pipe, given = made(name)
    given |= UNLIKE.get(name, {})
    negative = given.pop("negative_prompt", "")
    takes = inspect.signature(type(pipe).__call__).parameters
    given |= {"negative_prompt": negative} if name != "flux" and "negative_prompt" in takes else {}

    def run(prompt: str = PROMPT, **options: object) -> Callable[[], object]:
        more = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
        return lambda: pipe(prompt=prompt, output_type="latent", **given | more | options)

    concept = QUOTED.get(name, CONCEPT)
    with first_estimates(pipe.scheduler) as of:
        whole = of(run())
        with unguided(pipe) as off:
            alone, concept, base = (of(run(text, **off)) for text in (PROMPT, concept, negative))
    if torch.equal(whole, alone):
        base = whole
    elif name in UNLIKE:
        base = 2 * alone - whole
    return run, whole, alone, concept, base


@every_family
@pytest.mark.parametrize("batched", [True, False])
def test_the_concepts_direction_is_added(name: str, batched: bool) -> None:
    pipe, _ = made(name)
    run, whole, alone, concept, base = parts(name)
    if name not in ("flux", "flux2_dev"):  # whose guidance is distilled
        assert not torch.equal(whole, alone)
    rounding = 1e-5 * float(whole.abs().max())
    for scale, reverse in ((SCALE, False), (SCALE, True), (0.0, False)):
        edit = Edit(QUOTED.get(name, CONCEPT), scale=scale, threshold=0, warmup=0, reverse=reverse)
        with (
            first_estimates(pipe.scheduler) as of,
            semantic_guidance(pipe, [edit], batch_concepts=batched),
        ):
            guided = of(run())
        if scale == 0 and not batched:
            assert torch.equal(guided, whole)
        sign = -scale if reverse else scale
        expected = whole + sign * (concept - base)
        torch.testing.assert_close(guided, expected, rtol=0, atol=rounding)
        assert scale == 0 or float((guided - whole).abs().max()) > 100 * rounding
