"""A run that is asked to stop, or whose machine is about to go, writes a checkpoint in the midst of an epoch.

SIGTERM (`ray job stop`, systemd, Kubernetes) reaches the driver, which leaves a mark in the run's folder; a spot notice
reaches Ray, which drains the node. The workers look for both every few seconds, all at the same step.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import ray.train
import torch
from torch import Tensor

from btray import storage
from btray.storage import StorageError

_log = logging.getLogger(__name__)

STOP = "stop"
"""Name of the mark in a run's folder."""
EVERY = 5.0
"""Seconds between two looks, about."""

Notice = Literal["stop", "reclaimed"]


@contextmanager
def stoppable(run_uri: str) -> Iterator[Callable[[], bool]]:
    """For the block, SIGTERM asks the run in `run_uri` to end with a checkpoint; a second one ends the process at once.

    What is given says whether the run was asked. Only a process's main thread hears signals: elsewhere nothing is done.
    """
    mark = storage.join(run_uri, STOP)
    storage.delete(mark)
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            sys.exit(128 + number)
        asked.set()
        # Not here: what the signal interrupted may hold a lock that writing needs.
        threading.Thread(target=_leave, args=(mark,), name="stop", daemon=True).start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(mark: str) -> None:
    _log.info("asked to stop: a checkpoint is written within seconds, and the job ends")
    try:
        storage.write_text(mark, "")
    except StorageError as error:
        _log.warning("the workers cannot be told to stop: %s", error)


class Watch:
    """A worker's look-out. `agree` sums a tensor over all workers, so that they look and act at the same step."""

    def __init__(self, run_uri: str, rank: int, agree: Callable[[Tensor], Tensor]) -> None:
        self._mark = storage.join(run_uri, STOP)
        self._rank = rank
        self._agree = agree
        self._steps = 0
        self._wait = 1
        self._looked = time.monotonic()
        self._reclaimed: set[str] = set()

    def after_step(self) -> Notice | None:
        """What has come since the last look, if this step is one to look after. Each notice is given once."""
        self._steps += 1
        if self._steps < self._wait:
            return None
        now = time.monotonic()
        pace = (now - self._looked) / self._steps
        said = torch.zeros(2, dtype=torch.float64)
        if self._rank == 0:
            said = torch.tensor([self._asked_to_stop(), math.ceil(EVERY / max(pace, 1e-3))], dtype=torch.float64)
        stop, wait = self._agree(said).tolist()
        self._steps, self._wait, self._looked = 0, int(wait), now
        info = ray.train.get_preemption_info()
        reclaimed = set(info.preempted_node_ids) if info is not None else set()
        fresh = reclaimed - self._reclaimed
        self._reclaimed |= reclaimed
        if stop:
            return "stop"
        return "reclaimed" if fresh else None

    def _asked_to_stop(self) -> float:
        try:
            return float(storage.exists(self._mark))
        except StorageError:  # a store that is away must not end the training
            return 0.0
