"""Reading many files or objects at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeGuard, TypeVar

from btray import storage
from btray.storage import StorageError, packed, s3

Answer = bytes | StorageError
"""What a file or object holds, or why it could not be read."""
Request = TypeVar("Request")
Result = TypeVar("Result")

UNREACHABLE_CODES = ("unavailable", "throttled")
"""Codes of a store that answers nothing, or nobody for now: it is worth waiting for."""

# Seconds a local file may take, on average after the first ones, for the next one to be read without a thread.
_QUICK = 0.001
_GRACE = 8
_PAUSE = 1.0  # seconds between two looks whether a store is back


def read_many(
    uris: Sequence[str], *, etags: Sequence[str] | None = None, threads: int = 16, max_bytes: int | None = None
) -> list[Answer]:
    """What `storage.read_bytes` gives or raises for each URI, in their order, read by up to `threads` at a time.

    `etags` are those that the objects were listed with, where no others are wanted; an empty one: any is.

    Local files are read one after the other for as long as that is quick: to wake a thread takes as long as to read six
    files that the system has at hand. A store that is dead is left alone: see `until_dead`.
    """
    wanted = etags or [""] * len(uris)
    read = until_dead(lambda uri, etag: storage.read_bytes(uri, max_bytes=max_bytes, etag=etag))
    if len(uris) < 2 or threads < 2 or all(map(packed.is_member, uris)):  # a shard is read once for all its members
        return list(map(read, uris, wanted))
    quickly = _while_quick(read, uris, wanted)
    left = len(uris) - len(quickly)
    if not left:
        return quickly
    with ThreadPoolExecutor(min(threads, left)) as pool:
        return quickly + list(pool.map(read, uris[-left:], wanted[-left:]))


def until_dead(ask: Callable[..., Result]) -> Callable[..., Result | StorageError]:
    """`ask`, whose first argument is a URI, with the StorageErrors that it raises as answers; for use by many threads.

    Once a store has not answered, or refused as too many requests, for PATIENCE seconds while nothing else was answered
    either, it is not asked again: all else has that error at once, so that a dead store costs seconds and not seconds
    for each URI.
    """
    answers = 0
    dead: StorageError | None = None

    def asked(uri: str, *more: Any) -> Result | StorageError:
        nonlocal answers, dead
        if dead is not None:
            return StorageError(dead.code, uri, f"not tried after {dead}")
        before = answers
        result: Result | StorageError
        try:
            result = ask(uri, *more)
        except StorageError as error:
            result = error
        if not isinstance(result, StorageError) or result.code not in UNREACHABLE_CODES:
            answers += 1
        elif answers == before:
            dead = result
        return result

    return asked


def _while_quick(read: Callable[[str, str], Answer], uris: Sequence[str], etags: Sequence[str]) -> list[Answer]:
    """What `read` gives for the first of `uris`, up to an object in a store or until local reading turns out slow."""
    answers: list[Answer] = []
    started = time.perf_counter()
    for uri, etag in zip(uris, etags, strict=True):
        if storage.is_remote(uri) or time.perf_counter() - started > _QUICK * (len(answers) + _GRACE):
            break
        answers.append(read(uri, etag))
    return answers


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
    deadline = time.monotonic() + patience
    while unreachable := [(number, result) for number, result in enumerate(results) if _is_unreachable(result)]:
        late = time.monotonic() > deadline
        uri = unreachable[0][1].uri
        if late or _store_answers(uri):
            for (number, _), result in zip(unreachable, read([requests[n] for n, _ in unreachable]), strict=True):
                results[number] = result
            # A store that throttles everything may still answer the look below: only a served object ends the wait.
            all_throttled = all(isinstance(result, StorageError) and result.code == "throttled" for result in results)
            if late or (_store_answers(uri) and not all_throttled):
                break
        time.sleep(_PAUSE)
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
