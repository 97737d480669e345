"""Things beside a layout: LoRA, offloading, attention of another kind or library."""

from __future__ import annotations

import types

import pytest
import torch
from pipelines import MODELS, PROMPT, REGIONS, close, diffusers, latents, pipeline

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import Edit, apply_layout, layers, semantic_guidance

pytestmark = pytest.mark.usefixtures("one_thread")


def with_layout(pipe: object, **options: object) -> torch.Tensor:
    with apply_layout(pipe, PROMPT, REGIONS, **options):
        return latents(pipe)


@pytest.mark.parametrize("model", MODELS)
def test_lora(model: str) -> None:
    """Its weights count in modulated attention too, by the scale that the pipeline has set."""
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline(MODELS[model][0])
    denoiser, without = getattr(pipe, "unet", None) or pipe.transformer, with_layout(pipe)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    denoiser.add_adapter(
        peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets), "style"
    )
    full = with_layout(pipe)
    assert close(full, with_layout(pipe, backend="reference"))
    assert not close(full, without)
    pipe.set_adapters("style", 0.5)
    half = with_layout(pipe)
    assert not close(half, full)
    assert not close(half, without)
    denoiser.disable_adapters()
    assert torch.equal(with_layout(pipe), without)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", ["model", "sequential"])
def test_offloading(model: str, way: str) -> None:
    """The weights come for each call, here from one place of memory to another."""
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny_pipeline(MODELS[model][0])
    right = with_layout(pipe)
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        accelerate.cpu_offload(getattr(pipe, "unet", None) or pipe.transformer, "cpu")
    assert torch.equal(with_layout(pipe), right)
    if model == "sd":
        with semantic_guidance(pipe, [Edit("fog", warmup=1)]):
            assert not close(with_layout(pipe), right)


def test_latents_made_smaller_on_their_way(recwarn: pytest.WarningsRecorder) -> None:
    """An extension around none of the layers gives all of them fewer tokens: told, left alone."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)

    def scaled(factor: float, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(tokens, scale_factor=factor)

    pipe.unet.conv_in.register_forward_hook(lambda _module, _args, out: scaled(0.5, out))
    pipe.unet.conv_out.register_forward_pre_hook(lambda _module, args: (scaled(2.0, args[0]),))
    plain = latents(pipe, height=32, width=32, steps=1)
    with apply_layout(pipe, PROMPT, REGIONS, encode_phrases=False):
        assert torch.equal(latents(pipe, height=32, width=32, steps=1), plain)
    told = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert len(told) == 1
    assert "alone: test_latents_made_smaller_on_their_way.<locals>.<lambda> gives it" in told[0]


def test_xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without a layout go through its processor; its sum stands here, for it needs a GPU."""
    from diffusers.models import attention_processor

    pipe, calls = tiny_pipeline(diffusers.StableDiffusionPipeline), []
    right, plain = with_layout(pipe), latents(pipe)

    def memory_efficient_attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object
    ) -> object:
        calls.append(q.shape)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, options["attn_bias"], scale=options["scale"]
        )

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(
        attention_processor, "xformers", types.SimpleNamespace(ops=ops), raising=False
    )
    pipe.unet.set_attn_processor(attention_processor.XFormersAttnProcessor())
    through = latents(pipe)
    assert close(through, plain)
    of_a_run = len(calls)
    assert close(with_layout(pipe), right)
    assert len(calls) == 2 * of_a_run  # of the first steps, the unconditional half
    with apply_layout(pipe, PROMPT, REGIONS, active=0.0, encode_phrases=False):
        assert torch.equal(latents(pipe), through)
    assert len(calls) == 3 * of_a_run


def test_fused_projections_and_sliced_attention() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    with apply_layout(pipe, PROMPT, REGIONS):
        right = latents(pipe)
    pipe.fuse_qkv_projections()
    with apply_layout(pipe, PROMPT, REGIONS):
        assert close(latents(pipe), right)
    pipe.unfuse_qkv_projections()
    pipe.enable_attention_slicing(1)
    with apply_layout(pipe, PROMPT, REGIONS):
        assert close(latents(pipe), right)


def test_fused_projections_of_joint_attention() -> None:
    """Its processor leaves out the norms of q and k, with a layout as without one."""
    pipe = tiny_pipeline(diffusers.StableDiffusion3Pipeline)
    alike = {**pipe.transformer.config, "dual_attention_layers": ()}  # fused ones want a text
    pipe.transformer = diffusers.SD3Transformer2DModel.from_config(alike).eval()
    right = with_layout(pipe)
    pipe.transformer.fuse_qkv_projections()
    plain = latents(pipe)
    fused = with_layout(pipe)
    assert close(fused, with_layout(pipe, backend="reference"))
    assert not close(fused, plain)
    assert close(
        with_layout(pipe, cross_weight=1e-30, self_weight=1e-30, encode_phrases=False), plain
    )
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(with_layout(pipe), right)


def test_an_ip_adapter() -> None:
    """Its image reaches the picture as it does without a layout, which places the phrases."""
    pipe, width = tiny_pipeline(diffusers.StableDiffusionPipeline), 16
    right = with_layout(pipe)
    cross = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    weights = {
        f"{2 * i + 1}.to_{side}_ip.weight": torch.randn(width, width)
        for i in range(len(cross))
        for side in "kv"
    }
    proj = {"proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.zeros(4 * width)}
    proj |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": proj, "ip_adapter": weights}])
    kinds = {type(processor).__name__ for processor in pipe.unet.attn_processors.values()}
    assert "IPAdapterAttnProcessor2_0" in kinds

    def run(scale: float, **layout: object) -> torch.Tensor:
        pipe.set_ip_adapter_scale(scale)
        with apply_layout(pipe, PROMPT, REGIONS, **layout):
            return latents(pipe, ip_adapter_image_embeds=[torch.ones(2, 1, 8)])

    assert close(run(0.0), right)
    seen = run(1.0)
    assert not close(seen, right)
    assert close(seen, run(1.0, backend="reference"))
    off = {"cross_weight": 0, "self_weight": 0}
    assert torch.equal(
        run(1.0, **off), latents(pipe, ip_adapter_image_embeds=[torch.ones(2, 1, 8)])
    )
    assert not close(seen, run(1.0, **off))


def test_set_attention_backend_reaches_the_layers_below() -> None:
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    with apply_layout(pipe, PROMPT, REGIONS):
        right = latents(pipe)
        pipe.transformer.set_attention_backend("_native_math")
        assert close(latents(pipe), right)
    backends = {
        str(processor._attention_backend) for processor in pipe.transformer.attn_processors.values()
    }
    assert len(backends) == 1
    assert "None" not in backends


def test_views_of_the_projections_are_taken_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v reach the op as views of the projections, [B, tokens, heads, head dim]."""
    seen, original = [], layers.layout_attention

    def watched(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object, **options: object
    ) -> torch.Tensor:
        seen.extend(x._base is not None and x.stride(1) == x.shape[3] for x in (q, k, v))
        return original(q, k, v, *args, **options)

    monkeypatch.setattr(layers, "layout_attention", watched)
    with apply_layout(pipeline("sd"), PROMPT, REGIONS):
        latents(pipeline("sd"))
    assert seen
    assert all(seen)


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_rows_share_their_projections(kind: str) -> None:
    """A guided batch goes once through the weights of a layer, as it does without a layout."""
    pipe, calls = tiny_pipeline(getattr(diffusers, kind)), []
    for name, module in (getattr(pipe, "unet", None) or pipe.transformer).named_modules():
        if name.endswith(".to_q"):
            module.register_forward_hook(lambda _module, _args, out: calls.append(len(out)))
    latents(pipe, steps=3)
    without = list(calls)
    calls.clear()
    with apply_layout(pipe, PROMPT, REGIONS, active=1.0, encode_phrases=False):
        latents(pipe, steps=3)
    assert calls == without
    assert set(calls) == {2}
