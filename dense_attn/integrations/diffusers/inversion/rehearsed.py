"""Any pipeline of a known denoiser as a reversible chain, asked as it asks by itself."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import ReversibleSampler, _checks

from ..hooks import unwrapped, watchers
from ..models import model_of
from . import videos
from .chain import GUIDANCE, on_noise
from .rehearsal import Ask, Scales, combined, rehearse
from .schedules import is_flow, noise_of, of_flow, of_noise, velocities
from .settings import Settings, check_unguided, in_words, listed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Model

SECOND = "guidance_scale_2"  # of Wan 2.2's second denoiser
# arguments of pipelines' calls that change texts, numbers that networks are told, and sigmas
CALL = (
    *("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "guidance_scale", "sigmas"),
    *("mu", "max_sequence_length", "clip_skip", "clean_caption", "system_prompt"),
    *("complex_human_instruction", "text_encoder_out_layers", "original_size", "target_size"),
    *("crops_coords_top_left", "negative_original_size", "negative_target_size", SECOND),
    *("negative_crops_coords_top_left", "frame_rate", "distilled_guidance_scale"),
)
NEGATIVES = ("negative_prompt_2", "negative_prompt_3")
TEXTS = ("prompt_2", "prompt_3", *NEGATIVES)
NUMBERS = ("guidance_scale", "mu", "frame_rate", "distilled_guidance_scale", SECOND)
SCALES = ("true_cfg_scale", "guidance_scale")  # arguments that guide without a classifier
FACTORS = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
BESIDE = {  # what pipelines have that make more of an image, by where they say so
    "__init__": {"controlnet", "adapter"},
    "prepare_latents": {"image", "images", "video"},
    "__call__": {"control_image", "control_video", "video"},
}


class Rehearsed:
    """A reversible sampler on a pipeline's schedule, with its denoiser as the network.

    The pipeline prepares itself: a copy of it is called with a stand-in for the denoiser, and what
    that is asked in each step is asked again of the denoiser itself, of other latents.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        settings: Settings,
        count: int,
        generator: torch.Generator | None = None,
        *,
        guided: bool = True,
    ) -> None:
        """Rehearse the pipeline's run; `guided`: whether it guides where nothing is said."""
        settings = settings.checked()
        self.model = model_of(pipe)
        takes = inspect.signature(type(pipe).__call__).parameters
        name, scale = _guidance(pipe, self.model, takes, settings.guidance_scale, guided)
        self.scale, self.settings = scale, replace(settings, guidance_scale=scale)
        flow, steps = is_flow(pipe.scheduler), settings.num_inference_steps
        call = _further(settings, _known(takes, flow), count)
        given = self._arguments(takes, settings.texts(count), generator) | call
        given |= {name: scale} if name in takes else {}
        if scale <= self.model.unguided:
            for argument in call.keys() & NEGATIVES:
                check_unguided(f"call[{argument!r}]", call[argument] or [], self.model.unguided)
        scheduler = of_flow(pipe) if flow else _kept(of_noise(pipe, steps), pipe)
        self.alphas = None if flow else velocities(scheduler)
        self.scales = _scales(pipe, self.model, scale, call)
        found = rehearse(pipe, self.model, scheduler, self.scales, given)
        self.latents = found.latents  # noise as the pipeline draws it
        scheduler.timesteps = scheduler.timesteps.cpu()  # read in each step
        self._asks = dict(zip(scheduler.timesteps.tolist(), found.steps))
        dtype = found.steps[0][0].dtype
        if flow:
            with in_words(pipe):
                self.sampler = ReversibleSampler.from_scheduler(
                    scheduler, dtype=dtype, **settings.sampler
                )
        else:
            self.sampler = on_noise(pipe, scheduler, settings, dtype)

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided estimate of the velocity, or the noise, in x."""
        asks = self._asks[t.item()]
        estimates = [ask.again(self.model, x) for ask in asks]
        out = combined(self.model, asks, estimates, self.scales.of(asks))
        return noise_of(self.alphas, t, x, out)

    @property
    def grid(self) -> tuple[int, int]:
        """The latents' height and width."""
        first: Ask = next(iter(self._asks.values()))[0]
        given = first.bound.arguments | {self.model.latents: self.model.given(self.latents)}
        return self.model.grid(self.model.read(given))

    def check(self, argument: str, latents: Tensor) -> None:
        """Refuse latents of another shape than the pipeline's, or elsewhere."""
        shape = tuple(self.latents.shape)
        if tuple(_checks.floats(argument, latents).shape) != shape:
            _checks.refuse(argument, f"have pipe's shape {shape}", tuple(latents.shape))
        if latents.device.type != self.latents.device.type:
            _checks.refuse(argument, f"be on pipe's device {self.latents.device}", latents.device)
        if not latents.isfinite().all():
            _checks.refuse(argument, "be finite", "nan or inf")

    def _arguments(
        self, takes: Any, texts: dict[str, list[str]], generator: torch.Generator | None
    ) -> dict[str, Any]:
        """The arguments of the pipeline's call, but for the guidance."""
        settings = self.settings
        height, width = settings.size
        given = {
            "prompt": [*texts["prompt"]],  # Z-Image's pipeline writes to its list
            "height": height,
            "width": width,
            "num_frames": settings.frames,
            "num_inference_steps": settings.num_inference_steps,
            "generator": generator,
            "output_type": "latent",
        }
        negative = [*texts["negative_prompt"]]
        if "negative_prompt" not in takes:
            if any(negative):
                rule = "be empty where pipe's call takes none"
                _checks.refuse("negative_prompt", rule, negative)
        elif settings.guidance_scale > self.model.unguided:
            given["negative_prompt"] = negative
        else:
            check_unguided("negative_prompt", negative, self.model.unguided)
        if "use_resolution_binning" in takes:
            given["use_resolution_binning"] = False
        return {name: value for name, value in given.items() if value is not None}


def _known(takes: Any, flow: bool) -> tuple[str, ...]:
    """The further arguments of a pipeline's call that may be given."""
    own = set() if "true_cfg_scale" in takes else {"guidance_scale"}
    own |= set() if flow else {"sigmas"}  # the schedule is DDIM's
    return tuple(name for name in CALL if name in takes.keys() - own)


def _further(settings: Settings, known: tuple[str, ...], count: int) -> dict[str, Any]:
    """Further arguments of a pipeline's call: texts for each image, finite numbers, sigmas."""
    call = dict(settings.call)
    for name, value in settings.call.items():
        _checks.choice("call", name, known)
        argument = f"call[{name!r}]"
        if value is None:
            continue
        if name in TEXTS:
            call[name] = listed(argument, value, count, settings.made)
        elif name in NUMBERS:
            _checks.number(argument, value)
        elif name == "sigmas":
            call[name] = _sigmas(argument, value, settings.num_inference_steps)
    return call


def _sigmas(argument: str, value: Any, steps: int) -> list[float]:
    """A list of as many numbers as there are steps."""
    value = value.tolist() if hasattr(value, "tolist") else value
    rule = f"hold a number for each of the {steps} steps"
    if not isinstance(value, (list, tuple)):
        _checks.refuse(argument, rule, repr(value), TypeError)
    if len(value) != steps:
        _checks.refuse(argument, rule, len(value))
    return [_checks.number(argument, sigma) for sigma in value]


def _kept(scheduler: Any, pipe: DiffusionPipeline) -> Any:
    """A scheduler whose timesteps a pipeline's call leaves as they are."""
    scheduler.timesteps = scheduler.timesteps.to(pipe._execution_device)
    scheduler.set_timesteps = lambda *_, **__: None
    return scheduler


def _scales(pipe: DiffusionPipeline, model: Model, scale: float, call: dict[str, Any]) -> Scales:
    """The scale of the guidance, and the call's own for the steps of a second denoiser."""
    own, parts = call.get(SECOND), [*model.denoisers(pipe).values()]
    if own is None:
        return Scales(scale, scale)
    argument = f"call[{SECOND!r}]"
    if len(parts) < 2:
        _checks.refuse(argument, "be None for a pipe of one denoiser", own)
    if scale <= model.unguided:
        rule = f"be None where guidance_scale is {model.unguided:g} (no guidance)"
        _checks.refuse(argument, rule, own)
    return Scales(scale, float(own), parts[1])


def _guidance(
    pipe: DiffusionPipeline, model: Model, takes: Any, scale: float | None, guided: bool
) -> tuple[str, float]:
    """The argument of a pipeline's call that guides without a classifier, and its value."""
    name = next((name for name in SCALES if name in takes), "guider")
    own = takes[name].default if name in takes else _of_guider(pipe.guider)
    if own is None:
        if scale not in (None, model.unguided):
            rule = f"be {model.unguided:g} where pipe has no guider of a guidance_scale"
            _checks.refuse("guidance_scale", rule, scale)
        return name, model.unguided
    told = "negative_prompt" not in takes and "negative_prompt_embeds" not in takes
    if scale is not None:
        if not told and scale < model.unguided:
            rule = f"be at least {model.unguided:g} (no guidance)"
            _checks.refuse("guidance_scale", rule, scale)
        return name, float(scale)
    if told:
        return name, own  # a number that the network is told
    return name, min(GUIDANCE, own) if guided else model.unguided


def _of_guider(guider: Any) -> float | None:
    """The scale of a pipeline's guider, None for one that does not guide, or by no scale."""
    return getattr(guider, "guidance_scale", None) if getattr(guider, "_enabled", False) else None


def factor(pipe: DiffusionPipeline) -> int:
    """Pixels on a side of a latent."""
    return next(side for name in FACTORS if (side := getattr(pipe, name, None)))


def packs(pipe: DiffusionPipeline) -> bool:
    """Whether the latents of a pipeline's loop are tokens in a row."""
    latents = torch.empty(1, 4, 2, 2, dtype=torch.float32, device="meta")
    return model_of(pipe).arranged(latents).dim() == 3


def size_of(pipe: DiffusionPipeline, latents: Tensor) -> tuple[int | None, ...]:
    """The frames, height and width of latents in pixels, where their shape says it."""
    if latents.dim() not in (4, 5):
        return None, None, None
    shape = model_of(pipe).pictured(latents, (0, 0)).shape
    frames = 1 + videos.factor(pipe) * (shape[2] - 1) if videos.makes_videos(pipe) else None
    return frames, *(factor(pipe) * side for side in shape[-2:])


def check_pipe(pipe: DiffusionPipeline, *, pictures: bool = True) -> int:
    """Refuse pipelines that make no image or video of a prompt alone, or miss a part.

    Args:
        pipe: any.
        pictures: whether images are to be made tensors or tensors images.

    Returns:
        What the sides of images are to be multiples of.
    """
    model, kind = model_of(pipe), type(pipe).__name__
    takes = inspect.signature(type(pipe).__call__).parameters
    if not {"prompt", "height", "width", "generator"} <= takes.keys():
        _checks.refuse("pipe", "make images of prompts", kind)
    for method, names in BESIDE.items():
        known = inspect.signature(getattr(type(pipe), method, check_pipe)).parameters
        for name in sorted(names & known.keys()):
            _checks.refuse("pipe", "make images of a prompt alone", f"{kind} with {name}")
    if videos.makes_videos(pipe) and not model.video:
        _checks.refuse("pipe", "make images, not videos", kind)
    if not takes.keys() & {*SCALES} and not hasattr(pipe, "guider"):
        _checks.refuse("pipe", "have its guidance's scale in its call or a guider", kind)
    processor = "video_processor" if videos.makes_videos(pipe) else "image_processor"
    parts = ("vae", processor) if pictures else ()
    missing = [name for name in parts if getattr(pipe, name, None) is None]
    if missing:
        _checks.refuse("pipe", f"have a VAE and {processor}", f"no {', '.join(missing)}")
    for denoiser in map(unwrapped, model.denoisers(pipe).values()):
        if watchers(denoiser):
            _checks.refuse(
                "pipe",
                "be outside of apply_layout and semantic_guidance",
                "a pipeline inside of such a block",
            )
        if getattr(denoiser, "is_cache_enabled", False):
            _checks.refuse("pipe", "have no cache between the steps", f"{kind} with enable_cache")
        projection = type(getattr(denoiser, "encoder_hid_proj", None)).__name__
        if getattr(pipe, "is_ip_adapter_active", False) or "IPAdapter" in projection:
            _checks.refuse("pipe", "have no IP-Adapter", f"{kind} with one")
    return factor(pipe) * model.patch
