"""Listing a large prefix by many requests at a time; use `btray.storage` instead.

The keys are cut into stretches at sub-prefixes, which are discovered while the first stretches are listed already. The
stretches leave out no key, whether or not it lies below one of the sub-prefixes.
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
_WIDE = 32  # sub-prefixes of a prefix whose own sub-prefixes need not be looked at
_DEPTH = 3
_EACH = 64  # of the sub-prefixes of a wide prefix one is a bound


def list_files_unordered(uri: str) -> Iterator[FileInfo]:
    """Yield what `s3.list_files` does, in any order. Memory holds some pages."""
    last: str | None = ""
    for page in islice(pages_of(uri), _FIRST_PAGES):
        contents = page.get("Contents", ())
        if not (contents or last) and split(uri)[1]:
            yield describe(uri)
        yield from files_of(uri, page)
        last = contents[-1]["Key"] if page.get("IsTruncated") else None
    if last:
        yield from _Lister(uri, last)


class _Lister:
    """Lists the keys below `uri` that come after one in threads, a stretch each."""

    def __init__(self, uri: str, after: str) -> None:
        self._uri, self._after = uri, after
        self._pages: queue.Queue[list[FileInfo] | BaseException | None] = queue.Queue(2 * _LISTERS)
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(_LISTERS)
        self._started = 0

    def __iter__(self) -> Iterator[FileInfo]:
        """Yield the objects as pages of them come."""
        try:
            self._submit(self._cut)
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

    def _cut(self) -> None:
        """Have each stretch listed as soon as it is known where it ends, and then list the last one."""
        after = self._after
        for bound in _bounds(self._uri, prefix_of(self._uri), after, _DEPTH):
            self._submit(self._list, after, bound)
            after = bound
        self._list(after, None)

    def _list(self, after: str, last: str | None) -> None:
        for page in pages_of(self._uri, StartAfter=after):
            self._put(list(files_of(self._uri, page, last)))
            contents = page.get("Contents", ())
            if last is not None and contents and contents[-1]["Key"] > last:
                return

    def _submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._started += 1
        self._pool.submit(copy_context().run, self._run, function, *arguments)  # it holds the timeout of retries

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


def _bounds(uri: str, prefix: str, after: str, depth: int) -> Iterator[str]:
    """Yield sub-prefixes of `prefix` that come after the key `after`, in their order."""
    for number, page in enumerate(pages_of(uri, Prefix=prefix, Delimiter="/", StartAfter=after)):
        below = [item["Prefix"] for item in page.get("CommonPrefixes", ())]
        wide = number or page.get("IsTruncated") or len(below) >= _WIDE
        for name in below[::_EACH] if wide else below:
            if name > after:
                yield name
            if not wide and depth > 1:
                yield from _bounds(uri, name, max(name, after), depth - 1)
