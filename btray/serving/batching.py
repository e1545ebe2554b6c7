"""Dynamic batches without a clock: what waits while one forward pass runs goes together into the next one.

A single caller waits for nobody, and under load batches grow by themselves up to the largest size.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")
Answer = TypeVar("Answer")


class SharedThread(ThreadPoolExecutor):
    """One thread for the batches of several batchers of one event loop, each of which knows whether it is at work."""

    def __init__(self, name: str) -> None:
        """Start without work; `name` is that of the thread."""
        super().__init__(1, name)
        self.batches = 0
        """Batches that run there or wait for it."""


class Batcher(Generic[Work, Result]):
    """Hands lists of work to `run`, one list at a time, on a thread that it may share. Belongs to one event loop."""

    def __init__(
        self,
        run: Callable[[Sequence[Work]], Sequence[Result]],
        thread: SharedThread,
        *,
        largest: int,
        weight: Callable[[Work], int],
        watch: Callable[[int, int], None],
    ) -> None:
        """Run batches of at most `largest`, of which `weight` says how much a piece of work takes.

        One that takes more than `largest` runs alone. `watch` is called with the weight of each batch and of what
        continues to wait.
        """
        self.run = run
        self.thread = thread
        self.largest = largest
        self.weight = weight
        self.watch = watch
        self._waiting: deque[tuple[Work, asyncio.Future[Result]]] = deque()
        self._running: asyncio.Future[Any] | None = None

    @property
    def idle(self) -> bool:
        """Return whether nothing runs on the thread, for this batcher or another, and nothing waits."""
        return not self.thread.batches and not self._waiting

    async def alone(self, function: Callable[[], Answer]) -> Answer:
        """Run `function` on the thread, as a batch of one. Only for a batcher that is idle."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.watch(1, 0)
        self._run(lambda: [function()], [future])
        return await future

    async def submit(self, work: Work) -> Result:
        """Return the result of `run` for `work`; a caller that is cancelled while it waits takes the work along."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, future))
        self._start()
        return await future

    def _start(self) -> None:
        """Run what waits, up to the largest batch, unless one runs."""
        if self._running is not None:
            return
        works: list[Work] = []
        futures: list[asyncio.Future[Result]] = []
        size = 0
        while self._waiting and (not works or size + self.weight(self._waiting[0][0]) <= self.largest):
            work, future = self._waiting.popleft()
            if not future.done():  # else its caller is gone
                works.append(work)
                futures.append(future)
                size += self.weight(work)
        if works:
            self.watch(size, sum(self.weight(work) for work, _ in self._waiting))
            self._run(lambda: self.run(works), futures)

    def _run(self, function: Callable[[], Sequence[Answer]], futures: list[asyncio.Future[Answer]]) -> None:
        """Run `function` on the thread; it returns one result for each of `futures`."""

        def finish(done: asyncio.Future[Sequence[Answer]]) -> None:
            self._running = None
            self.thread.batches -= 1
            for place, future in enumerate(futures):
                if future.done():  # its caller is gone
                    continue
                if done.cancelled():
                    future.cancel()
                elif error := done.exception():
                    future.set_exception(error)
                else:
                    future.set_result(done.result()[place])
            self._start()

        self._running = asyncio.get_running_loop().run_in_executor(self.thread, function)
        self.thread.batches += 1
        self._running.add_done_callback(finish)
