"""Measured launch configurations, and verdicts of `verify`, in files that kernels know nothing of.

A file that is of no use is as if it were not there: nothing here fails.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dense_attn import _environment, _files, _progress

Found = dict[str, dict[str, Any]]  # the fields of a configuration, by what it was measured for


def requested() -> bool:
    """Whether configurations are measured."""
    return _environment.flag("DENSE_ATTN_AUTOTUNE")


def cache_file(name: str = "autotune.json") -> Path | None:
    """Where what was found is kept, None where there is no home to keep it in."""
    named, folder = (
        _environment.text("DENSE_ATTN_AUTOTUNE_CACHE"),
        _environment.text("XDG_CACHE_HOME"),
    )
    if named is not None and name == "autotune.json":
        return Path(named)
    try:
        return Path(folder or Path.home() / ".cache") / "dense_attn" / name
    except RuntimeError:
        return None


def bar(total: int, call: str) -> AbstractContextManager[Callable[..., None]]:
    """A bar that goes on with each configuration that is measured for a call."""
    return _progress.bar(total, f"dense_attn measures {call}", shown=True, unit="configuration")


def read(path: Path | None) -> Found:
    """The configurations that were found before."""
    try:
        return _entries(path)
    except Exception as error:  # a file may hold anything
        warnings.warn(f"dense_attn measures anew: {path} cannot be read: {error}", stacklevel=2)
        return {}


def keep(path: Path | None, found: Found) -> None:
    """Write what was found; what another process has found since stays."""
    if path is None or _is_special(path):
        return
    try:
        before = _entries(path)
    except Exception:
        before = {}  # what means nothing makes room
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _files.write(path, json.dumps(before | found, indent=1) + "\n")
    except Exception as error:
        warnings.warn(
            f"dense_attn keeps its measurements for this process alone: {error}", stacklevel=2
        )


def _entries(path: Path | None) -> Found:
    if path is None or _is_special(path):
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return {}
    return {str(key): dict(values) for key, values in json.loads(text).items()}


def _is_special(path: Path) -> bool:
    """A device or a pipe, which keeps nothing; whoever reads one may wait forever."""
    try:
        return path.exists() and not (path.is_file() or path.is_dir())
    except OSError:
        return False
