"""Triton kernels of semantic guidance and of reversible steps without a GPU: interpreted, and compiled ahead of time.

Triton interprets every kernel of a process or none, so the interpreted tests run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import aot
from aot_launches import compiled

from dense_attn.triton_kernels import reversible, sega, selection

FUSED = re.compile(r"\bfma\.|\bv_(?:pk_)?fmac?_")
DIVISION = re.compile(r"v_div_")  # gfx942 makes an exact quotient of fused steps
INTERPOLATION = 2  # the fused multiply-adds of torch.lerp, either side of weight 0.5


def test_interpreted() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    file = Path(__file__).with_name("triton_steps.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


def check_resources(target: str, launches: list) -> None:
    assert launches
    for launch in launches:
        assert launch.resources.spills == 0, launch.name
        assert launch.resources.shared <= aot.SHARED_LIMITS[target], launch.name


@pytest.mark.parametrize("target", aot.TARGETS)
def test_reversible_kernels_compile(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product melts into a sum, on any device, or one device could not undo another's steps."""
    monkeypatch.setattr(reversible, "_refuse_off_grid", lambda *_: None)
    x, z = torch.zeros(4096), torch.zeros(4096, dtype=torch.int64)
    with compiled(target) as launches:
        reversible.ddim_step(x, x.half(), x.half(), 0.9, 0.3, 7.5)
        reversible.leapfrog_step(x, x, x, 0.9, 0.3, 7.5)
        reversible.edict_mix(x, x, x, 0.9, 0.3, 0.93, True)
        reversible.edict_unmix(x, x, x, 0.9, 0.3, 0.93, True)
        reversible.exact_couple(z, x, 0.9, 0.3, torch.float16)
        reversible.exact_leapfrog(z, z, x, 0.9, 0.3, 0.1, torch.bfloat16)
        reversible.exact_mix(z, z, x, 0.9, 0.93, True, 0.1, False, torch.float32)
        reversible.exact_unmix(z, z, x, 0.9, 0.93, False, 0.1, True, torch.float32)
    assert len(launches) == 8
    check_resources(target, launches)
    for launch in launches:
        assert "div.full" not in launch.assembly, launch.name  # the plain division of float32 does not round to nearest
        assert DIVISION.search(launch.assembly) or not FUSED.search(launch.assembly), launch.name


def guide(num_values: int, sum_channels: bool = False, dtype: torch.dtype = torch.float32, apart: bool = False) -> None:
    """A step of three concepts; apart: the channels of a pixel are neighbours, the pixels of a channel are not."""
    uncond, edits = torch.zeros((1, 4, num_values), dtype=dtype), torch.zeros((3, 1, 4, num_values), dtype=dtype)
    if apart:
        uncond, edits = (x.mT.contiguous().mT for x in (uncond, edits))
    lists = {"edit_guidance_scale": [5.0] * 3, "edit_threshold": [0.9] * 3, "edit_weights": [1.0] * 3}
    lists |= {"warm": [True] * 3, "enabled": [True] * 3, "reverse": [False] * 3}
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.3, "edit_mom_beta": 0.4, "sum_channels": sum_channels}
    sega.sega_guidance(uncond, uncond, edits, uncond.float(), **lists, **numbers, user_mask=None)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_sega_kernels_compile(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "WARP_SIZE", aot.TARGETS[target].warp_size)
    with compiled(target) as launches:
        guide(4096)
        for num_values in (sega.UNSTAGED, selection.LONGEST):
            guide(num_values)
            guide(num_values // 2, sum_channels=True)
            guide(num_values // 2, apart=True)
            guide(num_values // 4, sum_channels=True, apart=True)
            guide(num_values, dtype=torch.bfloat16)
        sega.percentile_mask(torch.zeros(4, selection.LONGEST), 0.9)
        sega.percentile_mask(torch.zeros(4, selection.LONGEST, dtype=torch.bfloat16), 0.9)
    assert {launch.name for launch in launches} == {"sega_guidance_kernel", "percentile_mask_kernel"}
    check_resources(target, launches)
    for launch in launches:
        assert len(FUSED.findall(launch.assembly)) == INTERPOLATION, launch.name


@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_of_long_rows_compile(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "WARP_SIZE", aot.TARGETS[target].warp_size)
    with compiled(target) as launches:
        guide(2 * selection.LONGEST)
        sega.percentile_mask(torch.zeros(4, 2 * selection.LONGEST), 0.9)
    check_resources(target, launches)
    for launch in launches:
        if launch.name not in ("digit_kernel", "thresholds_kernel"):  # ranks are made integers by fused steps there
            assert not FUSED.search(launch.assembly), launch.name
