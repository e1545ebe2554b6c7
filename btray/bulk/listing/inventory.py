"""S3 Inventory: the reports by which S3 lists a bucket of any size, Parquet or CSV files named by a manifest.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from btray import storage
from btray.bulk.listing.objects import SCHEMA, Chunk, Listed, table_of
from btray.bulk.listing.selection import Selection
from btray.core.errors import UserError
from btray.data.manifests import csv_batches, open_for_arrow
from btray.storage import FileInfo
from btray.storage.read_many import in_threads, until_dead

_NEEDED = ("Bucket", "Key", "Size", "ETag")
_COLUMNS = {  # name in a CSV's fileSchema -> name in Parquet, as LastModifiedDate -> last_modified_date
    name: re.sub(r"\B(?=[A-Z])", "_", name).lower()
    for name in (*_NEEDED, "IsLatest", "IsDeleteMarker", "LastModifiedDate")
}
_TIME = _COLUMNS["LastModifiedDate"]
_HIDDEN = r"(^|/)(\.|__MACOSX(/|$))"
"""Of `storage.is_hidden`, for many keys at once."""
_PIECE_ROWS = 1 << 18
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class Inventory:
    """A report, of which only the manifest was read."""

    root: str
    kind: str
    columns: Sequence[str]
    """Of a CSV, which has no header."""
    files: Mapping[str, int]
    """Their sizes in bytes, by their URIs."""

    @classmethod
    def read(cls, root: str) -> Inventory:
        """Read a manifest.json. Raises UserError if it is not valid, or of a format that is not read."""
        try:
            report = json.loads(storage.read_text(root))
            sizes = {str(file["key"]): int(file.get("size") or 0) for file in report["files"]}
            kind, bucket = str(report["fileFormat"]), str(report["destinationBucket"]).rpartition(":")[2]
            fields = [name.strip() for name in str(report["fileSchema"]).split(",")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{root} is not a valid S3 Inventory manifest ({error!r}); give the manifest.json that S3 wrote."
            ) from error
        if kind not in ("CSV", "Parquet"):
            raise UserError(f"{root}: an inventory as {kind} is not read; have S3 write it as Parquet or CSV.")
        # a report that was downloaded has its files beside it
        folder = f"s3://{bucket}" if storage.is_remote(root) else root.rpartition("/")[0]
        files = {storage.join(folder, key): size for key, size in sizes.items()}
        return cls(root, kind, [_COLUMNS.get(field, field) for field in fields], files)

    def pieces(self, selection: Selection, known: Mapping[str, Listed] = MappingProxyType({})) -> Iterator[Chunk]:
        """Yield what lists the objects that `selection` chooses; files that are `known` are not read.

        Raises UserError if a field is missing.
        """
        for uri in self.files:
            if uri in known:
                yield known[uri]
            elif self.kind == "CSV":
                yield InventoryPiece(
                    uri=uri, selection=selection, present=_present(uri, self.columns), columns=self.columns
                )
            else:
                yield from _parquet_pieces(uri, selection)

    def file_names(self) -> dict[str, str]:
        """Return a digest of each file by its URI: equal ones are of files that name the same objects.

        An object of a store is known by its etag, a local file by its name, too. What cannot be examined is left out.
        """
        names = {}
        for uri, info in in_threads(until_dead(storage.describe), self.files):
            if isinstance(info, FileInfo) and info.etag:
                where = "" if storage.is_remote(uri) else uri
                told = f"{self.kind}\0{','.join(self.columns)}\0{where}\0{info.size}\0{info.etag}"
                names[uri] = hashlib.blake2b(told.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
        return names

    def require_counted(self, seen: int, counted: int) -> None:
        """Raise UserError if of all objects none counts."""
        if not counted:
            raise UserError(
                f"{self.root} names {seen} objects, of which none counts: old versions and markers do not, and no "
                "object whose key has a part that begins with . or _; give such a prefix itself as the input."
            )


@dataclass(frozen=True, kw_only=True)
class InventoryPiece:
    """Some rows of a report, to be read by whoever calls it, here or in a task."""

    uri: str
    selection: Selection
    present: Sequence[str]
    """The fields to read, by their names in Parquet."""
    groups: Sequence[int] = ()
    """Row groups of a Parquet file."""
    columns: Sequence[str] = ()
    """All fields of a CSV."""

    def __call__(self) -> Listed:
        """Return the objects that count and are chosen: of a bucket those that a listing would give."""
        with _readable_errors(self.uri):
            listed = [_listed(rows, self.selection) for rows in self._rows()]
        seen, counted, inside = (sum(getattr(part, name) for part in listed) for name in ("seen", "counted", "inside"))
        objects = pa.concat_tables([part.objects for part in listed]) if listed else table_of([])
        return Listed(objects, seen, counted, inside, source=self.uri)

    def _rows(self) -> Iterator[pa.Table]:
        if not self.columns:
            with open_for_arrow(self.uri) as file:
                table = pyarrow.parquet.ParquetFile(file)
                reading = {"columns": list(self.present), "use_threads": False}
                for batch in table.iter_batches(_BATCH_ROWS, row_groups=list(self.groups), **reading):
                    yield pa.Table.from_batches([batch])
            return
        filesystem, path = storage.arrow_filesystem(self.uri)
        with filesystem.open_input_stream(path, compression="gzip" if path.endswith(".gz") else None) as file:
            for batch in csv_batches(file, self.columns, self.present, header=False):
                rows = pa.Table.from_batches([batch])
                yield rows.set_column(rows.column_names.index("key"), "key", _decoded(rows["key"]))


def _parquet_pieces(uri: str, selection: Selection) -> Iterator[InventoryPiece]:
    with _readable_errors(uri), open_for_arrow(uri) as file:
        metadata = pyarrow.parquet.read_metadata(file)
        present = _present(uri, metadata.schema.to_arrow_schema().names)
        groups: list[int] = []
        rows = 0
        for number in range(metadata.num_row_groups):
            groups.append(number)
            rows += metadata.row_group(number).num_rows
            if rows >= _PIECE_ROWS or number == metadata.num_row_groups - 1:
                yield InventoryPiece(uri=uri, selection=selection, present=present, groups=groups)
                groups, rows = [], 0


@contextmanager
def _readable_errors(uri: str) -> Iterator[None]:
    with storage.storage_errors_for(uri):
        try:
            yield
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{uri} cannot be read ({reason}); have S3 write the inventory again.") from error


def _decoded(keys: pa.ChunkedArray) -> pa.Array:
    """Return the keys of a CSV, where alone they are URL-encoded: with `+` for a space, as S3 does."""
    encoded = pc.match_substring_regex(keys, "[%+]")
    if not pc.any(encoded).as_py():
        return keys
    return pa.array([unquote_plus(key) for key in keys.to_pylist()], pa.string())


def _present(uri: str, names: Collection[str]) -> list[str]:
    """Return which of the fields that are read a file has. Raises UserError if one that is needed is missing."""
    missing = [field for field in _NEEDED if _COLUMNS[field] not in names]
    if missing:
        raise UserError(
            f"{uri} has no field {' and '.join(missing)}; add it to the fields of the inventory's configuration in S3."
        )
    return [name for name in _COLUMNS.values() if name in names]


def _listed(rows: pa.Table, selection: Selection) -> Listed:
    """Return the objects of rows that are chosen: no old versions, delete markers, folders or hidden ones."""
    seen = len(rows)
    keys, sizes = rows["key"], _numbers(rows["size"])
    folders = pc.and_(pc.equal(sizes, 0), pc.match_substring_regex(keys, r"(/|_\$folder\$)$"))
    counts = pc.invert(pc.or_(folders, pc.match_substring_regex(keys, _HIDDEN)))
    if "is_latest" in rows.column_names:
        counts = pc.and_(counts, pc.not_equal(_words(rows["is_latest"]), "false"))
    if "is_delete_marker" in rows.column_names:
        counts = pc.and_(counts, pc.not_equal(_words(rows["is_delete_marker"]), "true"))
    rows = rows.set_column(rows.column_names.index("size"), "size", sizes).filter(counts)
    counted = len(rows)
    uris = pc.binary_join_element_wise("s3:/", rows["bucket"], rows["key"], "/")
    times = rows[_TIME] if _TIME in rows.column_names else None
    chosen, inside = selection.choose(uris, rows["key"], times)
    etags = pc.utf8_trim(pc.fill_null(rows["e_tag"], ""), '"')
    objects = pa.table({"uri": uris, "etag": etags, "size": rows["size"], "place": pa.nulls(counted, pa.string())})
    return Listed(objects.cast(SCHEMA).filter(chosen), seen, counted, inside)


def _numbers(sizes: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_string(sizes.type):
        sizes = pc.if_else(pc.equal(sizes, ""), None, sizes)
    return pc.fill_null(sizes.cast(pa.int64()), 0)


def _words(flags: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.utf8_lower(flags.cast(pa.string())), "")
