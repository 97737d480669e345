"""Everything about the machine and the moment of a run that a reader of its numbers needs."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import torch

from dense_attn import __version__
from dense_attn._kernel_hashes import kernel_hashes

from ..layout_attention.workloads import label_layout
from . import machine
from .revision import git_revision

_FOLDER = Path(__file__).resolve().parent
_STATE = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def describe_run(quick: bool) -> dict[str, Any]:
    """The header of a run's results; a GPU's stands beside that of the processor that launches."""
    header = _processor()
    header["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    header["suite"] = "quick" if quick else "full"
    if not machine.on_gpu():
        return header
    here = machine.current()
    header |= {"host": header["device"], "dry_run": here.dry_run, "kernels": kernel_hashes()}
    return header | (
        {"device": "none: a dry run, whose times mean nothing"} if here.dry_run else _gpu()
    )


def _processor() -> dict[str, Any]:
    cpu = _cpu_info()
    isa = getattr(torch.ops.dense_attn, "cpu_isa", None)
    return {
        "device": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock_mhz": float(cpu["cpu MHz"]) if "cpu MHz" in cpu else None,
        "isa": isa() if isa else None,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": _versions() | (_gpu_versions() if machine.on_gpu() else {}),
        "git_revision": git_revision(),
        "regions": label_layout()[0],
    }


def _versions() -> dict[str, str | None]:
    return {
        "dense_attn": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "pytest-benchmark": _version("pytest-benchmark"),
    }


def _gpu() -> dict[str, Any]:
    """The GPU as torch knows it, and its state now as its driver tells it."""
    found = torch.cuda.get_device_properties(machine.current().device)
    return {
        "device": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "sm_count": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "driver": query_gpu("driver_version").get("driver_version"),
        "state": state_of_gpu(),
    }


def state_of_gpu() -> dict[str, str]:
    """Clocks, power and temperature at this moment; empty without a GPU."""
    here = machine.current()
    return query_gpu(*_STATE) if machine.on_gpu() and not here.dry_run else {}


def query_gpu(*fields: str) -> dict[str, str]:
    """The answer of nvidia-smi about the first GPU that torch may use; empty without one."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    query = [f"--id={first}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    options = {"check": True, "capture_output": True, "text": True, "timeout": 20}
    try:
        answer = subprocess.run(["nvidia-smi", *query], **options).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (text.strip() for text in answer.strip().split(","))))


def _gpu_versions() -> dict[str, str | None]:
    packages = {name: _version(name) for name in ("triton", "xformers", "flash-attn")}
    return packages | {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
