"""The table of cases that every backend of semantic guidance runs, the tensors behind each, and
what is exact.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dense_attn import reference
from dense_attn.verify.accuracy import further
from dense_attn.verify.sega import exact_quantile

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE_RANGE = (torch.float32, torch.bfloat16, torch.float64)
Options = dict[str, object]
Results = dict[str, Tensor]  # eps, momentum and the gradients by name
LISTS = {  # one value for each of up to five concepts
    "edit_guidance_scale": (5.0, -3.0, 0.7, 12.0, 1.0),
    "edit_threshold": (0.9, 0.37, 0.95, 0.0, 1.0),
    "edit_weights": (1.0, 2.0, 0.5, -1.0, 0.25),
    "warm": (True,) * 5,
    "enabled": (True,) * 5,
    "reverse": (False, True, False, True, False),
}
NUMBERS = {"guidance_scale": 7.5, "edit_momentum_scale": 0.3, "edit_mom_beta": 0.4}


@dataclass(frozen=True)
class Case:
    """A call's differences from an ordinary one: three concepts, all warm."""

    name: str
    size: tuple[int, ...] = (3, 2, 4, 7, 9)  # E, B, C, ...
    change: tuple[tuple[str, object], ...] = ()
    values: str = "normal"
    view: str = "contiguous"
    mask: tuple[int, ...] | None = None  # the shape of user_mask
    bool_mask: bool = False
    momentum: str = "wide"  # or narrow, none
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def options(self) -> Options:
        """Keyword arguments of sega_guidance."""
        return {
            **{name: list(values[: self.size[0]]) for name, values in LISTS.items()},
            **NUMBERS,
            **dict(self.change),
        }


@dataclass
class Inputs:
    """The tensors of one call and the gradients that flow back into it."""

    eps_uncond: Tensor  # [B, C, ...]
    eps_text: Tensor  # [B, C, ...]
    eps_edits: Tensor  # [E, B, C, ...]
    momentum: Tensor | None  # [B, C, ...]
    user_mask: Tensor | None  # broadcastable to [E, B, C, ...]
    grad_eps: Tensor  # [B, C, ...]
    grad_momentum: Tensor  # [B, C, ...]

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that gradients reach, by name."""
        names = ("eps_uncond", "eps_text", "eps_edits", "momentum", "user_mask")
        tensors = {name: getattr(self, name) for name in names}
        return {name: x for name, x in tensors.items() if x is not None and x.is_floating_point()}


def _changed(**change: object) -> tuple[tuple[str, object], ...]:
    return tuple(change.items())


SUMMED = _changed(sum_channels=True)
ONE_FOR_ALL = _changed(edit_guidance_scale=4, edit_threshold=0.8, edit_weights=1, warm=True)
SOME_WARM = _changed(warm=[True, False, True])
CASES = (
    Case("latents-of-64", (3, 1, 4, 64, 64)),
    *(Case(f"concepts-{count}", (count, 2, 4, 7, 9)) for count in (1, 2, 4, 5)),
    Case("no-concepts", (0, 2, 4, 7, 9)),
    Case("no-batch", (3, 0, 4, 7, 9)),
    Case("no-channels", (3, 2, 0, 7, 9)),
    Case("one-value-a-channel", (3, 2, 4)),
    Case("one-pixel", (3, 2, 4, 1, 1)),
    Case("two-values", (3, 2, 4, 2)),
    Case("sequence", (3, 2, 3, 129)),
    Case("video", (2, 2, 4, 3, 5, 7)),
    Case("many-rows", (2, 3, 33, 5, 5)),
    Case("long-rows", (2, 1, 2, 300, 301)),
    *(Case(f"level-{x}", change=_changed(edit_threshold=[x] * 3)) for x in (0.0, 0.5, 1.0)),
    Case("some-warm", change=SOME_WARM),
    Case("none-warm", change=_changed(warm=[False] * 3)),
    Case("one-cooled", change=_changed(enabled=[True, False, True])),
    Case("all-cooled", change=_changed(enabled=[False] * 3)),
    Case("warm-ones-cooled", change=(*SOME_WARM, *_changed(enabled=[False, True, False]))),
    Case("warm-ones-without-weight", change=(*SOME_WARM, *_changed(edit_weights=[-1.0, 1.0, 0.0]))),
    Case("no-weights", change=_changed(edit_weights=[0.0] * 3)),
    Case("no-scale", change=_changed(edit_guidance_scale=[0.0] * 3)),
    Case("one-value-for-all", change=ONE_FOR_ALL),
    Case("no-momentum", momentum="none"),
    Case("narrow-momentum", momentum="narrow"),
    Case("momentum-alone", change=_changed(edit_mom_beta=1.0, edit_momentum_scale=-0.5)),
    Case("sum-channels", change=SUMMED),
    Case("sum-of-one-channel", (3, 2, 1, 7, 9), change=SUMMED),
    Case("sum-channels-some-warm", change=(*SOME_WARM, *SUMMED), mask=(7, 9)),
    Case("mask", mask=(3, 2, 4, 7, 9)),
    Case("mask-of-pixels", mask=(7, 9), bool_mask=True),
    Case("mask-of-rows", mask=(7, 1)),
    Case("mask-of-concepts", mask=(3, 1, 1, 7, 9), bool_mask=True),
    Case("mask-of-samples", mask=(2, 1, 1, 1)),
    Case("mask-of-one-number", mask=()),
    *(Case(view, view=view) for view in ("channels-last", "transposed", "every-other")),
    *(Case(view, view=view) for view in ("unaligned", "negated", "one-edit")),
    Case("one-pixel-repeated", view="one-pixel-repeated"),
    Case("channels-last-sum", view="channels-last", change=SUMMED, mask=(7, 9)),
    *(Case(values, values=values) for values in ("ties", "equal", "equal-pairs", "zero")),
    Case("ties-sum", values="ties", change=SUMMED),
    Case("tiny", values="tiny", dtypes=WIDE_RANGE),
    Case("large", values="large", dtypes=WIDE_RANGE),
    *(Case(name, values=name, mask=(7, 9)) for name in ("nan-uncond", "nan-text")),
    *(Case(name, values=name, mask=(7, 9)) for name in ("nan-edit", "nan-momentum")),
    *(Case(name, values=name) for name in ("inf-edit", "inf-text", "negative-inf-edit")),
    Case("nan-edit-sum", values="nan-edit", change=SUMMED),
)


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """The tensors of a case, the same bits on every run and every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    count, *shape = case.size
    eps = _values(case.values, normal(2 + count, *shape))
    momentum, grad_eps, grad_momentum = normal(3, *shape)
    if case.values == "nan-momentum":
        momentum[0, 1].flatten()[2] = torch.nan
    mask = (
        None
        if case.mask is None
        else torch.rand(case.mask, generator=generator, dtype=torch.float64)
    )
    eps = eps.to(dtype)
    wide = reference.accumulation_dtype(dtype)
    if mask is not None:
        mask = mask > 0.4 if case.bool_mask else mask.to(wide)
    momentum = (
        None
        if case.momentum == "none"
        else momentum.to(dtype if case.momentum == "narrow" else wide)
    )
    uncond, text, edits = _view(case.view, eps)
    return Inputs(uncond, text, edits, momentum, mask, grad_eps.to(dtype), grad_momentum.to(wide))


def _values(values: str, eps: Tensor) -> Tensor:
    """eps_uncond, eps_text and eps_edits, [2 + E, B, C, ...]."""
    if values == "ties":  # small integers
        return eps.round()
    if values == "equal":  # every difference the same
        return torch.cat([eps[:1] * 0, eps[1:2], eps[2:] * 0 + 0.7])
    if values == "equal-pairs":
        return torch.cat([eps[:1] * 0, eps[1:2], eps[2:].sign() * (eps[2:].abs() > 0.5)])
    if values == "zero":  # every concept is the unconditional estimate
        return torch.cat([eps[:2], eps[:1].expand_as(eps[2:])])
    if values in ("tiny", "large"):
        return eps * {"tiny": 1e-38, "large": 1e30}[values]
    if values != "normal":
        value, which = values.rsplit("-", 1)
        if which != "momentum":
            number = {"nan": torch.nan, "inf": torch.inf, "negative-inf": -torch.inf}[value]
            eps[{"uncond": 0, "text": 1, "edit": 3}[which], 1, 2].flatten()[5] = number
    return eps


def _view(view: str, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """eps_uncond, eps_text [B, C, ...], eps_edits [E, B, C, ...] under a view's strides."""
    if view == "channels-last":
        eps = eps.movedim(2, -1).contiguous().movedim(-1, 2)
    elif view == "transposed":
        eps = eps.mT.contiguous().mT
    elif view == "every-other":
        eps = eps.repeat_interleave(2, -1)[..., ::2]
    elif view == "unaligned":
        eps = torch.cat([eps.new_zeros(1), eps.flatten()])[1:].view(eps.shape)
    elif view == "negated":  # a lazy minus, as the imaginary part of a conjugate has it
        eps = torch._neg_view(-eps)
    elif view == "one-pixel-repeated":
        eps = eps[..., :1, :1].expand(eps.shape)
    edits = eps[2:3].expand_as(eps[2:]) if view == "one-edit" else eps[2:]
    return eps[0], eps[1], edits


def kept_entries(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Kept entries, and thresholds by their definition, of the dtype kernels accumulate in."""
    wide = reference.accumulation_dtype(inputs.eps_uncond.dtype)
    uncond, edits = inputs.eps_uncond.to(wide), inputs.eps_edits.to(wide)
    count, trailing = len(edits), uncond.dim() - 2
    levels, scales, reverse = (
        _each(options, name, count) for name in ("edit_threshold", "edit_guidance_scale", "reverse")
    )
    signed = [-scale if negative else scale for scale, negative in zip(scales, reverse)]
    magnitudes = (
        (edits - uncond) * torch.tensor(signed, dtype=wide).reshape(-1, *[1] * uncond.dim())
    ).abs()
    if options.get("sum_channels"):
        for channel in range(1, uncond.shape[1]):
            magnitudes[:, :, 0] += magnitudes[:, :, channel]
        magnitudes = magnitudes[:, :, :1]
    rows = magnitudes.reshape(
        *magnitudes.shape[:3], inputs.eps_uncond[0, 0].numel() if uncond.numel() else 1
    )
    thresholds = rows.new_empty(rows.shape[:3])
    for concept, level in enumerate(levels):
        if thresholds.numel():
            thresholds[concept] = exact_quantile(rows[concept], level)
    kept = magnitudes >= thresholds.reshape(*thresholds.shape, *[1] * trailing)
    return kept.expand(edits.shape), thresholds


def _each(options: Options, name: str, count: int) -> list:
    value = options[name]
    return value if isinstance(value, list) else [value] * count


def raw_options(options: Options) -> Options:
    """The options of the public op, one value a concept in each list, as a raw call takes them."""
    options = dict(options)
    rules = [options.pop(name) for name in ("edit_weights", "warm", "enabled")]
    return options | dict(zip(("weights", "partials", "all_warm"), reference.sega_weights(*rules)))


def given_the_kept(kept: Tensor, options: Options, order: list[int]) -> Callable:
    """The step as a formula of its tensors for given kept entries, concepts added in an order."""
    names = ("edit_guidance_scale", "edit_weights", "warm", "enabled", "reverse")
    scales, weights, warm, enabled, reverse = (
        [_each(options, name, len(kept))[concept] for concept in order] for name in names
    )

    def step(
        uncond: Tensor, text: Tensor, edits: Tensor, momentum: Tensor | None, mask: Tensor | None
    ) -> tuple:
        wide = reference.accumulation_dtype(uncond.dtype)
        momentum = torch.zeros_like(uncond) if momentum is None else momentum
        widened = uncond.to(wide)
        steered = reference.sega_differences(widened, edits.to(wide)[order], scales, reverse)
        steered = torch.where(kept[order], steered, 0)
        if mask is not None:
            steered = steered * mask.expand(edits.shape)[order]
        eps, momentum = reference.sega_combine(
            widened,
            text.to(wide),
            steered,
            momentum.to(wide),
            options["guidance_scale"],
            *reference.sega_weights(weights, warm, enabled),
            options["edit_momentum_scale"],
            options["edit_mom_beta"],
        )
        return eps.to(uncond.dtype), momentum

    return step


def evaluate(step: Callable, inputs: Inputs, dtype: torch.dtype | None = None) -> Results:
    """eps and momentum of `step(uncond, text, edits, momentum, mask)`, and the gradients."""
    leaves = {
        name: (x if dtype is None else x.to(dtype)).detach().requires_grad_()
        for name, x in inputs.differentiable().items()
    }
    tensors = (
        leaves.get(name, getattr(inputs, name))
        for name in ("eps_uncond", "eps_text", "eps_edits", "momentum")
    )
    eps, momentum = step(*tensors, leaves.get("user_mask", inputs.user_mask))
    results = {"eps": eps.detach(), "momentum": momentum.detach()}
    flows = [inputs.grad_eps.to(eps.dtype), inputs.grad_momentum.to(momentum.dtype)]
    grads = torch.autograd.grad(
        (eps, momentum), list(leaves.values()), flows, materialize_grads=True
    )
    return results | {f"gradient of {name}": grad for name, grad in zip(leaves, grads)}


def exact_and_plain(inputs: Inputs, options: Options) -> tuple[Results, Results]:
    """The two measures of the rule of accuracy: float64, and the dtype under test at its worst
    order of concepts.
    """
    kept, _ = kept_entries(inputs, options)
    concepts = list(range(len(kept)))
    exact = evaluate(given_the_kept(kept, options, concepts), inputs, torch.float64)
    plain = evaluate(given_the_kept(kept, options, concepts), inputs)
    for turn in range(1, len(concepts)):
        other = evaluate(given_the_kept(kept, options, concepts[turn:] + concepts[:turn]), inputs)
        plain = {name: further(plain[name], x, exact[name]) for name, x in other.items()}
    return exact, plain
