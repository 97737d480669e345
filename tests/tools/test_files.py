"""Files are written whole or not at all, and one sentence says what cannot be."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest

from dense_attn import _files

ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False
SOURCES = Path(__file__).resolve().parents[2]
WRITES = re.compile(
    r"""write_(text|bytes)\(|savefig\(\w|\.save\((?!buffer\b)[\w"']|save_file\(|os\.replace|\.rename\(|open\([^()]*["'][wax]b?["']"""
)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB with a file on it and 8 KiB left."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not ROOT or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs root, who may mount one")
    try:
        (disk / "there").write_bytes(b"x" * 56 * 1024)
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_text_is_utf_8_and_bytes_are_bytes(tmp_path: Path) -> None:
    _files.write(tmp_path / "text", "žluťoučký")
    _files.write_by(tmp_path / "bytes", lambda file: file.write(b"\xff\0"))
    assert (tmp_path / "text").read_bytes().decode() == "žluťoučký"
    assert (tmp_path / "bytes").read_bytes() == b"\xff\0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


def test_a_new_file_has_what_the_umask_leaves_and_a_replaced_one_its_own_mode(
    tmp_path: Path,
) -> None:
    before = os.umask(0o027)
    try:
        _files.write(tmp_path / "new", "1")
        (tmp_path / "old").write_text("1")
        (tmp_path / "old").chmod(0o604)
        _files.write(tmp_path / "old", "2")
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o640
    assert mode(tmp_path / "old") == 0o604
    assert (tmp_path / "old").read_text() == "2"


@pytest.mark.skipif(not ROOT, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("1")
    os.chown(tmp_path / "theirs", 12345, 23456)
    _files.write(tmp_path / "theirs", "2")
    assert ((tmp_path / "theirs").stat().st_uid, (tmp_path / "theirs").stat().st_gid) == (
        12345,
        23456,
    )


@pytest.mark.parametrize("there", [True, False], ids=["file", "dangling"])
def test_a_link_stays_one(tmp_path: Path, there: bool) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    if there:
        target.write_text("1")
    (tmp_path / "link").symlink_to(Path("folder", "target"))
    (tmp_path / "second").symlink_to(tmp_path / "link")
    _files.check(tmp_path / "second")
    assert target.exists() == there
    _files.write(tmp_path / "second", "2")
    assert target.read_text() == "2"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "second").is_symlink()


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    _files.check(os.devnull)
    _files.write(os.devnull, "1")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert not _files.is_kept(os.devnull)
    if ROOT:  # a node of its own: were it replaced, no harm would be done
        os.mknod(tmp_path / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        _files.write(tmp_path / "null", "1")
        assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)


def test_a_named_pipe_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    _files.check(tmp_path / "pipe")  # without waiting for a reader
    reader.start()
    _files.write(tmp_path / "pipe", "through")
    reader.join(10)
    assert read == ["through"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


PROGRAM = (
    "from dense_attn._files import write; print('before'); write('/dev/stdout', 'written\\n'); "
    "print('after')"
)


def test_standard_output_takes_what_is_written_in_its_turn() -> None:
    """Into a pipe, and into a file that is not cut off."""
    command = [sys.executable, "-c", PROGRAM]
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    filed = forked.run(PROGRAM).stdout  # of a file
    assert piped == filed == "before\nwritten\nafter\n"


def test_a_full_disk_leaves_what_was_there(full_disk: Path) -> None:
    for name in ("there", "new"):
        with pytest.raises(_files.FileError) as refused:
            _files.write(full_disk / name, b"y" * 32 * 1024)
        assert (
            str(refused.value) == f"{full_disk / name} cannot be written: No space left on device"
        )
    assert [path.name for path in full_disk.iterdir()] == ["there"]
    assert (full_disk / "there").read_bytes() == b"x" * 56 * 1024


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"]
)
def test_what_ends_in_the_middle_leaves_what_was_there(
    function: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").write_text("1")

    def ends(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, function, ends)
    with pytest.raises(
        KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else _files.FileError
    ):
        _files.write(tmp_path / "there", "2")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "1"


@pytest.mark.parametrize("content", ["2", "", "2" * 100])
@pytest.mark.parametrize(
    "number", [errno.EBUSY, errno.EPERM], ids=["mounted", "another user's in a sticky folder"]
)
def test_a_name_that_cannot_be_replaced_keeps_its_file(
    number: int, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "there").write_text("1" * 10)
    before = (tmp_path / "there").stat().st_ino
    monkeypatch.setattr(os, "replace", refuses)
    _files.write(tmp_path / "there", content)
    assert ((tmp_path / "there").read_text(), (tmp_path / "there").stat().st_ino) == (
        content,
        before,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with pytest.raises(_files.FileError):
        _files.write(tmp_path / "new", "1")


def test_such_a_file_is_left_alone_where_there_is_no_room(full_disk: Path) -> None:
    _files._overwrite(full_disk / "there", (full_disk / "there").stat(), b"y" * 60 * 1024)
    (full_disk / "there").write_bytes(b"x" * 56 * 1024)
    with pytest.raises(OSError, match="No space left"):
        _files._overwrite(full_disk / "there", (full_disk / "there").stat(), b"y" * 80 * 1024)
    assert (full_disk / "there").read_bytes() == b"x" * 56 * 1024


@pytest.mark.parametrize(
    "ask", [_files.check, lambda path: _files.write(path, "1")], ids=["check", "write"]
)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "it is a folder"),
        ("no/such", "No such file or directory"),
        ("file/below", "Not a directory"),
        ("loop", "Too many levels of symbolic links"),
        ("n" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_said_in_one_sentence(
    ask: object, name: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(_files.FileError) as refused:
        ask(tmp_path / name)
    assert str(refused.value) == f"{tmp_path / name} cannot be written: {reason}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_a_check_leaves_nothing_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("1")
    before = (tmp_path / "there").stat()
    _files.check(tmp_path / "there")
    _files.check(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").stat().st_mtime_ns == before.st_mtime_ns
    assert _files.is_kept(tmp_path / "there")
    assert _files.is_kept(tmp_path / "new")


UNWRITABLE = ("closed/new", "closed/open", "locked")
PERMISSIONS = f"""
import os, sys
from pathlib import Path
from dense_attn import _files
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
for name in {UNWRITABLE}:
    for ask in (_files.check, lambda path: _files.write(path, "2")):
        try:
            ask(Path(sys.argv[1], name))
        except _files.FileError as error:
            print(error)
"""


def test_an_unwritable_folder_or_file() -> None:
    """Act as a user who is not root, in a folder that this one may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder, closed = Path(name), Path(name, "closed")
        closed.mkdir()
        for file, allowed in ((closed / "open", 0o666), (folder / "locked", 0o444)):
            file.write_text("1")
            file.chmod(allowed)
        folder.chmod(0o777)
        closed.chmod(0o555)
        command = [sys.executable, "-c", PERMISSIONS, name]
        lines = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        closed.chmod(0o755)
        expected = [
            f"{folder / file} cannot be written: Permission denied"
            for file in UNWRITABLE
            for _ in range(2)
        ]
        assert lines == expected
        assert (folder / "locked").read_text() == (closed / "open").read_text() == "1"
        assert [path.name for path in closed.iterdir()] == ["open"]


@pytest.mark.parametrize("folder", ["dense_attn", "benchmarks", "examples", "triton_kernels"])
def test_nothing_else_writes_a_file(folder: str) -> None:
    """The exceptions are logs of `make gpu`, a switch of the system, examples in docstrings, and
    lines that the page shows; a `buffer` is memory.
    """
    others = {"_files.py", "gpu.py", "_memory.py", "code.py"}
    for path in (SOURCES / folder).rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        code = "\n".join(line for line in lines if not line.lstrip().startswith((">>> ", "... ")))
        assert path.name in others or not WRITES.search(code), path


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text(x)",
        "figure.savefig(output)",
        "image.save('x.png')",
        "os.replace(a, b)",
        "open(path, 'w')",
        "torch.save(state, path)",
        'log.open("w")',
        'open(name, "wb")',
    ],
)
def test_what_writes_a_file_is_seen(line: str) -> None:
    assert WRITES.search(line)
