"""Refusals of semantic guidance: every bad input gets its own error before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from cases import backends
from torch import Tensor

from dense_attn import SemanticGuidance, _checks, percentile_mask, sega_guidance
from dense_attn import backends as availability
from dense_attn._backends import table

GRAMMAR = re.compile(r"[a-z_]+ must .+, got .+", re.DOTALL)
every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu", op="sega_guidance"))
E, B, C, H, W = 3, 2, 4, 5, 7
NAN = float("nan")
BACKEND = "backend must be one of auto, cuda, triton, cpu, reference, got 'opencl'"


def eps(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or (B, C, H, W), dtype=dtype)


def guidance_arguments() -> dict[str, object]:
    """A call of sega_guidance that is right in every respect."""
    return {
        "eps_uncond": eps(),
        "eps_text": eps(),
        "eps_edits": eps(E, B, C, H, W),
        "momentum": eps(),
        "guidance_scale": 7.5,
        "edit_guidance_scale": (5, 3.0, np.float32(2)),
        "edit_threshold": np.array([0.9, 0.5, 0.0]),
        "edit_weights": torch.ones(E),
        "warm": [True, np.True_, False],
        "enabled": True,
        "reverse": False,
        "edit_momentum_scale": 0.1,
        "edit_mom_beta": 0.4,
        "user_mask": torch.ones(H, W, dtype=torch.bool),
        "sum_channels": False,
    }


def class_arguments() -> dict[str, object]:
    """Arguments of SemanticGuidance that are right in every respect."""
    return {
        "guidance_scale": 7.5,
        "edit_guidance_scale": [5, 3.0, 2],
        "edit_threshold": 0.9,
        "edit_warmup_steps": [0, 10, 3],
        "edit_cooldown_steps": [None, 20, 5.5],
        "edit_weights": None,
        "reverse_editing_direction": [True, False, False],
        "edit_momentum_scale": 0.1,
        "edit_mom_beta": 0.4,
        "sum_channels": True,
    }


NUMBERS = [
    ("guidance_scale", "7", TypeError, "guidance_scale must be a number, got str"),
    ("guidance_scale", NAN, ValueError, "guidance_scale must be finite"),
    ("guidance_scale", [7.5], TypeError, "got list"),
    ("guidance_scale", None, TypeError, "got NoneType"),
    ("edit_momentum_scale", True, TypeError, "edit_momentum_scale must be a number, got bool"),
    ("edit_momentum_scale", float("inf"), ValueError, "got inf"),
    ("edit_mom_beta", torch.tensor(0.4), TypeError, "edit_mom_beta must be a number, got Tensor"),
    ("edit_mom_beta", NAN, ValueError, "got nan"),
    ("edit_guidance_scale", "5", TypeError, "edit_guidance_scale must be a number, got str"),
    ("edit_guidance_scale", [5, NAN, 1], ValueError, "edit_guidance_scale must be finite"),
    ("edit_guidance_scale", torch.ones(E, 1), TypeError, "got Tensor"),
    ("edit_guidance_scale", [[5, 1, 1]], TypeError, "got list"),
    ("edit_threshold", 1.5, ValueError, "edit_threshold must be from 0 to 1, got 1.5"),
    ("edit_threshold", [0.5, -0.1, 0.5], ValueError,
     "edit_threshold must be from 0 to 1, got -0.1"),
    ("edit_threshold", NAN, ValueError, "edit_threshold must be finite, got nan"),
    ("edit_threshold", [True] * E, TypeError, "edit_threshold must be a number, got bool"),
    ("edit_weights", [1, "1", 1], TypeError, "edit_weights must be a number, got str"),
    ("sum_channels", 1, TypeError, "sum_channels must be a bool, got int"),
    ("backend", "opencl", ValueError, BACKEND),
]  # fmt: skip
LENGTHS = [
    ("edit_guidance_scale", [5.0, 5.0], ValueError,
     "edit_guidance_scale must be one value or 3, one for each concept"),
    ("edit_threshold", [], ValueError,
     "edit_threshold must be one value or 3, one for each concept, got 0 values"),
    ("edit_weights", torch.ones(4), ValueError,
     "edit_weights must be one value or 3, one for each concept, got 4"),
]  # fmt: skip
BAD_GUIDANCE = [
    *NUMBERS,
    *LENGTHS,
    ("eps_uncond", None, TypeError, "eps_uncond must be a tensor, got NoneType"),
    ("eps_uncond", eps().long(), TypeError,
     "eps_uncond must be one of float32, bfloat16, float16, float64, got int64"),
    ("eps_uncond", eps().to_sparse(), TypeError, "eps_uncond must be a strided tensor"),
    ("eps_uncond", eps(B), ValueError,
     "eps_uncond must have shape [batch, channels, ...] with at least one value"),
    ("eps_uncond", eps(B, C, 0, W), ValueError, "got (2, 4, 0, 7)"),
    ("eps_uncond", eps(B, C, H, W + 1), ValueError,
     "eps_text must have eps_uncond's shape (2, 4, 5, 8), got (2, 4, 5"),
    ("eps_uncond", eps().double(), TypeError,
     "eps_text must have eps_uncond's dtype float64, got float32"),
    ("eps_text", eps().half(), TypeError,
     "eps_text must have eps_uncond's dtype float32, got float16"),
    ("eps_text", eps().to("meta"), ValueError,
     "eps_text must be on eps_uncond's device cpu, got meta"),
    ("eps_text", 0.0, TypeError, "eps_text must be a tensor, got float"),
    ("eps_edits", eps(), ValueError,
     "eps_edits must have shape [concepts, *eps_uncond.shape = (2, 4, 5, 7)], got (2"),
    ("eps_edits", eps(E, 1, C, H, W), ValueError, "got (3, 1, 4, 5, 7)"),
    ("eps_edits", eps(E, B, C, H, W).double(), TypeError,
     "eps_edits must have eps_uncond's dtype float32, got float64"),
    ("eps_edits", eps(E, B, C, H, W).to("meta"), ValueError,
     "eps_edits must be on eps_uncond's device cpu, got meta"),
    ("eps_edits", [eps(), eps(B, C, H, 1), eps()], ValueError,
     "eps_edits must have eps_uncond's shape (2, 4, 5, 7), go"),
    ("eps_edits", (eps(), None, eps()), TypeError, "eps_edits must be a tensor, got NoneType"),
    ("eps_edits", 3, TypeError, "eps_edits must be a tensor, got int"),
    ("momentum", 0.0, TypeError, "momentum must be a tensor, got float"),
    ("momentum", eps().double(), TypeError, "momentum must be float32, got float64"),
    ("momentum", eps(1, C, H, W), ValueError,
     "momentum must have eps_uncond's shape (2, 4, 5, 7), got (1, 4, 5, 7)"),
    ("momentum", eps().to("meta"), ValueError,
     "momentum must be on eps_uncond's device cpu, got meta"),
    ("user_mask", [1], TypeError, "user_mask must be a tensor, got list"),
    ("user_mask", eps(H, W).long(), TypeError, "user_mask must be float32 or bool, got int64"),
    ("user_mask", eps(H, W).double(), TypeError, "user_mask must be float32 or bool, got float64"),
    ("user_mask", eps(H, W - 1), ValueError,
     "user_mask must broadcast to eps_edits' shape (3, 2, 4, 5, 7), got (5, 6)"),
    ("user_mask", eps(1, E, B, C, H, W), ValueError, "got (1, 3, 2, 4, 5, 7)"),
    ("user_mask", eps(H, W).to("meta"), ValueError,
     "user_mask must be on eps_uncond's device cpu, got meta"),
    ("warm", 1, TypeError, "warm must be a bool, got int"),
    ("warm", [True, True], ValueError,
     "warm must be one value or 3, one for each concept, got 2 values"),
    ("enabled", [True, None, True], TypeError, "enabled must be a bool, got NoneType"),
    ("reverse", [0.0] * E, TypeError, "reverse must be a bool, got float"),
    ("edit_guidance_scale", 1e39, ValueError,
     "edit_guidance_scale must be finite in float32, got 1e+39"),
]  # fmt: skip
BAD_CLASS = [
    *NUMBERS,
    ("edit_warmup_steps", -1, ValueError, "edit_warmup_steps must be at least 0, got -1"),
    ("edit_warmup_steps", None, TypeError, "edit_warmup_steps must be a number, got NoneType"),
    ("edit_warmup_steps", [0, NAN, 1], ValueError, "edit_warmup_steps must be finite, got nan"),
    ("edit_cooldown_steps", "10", TypeError, "edit_cooldown_steps must be a number, got str"),
    ("edit_cooldown_steps", [None, -2, 1], ValueError,
     "edit_cooldown_steps must be at least 0, got -2"),
    ("reverse_editing_direction", "no", TypeError,
     "reverse_editing_direction must be a bool, got str"),
    ("reverse_editing_direction", [0, 1, 0], TypeError,
     "reverse_editing_direction must be a bool, got int"),
]  # fmt: skip
BAD_LENGTHS = [
    *LENGTHS,
    ("edit_warmup_steps", [1, 2], ValueError,
     "edit_warmup_steps must be one value or 3, one for each concept, got 2"),
    ("edit_cooldown_steps", [None], ValueError,
     "edit_cooldown_steps must be one value or 3, one for each concept"),
    ("reverse_editing_direction", [True] * 4, ValueError,
     "reverse_editing_direction must be one value or 3, one for"),
]  # fmt: skip
BAD_MASKS = [
    ("x", [1.0], TypeError, "x must be a tensor, got list"),
    ("x", torch.ones(3, 4, dtype=torch.int32), TypeError,
     "x must be one of float32, bfloat16, float16, float64, got i"),
    ("x", torch.randn(3, 0, 4), ValueError,
     "x must have at least one entry along dim, got (3, 0, 4)"),
    ("x", torch.randn(4), ValueError, "dim must name distinct axes of x's 1, got (-2, -1)"),
    ("x", torch.tensor(1.0), ValueError, "dim must name distinct axes of x's 0"),
    ("level", 1.01, ValueError, "level must be from 0 to 1, got 1.01"),
    ("level", NAN, ValueError, "level must be finite, got nan"),
    ("level", "0.5", TypeError, "level must be a number, got str"),
    ("dim", 3, ValueError, "dim must name distinct axes of x's 3, got 3"),
    ("dim", -4, ValueError, "got -4"),
    ("dim", (0, -3), ValueError, "dim must name distinct axes of x's 3, got (0, -3)"),
    ("dim", (), TypeError, "dim must be an int or a sequence of ints, got ()"),
    ("dim", None, TypeError, "got None"),
    ("dim", (0, 1.0), TypeError, "got (0, 1.0)"),
    ("dim", True, TypeError, "got True"),
    ("backend", "opencl", ValueError, BACKEND),
]  # fmt: skip


def rows(table: list) -> pytest.MarkDecorator:
    names = [f"{argument}-{i}" for i, (argument, *_) in enumerate(table)]
    return pytest.mark.parametrize(("argument", "value", "error", "message"), table, ids=names)


def assert_refused(call: Callable, error: type[Exception], message: str, *tensors: object) -> None:
    before = [x.clone() for x in tensors if isinstance(x, Tensor)]
    with pytest.raises(error) as refusal:
        call()
    assert type(refusal.value) is error
    assert GRAMMAR.fullmatch(str(refusal.value))
    assert message in str(refusal.value)
    assert all(
        torch.equal(x, was) for x, was in zip((x for x in tensors if isinstance(x, Tensor)), before)
    )


@every_backend
@rows(BAD_GUIDANCE)
def test_a_bad_argument_of_sega_guidance_is_named(
    backend: str, argument: str, value: object, error: type[Exception], message: str
) -> None:
    good = {**guidance_arguments(), "backend": backend}
    assert_refused(
        lambda: sega_guidance(**{**good, argument: value}), error, message, *good.values()
    )


@every_backend
@rows(BAD_MASKS)
def test_a_bad_argument_of_percentile_mask_is_named(
    backend: str, argument: str, value: object, error: type[Exception], message: str
) -> None:
    good = {"x": torch.randn(2, 3, 4), "level": 0.5, "backend": backend}
    assert_refused(lambda: percentile_mask(**{**good, argument: value}), error, message, good["x"])


@rows(BAD_CLASS)
def test_a_bad_argument_of_the_class_is_named(
    argument: str, value: object, error: type[Exception], message: str
) -> None:
    assert_refused(
        lambda: SemanticGuidance(**{**class_arguments(), argument: value}), error, message
    )


@rows(BAD_LENGTHS)
def test_a_list_of_the_wrong_length_is_named_at_the_call(
    argument: str, value: object, error: type[Exception], message: str
) -> None:
    guidance = SemanticGuidance(**{**class_arguments(), argument: value})
    assert_refused(lambda: guidance(0, eps(), eps(), eps(E, B, C, H, W)), error, message)
    assert guidance.momentum is None


@pytest.mark.parametrize(
    "name",
    [
        "guidance_scale",
        "edit_guidance_scale",
        "edit_weights",
        "edit_momentum_scale",
        "edit_mom_beta",
    ],
)
def test_a_number_beyond_float32_is_for_float64_alone(name: str) -> None:
    guidance, wide = SemanticGuidance(**{name: 1e39}), eps().double()
    message = f"{name} must be finite in float32, got 1e+39"
    call = partial(guidance, 0, eps(), eps(), [eps()] * E)
    assert_refused(call, ValueError, message)
    assert guidance(0, wide, wide, [wide] * E).isfinite().all()


def test_options_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And spread over any number of concepts."""
    guidance = SemanticGuidance(edit_threshold=0.5, backend="reference")
    for name in ("fraction", "flag", "choice"):
        monkeypatch.setattr(_checks, name, lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr(table, "resolve", lambda *_: "reference")
    for count in (1, 3, 1):
        assert guidance(0, eps(), eps(), [eps()] * count).shape == (B, C, H, W)


@pytest.mark.parametrize("step", [-1, True, 0.0, "0", None, torch.tensor(0)])
def test_a_bad_step_is_named(step: object) -> None:
    guidance = SemanticGuidance(**class_arguments())
    error = ValueError if step == -1 else TypeError
    assert_refused(lambda: guidance(step, eps(), eps(), eps(E, B, C, H, W)), error, "step must be ")


def test_another_shape_is_refused_until_reset() -> None:
    guidance = SemanticGuidance(**class_arguments(), backend="reference")
    guidance(np.int64(0), eps(), eps(), [eps()] * E)
    before = guidance.momentum.clone()
    for change in ({"shape": (B + 1, C, H, W)}, {"dtype": torch.float64}):
        other = eps(*change.get("shape", ()), dtype=change.get("dtype", torch.float32))
        was = "the momentum of the steps before, (2, 4, 5, 7) in float32 on cpu"
        message = f"eps_uncond must go with {was}, or reset()"
        step = partial(guidance, 1, other, other, [other] * E)
        assert_refused(step, ValueError, message)
    assert torch.equal(guidance.momentum, before)
    guidance(1, *[eps().half()] * 2, [eps().half()] * E)  # whose momentum is float32 too
    guidance.reset()
    guidance(0, *[other] * 2, [other] * E)
    assert guidance.momentum.dtype == torch.float64


@every_backend
def test_the_good_calls_are_good(backend: str) -> None:
    results = sega_guidance(**guidance_arguments(), backend=backend)
    assert [x.shape for x in results] == [(B, C, H, W)] * 2
    assert SemanticGuidance(**class_arguments(), backend=backend)(
        0, eps(), eps(), [eps()] * E
    ).shape == (B, C, H, W)
    masked, threshold = percentile_mask(eps(), 0.5, dim=[1, -1], backend=backend)
    assert (masked.shape, threshold.shape) == ((B, C, H, W), (B, H))


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("op", ["percentile_mask", "sega_guidance"])
def test_a_named_backend_runs_or_raises_with_every_reason(backend: str, op: str) -> None:
    call = {
        "percentile_mask": lambda: percentile_mask(eps(), 0.5, backend=backend),
        "sega_guidance": lambda: sega_guidance(**guidance_arguments(), backend=backend),
    }[op]
    reason = availability()[backend][op]
    if reason == "available":
        assert call()[0].shape == (B, C, H, W)
    else:
        assert_refused(call, RuntimeError, reason)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble])
def test_numbers_of_numpy(kind: type[np.floating]) -> None:
    assert percentile_mask(eps(), kind(0.5))[1].shape == (B, C)
    message = "guidance_scale must be finite, got inf"
    assert_refused(lambda: SemanticGuidance(guidance_scale=kind("inf")), ValueError, message)
