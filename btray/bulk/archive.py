"""What an archive holds: prefix, manifest, S3 Inventory, file list or pack, streamed; nothing grows with the archive.

A prefix and an inventory give every object but directory markers and hidden ones; a manifest and a file list give what
they name. Size and entity tag are asked for, many at a time, where they do not stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from fnmatch import translate
from itertools import islice
from re import compile as compile_pattern

import pyarrow as pa

from btray import storage
from btray.bulk.inventory import named_in_inventory, path_in_bucket
from btray.core.errors import UserError
from btray.data.manifests import named_in_list, named_in_manifest
from btray.data.packs import describe_pack, is_pack, list_pack
from btray.storage import FileInfo, StorageError
from btray.storage.errors import storage_errors_for
from btray.storage.read_many import read_patiently, until_dead
from btray.storage.retry import DEFAULT_TIMEOUT

_DESCRIBED_AT_A_TIME = 1024
_DESCRIBERS = 32
_KINDS = (
    "a folder or prefix, a manifest (.parquet, .csv) with the column uri, an S3 manifest.json, a list (.txt) or a "
    "packed archive"
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which objects of an archive are meant."""

    include: Sequence[str] = ()
    """Globs, of which one must match; none: all. `*` matches `/` too. What they match is the path below a prefix, the
    folder of a manifest or list, the bucket of an inventory or the folder that was packed; elsewhere the whole URI."""
    exclude: Sequence[str] = ()
    """Globs of which none may match."""
    since: datetime | None = None
    """Only objects modified at this time or later; what has no known time counts."""
    outside: str = ""
    """A folder whose objects are left out: the output, where it lies within the input."""

    def filter(self, path_of: Callable[[str], str], objects: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """Those of `objects` that are meant by their names; globs match the path that a URI has by `path_of`.

        Raises UserError where all of them lie in the output.
        """
        included, excluded = _matcher(self.include), _matcher(self.exclude)
        inside = others = 0
        for info in objects:
            if self.holds(info.uri):
                inside += 1
                continue
            others += 1
            path = path_of(info.uri)
            if not excluded(path) and (not self.include or included(path)):
                yield info
        if inside and not others:
            raise self.refusal()

    def recent(self, objects: Iterable[FileInfo]) -> Iterator[FileInfo]:
        """Those of `objects` that are meant by their time."""
        oldest = self.since.timestamp() if self.since else 0.0
        return (info for info in objects if not 0 < info.modified < oldest)

    def holds(self, uri: str) -> bool:
        """Whether `uri` is the output or lies in it."""
        return bool(self.outside) and f"{uri}/".startswith(self.outside.rstrip("/") + "/")

    def refusal(self) -> UserError:
        """What is said where nothing is left but the output."""
        return UserError(
            f"--output {self.outside} holds all of the input, and what lies in the output is no input; "
            "name an output beside the input or below it."
        )


def list_archive(uri: str, selection: Selection, *, patience: float = DEFAULT_TIMEOUT) -> Iterator[FileInfo]:
    """Every object of the archive that `selection` means, as it is listed; one may come twice from a manifest.

    What cannot be examined, although a store that is away is waited for `patience` seconds, has size 0 and an empty
    etag: reading it tells why.

    Raises, when the first item is asked for or later:
        UserError: the archive is not there, is of no known kind, or its manifest cannot be read.
        StorageError: listing failed half-way.
    """
    root = storage.resolve(uri)
    kind = _kind(root)
    if kind is None:
        if selection.holds(root):
            raise selection.refusal()
        yield from selection.recent(selection.filter(_below(root), _listed(root)))
        return
    try:
        with storage_errors_for(root):
            found = selection.filter(_paths(root, kind), _readable(root, kind))
            yield from selection.recent(found if kind is list_pack else _described(found, patience))
    except StorageError as error:
        if error.retryable:
            raise
        raise storage.user_error(error) from error


def _paths(root: str, kind: Callable[[str], Iterator[FileInfo]]) -> Callable[[str], str]:
    """From the URI of an object to the path that globs match."""
    if kind is named_in_inventory:
        return path_in_bucket
    return _below(describe_pack(root).root if kind is list_pack else root.rpartition("/")[0])


def _below(root: str) -> Callable[[str], str]:
    return lambda uri: uri.removeprefix(root.rstrip("/") + "/")


def _readable(root: str, read: Callable[[str], Iterator[FileInfo]]) -> Iterator[FileInfo]:
    try:
        yield from read(root)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{root} cannot be read ({reason}); write it again, as Parquet or UTF-8 CSV.") from error


def _listed(root: str) -> Iterator[FileInfo]:
    found = False
    try:
        for info in storage.list_files(root):
            found = True
            yield info
    except StorageError as error:
        if found:
            raise
        raise storage.user_error(error) from error
    if not found:
        raise UserError(f"{root} holds no file; give {_KINDS}.")


def _matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    patterns = [compile_pattern(translate(glob)) for glob in globs]
    return lambda path: any(pattern.match(path) for pattern in patterns)


def _kind(root: str) -> Callable[[str], Iterator[FileInfo]] | None:
    """How `root` is read where it is a file that names others; None: it is listed."""
    kinds: dict[str, Callable[[str], Iterator[FileInfo]]] = {
        ".parquet": named_in_manifest,
        ".csv": named_in_manifest,
        ".txt": named_in_list,
        "manifest.json": named_in_inventory,
    }
    found = next((read for end, read in kinds.items() if root.lower().endswith(end)), None)
    try:
        if found is not None and not storage.is_folder(root):
            return found
        return list_pack if is_pack(root) else None
    except StorageError as error:
        raise storage.user_error(error) from error


def _described(objects: Iterator[FileInfo], patience: float) -> Iterator[FileInfo]:
    """The same objects, those without an etag examined; where that cannot be done they stay as they are."""
    with ThreadPoolExecutor(_DESCRIBERS) as pool:

        def describe(uris: Sequence[str]) -> list[FileInfo | StorageError]:
            return list(pool.map(until_dead(storage.describe), uris))

        while chunk := list(islice(objects, _DESCRIBED_AT_A_TIME)):
            answers = iter(read_patiently([info.uri for info in chunk if not info.etag], describe, patience))
            for info in chunk:
                answer = info if info.etag else next(answers)
                yield info if isinstance(answer, StorageError) else answer
