"""Manifests and lists: files that name objects, a row or line each, streamed."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.storage import FileInfo

_BLOCK = 4 << 20  # bytes

_Row = tuple[str | None, str | None, str | None]
"""URI, size and etag as they stand there."""


def named_in_parquet(manifest: str) -> Iterator[FileInfo]:
    """The objects that a Parquet manifest names.

    They have the size and etag that stand in columns of these names, and else, unexamined, size 0 and an empty etag.
    """
    with opened(manifest) as file:
        table = pa.parquet.ParquetFile(file)
        columns = _columns(manifest, table.schema_arrow.names)
        yield from _named(manifest, _rows(table.iter_batches(columns=columns), columns))


def named_in_csv(manifest: str) -> Iterator[FileInfo]:
    """The same of a CSV manifest."""
    with opened(manifest) as file:
        header = pa.csv.open_csv(file).schema.names
    columns = _columns(manifest, header)
    with opened(manifest) as file:
        yield from _named(manifest, _rows(csv_batches(file, header, columns), columns))


def named_in_list(listing: str) -> Iterator[FileInfo]:
    """The same of a file list, a URI a line, where all are unexamined."""
    return _named(listing, ((line, None, None) for line in _lines(listing)))


def locate(folder: str, uri: str) -> str:
    """The absolute URI of what a manifest in `folder` names: relative ones start there. Raises UserError.

    `./` and `../` with which a URI begins are steps in object storage too; elsewhere in a key they are its letters.
    """
    if "://" in uri or uri.startswith(("/", "~")):
        return storage.resolve(uri)
    if storage.is_remote(folder) and uri.startswith(("./", "../")):
        bucket, _, key = folder.removeprefix("s3://").partition("/")
        return storage.join(f"s3://{bucket}", posixpath.normpath(f"/{key}/{uri}"))
    return storage.resolve(storage.join(folder, uri))


def opened(uri: str) -> Any:
    """A file or object that pyarrow reads pieces of."""
    filesystem, path = storage.arrow_filesystem(uri)
    return filesystem.open_input_file(path)


def csv_batches(
    file: Any, columns: Sequence[str], wanted: Sequence[str], *, header: bool = True
) -> Iterator[pa.RecordBatch]:
    """All values as text; of a file without a header `columns` are its names."""
    yield from pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(block_size=_BLOCK, column_names=None if header else list(columns)),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), include_columns=list(wanted)
        ),
    )


def _lines(listing: str) -> Iterator[str]:
    with opened(listing) as file:
        rest = b""
        while block := file.read(_BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            yield from (_text(listing, line) for line in lines if line.strip())
        if rest.strip():
            yield _text(listing, rest)


def _text(listing: str, line: bytes) -> str:
    try:
        return line.decode().rstrip("\r")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{listing}: the line {line!r} is no UTF-8; write the list as UTF-8, one URI a line."
        ) from error


def _columns(manifest: str, names: Sequence[str]) -> list[str]:
    """What the columns uri, size and etag are called exactly; uri alone where one of the others is missing."""
    by_name = {name.strip().casefold(): name for name in reversed(names)}
    if "uri" not in by_name:
        raise UserError(f"{manifest} has no column uri (it has {', '.join(names)}); name the column of URIs so.")
    found = [by_name[name] for name in ("uri", "size", "etag") if name in by_name]
    return found if len(found) == 3 else found[:1]


def _rows(batches: Iterable[pa.RecordBatch], columns: Sequence[str]) -> Iterator[_Row]:
    for batch in batches:
        values = [batch.column(name).cast(pa.string()).to_pylist() for name in columns]
        unknown = [[None] * len(batch)] * (3 - len(columns))
        yield from zip(*values, *unknown, strict=True)


def _named(source: str, rows: Iterator[_Row]) -> Iterator[FileInfo]:
    folder = source.rpartition("/")[0]
    for number, (uri, size, etag) in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        if not (uri or "").strip():
            raise UserError(f"{where}: uri is empty; fill it or drop the row.")
        try:
            located = locate(folder, str(uri))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if size and etag:
            yield FileInfo(located, _bytes(where, size), etag.strip('"'), 0.0)
        else:
            yield FileInfo(located, 0, "", 0.0)


def _bytes(where: str, size: str) -> int:
    if not size.strip().isdecimal():
        raise UserError(f"{where}: size {size!r} is no number of bytes; write one, or leave size and etag empty.")
    return int(size)
