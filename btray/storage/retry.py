"""The one retry policy: growing, jittered pauses while a store throttles or does not answer, up to a time limit."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from btray.storage.errors import FAILURES, as_storage_error

DEFAULT_TIMEOUT = 8.0
"""Seconds during which a request to a throttled or unavailable store is repeated before the failure is reported."""

Result = TypeVar("Result")

# A context variable, not a global: fsspec's thread, which makes the S3 requests, runs each of them in the context of
# the thread that asked for it.
_timeout: ContextVar[float | None] = ContextVar("_timeout", default=None)


@contextmanager
def retry_timeout(seconds: float) -> Iterator[None]:
    """Within the block, retry for `seconds` instead of DEFAULT_TIMEOUT; holds for this thread and not for others."""
    token = _timeout.set(seconds)
    try:
        yield
    finally:
        _timeout.reset(token)


def backoff_delays(timeout: float | None = None, *, first: float = 0.1, longest: float = 2.0) -> Iterator[float]:
    """Return the pauses between attempts, in seconds: doubled each time up to `longest`, with jitter.

    They end `timeout` seconds from now, by default those of `retry_timeout`; the last one is cut to end just then.
    """
    # a timeout of 0 set for a whole job (--patience 0) must not make each lost packet a failure: it means the default
    deadline = time.monotonic() + (timeout if timeout is not None else _timeout.get() or DEFAULT_TIMEOUT)

    def delays() -> Iterator[float]:
        upper = first
        while (left := deadline - time.monotonic()) > 0:
            yield min(random.uniform(upper / 2, upper), left)  # noqa: S311 - jitter, no secret
            upper = min(2 * upper, longest)

    return delays()  # the clock runs from the call on, not from the first failure


def retry(attempt: Callable[[], Result]) -> Result:
    """Return what `attempt` gives, called again as long as it fails in a way that may pass."""
    delays = backoff_delays()
    while True:
        try:
            return attempt()
        except FAILURES as error:
            delay = _delay_after(error, delays)
        time.sleep(delay)


async def retry_async(attempt: Callable[[], Awaitable[Result]]) -> Result:
    """Do the same as `retry` on an event loop."""
    delays = backoff_delays()
    while True:
        try:
            return await attempt()
        except FAILURES as error:
            delay = _delay_after(error, delays)
        await asyncio.sleep(delay)


def _delay_after(error: Exception, delays: Iterator[float]) -> float:
    """Return the pause before the next attempt, or raise `error` if there is to be none."""
    delay = next(delays, None) if as_storage_error(error, "").retryable else None
    if delay is None:
        raise error
    return delay
