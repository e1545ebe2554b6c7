"""Headers of many objects, read by ranges from their beginning, so that series can be chosen without their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Final

from btray import storage
from btray.bulk.clinical.pseudonyms import Pseudonyms
from btray.bulk.clinical.series import SeriesFilter
from btray.data.scans import ScanRejected, SliceInfo, read_info
from btray.pacs.source import PacsSource
from btray.storage import FileInfo, StorageError, packed
from btray.storage.ranges import read_range
from btray.storage.read_many import read_patiently, until_dead

_FIRST: Final = 64 << 10  # bytes; most headers are shorter

Header = SliceInfo | ScanRejected | StorageError | None
"""What an object says of its first frame: nothing, if it is a picture; or why that cannot be told."""


class HeaderReader:
    """Reads the headers of objects, `threads` at a time, of which some are chosen by `choice`."""

    def __init__(
        self,
        choice: SeriesFilter,
        *,
        threads: int,
        patience: float,
        pseudonyms: Pseudonyms | None = None,
        pacs: PacsSource | None = None,
    ) -> None:
        """Read by ranges, or ask `pacs`; `pseudonyms` are those that objects are listed with."""
        self.choice = choice
        self._pseudonyms = pseudonyms
        self._pacs = pacs
        self._patience = patience
        self._threads = ThreadPoolExecutor(threads)

    def read(self, objects: Sequence[FileInfo]) -> list[Header]:
        """Return the headers of some objects, in their order."""
        names = self._pseudonyms
        uris = [names.place(info.place) if names else info.place or info.uri for info in objects]
        if self._pacs:
            return [*self._pacs.headers(uris)]
        return read_patiently(uris, self._read, self._patience)

    def _read(self, uris: Sequence[str]) -> list[Header]:
        guarded = until_dead(read_header)
        # In this thread's context, which holds the timeout of retries.
        reading = [self._threads.submit(copy_context().run, partial(guarded, uri)) for uri in uris]
        return [header.result() for header in reading]


def read_header(uri: str) -> Header:
    """Return what one object says of its first frame. Raises StorageError."""
    if packed.is_member(uri):
        return _info(storage.read_bytes(uri))
    data, wanted = b"", _FIRST
    while True:
        data += read_range(uri, len(data), wanted)
        header = _info(data)
        if len(data) < wanted or not (isinstance(header, ScanRejected) and header.code == "truncated"):
            return header
        wanted *= 2


def _info(data: bytes) -> SliceInfo | ScanRejected | None:
    try:
        return read_info(data)
    except ScanRejected as error:
        return error
