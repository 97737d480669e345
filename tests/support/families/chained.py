"""The families that have chains, with VAEs that normalise, and their plain calls."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import numpy as np
import torch
from pipelines import MODELS, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers.inversion.rehearsed import Rehearsed
from dense_attn.integrations.diffusers.inversion.settings import Settings
from families import family, images, made_of

FLOWS = ("sd3", "flux", "flux2", "chroma", "qwen", "z_image", "lumina2", "auraflow", "cogview4")
FLOWS += ("sana", "kandinsky5", "hunyuan_image")
VIDEOS = ("wan", "wan_2_2", "skyreels", "ltx", "hunyuan_video", "hunyuan_video15")
VIDEOS += ("kandinsky5_t2v",)
FLOWS += VIDEOS
NAMES = (*FLOWS, "sdxl", "pixart", "hunyuan_dit", "cogvideox")
PROMPT, NEGATIVE, SCALE = "a cat dog", "fog", 4.0
SIZES = {"qwen": (32, 48), "lumina2": (32, 48), "hunyuan_dit": (64, 96), "kandinsky5": (64, 96)}
SIZES |= {"sana": (64, 96), "cogview4": (32, 48), "hunyuan_image": (64, 96)}
OWN = {  # what the calls of some are given beside the rest
    "sd3": {"max_sequence_length": 24},
    "flux": {"max_sequence_length": 24},
    "cogview4": {},
    "sdxl": {},
}
# VAEs of as many pixels a latent as the pipeline counts on
OF_OTHERS = {
    "sana": images.deep_vae,
    "kandinsky5": images.coarse_vae,
    "lumina2": images.coarse_vae,
    "hunyuan_image": images.deepest_vae,
    "kandinsky5_t2v": images.video_vae,
}
LATER = ("negative_prompt", "true_cfg_scale", "use_resolution_binning", "height", "width")
LATER += ("guidance_scale", "num_frames")


def size_of(name: str) -> tuple[int, int]:
    """Height and width of its images in pixels."""
    given = made_of(name)[1] if frames_of(name) else {"height": 16, "width": 24}
    return SIZES.get(name, (given["height"], given["width"]))


def frames_of(name: str) -> int | None:
    """How many frames its videos have."""
    return None if name in MODELS else made_of(name)[1].get("num_frames")


def call_of(name: str) -> dict[str, Any]:
    """Further arguments of its calls."""
    given = OWN.get(name)
    given = dict(made_of(name)[1]) if given is None else given
    return {key: value for key, value in given.items() if key not in LATER}


def image_of(name: str, count: int = 1) -> Tensor:
    """Images, or videos, with values in 0..1."""
    frames, seed = frames_of(name), torch.Generator().manual_seed(1)
    shape = (count, *([frames] if frames else []), 3, *size_of(name))
    return torch.rand(shape, generator=seed, dtype=torch.float32)


def bytes_of(name: str) -> np.ndarray:
    """A video [F, H, W, 3] of bytes."""
    return (255 * image_of(name)[0].movedim(1, -1)).round().byte().numpy()


@cache
def pipe_of(name: str) -> Any:
    """A family's pipeline, with a VAE whose numbers are none of 0 and 1."""
    pipe = copy.copy(pipeline(name) if name in MODELS else family(name))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = OF_OTHERS.get(name)
        vae = copy.deepcopy(pipe.vae) if own is None else own()
    count = vae.config.get("z_dim") or vae.config.latent_channels
    numbers = torch.linspace(0.2, 0.9, 4 * count, dtype=torch.float32)
    if hasattr(vae, "bn"):
        vae.bn.running_mean.copy_(numbers)
        vae.bn.running_var.copy_(numbers.flip(0))
    elif "latents_mean" in dict(vae.named_buffers()):
        vae.latents_mean.copy_(numbers[:count])
        vae.latents_std.copy_(numbers[-count:])
    elif vae.config.get("latents_mean") is not None:
        mean, deviation = numbers[:count].tolist(), numbers[-count:].tolist()
        vae.register_to_config(latents_mean=mean, latents_std=deviation)
    else:
        vae.register_to_config(scaling_factor=0.7, shift_factor=0.3)
    vars(pipe)["vae"] = vae.eval()
    if name == "cogvideox":  # whose pipeline notes it when it is made
        vars(pipe)["vae_scaling_factor_image"] = vae.config.scaling_factor
    return pipe


def takes(name: str) -> set[str]:
    """The arguments of its calls."""
    return set(inspect.signature(type(pipe_of(name)).__call__).parameters)


def chain_of(
    name: str,
    steps: int,
    *,
    guided: bool = True,
    count: int = 1,
    call: dict[str, Any] | None = None,
    **sampler: Any,
) -> Rehearsed:
    """A family's chain, of noise of a seed; `call`: beside its further arguments."""
    settings = Settings(
        [PROMPT] * count,
        NEGATIVE if guided and "negative_prompt" in takes(name) else "",
        SCALE if guided else None,
        steps,
        sampler,
        call_of(name) | (call or {}),
        size_of(name),
        frames_of(name),
    )
    return Rehearsed(pipe_of(name), settings, count, noise(), guided=guided)


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def plain_run(name: str, chain: Rehearsed, **options: Any) -> tuple[Tensor, Any]:
    """The latents at the end of the pipeline's own loop, and what it returns."""
    pipe, known, last = copy.copy(pipe_of(name)), takes(name), {}
    if hasattr(pipe, "guider"):
        vars(pipe)["guider"] = pipe.guider.new(guidance_scale=chain.scale)
    scale = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
    given = call_of(name) | {"prompt": [*chain.settings.prompt]}
    given |= dict(zip(("height", "width", "num_frames"), (*size_of(name), frames_of(name))))
    given |= {scale: chain.scale}
    given = {key: value for key, value in given.items() if key in known}
    if "negative_prompt" in known and chain.scale > chain.model.unguided:
        given["negative_prompt"] = [NEGATIVE] * len(chain.settings.prompt)
    if "use_resolution_binning" in known:
        given["use_resolution_binning"] = False

    def kept(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        last["latents"] = tensors["latents"]
        return {}

    if "callback_on_step_end" in known:
        given["callback_on_step_end"] = kept
    elif "callback" in known:
        given["callback"] = lambda _step, _t, latents: last.update(latents=latents)
    steps = chain.settings.num_inference_steps
    given |= {"num_inference_steps": steps, "generator": noise(), "return_dict": False}
    made = pipe(**given | options)[0]
    if chain.model.room is not None:  # callbacks hear of it too, or there are none
        given |= {"generator": noise(), "output_type": "latent"}
        last["latents"] = pipe(**given)[0]
    return last["latents"], made
