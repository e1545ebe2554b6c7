"""Manifests and lists: files that name objects, a row or line each, streamed."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from btray import storage
from btray.errors import UserError
from btray.storage import FileInfo

_BLOCK = 4 << 20  # bytes


def named_in_parquet(manifest: str) -> Iterator[FileInfo]:
    """The objects that a Parquet manifest names, unexamined: size 0 and an empty etag."""
    with opened(manifest) as file:
        table = pa.parquet.ParquetFile(file)
        column = _uri_column(manifest, table.schema_arrow.names)
        batches = table.iter_batches(columns=[column])
        yield from _named(manifest, (uri for batch in batches for uri in batch.column(0).cast(pa.string()).to_pylist()))


def named_in_csv(manifest: str) -> Iterator[FileInfo]:
    """The same of a CSV manifest."""
    with opened(manifest) as file:
        header = pa.csv.open_csv(file).schema.names
    column = _uri_column(manifest, header)
    with opened(manifest) as file:
        batches = csv_batches(file, header, [column])
        yield from _named(manifest, (uri for batch in batches for uri in batch.column(0).to_pylist()))


def named_in_list(listing: str) -> Iterator[FileInfo]:
    """The same of a file list, a URI a line."""
    return _named(listing, _lines(listing))


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


def _uri_column(manifest: str, names: Sequence[str]) -> str:
    found = next((name for name in names if name.strip().casefold() == "uri"), None)
    if found is None:
        raise UserError(f"{manifest} has no column uri (it has {', '.join(names)}); name the column of URIs so.")
    return found


def _named(source: str, uris: Iterator[str | None]) -> Iterator[FileInfo]:
    folder = source.rpartition("/")[0]
    for number, uri in enumerate(uris, start=1):
        if not (uri or "").strip():
            raise UserError(f"{source}, row {number}: uri is empty; fill it or drop the row.")
        try:
            yield FileInfo(locate(folder, str(uri)), 0, "", 0.0)
        except UserError as error:
            raise UserError(f"{source}, row {number}: {error}") from error
