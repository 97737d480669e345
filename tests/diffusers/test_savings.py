"""Savings under a layout: regional compile, fp8 weights, step caches, autocast."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from pipelines import MODELS, PROMPT, REGIONS, close, diffusers, latents, pipeline
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import apply_layout, state

pytestmark = pytest.mark.usefixtures("one_thread")
ATTENTION_LAYERS = {"sd": 32, "sdxl": 8, "sd3": 4, "flux": 3}
every_model = pytest.mark.parametrize("model", MODELS)


def denoiser(pipe: object) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def with_layout(pipe: object, run: dict[str, object] | None = None, **options: object) -> Tensor:
    with apply_layout(pipe, PROMPT, REGIONS, **options):
        return without(pipe, run)


def without(pipe: object, run: dict[str, object] | None = None) -> Tensor:
    return latents(pipe, **(run or {}))


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((a.float() - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list:
    """One entry for each modulated call of a layer."""
    seen, attend = [], state.LayoutState.attend
    monkeypatch.setattr(
        state.LayoutState, "attend", lambda *args: seen.append(args[2].shape) or attend(*args)
    )
    return seen


# diffusers names no blocks of Stable Diffusion 3's
@pytest.mark.parametrize("model", ["sd", "flux"])
def test_regional_compile(model: str) -> None:
    """A kind of block has at most three graphs under a layout, and a second run makes no more."""
    pipe = tiny_pipeline(MODELS[model][0])
    right = with_layout(pipe, {"steps": 4})
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    denoiser(pipe).compile_repeated_blocks(backend=counter, fullgraph=True)
    assert close(with_layout(pipe, {"steps": 4}), right)
    graphs = counter.frame_count
    assert close(with_layout(pipe, {"steps": 4}), right)
    assert counter.frame_count == graphs
    assert 0 < graphs <= 3 * len(denoiser(pipe)._repeated_blocks)


@every_model
def test_weights_kept_in_fp8(model: str) -> None:
    """Bit for bit the run of weights that were rounded to fp8 once."""
    small, rounded = (tiny_pipeline(MODELS[model][0]) for _ in range(2))
    denoiser(small).enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    weights = denoiser(small).state_dict()
    assert torch.float8_e4m3fn in {weight.dtype for weight in weights.values()}
    denoiser(rounded).load_state_dict({name: weight.float() for name, weight in weights.items()})
    got = with_layout(small)
    assert torch.equal(got, with_layout(rounded))
    assert not close(got, latents(small))


@every_model
def test_autocast(model: str) -> None:
    """A run is as far from float32 as the plain pipeline's is under autocast."""
    pipe = pipeline(model)
    exact, plain = with_layout(pipe), latents(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain_got = with_layout(pipe), latents(pipe)
    assert got.dtype == plain_got.dtype
    assert 0 < off(got, exact) < 2 * off(plain_got, plain)


@every_model
def test_attention_of_some_steps_is_broadcast(model: str, calls: list) -> None:
    """Modulated attention is skipped as other attention is; the kept result is modulated."""
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    runs = {}
    for every, backend in ((0, "auto"), (1, "auto"), (2, "auto"), (2, "reference")):
        pipe = tiny_pipeline(MODELS[model][0])
        if every:
            both = {f"{kind}_attention_block_skip_range": every for kind in ("spatial", "cross")}
            both |= {
                f"{kind}_attention_timestep_skip_range": (-1, 1001) for kind in ("spatial", "cross")
            }
            config = PyramidAttentionBroadcastConfig(**both, current_timestep_callback=lambda: 500)
            apply_pyramid_attention_broadcast(denoiser(pipe), config)
        calls.clear()
        runs[every, backend] = with_layout(pipe, active=0.8, backend=backend), len(calls)
    (never, of_all), (each, of_each), (second, of_some), (exact, _) = runs.values()
    assert torch.equal(each, never)
    assert of_each == of_all == 2 * of_some
    assert not close(second, never)
    assert close(second, exact)


@pytest.mark.parametrize(
    ("cache", "options"),
    [
        ("FirstBlockCache", {"threshold": 0.2}),
        ("TaylorSeerCache", {"cache_interval": 2, "disable_cache_before_step": 2}),
        ("MagCache", {"mag_ratios": [1.0] * 10, "num_inference_steps": 10, "threshold": 0.05}),
    ],
)
def test_step_caches(cache: str, options: dict, calls: list) -> None:
    """They leave out blocks of some steps; those that run have their layout."""
    config = getattr(diffusers.hooks, f"{cache}Config", None)
    if config is None:
        pytest.skip(f"this diffusers has no {cache}")
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    right = with_layout(pipe, active=1.0)
    of_all = len(calls)
    calls.clear()
    pipe.transformer.enable_cache(config(**options))
    with pytest.warns(UserWarning, match=f"^{cache}Config may repeat a layout's steps"):
        with_layout(pipe)
    calls.clear()
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(config(**options))
    got = with_layout(pipe, active=1.0)
    assert 0 < len(calls) < of_all
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(config(**options))
    assert close(got, with_layout(pipe, active=1.0, backend="reference"))
    plain = latents(pipe)
    assert not close(got, plain)
    pipe.transformer.disable_cache()
    assert torch.equal(with_layout(pipe, active=1.0), right)


@every_model
def test_odd_sizes(model: str, calls: list) -> None:
    """9 x 11 latents, or 5 x 7 tokens of a transformer: no layer is left out."""
    if model in ("sd3", "flux"):
        pipe, size = pipeline(model), {"height": 20, "width": 28}
    else:
        pipe, size = (
            pipeline(model, 4 if model == "sd" else 2),
            {"latents": torch.randn(1, 4, 9, 11)},
        )
    got = with_layout(pipe, size, modulation="range")
    assert len(calls) == math.ceil(0.3 * 10) * ATTENTION_LAYERS[model]
    assert close(got, with_layout(pipe, size, modulation="range", backend="reference"))
    assert not close(got, without(pipe, size))
