"""Requests are repeated by one policy: what may pass, with growing pauses, for as long as the caller allows."""

from __future__ import annotations

import asyncio
import math
import re
import threading
import time
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace

import pytest

from btray.storage import retry as policy
from btray.storage import retry_timeout
from btray.storage.retry import backoff_delays, retry, retry_async
from tests.conftest import ROOT


def run_async(attempt: Callable[[], str]) -> str:
    async def call() -> str:
        return attempt()

    return asyncio.run(retry_async(call))


both = pytest.mark.parametrize("repeat", [retry, run_async])


def test_pauses_double_with_jitter_up_to_the_longest() -> None:
    pauses = list(islice(backoff_delays(math.inf, first=1.0, longest=5.0), 6))
    for pause, upper in zip(pauses, [1, 2, 4, 5, 5, 5], strict=True):
        assert upper / 2 <= pause <= upper


def test_pauses_end_with_the_time_that_there_is_and_the_clock_runs_from_the_call_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(policy, "time", SimpleNamespace(monotonic=lambda: now))
    delays = backoff_delays(0.3, first=0.1)
    now += 0.1  # what the first attempt takes counts
    for delay in delays:
        now += delay
    assert now == pytest.approx(0.3)
    assert list(backoff_delays(0.0)) == []


@both
def test_what_may_pass_is_repeated_until_it_works(repeat: Callable[[Callable[[], str]], str]) -> None:
    failures = iter([TimeoutError("away"), ConnectionResetError("away")])

    def attempt() -> str:
        if error := next(failures, None):
            raise error
        return "done"

    assert repeat(attempt) == "done"


@both
def test_what_will_not_pass_is_tried_once(repeat: Callable[[Callable[[], str]], str]) -> None:
    attempts: list[int] = []

    def attempt() -> str:
        attempts.append(1)
        raise PermissionError(13, "no")

    with pytest.raises(PermissionError):
        repeat(attempt)
    assert len(attempts) == 1


@both
def test_what_lasts_longer_than_the_callers_time_fails_as_it_did(repeat: Callable[[Callable[[], str]], str]) -> None:
    def attempt() -> str:
        raise TimeoutError("away")

    started = time.monotonic()
    with retry_timeout(0.2), pytest.raises(TimeoutError):
        repeat(attempt)
    assert 0.2 <= time.monotonic() - started < 2


def test_a_timeout_holds_for_its_own_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "DEFAULT_TIMEOUT", 0.0)
    others: list[list[float]] = []
    with retry_timeout(60):
        thread = threading.Thread(target=lambda: others.append(list(backoff_delays())))
        thread.start()
        thread.join()
        assert next(backoff_delays()) > 0
    assert others == [[]]
    assert list(backoff_delays()) == []


def test_no_other_module_makes_up_its_own_pauses() -> None:
    jitter = re.compile(r"random\.uniform|\bbackoff\b|\*\*failures")
    found = [path for path in (ROOT / "btray").rglob("*.py") if jitter.search(path.read_text())]
    assert found == [ROOT / "btray" / "storage" / "retry.py"]
