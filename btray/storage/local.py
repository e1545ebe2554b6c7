"""Local files as `btray.storage` lists and reads them, and writes them whole or not at all; use that module instead."""

from __future__ import annotations

import errno
import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from btray.storage.errors import StorageError, check_file, storage_errors_for, suppress_missing
from btray.storage.file_info import FileInfo, is_hidden
from btray.storage.retry import retry

_log = logging.getLogger(__name__)
_TEMPORARY = ".tmp"


# ---- looking and reading


def is_folder(path: str) -> bool:
    """Return whether a folder is there. Raises StorageError if that cannot be told."""
    with suppress_missing(), storage_errors_for(path):
        return stat.S_ISDIR(os.stat(path).st_mode)
    return False


def describe(path: str) -> FileInfo:
    """Return one file as it would be listed. Raises StorageError."""
    with storage_errors_for(path):
        return _info(path, os.stat(path))


def list_files(path: str) -> Iterator[FileInfo]:
    """List a file, or all files below a folder, as `btray.storage.list_files` says."""
    with storage_errors_for(path):
        status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        yield from _walk(path, {(status.st_dev, status.st_ino)})
    else:
        yield _info(path, status)


def list_names(folder: str) -> list[str]:
    """Return the names in a folder, sorted. Raises StorageError."""
    with storage_errors_for(folder):
        return sorted(os.listdir(folder))


def _walk(folder: str, above: set[tuple[int, int]]) -> Iterator[FileInfo]:
    with storage_errors_for(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        if is_hidden(name):
            continue
        path = os.path.join(folder, name)
        try:
            status = os.stat(path)
        except OSError:
            yield FileInfo(_printable(path), 0, "", 0.0)
            continue
        identity = (status.st_dev, status.st_ino)
        if not stat.S_ISDIR(status.st_mode):
            yield _info(path, status)
        elif identity not in above:  # a link back to a folder above: its files are listed there
            yield from _walk(path, above | {identity})


def _info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(_printable(path), status.st_size, _etag_of(status), status.st_mtime)


def _etag_of(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _printable(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        # without the name: a job may keep secret what its results call the file
        _log.warning("the name of a file is not UTF-8: it will be reported as not_found; rename it")
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    return path


def read(path: str, max_bytes: int | None, etag: str = "") -> bytes:
    """Return a whole file, as `btray.storage.read_bytes` says. Raises StorageError."""

    def attempt() -> bytes:
        # without O_NONBLOCK, opening a named pipe that nobody writes to would wait for ever
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            check_file(path, status.st_size, max_bytes, _etag_of(status), etag)
            return file.read()

    with storage_errors_for(path):
        return retry(attempt)


# ---- writing


def replace(path: str, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write what `fill` writes over what was there; makes folders. Raises StorageError."""
    with storage_errors_for(path), _filled_beside(path, fill) as temporary:
        os.replace(temporary, path)


def create(path: str, data: bytes) -> bool:
    """Write `data` if nothing is there yet; return False if something is. Raises StorageError."""
    with storage_errors_for(path), _filled_beside(path, lambda file: file.write(data)) as temporary:
        try:
            os.link(temporary, path)  # unlike a rename it fails if the name is taken
        except FileExistsError:
            return False
        except PermissionError:  # a file system without hard links
            if os.path.exists(path):
                return False
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return True


def require_writable(folder: str) -> None:
    """Raise StorageError unless `folder`, or the one in which it would be made, may be written to. Makes nothing."""
    existing = folder
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise StorageError("failed", folder, f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError("forbidden", folder, f"{existing} may not be written to")


def remove_temporaries(folder: str) -> None:
    """Remove what killed writers left in a folder, if it is there; its names are not gathered. Raises StorageError."""
    if not os.path.isdir(folder):
        return
    with storage_errors_for(folder), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") and entry.name.endswith(_TEMPORARY):
                Path(entry.path).unlink(missing_ok=True)


@contextmanager
def _filled_beside(path: str, fill: Callable[[IO[bytes]], Any]) -> Iterator[str]:
    """Give a finished file in the folder of `path`, for the block to put in place; what it leaves there is removed."""
    folder = os.path.dirname(path) or "."
    # hidden: no reader takes it for data, also after a kill
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}{_TEMPORARY}")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    # the rename is durable only once its folder is: without this, a power cut could leave the old name
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
