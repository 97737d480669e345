"""A stand-in for ComfyUI, which no registry has: the parts of its interface that nodes meet.

Written from what ComfyUI documents and does (docs.comfy.org on the V3 schema, and in its versions
of 2026 `comfy/ldm/modules/attention.py`, `comfy/samplers.py` and `comfy/patcher_extension.py`): the
same names, arguments and order of calls, on denoisers of a few random weights.
"""

from __future__ import annotations

import sys
import types

import pytest

from . import api, sampling

__all__ = ["installed"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules under ComfyUI's names while a test runs."""
    modules = {name: types.ModuleType(name) for name in ("comfy", "comfy_api")}
    modules |= {
        "comfy.patcher_extension": sampling.patcher_extension,
        "comfy.samplers": sampling.samplers,
        "comfy.sampler_helpers": sampling.sampler_helpers,
        "comfy_api.latest": api.latest,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(modules[parent], child, module, raising=False)
