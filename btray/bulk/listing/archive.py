"""The objects of an archive, streamed from a prefix, a manifest, an S3 Inventory, a file list or a pack.

A prefix and an inventory give every object but directory markers and hidden ones; a manifest and a file list give what
they name. Size and entity tag are requested, many at a time, if the source does not hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import pyarrow as pa

from btray import storage
from btray.bulk.listing.inventory import Inventory
from btray.bulk.listing.objects import Chunk, Listed, chunks_of, objects_of
from btray.bulk.listing.selection import Selection
from btray.core.errors import UserError
from btray.data.config import PreprocessConfig
from btray.data.manifests import kind_of, named_in_list, named_in_manifest
from btray.data.packs import describe_pack, is_pack, list_pack, require_preprocessing
from btray.pacs.source import PacsSource
from btray.storage import FileInfo, StorageError
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
_LARGE = 64 << 20  # bytes of an inventory: some 10^6 objects


@dataclass(frozen=True)
class Archive:
    """The objects of an archive that are chosen, in chunks."""

    chunks: Iterator[Chunk]
    may_repeat: bool = False
    """An object may come twice."""
    large: bool = False
    """There are so many that tasks shall list them."""
    selection: Selection | None = None
    """Of an inventory, which does not say by itself that all of it lies in the output."""
    inventory: Inventory | None = None

    def less(self, known: Mapping[str, Listed]) -> Archive:
        """Return the archive of an inventory, of which the files that are `known` are not read."""
        if self.inventory is None or self.selection is None:
            return self
        large = sum(size for uri, size in self.inventory.files.items() if uri not in known) > _LARGE
        return replace(self, chunks=self.inventory.pieces(self.selection, known), large=large)

    def require_some(self, seen: int, counted: int, inside: int) -> None:
        """Raise UserError if the chunks, all of which were listed, have no object, by the sums of what they count."""
        if self.inventory is not None:
            self.inventory.require_counted(seen, counted)
            if inside == counted and self.selection is not None:
                raise self.selection.refusal()


def open_archive(
    uri: str,
    selection: Selection,
    *,
    patience: float = DEFAULT_TIMEOUT,
    preprocess: PreprocessConfig | None = None,
    pacs: PacsSource | None = None,
) -> Archive:
    """Return the objects of an archive in chunks. Raises as `list_archive` does, now or when a chunk is taken."""
    if pacs:
        return Archive(chunks_of(list_archive(uri, selection, pacs=pacs)))
    root = storage.resolve(uri)
    if _is_inventory(root):
        return Archive(iter(()), selection=selection, inventory=Inventory.read(root)).less({})
    listed = list_archive(uri, selection, patience=patience, preprocess=preprocess)
    return Archive(chunks_of(listed), may_repeat=_reader_of(root) in (named_in_manifest, named_in_list))


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
    if _is_inventory(root):
        yield from _list_inventory(open_archive(uri, selection))
        return
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


def _is_inventory(root: str) -> bool:
    return root.lower().endswith("manifest.json") and not storage.is_folder(root)


def _list_inventory(archive: Archive) -> Iterator[FileInfo]:
    sums = (0, 0, 0)
    for chunk in archive.chunks:
        listed = chunk()
        sums = (sums[0] + listed.seen, sums[1] + listed.counted, sums[2] + listed.inside)
        yield from objects_of(listed.objects)
    archive.require_some(*sums)


def _reader_of(root: str) -> Reader | None:
    """Return how `root` is read if it is a file that names others or a pack; None: it is listed."""
    if kind := kind_of(root):
        return named_in_manifest if kind == "manifest" else named_in_list
    return list_pack if is_pack(root) else None


def _path_function(root: str, read: Reader) -> Callable[[str], str]:
    """Return the function from the URI of an object to the path that globs match."""
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
    for info in storage.list_files_unordered(root):
        yield info
    if info is None:
        raise UserError(f"{root} holds no file; give {_KINDS}.")


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
