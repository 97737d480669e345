"""A file of measurements that is of no use is as if it were not there."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dense_attn import _tuned

FOUND = {"a call": {"BLOCK_M": 64}}


def test_what_was_kept_is_read_and_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.json"
    _tuned.keep(file, FOUND)
    _tuned.keep(file, {"another": {"BLOCK_M": 32}})
    assert _tuned.read(file) == FOUND | {"another": {"BLOCK_M": 32}}
    assert [path.name for path in file.parent.iterdir()] == ["found.json"]


NONSENSE = {
    "half": "{",
    "a list": "[]",
    "a number for an entry": '{"a": 3}',
    "no UTF-8": b"\xff\xfe",
    "nothing": "",
    "deep": "[" * 10**5,
}


@pytest.mark.parametrize("content", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_costs_a_warning_and_makes_room(content: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="dense_attn measures anew: .*found.json cannot be read: "):
        assert _tuned.read(file) == {}
    _tuned.keep(file, FOUND)
    assert _tuned.read(file) == FOUND


def test_a_folder_keeps_nothing(tmp_path: Path) -> None:
    assert _tuned.read(tmp_path) == {}
    with pytest.warns(
        UserWarning, match=f"for this process alone: {tmp_path} cannot be written: it is a folder"
    ):
        _tuned.keep(tmp_path, FOUND)
    assert list(tmp_path.iterdir()) == []


def test_below_a_file_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert _tuned.read(tmp_path / "file" / "found.json") == {}
    with pytest.warns(UserWarning, match="for this process alone"):
        _tuned.keep(tmp_path / "file" / "found.json", FOUND)


def test_devices_and_pipes_keep_nothing_and_stay(tmp_path: Path) -> None:
    """Nor is anybody waited for at the other end of a pipe."""
    os.mkfifo(tmp_path / "pipe")
    for path in (Path(os.devnull), tmp_path / "pipe"):
        _tuned.keep(path, FOUND)
        assert _tuned.read(path) == {}
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_disk_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuses)
    with pytest.warns(UserWarning, match="found.json cannot be written: Read-only file system"):
        _tuned.keep(tmp_path / "found.json", FOUND)
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_the_named_one_or_in_the_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DENSE_ATTN_AUTOTUNE_CACHE", str(tmp_path / "mine"))
    assert _tuned.cache_file() == tmp_path / "mine"
    monkeypatch.setenv("DENSE_ATTN_AUTOTUNE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _tuned.cache_file() == tmp_path / "dense_attn" / "autotune.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _tuned.cache_file() == tmp_path / ".cache" / "dense_attn" / "autotune.json"


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DENSE_ATTN_AUTOTUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert _tuned.cache_file() is None
    assert _tuned.read(None) == {}
    _tuned.keep(None, FOUND)


WRITER = """
import sys
from pathlib import Path
from dense_attn import _tuned
for turn in range(30):
    _tuned.keep(Path(sys.argv[1]), {f"{sys.argv[2]} {turn}": {"BLOCK_M": turn}})
"""


def test_two_writers_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), name]) for name in "ab"]
    while any(writer.poll() is None for writer in writers):
        if file.exists():
            json.loads(file.read_text())  # whole at any moment
    assert [writer.returncode for writer in writers] == [0, 0]
    assert {f"{name} 29" for name in "ab"} & _tuned.read(file).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
