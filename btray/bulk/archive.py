"""The objects of an archive, streamed from a prefix, a manifest, an S3 Inventory, a file list or a pack.

A prefix and an inventory give every object but directory markers and hidden ones; a manifest and a file list give what
they name. Size and entity tag are requested, many at a time, if the source does not hold them.
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
from btray.bulk.inventory import named_in_inventory
from btray.core.errors import UserError
from btray.data.config import PreprocessConfig
from btray.data.manifests import kind_of, named_in_list, named_in_manifest
from btray.data.packs import describe_pack, is_pack, list_pack, require_preprocessing
from btray.pacs.source import PacsSource
from btray.storage import FileInfo, StorageError, s3
from btray.storage.errors import storage_errors_for
from btray.storage.read_many import read_patiently, until_dead
from btray.storage.retry import DEFAULT_TIMEOUT

_DESCRIBED_AT_A_TIME = 1024
_DESCRIBERS = 32  # threads
_KINDS = (
    "a folder or prefix, a manifest (.parquet, .csv) with the column uri, an S3 manifest.json, a list (.txt) or a "
    "packed archive"
)

# Lists, tables and archives that people may take for one of these; as a scan, each would be one rejected row.
_OTHER_LISTS = (
    ".jsonl", ".ndjson", ".json", ".yaml", ".yml", ".xlsx", ".xls", ".ods", ".lst", ".list", ".pq", ".parquet.gz",
    ".feather", ".arrow", ".orc", ".avro", ".csv.bz2", ".csv.zst", ".csv.xz", ".csv.zip", ".txt.bz2", ".txt.xz", ".zip",
    ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".rar", ".7z",
)  # fmt: skip

Reader = Callable[[str], Iterator[FileInfo]]
"""From the URI of a file that names objects, or of a pack, to those objects."""


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

    def is_outside(self, uri: str) -> bool:
        """Return whether `uri` is the output or lies in it."""
        return f"{uri}/".startswith(tuple(folder.rstrip("/") + "/" for folder in self.outside))

    def refusal(self) -> UserError:
        """Return the error for an archive that is nothing but the output."""
        return UserError(
            f"--output {self.outside[0]} holds all of the input, and what lies in the output is no input; "
            "name an output beside the input or below it."
        )


def list_archive(
    uri: str,
    selection: Selection,
    *,
    patience: float = DEFAULT_TIMEOUT,
    preprocess: PreprocessConfig | None = None,
    pacs: PacsSource | None = None,
) -> Iterator[FileInfo]:
    """Yield every object of the archive that `selection` chooses, as it is listed; one may come twice from a manifest.

    What cannot be examined, although a store that is away is waited for `patience` seconds, has size 0 and an empty
    etag: reading it tells why. A pack of frames serves who needs no more than the frames that `preprocess` gives. If
    `uri` is the address of a PACS, `pacs` lists it.

    Raises, when the first item is requested or later:
        UserError: the archive is of no known kind, its manifest cannot be read, or it is a pack of other frames.
        StorageError: it cannot be reached, or listing failed half-way.
    """
    if pacs:
        yield from selection.by_name(_path_below(pacs.root), pacs.list_images())
        return
    root = storage.resolve(uri)
    read = _reader_of(root)
    if read is None:
        if root.lower().endswith(_OTHER_LISTS) and not storage.is_folder(root):
            raise UserError(f"{root} is of a kind that names no objects here; give {_KINDS}.")
        if selection.is_outside(root):
            raise selection.refusal()
        yield from selection.by_time(selection.by_name(_path_below(root), _list_folder(root)))
        return
    if read is list_pack:
        require_preprocessing(root, preprocess)
    with storage_errors_for(root):
        objects = selection.by_name(_path_function(root, read), _read_names(root, read))
        yield from selection.by_time(objects if read is list_pack else _describe(objects, patience))


def _reader_of(root: str) -> Reader | None:
    """Return how `root` is read if it is a file that names others or a pack; None: it is listed."""
    if kind := kind_of(root):
        return named_in_manifest if kind == "manifest" else named_in_list
    if root.lower().endswith("manifest.json") and not storage.is_folder(root):
        return named_in_inventory
    return list_pack if is_pack(root) else None


def _path_function(root: str, read: Reader) -> Callable[[str], str]:
    """Return the function from the URI of an object to the path that globs match."""
    if read is named_in_inventory:
        return lambda uri: s3.split(uri)[1]  # what a report of a whole bucket starts from
    return _path_below(describe_pack(root).root if read is list_pack else root.rpartition("/")[0])


def _path_below(root: str) -> Callable[[str], str]:
    return lambda uri: uri.removeprefix(root.rstrip("/") + "/")


def _read_names(root: str, read: Reader) -> Iterator[FileInfo]:
    try:
        yield from read(root)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{root} cannot be read ({reason}); write it again, as Parquet or UTF-8 CSV.") from error


def _list_folder(root: str) -> Iterator[FileInfo]:
    info: FileInfo | None = None
    for info in storage.list_files(root):
        yield info
    if info is None:
        raise UserError(f"{root} holds no file; give {_KINDS}.")


def _matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    patterns = [compile_pattern(translate(glob)) for glob in globs]
    return lambda path: any(pattern.match(path) for pattern in patterns)


def _describe(objects: Iterator[FileInfo], patience: float) -> Iterator[FileInfo]:
    """Yield the same objects, with size and etag of those without an etag; if they cannot be examined, as they are."""
    with ThreadPoolExecutor(_DESCRIBERS) as pool:

        def describe(uris: Sequence[str]) -> list[FileInfo | StorageError]:
            return list(pool.map(until_dead(storage.describe), uris))

        while chunk := list(islice(objects, _DESCRIBED_AT_A_TIME)):
            answers = iter(read_patiently([info.uri for info in chunk if not info.etag], describe, patience))
            for info in chunk:
                answer = info if info.etag else next(answers)
                yield info if isinstance(answer, StorageError) else answer
