"""Where the work of a listing is done: here, one piece after the other, or in Ray's tasks, if there is much of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from btray import storage
from btray.bulk.listing.key_files import (
    FIRST_BYTES,
    HeldKeys,
    KeyFile,
    KeySource,
    Records,
    key_file_uri,
    latest,
    write_key_file,
)

_CPUS = 0.05  # of a task, so that it finds room beside actors that hold the CPUs
_PARTITIONS = 8  # for each task that runs at a time


class Tasks(Protocol):
    """What runs the functions of a listing, and keeps what they need."""

    @property
    def parallel(self) -> int:
        """Return how many run at a time."""

    @property
    def partitions(self) -> int:
        """Return in how many partitions objects are joined, so that none takes much memory."""

    def start(self, function: Callable[..., Any], *arguments: Any, returns: int = 1) -> Any:
        """Have `function` called with `arguments`, some of which may stand for results that are to come.

        Return what stands for its result; if it `returns` several, a list of what stands for each.
        """

    def result(self, started: Any) -> Any:
        """Wait for the result that something stands for, and return it."""

    def keep(self, records: Records) -> KeySource:
        """Keep records where all functions find them, and not in this process's memory."""


class LocalTasks:
    """Runs every function at once, in this process."""

    parallel = partitions = 1

    def __init__(self, scratch: Path) -> None:
        """Keep records in files of the folder `scratch`."""
        self._scratch = scratch
        self._kept = 0

    def start(self, function: Callable[..., Any], *arguments: Any, returns: int = 1) -> Any:
        """Call the function."""
        return function(*arguments)

    def result(self, started: Any) -> Any:
        """Return the result."""
        return started

    def keep(self, records: Records) -> KeySource:
        """Write a key file."""
        uri = key_file_uri(str(self._scratch), self._kept)
        self._kept += 1
        write_key_file(uri, latest(records))
        return KeyFile.open(storage.describe(uri))


class RayTasks:
    """Runs the functions as tasks of Ray, to which this process is connected."""

    def __init__(self, patience: float) -> None:
        """Let each task wait `patience` seconds for a store that does not answer."""
        from btray.core.cluster import cpus

        self.parallel = max(1, int(cpus()))
        self.partitions = min(_PARTITIONS * self.parallel, FIRST_BYTES)
        self._patience = patience

    def start(self, function: Callable[..., Any], *arguments: Any, returns: int = 1) -> Any:
        """Submit a task."""
        return _remote().options(num_returns=returns).remote(self._patience, function, *arguments)

    def result(self, started: Any) -> Any:
        """Wait for a task."""
        import ray

        return ray.get(started)

    def keep(self, records: Records) -> KeySource:
        """Put the records into Ray's object store, which moves what is much to disk."""
        import ray

        held = HeldKeys(records)
        return _StoredKeys(ray.put(held), held.begins)


class _StoredKeys:
    """Records in Ray's object store."""

    def __init__(self, reference: Any, begins: npt.NDArray[np.int64]) -> None:
        self._reference = reference
        self._begins = begins

    def read(self, first: int, end: int) -> Records:
        """Return some of the records; see `KeySource.read`."""
        import ray

        records: Records = ray.get(self._reference).read(first, end)
        return records

    def count(self, first: int, end: int) -> int:
        """Return how many records there are; see `KeySource.count`."""
        return int(self._begins[end] - self._begins[first])


@cache
def _remote() -> Any:
    import ray

    return ray.remote(num_cpus=_CPUS)(listing_task)


def listing_task(patience: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a worker of Ray, which goes by the name of this one."""
    with storage.retry_timeout(patience):
        return function(*arguments)
