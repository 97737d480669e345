"""`verify` of guidance and of reversible steps fails a backend that is wrong in one respect."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from dense_attn import reference
from dense_attn._backends import table
from dense_attn.verify import reversible, sega

pytestmark = pytest.mark.usefixtures("one_thread")
OPS = [
    name
    for name in vars(reference)
    if callable(getattr(reference, name)) and not name.startswith("_")
]


def _off_by_a_bit(x: torch.Tensor, level: float) -> tuple:
    masked, threshold = reference.percentile_mask(x, level)
    return masked, torch.nextafter(threshold, threshold + 1)


def _wrong_momentum(*tensors: torch.Tensor, **options: object) -> tuple:
    eps, momentum, thresholds = reference.sega_guidance(*tensors, **options)
    return eps, momentum * 1.0001, thresholds


def _wrong_step(*arguments: object) -> torch.Tensor:
    return reference.ddim_step(*arguments) * 1.001


def _wrong_grid(*arguments: object) -> tuple:
    x, y, latent = reference.exact_mix(*arguments)
    return x + (x % 1000 == 0), y, latent


@pytest.mark.parametrize(
    ("op", "wrong", "rows"),
    [
        ("percentile_mask", _off_by_a_bit, {"thresholds, masks"}),
        ("sega_guidance", _wrong_momentum, {"guidance", "guidance, mixed"}),
        ("ddim_step", _wrong_step, {"float steps"}),
        ("exact_mix", _wrong_grid, {"edict, 50 steps"}),
    ],
)
def test_a_wrong_backend_fails(
    op: str, wrong: Callable, rows: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    functions = {name: getattr(reference, name) for name in OPS} | {op: wrong}
    monkeypatch.setitem(table.NAMESPACES, "triton", SimpleNamespace(**functions))
    monkeypatch.setattr(table, "why_not", lambda backend, op, x, *_: [])
    monkeypatch.setattr(table, "device_of", lambda backend: "cpu")
    for family in (sega, reversible):
        monkeypatch.setattr(family, "DTYPES", (torch.float32,))
        monkeypatch.setattr(family, "usable", lambda op, dtype, among: list(among))
    verdicts = [verdict for family in (sega, reversible) for verdict in family.verify(["triton"])]
    assert {verdict.what for verdict in verdicts if not verdict.passed} == rows
    assert len(verdicts) == 6
