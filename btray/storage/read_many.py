"""Reading many files or objects at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from btray import storage
from btray.storage import StorageError, packed

Answer = bytes | StorageError
"""What a file or object holds, or why it could not be read."""
Found = TypeVar("Found")

UNREACHABLE_CODES = ("unavailable", "throttled")
"""Codes of a store that answers nothing, or nobody for now: it is worth waiting for."""

# Seconds a local file may take, on average after the first ones, for the next one to be read without a thread.
_QUICK = 0.001
_GRACE = 8


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


def until_dead(ask: Callable[..., Found]) -> Callable[..., Found | StorageError]:
    """`ask`, whose first argument is a URI, with the StorageErrors that it raises as answers; for use by many threads.

    Once a store has not answered, or refused as too many requests, for PATIENCE seconds while nothing else was answered
    either, it is not asked again: all else has that error at once, so that a dead store costs seconds and not seconds
    for each URI.
    """
    answers = 0
    dead: StorageError | None = None

    def asked(uri: str, *more: Any) -> Found | StorageError:
        nonlocal answers, dead
        if dead is not None:
            return StorageError(dead.code, uri, f"not tried after {dead}")
        before = answers
        result: Found | StorageError
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
