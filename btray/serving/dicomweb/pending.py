"""Studies that were pushed and wait for their report: one small file for each push, in a folder or below a prefix.

A push changes nothing that another one wrote, and a report takes away the marks alone that were there before the
archive was asked: a push that comes meanwhile makes its study wait again. So no two processes have to agree on
anything, and whatever is killed, a study that was not reported is still marked.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from btray import storage

UID: Final = re.compile(r"[0-9][0-9.]{0,63}")
"""A UID; those of real archives may have zeros in front, which the standard forbids."""
Marks = frozenset[str]
"""Names of the files of one study."""


@dataclass(frozen=True)
class PendingStudies:
    """The marks in a folder."""

    folder: str

    def add(self, study_uid: str) -> None:
        """Mark a study: an instance of it was pushed. Raises StorageError."""
        storage.write_bytes(storage.join(self.folder, f"{study_uid}_{uuid.uuid4().hex}"), b"pushed\n")

    def marks(self) -> dict[str, Marks]:
        """Return the marks of each study. Raises StorageError."""
        found: dict[str, set[str]] = {}
        for name in storage.list_names(self.folder, missing_ok=True):
            study_uid, separator, _ = name.partition("_")
            if separator and UID.fullmatch(study_uid):
                found.setdefault(study_uid, set()).add(name)
        return {study_uid: frozenset(names) for study_uid, names in found.items()}

    def remove(self, marks: Collection[str]) -> None:
        """Take marks away: their study is reported as it was when they were read. Raises StorageError."""
        storage.delete_many([storage.join(self.folder, name) for name in marks])


@dataclass
class StillStudies:
    """Tells which studies have not been pushed for some time, by the clock of the process that watches.

    What was marked before the process began counts from its first look.
    """

    quiet: float
    """Seconds without a new mark."""
    _seen: dict[str, tuple[Marks, float]] = field(default_factory=dict)

    def of(self, marks: dict[str, Marks], now: float) -> list[str]:
        """Return the studies that are still at the time `now`, those that waited longest first."""
        before = self._seen
        self._seen = {
            study: before[study] if study in before and before[study][0] == names else (names, now)
            for study, names in marks.items()
        }
        since = {study: begin for study, (_, begin) in self._seen.items() if now - begin >= self.quiet}
        return sorted(since, key=since.__getitem__)

    def again(self, study_uid: str, now: float, pause: float) -> None:
        """Let a study that could not be reported wait for `pause` seconds from `now` on."""
        names, _ = self._seen[study_uid]
        self._seen[study_uid] = names, now + pause - self.quiet
