"""The calls of a model, with the texts of regions behind the prompt's and an attention of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dense_attn import _checks

from .call import Call
from .models import Model
from .parts import Make, Parts
from .regions import Region

OVERRIDE = "optimized_attention_override"  # ComfyUI's name
CONDITIONAL = 0  # the number of the positive prompt in cond_or_uncond


class Wrapper:
    """A wrapper of ComfyUI's `apply_model`: each call of a sampler, of any kind of model."""

    def __init__(
        self,
        regions: list[Region],
        model: Model,
        make: Make,
        window: tuple[float, float],
        exponent: float,
    ) -> None:
        self.regions, self.model, self.make = regions, model, make
        self.window, self.exponent = window, exponent
        self._parts: Parts | None = None  # of the last size of latents and text
        self._texts: list[Tensor] = []  # of the regions, where and as the last call had its own

    def __call__(
        self,
        executor: Callable[..., Tensor],
        x: Tensor,  # [B, C, H, W] or [B, C, F, H, W]
        t: Tensor,  # [B], sigmas
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,  # [B, T, C]
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The model's estimate, with regions in the rows that see the prompt, in their steps."""
        base, options, sigma = executor.class_obj, dict(transformer_options or {}), float(t[0])
        chunks = options.get("cond_or_uncond")
        if chunks is None:
            rule = "say which rows see the prompt (cond_or_uncond)"
            _checks.refuse("transformer_options", rule, "nothing of it")
        sees = [chunk == CONDITIONAL for chunk in chunks]
        if not any(sees) or not self._is_on(base.model_sampling, sigma):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        if c_crossattn is None:
            _checks.refuse("conditioning", "hold tokens of a text", None)
        text = self._with_regions(c_crossattn, sees)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            more = mask.new_ones(len(mask), text.shape[1] - c_crossattn.shape[1])
            kwargs["attention_mask"] = torch.cat([mask, more], 1)
        parts = self._parts_of(base.diffusion_model, x, c_crossattn.shape[1])
        call = Call(parts, sees, options.get(OVERRIDE), self._factor(base.model_sampling, t))
        options[OVERRIDE] = call
        out = executor(x, t, c_concat, text, control, options, **kwargs)
        call.check()
        return out

    def _is_on(self, sampling: Any, sigma: float) -> bool:
        start, end = (sampling.percent_to_sigma(percent) for percent in self.window)
        return end <= sigma <= start

    def _factor(self, sampling: Any, sigmas: Tensor) -> float:
        """The factor of strengths: the time, from 1 to 0, to the exponent."""
        if not self.exponent:
            return 1.0
        time = sigmas[0] if self.model.flow else sampling.timestep(sigmas[:1])[0] / 1000
        return min(max(float(time), 0.0), 1.0) ** self.exponent

    def _with_regions(self, text: Tensor, sees: list[bool]) -> Tensor:
        """The call's text with those of the regions behind it; zeros in rows without them."""
        batch, _, channels = text.shape
        if len(text) % len(sees):
            rule = f"have rows for each of the {len(sees)} prompts"
            _checks.refuse("conditioning", rule, len(text))
        if not self._texts or (self._texts[0].device, self._texts[0].dtype) != (
            text.device,
            text.dtype,
        ):
            self._texts = [region.tokens.to(text) for region in self.regions]
        for one in self._texts:
            if one.shape[2] != channels:
                rule = f"be of the prompt's text encoder, {channels} channels"
                _checks.refuse("conditioning", rule, one.shape[2])
        rows = torch.tensor(sees, dtype=torch.bool, device=text.device)
        rows = rows.repeat_interleave(batch // len(sees))
        own = torch.cat(self._texts, 1) * rows[:, None, None].to(text)
        return torch.cat([text, own], 1)

    def _parts_of(self, denoiser: Any, latents: Tensor, own: int) -> Parts:
        """The layers of a size of latents and text, kept while these stay the same."""
        grid = self.model.grid(denoiser, tuple(latents.shape))
        sizes = (own, *(region.tokens.shape[1] for region in self.regions))
        kept = self._parts
        if kept is None or (kept.grid, kept.sizes) != (grid, sizes):
            self._parts = kept = Parts(self.model, grid, sizes, self.make)
        return kept
