"""Names that become paths: of members of archives, and of objects, whose keys may be no path at all."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

_NAME_BYTES = 200  # file systems end at 255 bytes a name; a temporary file's suffix must still fit
_PATH_BYTES = 2000  # they end at 4096, of which the folder takes some


class StorablePaths:
    """The files of one folder to be, none of which any file system takes for another."""

    def __init__(self, leave_out: Callable[[str], str | None] = lambda _: None) -> None:
        """Also leave out the paths for which `leave_out` gives a reason."""
        self._leave_out = leave_out
        self.files: dict[str, str] = {}
        """Paths that were taken, by their folded form."""
        self._folders: set[str] = set()

    def take(self, name: str) -> tuple[str, str | None]:
        """Return the path that `name` is stored at, which is taken from now on, or why it is left out.

        Two slashes in a row are one. The reasons are `unusable_name` (a part that is `..`, too long or holds NUL),
        `unknown_encoding` (bytes that were not decoded), `duplicate_name` (the same path again) and `colliding_name`
        (another one in case or Unicode form alone, or also a folder).
        """
        parts = [part for part in name.split("/") if part not in {"", "."}]
        path = "/".join(parts)
        try:
            longest = max((len(part.encode()) for part in parts), default=0)
        except UnicodeEncodeError:
            return path, "unknown_encoding"
        if ".." in parts or "\0" in path or not 0 < longest <= _NAME_BYTES or len(path.encode()) > _PATH_BYTES:
            return path, "unusable_name"
        # equal for two names which one file system or another takes for the same
        keys = [unicodedata.normalize("NFC", "/".join(parts[:end])).casefold() for end in range(1, len(parts) + 1)]
        if self.files.get(keys[-1]) == path:
            return path, "duplicate_name"
        if keys[-1] in self.files or keys[-1] in self._folders or any(key in self.files for key in keys[:-1]):
            return path, "colliding_name"
        if reason := self._leave_out(path):
            return path, reason
        self._folders.update(keys[:-1])
        self.files[keys[-1]] = path
        return path, None
