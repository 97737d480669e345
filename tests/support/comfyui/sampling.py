"""ComfyUI's model patcher, its wrappers, and estimates of several conditionings in a batch."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class WrappersMP:
    """The kinds of wrappers."""

    APPLY_MODEL = "apply_model"


class WrapperExecutor:
    """A function behind its wrappers; each is called with the rest of them."""

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        rest = WrapperExecutor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](rest, *args, **kwargs)


class Sampling:
    """Sigmas of a flow, or of Stable Diffusion's kind (of its variance-exploding form)."""

    def __init__(self, flow: bool) -> None:
        self.flow = flow

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma if self.flow else sigma / 14.6 * 999

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0:
            return 1.0 if self.flow else 999999999.9
        return (1 - percent) * (1.0 if self.flow else 14.6)


class BaseModel:
    """A denoiser, and how it is called."""

    def __init__(self, diffusion_model: torch.nn.Module, flow: bool) -> None:
        self.diffusion_model, self.model_sampling = diffusion_model, Sampling(flow)

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options or {}
        wrappers = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).values()
        flat = [one for ones in wrappers for one in ones]
        executor = WrapperExecutor(self._apply_model, self, flat)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None,
        c_crossattn: Tensor,
        control: Any,
        transformer_options: dict,
        **kwargs: Any,
    ) -> Tensor:
        eps = self.diffusion_model(
            x, context=c_crossattn, transformer_options=transformer_options, **kwargs
        )
        return x - eps * t.view(-1, *[1] * (x.dim() - 1))  # denoised

    def extra_conds(self, **kwargs: Any) -> dict[str, Tensor]:
        return {"c_crossattn": kwargs["cross_attn"]}


class ModelPatcher:
    """A model with options that its clones have of their own."""

    def __init__(self, model: BaseModel) -> None:
        self.model, self.wrappers = model, {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.wrappers = {
            kind: {key: list(ones) for key, ones in keyed.items()}
            for kind, keyed in self.wrappers.items()
        }
        other.model_options = _copied(self.model_options)
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def set_model_sampler_post_cfg_function(
        self, function: Callable, disable_cfg1_optimization: bool = False
    ) -> None:
        before = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*before, function]
        if disable_cfg1_optimization:
            self.model_options["disable_cfg1_optimization"] = True

    def options(self, sigmas: Tensor | None = None) -> dict[str, Any]:
        """The options of a run, with the wrappers and the sigmas that a sampler puts in."""
        options = _copied(self.model_options)
        options["transformer_options"] |= {"wrappers": self.wrappers, "sample_sigmas": sigmas}
        return options


def _copied(options: Any) -> Any:
    if isinstance(options, dict):
        return {key: _copied(value) for key, value in options.items()}
    return copy.copy(options) if isinstance(options, list) else options


def convert_cond(conditioning: list) -> list[dict]:
    return [{**more, "cross_attn": tokens} for tokens, more in conditioning]


def encode_model_conds(
    model_function: Callable, conds: list[dict], noise: Tensor, device: object, prompt_type: str
) -> list[dict]:
    return [
        {**one, "model_conds": model_function(**one, noise=noise, prompt_type=prompt_type)}
        for one in conds
    ]


def calc_cond_batch(
    model: BaseModel, conds: list, x: Tensor, timestep: Tensor, model_options: dict
) -> list[Tensor]:
    """The estimate of each list of conditionings; those of one shape in one batch, last first."""
    outs, counts = [torch.zeros_like(x) for _ in conds], [0 for _ in conds]
    running = [(one, i) for i, ones in enumerate(conds) for one in ones or ()]
    while running:
        shape = running[0][0]["model_conds"]["c_crossattn"].shape
        same = [x for x in running if x[0]["model_conds"]["c_crossattn"].shape == shape]
        running = [x for x in running if x[0]["model_conds"]["c_crossattn"].shape != shape]
        chunks = [i for _, i in reversed(same)]
        text = [one["model_conds"]["c_crossattn"].expand(len(x), -1, -1) for one, _ in same]
        options = dict(model_options.get("transformer_options", {}))
        options |= {"cond_or_uncond": chunks, "sigmas": timestep}
        given = torch.cat([x] * len(same)), torch.cat([timestep] * len(same))
        out = model.apply_model(
            *given, c_crossattn=torch.cat(text[::-1]), transformer_options=options
        )
        for i, part in zip(chunks, out.chunk(len(same))):
            outs[i], counts[i] = outs[i] + part, counts[i] + 1
    return [out / max(count, 1) for out, count in zip(outs, counts)]


def sampling_function(
    model: BaseModel,
    x: Tensor,
    timestep: Tensor,
    uncond: list | None,
    cond: list,
    cond_scale: float,
    model_options: dict,
) -> Tensor:
    """Classifier-free guidance and the functions that come after it."""
    skipped = cond_scale == 1 and not model_options.get("disable_cfg1_optimization", False)
    uncond = None if skipped else uncond
    positive, negative = calc_cond_batch(model, [cond, uncond], x, timestep, model_options)
    denoised = negative + (positive - negative) * cond_scale
    for function in model_options.get("sampler_post_cfg_function", []):
        given = {"denoised": denoised, "cond": cond, "uncond": uncond, "cond_scale": cond_scale}
        given |= {"cond_denoised": positive, "uncond_denoised": negative, "model": model}
        given |= {"sigma": timestep, "input": x, "model_options": model_options}
        denoised = function(given)
    return denoised


def _module(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(names)
    return module


patcher_extension = _module("comfy.patcher_extension", WrappersMP=WrappersMP)
sampler_helpers = _module("comfy.sampler_helpers", convert_cond=convert_cond)
samplers = _module(
    "comfy.samplers", calc_cond_batch=calc_cond_batch, encode_model_conds=encode_model_conds
)
