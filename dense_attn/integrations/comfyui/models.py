"""Denoisers of ComfyUI: which tokens their attention is over, known by the name of their class."""

from __future__ import annotations

from typing import Any, NamedTuple

from dense_attn import _checks

from ..diffusers.models.record import IMAGE, REFERENCES, TEXT, Attention
from ..diffusers.options.numbers import JOINT, RANGE, Defaults

SELF = Attention("self", (IMAGE,))
CROSS = Attention("cross", (IMAGE,), (TEXT,))
JOINED = Attention("joint", (TEXT, IMAGE, REFERENCES))  # ComfyUI has the text in front


class Model(NamedTuple):
    """A kind of denoiser; a row of `MODELS` is all that is known of it."""

    denoiser: str  # the name of its class
    attentions: tuple[Attention, ...]
    nested: bool = False  # whether layers have grids of their own, which `activations_shape` says
    flow: bool = True  # whether its sigmas are times from 1 to 0

    @property
    def joint(self) -> bool:
        """Whether text tokens attend too, in the layers of the image."""
        return JOINED in self.attentions

    @property
    def defaults(self) -> Defaults:
        """The numbers of a layout whose caller does not say, as on diffusers' pipelines."""
        return JOINT if self.joint else RANGE

    def grid(self, denoiser: Any, latents: tuple[int, ...]) -> tuple[int, int, int]:
        """The frames, rows and columns of tokens of latents [B, C, H, W] or [B, C, F, H, W]."""
        patch = getattr(denoiser, "patch_size", 1)
        sides = (patch,) * 2 if isinstance(patch, int) else tuple(patch)
        sides = (1,) * (3 - len(sides)) + sides
        frames = latents[2] if len(latents) == 5 else 1
        return tuple(-(-n // side) for n, side in zip((frames, *latents[-2:]), sides))


MODELS = (
    Model("UNetModel", (SELF, CROSS), nested=True, flow=False),  # Stable Diffusion 1, 2, XL
    Model("OpenAISignatureMMDITWrapper", (SELF, JOINED)),  # 3, whose larger ones have both
    Model("Flux", (JOINED,)),  # FLUX.1 and FLUX.2
    Model("QwenImageTransformer2DModel", (JOINED,)),
    Model("WanModel", (SELF, CROSS)),
)


def denoiser_of(model: Any) -> Any:
    """The denoiser of a ModelPatcher."""
    denoiser = getattr(getattr(model, "model", None), "diffusion_model", None)
    if denoiser is None:
        _checks.refuse("model", "be a ModelPatcher", type(model).__name__, TypeError)
    return denoiser


def model_of(model: Any) -> Model:
    """The record of a ModelPatcher's denoiser, by its class or one that it is derived from."""
    denoiser = denoiser_of(model)
    kinds = [kind.__name__ for kind in type(denoiser).__mro__]
    for model in MODELS:
        if model.denoiser in kinds:
            return model
    *names, last = (model.denoiser for model in MODELS)
    rule = f"have a {', '.join(names)} or {last}, whose tokens are known"
    return _checks.refuse("model", rule, kinds[0])
