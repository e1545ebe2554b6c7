"""Which objects of an archive are chosen, by name and by time: one after the other, or many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import translate
from re import compile as compile_pattern

import pyarrow as pa
import pyarrow.compute as pc

from btray.core.errors import UserError
from btray.storage import FileInfo


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A choice of the objects of an archive."""

    include: Sequence[str] = ()
    """Globs, of which one must match; none: all. `*` matches `/` too. What they match is the path below a prefix, the
    folder of a manifest or list, the bucket of an inventory or the folder that was packed; elsewhere the whole URI."""
    exclude: Sequence[str] = ()
    """Globs of which none may match."""
    since: datetime | None = None
    """Only objects modified at this time or later; what has no known time counts."""
    outside: Sequence[str] = ()
    """Folders whose objects are left out: the output first, if it lies within the input."""

    def by_name(self, path_of: Callable[[str], str], objects: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """Yield those of `objects` that are chosen by their names; globs match the path that a URI has by `path_of`.

        Raises UserError if all of them lie in the output.
        """
        included, excluded = _matcher(self.include), _matcher(self.exclude)
        inside = others = 0
        for info in objects:
            if self.is_outside(info.uri):
                inside += 1
                continue
            others += 1
            path = path_of(info.uri)
            if not excluded(path) and (not self.include or included(path)):
                yield info
        if inside and not others:
            raise self.refusal()

    def by_time(self, objects: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """Return those of `objects` that are chosen by their time."""
        oldest = self.since.timestamp() if self.since else 0.0
        return (info for info in objects if not 0 < info.modified < oldest)

    def choose(
        self, uris: pa.ChunkedArray, paths: pa.ChunkedArray, modified: pa.ChunkedArray | None
    ) -> tuple[pa.ChunkedArray, int]:
        """Return which of many objects are chosen, and how many lie in the output; globs match `paths`.

        `modified` are times, or text in ISO 8601; None: none is known.
        """
        inside = pa.repeat(False, len(uris))
        for folder in self.outside:
            below = pc.starts_with(uris, folder.rstrip("/") + "/")
            inside = pc.or_(inside, pc.or_(below, pc.equal(uris, folder.rstrip("/"))))
        chosen = pc.invert(inside)
        if self.since and modified is not None:
            if pa.types.is_string(modified.type):
                modified = pc.if_else(pc.equal(modified, ""), None, modified)
            times = modified.cast(pa.timestamp("us", "UTC"), safe=False)
            chosen = pc.and_(chosen, pc.fill_null(pc.greater_equal(times, pa.scalar(self.since)), True))
        if self.include or self.exclude:
            included, excluded = _matcher(self.include), _matcher(self.exclude)
            names = paths.to_pylist()
            matched = [not excluded(name) and (not self.include or included(name)) for name in names]
            chosen = pc.and_(chosen, pa.array(matched, pa.bool_()))
        return chosen, int(pc.sum(inside).as_py() or 0)

    def is_outside(self, uri: str) -> bool:
        """Return whether `uri` is the output or lies in it."""
        return f"{uri}/".startswith(tuple(folder.rstrip("/") + "/" for folder in self.outside))

    def refusal(self) -> UserError:
        """Return the error for an archive that is nothing but the output."""
        return UserError(
            f"--output {self.outside[0]} holds all of the input, and what lies in the output is no input; "
            "name an output beside the input or below it."
        )


def _matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    patterns = [compile_pattern(translate(glob)) for glob in globs]
    return lambda path: any(pattern.match(path) for pattern in patterns)
