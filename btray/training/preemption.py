"""Interruption: a run that is stopped, or whose machine is about to go, writes a checkpoint in the middle of an epoch.

SIGTERM (`ray job stop`, systemd, Kubernetes) reaches the driver, which leaves a mark in the run's folder; a spot notice
reaches Ray, which drains the node. The workers look for both every few seconds, all after the same step.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

import ray.train
import torch

from btray import storage
from btray.core.errors import Stopped
from btray.storage import StorageError
from btray.training.collectives import Collectives

_log = logging.getLogger(__name__)

STOP = "stop"
"""Name of the mark in a run's folder that tells the workers to stop."""
BEGUN = "begun"
"""Name of the mark that the workers leave after their first step: from then on there is something to save."""
EVERY = 5.0
"""Seconds between two looks, about: a spot instance goes 30 to 120 s after its notice, and a look costs a request."""

Notice = Literal["stop", "reclaimed", "due"]
"""A stop was requested; the machine is about to go; it is time for a checkpoint."""


@contextmanager
def stoppable(run_uri: str) -> Iterator[Callable[[], bool]]:
    """Let SIGTERM end the run in `run_uri` with a checkpoint while the block runs, and a second one end the process.

    Yields a function that returns whether a stop was requested. Only a process's main thread receives signals: in
    another one nothing is done.

    Raises Stopped in the block if the workers have not taken a step yet: they may still wait for nodes or read data.
    """
    mark, begun = storage.join(run_uri, STOP), storage.join(run_uri, BEGUN)
    for name in (mark, begun):
        storage.delete(name)
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    requested, needless = threading.Event(), threading.Event()

    def write_mark() -> None:
        try:
            storage.write_text(mark, "")  # first: workers that begin just now look for it after they have said so
            if storage.exists(begun):
                _log.info("stopping: the workers write a checkpoint within seconds, then the job ends")
            else:
                needless.set()
                os.kill(os.getpid(), signal.SIGTERM)  # only a signal interrupts what the main thread waits for
        except StorageError as error:
            _log.warning("the workers cannot be told to stop: %s", error)

    def request(number: int, frame: FrameType | None) -> None:
        if needless.is_set():
            raise Stopped(f"run {run_uri} was stopped before its workers took a step; the same command continues it")
        if requested.is_set():
            sys.exit(128 + number)
        requested.set()
        # In a thread: the code that the signal interrupted may hold a lock that writing needs.
        threading.Thread(target=write_mark, name="stop", daemon=True).start()

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


class InterruptionWatch:
    """Watches for notices and for the time in a worker; all workers look, and so act, after the same step."""

    def __init__(self, run_uri: str, collectives: Collectives, minutes: float = 0.0) -> None:
        """`minutes` after which a checkpoint is due; 0: never."""
        self._pause = minutes * 60 or math.inf
        self._saved = time.monotonic()
        self._mark, self._begun = storage.join(run_uri, STOP), storage.join(run_uri, BEGUN)
        self._begun_marked = False
        self._collectives = collectives
        self._steps = 0  # since the last look
        self._interval = 1  # steps from one look to the next
        self._looked = time.monotonic()
        self._reclaimed: set[str] = set()

    def saved(self) -> None:
        """Count the minutes from now: a checkpoint was written."""
        self._saved = time.monotonic()

    def after_step(self) -> Notice | None:
        """Return the notice that came since the last look, if it is time for one; a reclaimed node is reported once."""
        self._steps += 1
        if self._steps < self._interval:
            return None
        now = time.monotonic()
        status = torch.zeros(3, dtype=torch.float64)  # stop, steps to the next look, whether a checkpoint is due
        if self._collectives.rank == 0:  # its clock and its look at the mark count for all
            pace = (now - self._looked) / self._steps
            status[1] = math.ceil(EVERY / max(pace, 1e-3))
            with suppress(StorageError):  # an unreachable store must not end the training
                if not self._begun_marked:
                    storage.write_text(self._begun, "")
                    self._begun_marked = True
                status[0] = storage.exists(self._mark)
            status[2] = now - self._saved >= self._pause
        stop, interval, due = self._collectives.sum(status).tolist()
        self._steps, self._interval, self._looked = 0, int(interval), now
        info, known = ray.train.get_preemption_info(), len(self._reclaimed)
        self._reclaimed.update(info.preempted_node_ids if info is not None else ())
        if stop:
            return "stop"
        if len(self._reclaimed) > known:
            return "reclaimed"
        return "due" if due else None
