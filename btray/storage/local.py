"""How `btray.storage` writes local files whole or not at all; use that module instead."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from btray.storage.errors import StorageError, storage_errors_for

_TEMPORARY = ".tmp"


def replace(path: str, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write what `fill` writes over what was there; makes folders. Raises StorageError."""
    with storage_errors_for(path), _filled_beside(path, fill) as temporary:
        os.replace(temporary, path)


def create(path: str, data: bytes) -> bool:
    """Write `data` where nothing is there yet; False where something is. Raises StorageError."""
    with storage_errors_for(path), _filled_beside(path, lambda file: file.write(data)) as temporary:
        try:
            os.link(temporary, path)  # unlike a rename it fails where the name is taken
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
    there = folder
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise StorageError("failed", folder, f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError("forbidden", folder, f"{there} may not be written to")


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
    """A finished file in the folder of `path`, for the block to put in place; what it leaves there is removed."""
    folder = os.path.dirname(path) or "."
    # hidden: no reader takes it for data, also after a kill
    temporary = f"{folder.rstrip('/')}/.{uuid.uuid4().hex}{_TEMPORARY}"
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
    _sync(folder)


def _sync(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
