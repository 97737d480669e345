"""Reasons of the table of backends that no machine of ours can give by itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dense_attn import _backends, _triton


@pytest.mark.parametrize(("capability", "reasons"), [((8, 0), []), ((12, 0), []), ((7, 5), ["7.5"])])
def test_old_gpus_are_named(capability: tuple[int, int], reasons: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backends.NAMESPACES, "triton", SimpleNamespace(LOAD_ERROR=None))
    monkeypatch.setattr(_triton, "DEVICE", "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    x = SimpleNamespace(device=torch.device("cuda:0"), shape=(1, 1, 1, 64), dtype=torch.float32)
    expected = [f"needs a GPU of compute capability 8.0 or newer, got {number}" for number in reasons]
    assert _backends.why_not("triton", "layout_attention", x) == expected
