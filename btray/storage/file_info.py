"""What a listing says of one file or object."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FileInfo:
    """One file as listed: size in bytes, entity tag (see `list_files`), modification time in seconds since 1970."""

    uri: str
    size: int
    etag: str
    modified: float
    place: str = ""
    """The URI that its bytes are read from, if not `uri`: that of a member of a packed archive."""


def is_hidden(path: str) -> bool:
    """Return whether a part of `path` is hidden: its name begins with a dot, or is __MACOSX, where macOS keeps such."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
