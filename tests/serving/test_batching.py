"""Batches are made of what waits, never larger than allowed; nobody waits for company or gets another's answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from btray.serving.batching import Batcher, SharedThread


class Slow:
    """Squares what it is given once it may, and remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may_run = threading.Event()

    def __call__(self, works: Sequence[int]) -> list[int]:
        self.batches.append(list(works))
        self.may_run.wait(10)
        if 13 in works:
            raise ValueError("13")
        return [work * work for work in works]


def batcher(run: Slow, largest: int = 4, thread: SharedThread | None = None) -> Batcher[int, int]:
    thread = thread or SharedThread("predict")
    return Batcher(run, thread, largest=largest, weight=lambda work: work // 100 or 1, watch=lambda *_: None)


def test_a_single_caller_does_not_wait_for_company() -> None:
    run = Slow()
    run.may_run.set()

    async def alone() -> int:
        return await asyncio.wait_for(batcher(run).submit(3), 5)

    assert asyncio.run(alone()) == 9
    assert run.batches == [[3]]


def test_what_waits_goes_together_up_to_the_largest_batch() -> None:
    run = Slow()

    async def crowd() -> list[int]:
        made = batcher(run)
        tasks = [asyncio.create_task(made.submit(number)) for number in range(10)]
        await asyncio.sleep(0)
        run.may_run.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(crowd()) == [number**2 for number in range(10)]
    assert run.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_heavy_work_counts_by_its_weight_and_goes_alone_where_it_is_too_heavy() -> None:
    run = Slow()

    async def mixed() -> None:
        made = batcher(run)
        tasks = [asyncio.create_task(made.submit(number)) for number in (1, 300, 200, 900, 2)]
        await asyncio.sleep(0)
        run.may_run.set()
        await asyncio.gather(*tasks)

    asyncio.run(mixed())
    assert run.batches == [[1], [300], [200], [900], [2]]


def test_a_failure_reaches_those_of_its_batch_alone() -> None:
    run = Slow()

    async def unlucky() -> list[object]:
        made = batcher(run)
        tasks = [asyncio.create_task(made.submit(number)) for number in (1, 2, 13, 3, 4, 5)]
        await asyncio.sleep(0)
        run.may_run.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *failed, last = asyncio.run(unlucky())
    assert (first, last) == (1, 25)
    assert all(isinstance(error, ValueError) for error in failed)


def test_whoever_goes_takes_the_work_along() -> None:
    run = Slow()

    async def impatient() -> int:
        made = batcher(run)
        tasks = [asyncio.create_task(made.submit(number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.sleep(0)
        run.may_run.set()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        return await tasks[1] + await tasks[3]

    assert asyncio.run(impatient()) == 10
    assert run.batches == [[0], [1, 3]]


def test_batchers_that_share_a_thread_know_when_another_uses_it() -> None:
    run, thread = Slow(), SharedThread("predict")

    async def both() -> None:
        one, other = batcher(run, thread=thread), batcher(run, thread=thread)
        works = [asyncio.create_task(one.submit(2)), asyncio.create_task(other.submit(3))]
        assert one.idle
        await asyncio.sleep(0)
        assert not one.idle
        assert not other.idle
        run.may_run.set()
        assert await asyncio.gather(*works) == [4, 9]
        assert one.idle
        assert other.idle
        with pytest.raises(ValueError, match="13"):
            await one.submit(13)
        assert other.idle, "a batch that failed holds the thread for ever"

    asyncio.run(both())
