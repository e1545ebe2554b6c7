"""Reading many files or objects at once, without wasting time on a store that is down."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from itertools import islice
from typing import Any, TypeGuard, TypeVar

from btray import storage
from btray.storage import StorageError, packed, s3
from btray.storage.errors import UNREACHABLE_CODES
from btray.storage.retry import backoff_delays

ReadResult = bytes | StorageError
"""What a file or object holds, or why it could not be read."""
Request = TypeVar("Request")
Result = TypeVar("Result")

# Seconds a local file may take, on average after the first _GRACE ones, for the next one to be read without a thread.
_QUICK = 0.001
_GRACE = 8
_AT_A_TIME = 16
_PAUSE = 1.0  # seconds between two looks whether a store is back


def read_many(
    uris: Sequence[str], *, etags: Sequence[str] | None = None, threads: int = 16, max_bytes: int | None = None
) -> list[ReadResult]:
    """Return what `storage.read_bytes` gives or raises for each URI, in their order.

    Local files are read one after the other for as long as that is quick: to wake a thread takes as long as to read six
    files that the system has in its cache. A store that is down is left alone: see `until_dead`.

    Args:
        uris: Of files, objects or members of packed archives.
        etags: Those that the objects were listed with, if no other bytes are wanted; an empty one: any are.
        threads: The most objects read at the same time.
        max_bytes: The largest size that is read; None: any is.
    """
    expected = etags or [""] * len(uris)
    read = until_dead(lambda uri, etag: storage.read_bytes(uri, max_bytes=max_bytes, etag=etag))
    if len(uris) < 2 or threads < 2 or all(map(packed.is_member, uris)):  # a shard is read once for all its members
        return list(map(read, uris, expected))
    results: list[ReadResult] = []
    started = time.perf_counter()
    for uri, etag in zip(uris, expected, strict=True):
        if storage.is_remote(uri) or time.perf_counter() - started > _QUICK * (len(results) + _GRACE):
            break
        results.append(read(uri, etag))
    if left := len(uris) - len(results):
        with ThreadPoolExecutor(min(threads, left)) as pool:
            results += pool.map(read, uris[-left:], expected[-left:])
    return results


def in_threads(read: Callable[[Request], Result], items: Iterable[Request]) -> Iterator[tuple[Request, Result]]:
    """Yield items with what `read` makes of each, in their order; some are read at a time, and memory holds few."""
    left = iter(items)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        while some := list(islice(left, 4 * _AT_A_TIME)):
            # In this thread's context, which holds the timeout of retries.
            readings = [pool.submit(copy_context().run, read, item) for item in some]
            for item, reading in zip(some, readings, strict=True):
                yield item, reading.result()


def until_dead(request: Callable[..., Result]) -> Callable[..., Result | StorageError]:
    """Wrap `request`, whose first argument is a URI, for many threads: it returns StorageErrors instead of raising.

    Once a store has not answered, or has refused as one request too many, until the retries ended, and nothing else was
    answered meanwhile either, it is not asked again: all further requests get that error at once. So a dead store costs
    seconds and not seconds for each URI.
    """
    answered = 0
    dead: StorageError | None = None

    def guarded(uri: str, *more: Any) -> Result | StorageError:
        nonlocal answered, dead
        if dead is not None:
            return StorageError(dead.code, uri, f"not tried after {dead}")
        before = answered
        result: Result | StorageError
        try:
            result = request(uri, *more)
        except StorageError as error:
            result = error
        if not _is_unreachable(result):
            answered += 1
        elif answered == before:
            dead = result
        return result

    return guarded


def read_patiently(
    requests: Sequence[Request], read: Callable[[Sequence[Request]], Sequence[Result | StorageError]], patience: float
) -> list[Result | StorageError]:
    """Return what `read` gives for each of `requests`, asking again for what was unreachable once the store is back.

    A store that does not answer, or refuses every request as one too many (as a proxy does while the store itself is
    down), is abandoned after `patience` seconds. One that answers, but not for these objects, is asked for them once
    more: a single broken object must not hold up the others.

    Args:
        requests: What is to be read, for example URIs.
        read: Reads some of `requests`; gives a result or the error of each, in their order.
        patience: Seconds to wait for a store that does not answer.
    """
    results = list(read(requests))
    delays = backoff_delays(patience, first=_PAUSE, longest=_PAUSE)
    while unreachable := [(number, result) for number, result in enumerate(results) if _is_unreachable(result)]:
        delay = next(delays, None)
        uri = unreachable[0][1].uri
        if delay is None or _store_answers(uri):
            for (number, _), result in zip(unreachable, read([requests[n] for n, _ in unreachable]), strict=True):
                results[number] = result
            # A store may refuse to be read while it can be listed: only an object that it gave shows that it is back.
            all_throttled = all(isinstance(result, StorageError) and result.code == "throttled" for result in results)
            if delay is None or (_store_answers(uri) and not all_throttled):
                break
        time.sleep(delay)
    return results


def _is_unreachable(result: object) -> TypeGuard[StorageError]:
    return isinstance(result, StorageError) and result.code in UNREACHABLE_CODES


def _store_answers(uri: str) -> bool:
    """Return whether the store of `uri` answers a request for its bucket or folder, with whatever code."""
    around = f"s3://{s3.split(uri)[0]}" if storage.is_remote(uri) else os.path.dirname(uri)
    try:
        storage.is_folder(around)
    except StorageError as error:
        return not error.retryable
    return True
