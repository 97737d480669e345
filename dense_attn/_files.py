"""Files are written whole or not at all: the one way in which anything here writes one."""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


class FileError(OSError):
    """A file that cannot be written; the message is one sentence that names it."""


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file whole, in the place of what was there, or leave everything as it was.

    Links are followed. A file that was there keeps its mode and owner, a new one has what the umask
    leaves. Devices and pipes are never replaced: the bytes go into them. So they go into a file
    whose name cannot be given to another, one that is mounted by itself or another user's in a
    folder such as /tmp, once there is room for all of them.

    Raises:
        FileError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with _sentence(path):
        found = _status(path)
        if found is not None and not _is_replaced(found):
            _pour(path, found, data)
            return
        target = Path(os.path.realpath(path))
        with _part(target, found) as (part, file):
            file.write(data)
            file.flush()
            # what a full disk keeps back shows here, not after the file has its name
            os.fsync(file.fileno())
            try:
                os.replace(part, target)
            except OSError as error:
                if found is None or error.errno not in (errno.EBUSY, errno.EPERM):
                    raise
                _overwrite(target, found, data)


def write_by(path: str | Path, save: Callable[[BinaryIO], object]) -> None:
    """Write as `write` does what save(file) puts into a binary file in memory."""
    buffer = io.BytesIO()
    save(buffer)
    write(path, buffer.getvalue())


def check(path: str | Path) -> None:
    """Raise FileError now if `write` would, as far as can be known; nothing is changed."""
    with _sentence(path):
        found = _status(path)
        if found is None or _is_replaced(found):
            with _part(Path(os.path.realpath(path)), found):
                return
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def is_kept(path: str | Path) -> bool:
    """Whether a later `write` replaces an earlier one, which it does in no pipe or terminal."""
    with _sentence(path):
        found = _status(path)
    return found is None or _is_replaced(found)


@contextmanager
def _sentence(path: str | Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise  # nobody reads what is poured: for the command to end quietly
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from error


def _status(path: str | Path) -> os.stat_result | None:
    """The status of the file that a path leads to, None where nothing is."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError("it is a folder")
    return found


def _is_replaced(found: os.stat_result) -> bool:
    """Whether it is a regular file, and not the one that output is redirected to."""
    return stat.S_ISREG(found.st_mode) and _stream_of(found) is None


def _stream_of(found: os.stat_result) -> int | None:
    """The descriptor of standard output or error that is this file."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), found):
                return descriptor
    return None


def _pour(path: str | Path, found: os.stat_result, data: bytes) -> None:
    stream = _stream_of(found)
    if stream is None:
        with open(os.open(path, os.O_WRONLY), "wb") as file:
            file.write(data)
        return
    for printed in (sys.stdout, sys.stderr):  # what was printed before comes first
        if printed is not None:
            printed.flush()
    with open(stream, "wb", closefd=False) as file:
        file.write(data)


def _overwrite(target: Path, found: os.stat_result, data: bytes) -> None:
    with open(os.open(target, os.O_WRONLY), "wb") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, len(data)))
        except OSError:
            file.truncate(found.st_size)
            raise
        file.write(data)
        file.truncate()
        os.fsync(file.fileno())


@contextmanager
def _part(target: Path, found: os.stat_result | None) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside the target, of the target's mode; gone at the end unless renamed."""
    if found is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    part = target.parent / f".{secrets.token_hex(8)}.part"
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            if found is not None:
                with suppress(OSError):  # to give a file away is root's
                    os.chown(part, found.st_uid, found.st_gid)
                with suppress(OSError):  # some disks know no modes
                    os.chmod(part, stat.S_IMODE(found.st_mode))
            yield part, file
    finally:
        with suppress(OSError):
            os.unlink(part)
