"""Tiny pipelines of images with encoders of their own, and of those that edit images."""

from __future__ import annotations

import sys
import types
from functools import partial
from typing import Any

import torch
from PIL import Image
from pipelines import diffusers
from tokenizers.processors import TemplateProcessing

from dense_attn.examples import _tiny_pipeline as tiny
from families.chats import LastHidden, Processor, chat_tokenizer, flow, louder
from families.controlnets import changed

PICTURE = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
EDIT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n"
CHAT = "<|im_start|>user\n{}<|im_end|>\n"
BESIDE = "<|im_start|>user{}<|vision_start|><|image_pad|><|vision_end|><|im_end|>"


def begun(tokenizer: object) -> object:
    """A tokenizer that puts its first token before every text, as Gemma's and Mistral's do."""
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer


def read_as(pipe: object, template: str, name: str = "prompt_template_encode") -> object:
    """A pipeline with a short template, of which a message's beginning is dropped."""
    setattr(pipe, name, template)
    reader = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)
    begin = template.split("user")[0] + "user" + "\n" * ("user\n" in template)
    pipe.prompt_template_encode_start_idx = len(reader(begin).input_ids)
    return pipe


def coarse_vae() -> torch.nn.Module:
    """One of 8 x 8 pixels a latent, which some pipelines count on."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )


def hunyuan_dit() -> object:
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
    )
    tokenizer = tiny._clip("")["tokenizer"]
    return diffusers.HunyuanDiTPipeline(
        vae=coarse_vae(),
        text_encoder=LastHidden(len(tokenizer), 16),
        tokenizer=tokenizer,
        transformer=louder(transformer, ".to_v.", ".to_out."),
        scheduler=tiny._ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **tiny._t5("_2", 32),
    )


def cogview4() -> object:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
    )
    tokenizer = begun(chat_tokenizer(padding_side="left", bos_token="<|begin|>"))
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=LastHidden(len(tokenizer) + 8, 16),
        vae=tiny._vae(4),
        transformer=louder(transformer, "attn1."),
        scheduler=flow(),
    )


def sana() -> object:
    from transformers import GemmaTokenizer

    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    signs = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *tiny.LETTERS]
    tokenizer = begun(GemmaTokenizer(vocab={sign: i for i, sign in enumerate(signs)}, merges=[]))
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=LastHidden(len(tokenizer), 16),
        vae=None,  # 32 x 32 pixels a latent
        transformer=louder(transformer, "attn2."),
        scheduler=flow(),
    )


class Wide:
    """torch, in which a model that rotates in bfloat16 does so in float32.

    Or rounding would make a last bit's difference between backends 2e-4 of the whole.
    """

    bfloat16 = torch.float32

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def kandinsky5(kind: str = "T2I") -> object:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=32,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=kind in ("I2I", "T2V", "I2V"),
    )
    sys.modules[type(transformer).__module__].torch = Wide()
    processor, clip = Processor(chat_tokenizer()), tiny._clip("")["tokenizer"]
    louder(transformer, ".to_value.", ".out_layer.")
    with torch.no_grad():
        for name, weight in transformer.named_parameters():
            if "modulation" in name:
                weight.normal_(std=0.3)  # all 0 at first
    vae = coarse_vae() if kind == "I2I" else None  # or 8 x 8 pixels a latent, and 4 frames
    pipe = getattr(diffusers, f"Kandinsky5{kind}Pipeline")(
        transformer=transformer,
        vae=vae,
        text_encoder=LastHidden(len(processor.tokenizer) + 8, 16),
        tokenizer=processor,
        text_encoder_2=LastHidden(len(clip), 16),
        tokenizer_2=clip,
        scheduler=flow(),
    )
    pipe.resolutions = [(96, 64)]
    return read_as(pipe, BESIDE if kind == "I2I" else CHAT, "prompt_template")


def video_vae() -> torch.nn.Module:
    """The encoder of a video's first image, of Kandinsky's 8 x 8 pixels and 4 frames a latent."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def deep_vae() -> torch.nn.Module:
    """SANA's, of 32 x 32 pixels a latent."""
    sizes = {"block_types": "ResBlock", "block_out_channels": (8,) * 6}
    sizes |= {"layers_per_block": (1,) * 6, "qkv_multiscales": ((),) * 6}
    both = {f"{part}_{name}": sizes[name] for part in ("encoder", "decoder") for name in sizes}
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=8, **both).eval()


def deepest_vae() -> torch.nn.Module:
    """HunyuanImage's, of 32 x 32 pixels a latent."""
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32,) * 6,
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=64,
    ).eval()


def extras(name: str, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts that a class has in the place of its family's."""
    if name == "Flux2KleinKVPipeline":  # which exchanges processors
        return {"transformer": changed(parts["transformer"])}
    if name == "Kandinsky5I2VPipeline":
        return {"vae": video_vae()}
    if name == "SanaControlNetPipeline":
        return {"vae": deep_vae()}
    if name.startswith("SanaSprint"):
        transformer, scheduler = parts["transformer"], diffusers.SCMScheduler()
        own = {"transformer": changed(transformer, guidance_embeds=True), "scheduler": scheduler}
        return {"vae": deep_vae(), **own}
    return {}


def shrink(module: types.ModuleType) -> None:
    """Let the images of a module's pipelines have 48 x 32 pixels, not 1024 x 1024."""
    sizes = (48, 32) if "plus" in module.__name__ else (48, 32, None)
    module.calculate_dimensions = lambda _area, _ratio: sizes


def qwen_edit(kind: str = "QwenImageEditPipeline") -> object:
    from families import family

    parts = family("qwen").components
    pipe = getattr(diffusers, kind)(**parts, processor=Processor(parts["tokenizer"]))
    shrink(sys.modules[type(pipe).__module__])
    return read_as(pipe, CHAT if "Plus" in kind else EDIT)


def flux2_dev() -> object:
    from families import family

    parts = family("flux2").components
    tokenizer = begun(chat_tokenizer(bos_token="<|begin|>"))
    template = "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['content'][0]['text'] }}<|im_end|>{% endfor %}"  # noqa: E501
    pipe = diffusers.Flux2Pipeline(
        scheduler=flow(),
        vae=parts["vae"],
        text_encoder=LastHidden(len(tokenizer) + 8, 16),
        tokenizer=Processor(tokenizer, template),
        transformer=parts["transformer"],
    )
    pipe.system_message = "see"
    return pipe


def glyphs() -> dict[str, object]:
    """The reader of quoted words, by bytes."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(vocab_size=384, **sizes))
    return {"tokenizer_2": ByT5Tokenizer(), "text_encoder_2": encoder}


def hunyuan_image() -> object:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        rope_axes_dim=(8, 8),
    )
    tokenizer = chat_tokenizer()
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=flow(),
        vae=None,  # 32 x 32 pixels a latent
        text_encoder=LastHidden(len(tokenizer) + 8, 16),
        tokenizer=tokenizer,
        transformer=transformer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        **glyphs(),
    )
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 24, 16
    return read_as(pipe, CHAT)


def flux2_kv() -> object:
    from families import family

    parts = family("flux2").components  # whose processors stay
    return diffusers.Flux2KleinKVPipeline(**parts | {"transformer": changed(parts["transformer"])})


FEW = {"height": 32, "width": 48}
LARGE = {"height": 64, "width": 96}
SMALL = {"height": 16, "width": 24, "image": PICTURE}
GUIDED = {"true_cfg_scale": 4.0, "negative_prompt": "fog"}
FAMILIES = {
    "hunyuan_dit": (hunyuan_dit, {"use_resolution_binning": False, **LARGE}),
    "cogview4": (cogview4, FEW),
    "sana": (
        sana,
        {"height": 128, "width": 192, "max_sequence_length": 20, "use_resolution_binning": False},
    ),
    "kandinsky5": (kandinsky5, LARGE),
    "kandinsky5_i2i": (partial(kandinsky5, "I2I"), {"image": PICTURE, **LARGE}),
    "kandinsky5_t2v": (partial(kandinsky5, "T2V"), {"num_frames": 5, **LARGE}),
    "qwen_edit": (qwen_edit, {"image": PICTURE, **FEW, **GUIDED}),
    "qwen_edit_plus": (
        partial(qwen_edit, "QwenImageEditPlusPipeline"),
        {"image": [PICTURE, PICTURE], **FEW, **GUIDED},
    ),
    "hunyuan_image": (hunyuan_image, {"negative_prompt": "fog", "height": 256, "width": 384}),
    "flux2_kv": (flux2_kv, {**SMALL, "max_sequence_length": 24}),
    "flux2_dev": (flux2_dev, {**SMALL, "max_sequence_length": 24}),
}
