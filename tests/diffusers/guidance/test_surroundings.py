"""Semantic guidance of transformers beside images of several prompts, blocks, and layouts."""

from __future__ import annotations

import pytest
import torch
from families import family, made_of
from families.classes import made
from families.estimates import first_estimates
from pipelines import ALL, PROMPT, REGIONS, close, diffusers, latents, pipeline
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import Edit, Region, apply_layout, semantic_guidance

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:edits.*warmup must be at most"),
]
EDITS = [Edit("snow", warmup=1, threshold=0.5), Edit("a long bank of fog", warmup=0, reverse=True)]
NOISE = {"sd3": (2, 16, 8, 12), "flux": (2, 24, 16)}
NOISE |= dict.fromkeys(("z_image", "hunyuan_image"), (2, 4, 8, 12))


def run(name: str, prompt: object = PROMPT, *, steps: int = 3, **options: object) -> Tensor:
    if name in ("sd3", "flux"):
        return latents(pipeline(name), prompt, steps=steps, **options)
    given = made_of(name)[1] | {"generator": torch.Generator().manual_seed(0)} | options
    pipe = family(name)
    return pipe(prompt=prompt, num_inference_steps=steps, output_type="latent", **given)[0]


def pipe_of(name: str) -> object:
    return pipeline(name) if name in ("sd3", "flux") else family(name)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.full) if n != "flux" else n for n in NOISE]
)
@pytest.mark.parametrize("batched", [True, False])
def test_every_image_of_every_prompt_has_the_concepts(name: str, batched: bool) -> None:
    """Together they are as each is by itself."""
    noise = torch.randn(NOISE[name], generator=torch.Generator().manual_seed(1))
    given = {} if name in ("sd3", "flux") else {"negative_prompt": "rain"}
    with semantic_guidance(pipe_of(name), EDITS, batch_concepts=batched):
        both = run(name, ["a cat", "a dog"], latents=noise, **doubled(given))
        twice = run(name, "a cat", latents=noise, num_images_per_prompt=2, **given)
        each = [run(name, text, latents=noise[i : i + 1], **given) for i, text in enumerate(TEXTS)]
    assert close(both, torch.cat(each))
    assert close(twice[:1], each[0])
    assert not close(twice[1:], each[1])


TEXTS = "a cat", "a dog"


def doubled(given: dict) -> dict:
    return {name: [value] * 2 for name, value in given.items()}


def test_the_innermost_block_counts_and_callbacks_are_heard() -> None:
    pipe, inner = pipeline("sd3"), [Edit("rain", warmup=1)]
    with semantic_guidance(pipe, EDITS):
        alone = latents(pipe, steps=3)
        with semantic_guidance(pipe, inner):
            within = latents(pipe, steps=3)
        assert torch.equal(latents(pipe, steps=3), alone)

    def weaker(pipe: object, _step: int, _time: object, tensors: dict) -> dict:
        pipe._guidance_scale = 2.0
        return tensors

    plain = latents(pipe, steps=3, callback_on_step_end=weaker)
    with semantic_guidance(pipe, inner):
        assert torch.equal(latents(pipe, steps=3), within)
        assert not close(latents(pipe, steps=3, callback_on_step_end=weaker), within)
    with semantic_guidance(pipe, [Edit("rain", scale=0.0, warmup=0)], batch_concepts=False):
        assert torch.equal(latents(pipe, steps=3, callback_on_step_end=weaker), plain)


def test_blocks_may_end_in_any_order_and_a_scheduler_may_be_another() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusion3Pipeline)
    plain = latents(pipe, steps=2)
    blocks = [semantic_guidance(pipe, EDITS) for _ in range(2)]
    for block in blocks:
        block.__enter__()
    guided = latents(pipe, steps=2)
    first = pipe.scheduler
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(first.config)
    assert torch.equal(latents(pipe, steps=2), guided)
    blocks[0].__exit__(None, None, None)
    assert torch.equal(latents(pipe, steps=2), guided)
    blocks[1].__exit__(None, None, None)
    assert torch.equal(latents(pipe, steps=2), plain)
    assert "step" not in vars(first).keys() | vars(pipe.scheduler).keys()


@pytest.mark.parametrize(
    "name", ["flux", *(pytest.param(n, marks=pytest.mark.full) for n in ("sd3", "z_image", "qwen"))]
)
@pytest.mark.parametrize("batched", [True, False])
def test_a_layout_is_the_prompts_alone(name: str, batched: bool) -> None:
    """In either order; the direction of a concept from the negative prompt has none of it."""
    pipe, edits = pipe_of(name), [Edit("snow", scale=3, threshold=0, warmup=0)]
    guided = {"true_cfg_scale": 3.0} if name in ("flux", "qwen") else {}
    guided |= {"negative_prompt": "rain"}
    block = {"edits": edits, "batch_concepts": batched}
    with first_estimates(pipe.scheduler) as of:

        def first() -> Tensor:
            return of(lambda: run(name, **guided))

        plain = first()
        with semantic_guidance(pipe, **block):
            concept = first() - plain
        with apply_layout(pipe, PROMPT, REGIONS):
            laid = first()
        with semantic_guidance(pipe, **block), apply_layout(pipe, PROMPT, REGIONS):
            both = first()
        with apply_layout(pipe, PROMPT, REGIONS), semantic_guidance(pipe, **block):
            assert torch.equal(first(), both)
    assert not close(laid, plain)
    assert close(both - laid, concept)


@pytest.mark.full
def test_a_mean_flows_second_time_is_every_rows() -> None:
    """HunyuanImage's distilled model, without a guider: concepts in the batch are as apart."""
    pipe = made(diffusers.HunyuanImagePipeline)
    config = dict(pipe.transformer.config) | ALL | {"use_meanflow": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer = type(pipe.transformer).from_config(config).eval()
    pipe.guider = None
    noise = torch.Generator().manual_seed(0)
    given = {"latents": torch.randn(NOISE["hunyuan_image"], generator=noise)}
    given |= {"num_inference_steps": 3, "height": 256, "width": 384, "output_type": "latent"}
    found = []
    for batched in (True, False):
        with semantic_guidance(pipe, EDITS, batch_concepts=batched):
            found.append(pipe(prompt=list(TEXTS), **given)[0])
    assert close(*found)
    assert not close(found[0], pipe(prompt=list(TEXTS), **given)[0])


def test_vectors_of_a_distilled_run() -> None:
    pipe = pipeline("flux")
    with semantic_guidance(pipe, EDITS) as guidance:
        guided = latents(pipe, steps=3)
        vectors = guidance.record()
        assert torch.equal(latents(pipe, steps=3), guided)
    assert [None if v is None else tuple(v.shape) for _, v in vectors] == [(1, 16, 24)] * 3
    with semantic_guidance(pipe, apply=vectors):
        assert close(latents(pipe, steps=3), guided)
        other = latents(pipe, "a dog", steps=3)
    assert not close(other, latents(pipe, "a dog", steps=3))


def test_what_is_no_estimate_of_the_prompt_alone_is_refused() -> None:
    pipe = pipeline("sd3")
    plain = latents(pipe, steps=4)
    more = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0}
    with (
        semantic_guidance(pipe, EDITS),
        pytest.raises(ValueError, match="pipe must call its denoiser once a step for its prompt"),
    ):
        latents(pipe, steps=4, skip_layer_guidance_stop=1.0, **more)
    with (
        apply_layout(pipe, None, [Region((0, 0, 1, 1), "a cat")]),
        semantic_guidance(pipe, EDITS),
        pytest.raises(ValueError, match="pipe must be without semantic guidance while regions"),
    ):
        latents(pipe, steps=2)
    with pytest.raises(TypeError, match="batch_concepts must be"):
        semantic_guidance(pipe, EDITS, batch_concepts="no").__enter__()
    assert torch.equal(latents(pipe, steps=4), plain)


def test_a_cache_of_steps_is_refused_where_concepts_have_calls() -> None:
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    rule = "pipe must have no cache of steps while concepts have calls of their own"
    with (
        semantic_guidance(pipe, EDITS, batch_concepts=False),
        pytest.raises(ValueError, match=rule),
    ):
        latents(pipe, steps=2)


def test_schedulers_that_get_something_else_are_refused() -> None:
    for name in ("SanaSprintPipeline", "LTXImageToVideoPipeline", "Kandinsky5I2VPipeline"):
        kind = getattr(diffusers, name)
        pipe = made(kind)
        with pytest.raises(
            ValueError, match=f"estimate of all latents, and keep no keys, got {name}"
        ):
            semantic_guidance(pipe, EDITS).__enter__()
