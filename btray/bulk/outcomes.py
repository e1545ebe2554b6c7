"""How objects ended: records of key, time and outcome, in any order, of which the latest of each key counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from btray.data.key_set import Keys

CLASSIFIED, REJECTED, WITHHELD = range(3)
"""Outcomes: an answer, a rejection for good, and one that says something of the store, not of the bytes."""

RECORD = np.dtype([("key", "S16"), ("at", "<i8"), ("outcome", "u1")])
"""The key of `btray.data.key_set`, microseconds since 1970, and one of the outcomes."""
Records = npt.NDArray[np.void]

_IN_MEMORY = 1 << 20  # records
_PILES = 256


def records(keys: Keys, at: npt.NDArray[np.int64], outcome: npt.NDArray[np.uint8]) -> Records:
    """Records [n]."""
    made = np.empty(len(keys), RECORD)
    made["key"], made["at"], made["outcome"] = keys, at, outcome
    return made


class Outcomes:
    """The latest outcome of each key. Many records are kept in `folder`, in piles by the first byte of their keys."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: list[Records] = []
        self._count = 0
        self._on_disk = False

    def add(self, found: Records) -> None:
        """Add records, in any order."""
        self._held.append(found)
        self._count += len(found)
        if self._count >= _IN_MEMORY:
            self._spill()

    def settled(self, worst: int) -> Iterator[Keys]:
        """Keys whose latest outcome is `worst` or better. Of two at the same moment the worse one counts."""
        if self._on_disk:
            self._spill()
            for pile in range(_PILES):
                if self._pile(pile).exists():
                    yield _settled(np.fromfile(self._pile(pile), RECORD), worst)
        elif self._held:
            yield _settled(np.concatenate(self._held), worst)

    def _pile(self, number: int) -> Path:
        return self._folder / f"{number:03d}.pile"

    def _spill(self) -> None:
        every = np.concatenate([*self._held, np.empty(0, RECORD)])
        self._held, self._count, self._on_disk = [], 0, True
        first_bytes: npt.NDArray[Any] = every.view(np.uint8).reshape(-1, RECORD.itemsize)[:, 0]
        order = np.argsort(first_bytes, kind="stable")
        ends = np.cumsum(np.bincount(first_bytes, minlength=_PILES))
        for number, some in enumerate(np.split(every[order], ends[:-1])):
            if len(some):
                with self._pile(number).open("ab") as file:
                    some.tofile(file)


def _settled(found: Records, worst: int) -> Keys:
    ordered = found[np.lexsort((found["outcome"], found["at"], found["key"]))]
    last = np.append(ordered["key"][1:] != ordered["key"][:-1], True)[: len(ordered)]
    settled: Keys = ordered["key"][last & (ordered["outcome"] <= worst)]
    return settled
