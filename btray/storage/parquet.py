"""Reading Parquet files that may be damaged, apart from a store that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa

from btray import storage
from btray.storage.errors import FAILURES, StorageError

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


def read_undamaged(uri: str, read: Callable[[Any], Result], body: bytes | None = None) -> Result | None:
    """Return what `read` makes of a Parquet file, opened for reading ranges; None, with a warning, if it is damaged.

    A store that fails in the middle of it may look like damage, so the file is then fetched whole and read again.

    Args:
        uri: Of the file.
        read: Reads from an open file.
        body: Its bytes, if they were fetched already.

    Raises:
        StorageError: the file is not there, the store does not answer, and so on.
    """
    if body is None:
        try:
            with storage.storage_errors_for(uri), storage.open_ranges(uri) as file:
                return read(file)
        except (StorageError, pa.ArrowException, KeyError) as error:
            if isinstance(error, StorageError) and error.code != "failed":
                raise
        body = storage.read_bytes(uri)
    try:
        return read(pa.BufferReader(body))
    except (*FAILURES, pa.ArrowException, KeyError) as error:
        _log.warning("%s is damaged; what it held is made anew: %s", uri, " ".join(str(error).split()))
        return None


def set_aside(uri: str) -> None:
    """Move a damaged file into the folder `_damaged` beside it, where no reader looks. Raises StorageError."""
    folder, _, name = uri.rpartition("/")
    storage.write_bytes(storage.join(folder, "_damaged", name), storage.read_bytes(uri))
    storage.delete(uri)
    _log.warning("%s was damaged and lies in _damaged/ now", uri)
