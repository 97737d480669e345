"""The tables of cases on kernels as they are compiled, emulated in processes of their own."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
from case_tensors import REAL_LAYOUTS

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ROOT / "tests" / "backends"
OLDEST = ROOT / ".venv" / "triton-3.6.0"
ATTENTION = (  # each compiles three to five kernels
    "row-head-dim-40-bfloat16-range",
    "phases-long-in-runs-bfloat16-range",
    "parked-head-dim-128-bfloat16-range",
    "specialised-ordered-in-runs-float16-range",
    "halved-ordered-in-runs-bfloat16-range",
)
MORE_ATTENTION = (
    "row-head-dim-128-float16-mask",
    "specialised-wide-in-runs-bfloat16-range",
    *(["phases-real-layout-float32-bias"] if REAL_LAYOUTS.exists() else []),
)
OTHERS = (
    "test_interpolation and whole-40-0.3",
    "test_percentile_mask and several-ties-torch.bfloat16",
    "test_sega_guidance and whole-warming-torch.float32",
    "test_sega_guidance and staged-masked-torch.float16",
    "test_sega_guidance and several-summed-torch.float32",
    "test_exact_steps and torch.float32-torch.bfloat16",
    "test_float_steps and torch.bfloat16-torch.float32",
)
CORE = {  # files, a selection, and how many tests it holds
    "attention": (
        ("test_backends.py",),
        f"triton and ({' or '.join(ATTENTION)})",
        len(ATTENTION),
    ),
    "more attention": (
        ("test_backends.py",),
        f"triton and ({' or '.join(MORE_ATTENTION)})",
        len(MORE_ATTENTION),
    ),
    "guidance and steps": (
        ("gpu_sega.py", "gpu_steps.py"),
        " or ".join(f"({part})" for part in OTHERS),
        len(OTHERS),
    ),
}
LONG_TABLES = {
    "attention": (("test_backends.py", "triton_attention.py", "triton_lists.py"), "triton"),
}
HALF = "attention in bfloat16"  # what continuous integration has time for
SHORT_TABLES = {
    HALF: (("test_backends.py",), "triton and bfloat16"),
    "guidance and steps": (("gpu_sega.py", "gpu_steps.py"), ""),
    "public ops": (("triton_backend.py",), ""),
}
TABLES = LONG_TABLES | SHORT_TABLES


def emulate(files: tuple[str, ...], selection: str, *options: str, path: Path | None = None) -> str:
    """The output of a run of these files, which must pass."""
    command = ("-q", "-rN", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "ptx.plugin")
    environment = {"PYTHONPATH": str(path)} if path else {}
    done = forked.run(
        forked.PYTEST, *command, "-k", selection, *options, *files, cwd=BACKENDS, **environment
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "part",
    ["attention", pytest.param("more attention", marks=pytest.mark.full), "guidance and steps"],
)
def test_core(part: str) -> None:
    *core, count = CORE[part]
    assert f"{count} passed" in emulate(*core, "--ptx-order", "each")


@pytest.mark.full
@pytest.mark.parametrize("part", CORE)
def test_core_by_the_oldest_triton(part: str) -> None:
    if not OLDEST.exists():
        pytest.skip("Triton 3.6.0 is not installed: make test ARGS='-m full' does it")
    *core, count = CORE[part]
    assert f"{count} passed" in emulate(*core, path=OLDEST)


@pytest.mark.full
@pytest.mark.parametrize(
    ("part", "target", "order"),
    [
        *((part, "sm_80", "random") for part in SHORT_TABLES),
        *(pytest.param(part, "sm_80", "random", marks=pytest.mark.long) for part in LONG_TABLES),
        *(
            pytest.param(part, "sm_90", "backward", marks=pytest.mark.long)
            for part in TABLES
            if part != HALF
        ),
    ],
)
def test_tables(part: str, target: str, order: str) -> None:
    emulate(*TABLES[part], "-m", "not full", "--ptx-target", target, "--ptx-order", order)


@pytest.mark.full
@pytest.mark.long
@pytest.mark.parametrize("part", ["attention", "more attention"])
def test_inexact_units_as_far_off_as_they_may(part: str) -> None:
    *core, count = CORE[part]
    assert f"{count} passed" in emulate(*core, "--ptx-harsh")
