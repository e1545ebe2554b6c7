"""Listing a large prefix by many requests at a time; use `btray.storage` instead.

Sub-prefixes are discovered and listed in threads, each by itself: so no key is lost in stores that do not list in the
order of bytes either, as SeaweedFS does not.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from typing import Any

from btray.storage.file_info import FileInfo
from btray.storage.s3 import describe, files_of, pages_of, prefix_of, split

_FIRST_PAGES = 16  # that are listed one after the other: a prefix of few objects needs no more
_LISTERS = 16  # threads
_WIDE = 32  # sub-prefixes of a prefix whose own sub-prefixes need not be looked for
_DEPTH = 3


def list_files_unordered(uri: str) -> Iterator[FileInfo]:
    """Yield what `s3.list_files` does, in any order. Memory holds some pages, and the names of sub-prefixes."""
    first: set[str] = set()
    more = False
    for page in islice(pages_of(uri), _FIRST_PAGES):
        more = bool(page.get("IsTruncated"))
        if not page.get("Contents") and not first and split(uri)[1]:
            yield describe(uri)
        for info in files_of(uri, page):
            first.add(info.uri)
            yield info
    if more:
        yield from (info for info in _Lister(uri) if info.uri not in first)


class _Lister:
    """Lists what is below `uri` in threads, each sub-prefix by itself."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._pages: queue.Queue[list[FileInfo] | BaseException | None] = queue.Queue(2 * _LISTERS)
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(_LISTERS)
        self._started, self._lock = 0, threading.Lock()

    def __iter__(self) -> Iterator[FileInfo]:
        """Yield the objects as pages of them come."""
        try:
            self._submit(self._folder, prefix_of(self._uri), _DEPTH)
            done = 0
            while done < self._started:
                page = self._pages.get()
                if isinstance(page, BaseException):
                    raise page
                done += page is None
                yield from page or ()
        finally:
            self._ended.set()
            self._pool.shutdown(cancel_futures=True)

    def _folder(self, prefix: str, depth: int) -> None:
        """List what is directly below a prefix, and have its sub-prefixes listed: those of a narrow one like itself."""
        for number, page in enumerate(pages_of(self._uri, Prefix=prefix, Delimiter="/")):
            self._put(list(files_of(self._uri, page)))
            below = [item["Prefix"] for item in page.get("CommonPrefixes", ())]
            narrow = depth > 1 and number == 0 and len(below) < _WIDE and not page.get("IsTruncated")
            for name in below:
                self._submit(self._folder, name, depth - 1) if narrow else self._submit(self._all, name)

    def _all(self, prefix: str) -> None:
        for page in pages_of(self._uri, Prefix=prefix):
            self._put(list(files_of(self._uri, page)))

    def _submit(self, function: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            self._started += 1
        with contextlib.suppress(RuntimeError):  # the pool is shut down: nobody takes more
            self._pool.submit(copy_context().run, self._run, function, *arguments)

    def _run(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(_Ended):
            try:
                function(*arguments)
                self._put(None)
            except _Ended:
                raise
            except BaseException as error:  # it is raised again where the pages are taken
                self._put(error)

    def _put(self, page: list[FileInfo] | BaseException | None) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(queue.Full):
                return self._pages.put(page, timeout=1.0)
        raise _Ended


class _Ended(Exception):
    """Nobody takes pages any more."""
