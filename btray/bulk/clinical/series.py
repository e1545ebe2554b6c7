"""A choice of series by what their headers say, of which nothing else is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Final, Self

from btray.data.slice_facts import UIDS, SliceFacts

UNKNOWN: Final = "unknown"
"""A value that the header does not give."""
PRESETS: Final[dict[str, tuple[str, ...]]] = {
    # real series often lack the tag of contrast
    "t1-post-axial": (
        "modality=MR", "plane=axial", "sequence=t1", "contrast=post|unknown", "image_kind=original|derived|unknown",
    ),
}  # fmt: skip
"""Choices by their names."""
KEYS: Final = (
    *(item.name for item in fields(SliceFacts) if item.name not in UIDS), "body_part", "description", "protocol",
)  # fmt: skip
"""What series are chosen by."""
DERIVED: Final = ("modality", "plane", "image_kind", "sequence", "contrast")
"""Those that no person wrote: they may be shown."""


@dataclass(frozen=True)
class SeriesFilter:
    """Terms that must all hold: of each key one of some globs, in any case."""

    terms: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def parse(cls, texts: Sequence[str], preset: str | None = None) -> Self | None:
        """Read `KEY=VALUE[|VALUE]` and the name of a preset; None if there is neither. Raises ValueError."""
        terms = []
        for text in (*texts, *(PRESETS[preset] if preset else ())):
            key, equals, values = text.partition("=")
            if not equals or not values or key not in KEYS:
                raise ValueError(f"{text!r} is not KEY=VALUE[|VALUE] with one of the keys {', '.join(KEYS)}")
            terms.append((key, tuple(sorted(value.strip().casefold() for value in values.split("|")))))
        return cls(tuple(sorted(set(terms)))) if terms else None

    def __str__(self) -> str:
        return ", ".join(f"{key}={'|'.join(values)}" for key, values in self.terms)

    @property
    def reason(self) -> str:
        """Return why a series is left out, for people; of two choices that are the same, the same."""
        return f"left out by --series {self}"

    def matches(self, info: SliceFacts | None) -> bool:
        """Return whether a slice is chosen; pictures, which say nothing, have `unknown` values."""
        return all(
            any(fnmatchcase(_text(getattr(info, key, None)), value) for value in values) for key, values in self.terms
        )


def _text(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:g}" if isinstance(value, float) else str(value).casefold()
