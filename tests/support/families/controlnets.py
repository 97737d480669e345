"""Second networks of tiny pipelines, of the first one's sizes, and models like others."""

from __future__ import annotations

from typing import Any

import torch


def controlnet(name: str, parts: dict[str, Any]) -> torch.nn.Module:
    """The second network of a class, of the first one's sizes."""
    from diffusers import (
        ControlNetModel,
        ControlNetUnionModel,
        FluxControlNetModel,
        HunyuanDiT2DControlNetModel,
        QwenImageControlNetModel,
        SanaControlNetModel,
        SD3ControlNetModel,
        ZImageControlNetModel,
    )

    if "Union" in name:
        net = ControlNetUnionModel.from_unet(
            parts["unet"], conditioning_embedding_out_channels=(8, 8)
        )
        return changed(
            net, num_trans_channel=8, num_proj_channel=8, num_trans_head=2, num_trans_layer=1
        )
    if name.startswith("QwenImage"):
        sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
        sizes["extra_condition_channels"] = 4 if "Inpaint" in name else 0
        return QwenImageControlNetModel.from_transformer(parts["transformer"], **sizes)
    if name.startswith("ZImage"):
        sizes = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
        sizes |= {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        sizes["control_in_dim"] = 9 if "Inpaint" in name else 4
        net = ZImageControlNetModel(**sizes)
        return ZImageControlNetModel.from_transformer(net, parts["transformer"])
    if name.startswith("HunyuanDiT"):
        return HunyuanDiT2DControlNetModel.from_transformer(
            parts["transformer"], transformer_num_layers=4, load_weights_from_transformer=False
        )
    if name.startswith("Sana"):
        return SanaControlNetModel.from_config(parts["transformer"].config, num_layers=1)
    if name.startswith("StableDiffusion3"):
        extra = 1 if "Inpaint" in name else 0
        return SD3ControlNetModel.from_transformer(
            parts["transformer"], 1, num_extra_conditioning_channels=extra
        )
    if name.startswith("Flux"):
        return FluxControlNetModel.from_transformer(
            parts["transformer"], 1, 1, attention_head_dim=16, num_attention_heads=2
        )
    return ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8))


def changed(model: torch.nn.Module, **config: object) -> torch.nn.Module:
    """A model like another, but for some of its sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(model).from_config(model.config, **config).eval()
