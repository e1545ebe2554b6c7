"""Manifests and lists: files that name objects, one per row or line, streamed."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.storage import FileInfo
from btray.storage.packed import is_member

_BLOCK = 4 << 20  # bytes; a row must fit into one, so that newlines in quoted values are found


def named_in_manifest(manifest: str) -> Iterator[FileInfo]:
    """Yield the objects that the column uri of a .parquet or .csv manifest names.

    They have the size and etag that stand in columns of these names, or else, unexamined, size 0 and an empty etag.

    Raises:
        UserError: the manifest or one of its rows cannot be read as such.
        StorageError: the manifest is not there, and so on.
    """
    for number, (uri, size, etag) in read_manifest(manifest, ("uri", "size", "etag"), required=("uri",)):
        if not (size and etag):
            yield FileInfo(str(uri), 0, "", 0.0)
        elif size.strip().isdecimal():
            yield FileInfo(str(uri), int(size), etag.strip('"'), 0.0)
        else:
            raise UserError(
                f"{manifest}, row {number}: size {size!r} is not a number of bytes; write one, or leave size and etag "
                "empty."
            )


def named_in_list(listing: str) -> Iterator[FileInfo]:
    """Yield the objects that a file list names, one URI per line; all are unexamined. Raises UserError."""
    folder = listing.rpartition("/")[0]
    with open_for_arrow(listing) as file:
        lines = (line.rstrip(b"\r\n") for line in io.BufferedReader(file, _BLOCK) if line.strip())
        for number, line in enumerate(lines, start=1):
            try:
                uri = line.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{listing}: the line {line!r} is not UTF-8; write the list as UTF-8, one URI per line."
                ) from error
            yield FileInfo(_locate(listing, number, folder, uri), 0, "", 0.0)


def read_manifest(
    manifest: str, columns: Sequence[str], *, required: Sequence[str], folder: str | None = None
) -> Iterator[tuple[int, list[str | None]]]:
    """Yield number (from 1) and values of each row of a .csv manifest, or one in Parquet; values are text or None.

    Args:
        manifest: URI of the file.
        columns: Names of the columns to read, in any case. The first one holds URIs and is made absolute.
        required: The first ones of `columns`, which must be there and hold something in each row; others may be absent.
        folder: What relative URIs start from; by default the manifest's folder.

    Raises:
        UserError: the file is not a manifest, lacks a column, or has a row without a value or with a malformed URI.
        StorageError: the manifest is not there, and so on.
    """
    folder = manifest.rpartition("/")[0] if folder is None else folder
    with _manifest_errors(manifest):
        for number, values in enumerate(_values(manifest, columns, required), start=1):
            for name, value in zip(required, values, strict=False):
                if not value or not value.strip():
                    known = ", ".join(f"{name} {value!r}" for name, value in zip(required, values, strict=False))
                    raise UserError(f"{manifest}, row {number}: {name} is empty ({known}); fill it or drop the row.")
            yield number, [_locate(manifest, number, folder, str(values[0])), *values[1:]]


def column_names(manifest: str) -> dict[str, str]:
    """Return the names of a manifest's columns, by what they are in lower case. Raises UserError and StorageError."""
    with _manifest_errors(manifest), open_for_arrow(manifest) as file:
        names = pa.csv.open_csv(file).schema.names if _is_csv(manifest) else pa.parquet.read_schema(file).names
    return {name.strip().casefold(): name for name in reversed(names)}  # of equal names the first one counts


@contextmanager
def _manifest_errors(manifest: str) -> Iterator[None]:
    with storage.storage_errors_for(manifest):
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{manifest} cannot be read as a manifest ({reason}); write it as UTF-8 CSV or Parquet."
            ) from error


def _is_csv(manifest: str) -> bool:
    return manifest.lower().endswith(".csv")


def _values(manifest: str, columns: Sequence[str], required: Sequence[str]) -> Iterator[Sequence[str | None]]:
    by_name = column_names(manifest)
    if missing := [name for name in required if name not in by_name]:
        known = ", ".join(reversed(by_name.values()))
        spec = ",".join(required) + "".join(f"[,{name}]" for name in columns if name not in required)
        raise UserError(f"{manifest} has no column {' and '.join(missing)} (it has {known}); the columns are {spec}.")
    present = [by_name[name] for name in columns if name in by_name]
    # opened anew: the reader of the header has read ahead
    with open_for_arrow(manifest) as file:
        parquet = None if _is_csv(manifest) else pa.parquet.ParquetFile(file)
        for batch in parquet.iter_batches(columns=present) if parquet else csv_batches(file, present, present):
            texts = [
                batch.column(batch.schema.get_all_field_indices(by_name[name])[0]).cast(pa.string()).to_pylist()
                if name in by_name
                else [None] * len(batch)
                for name in columns
            ]
            yield from zip(*texts, strict=True)


def _locate(source: str, number: int, folder: str, uri: str) -> str:
    """Return the absolute URI of what a row of a manifest names: relative ones start at `folder`. Raises UserError.

    `./` and `../` with which a URI begins are steps in object storage too; elsewhere in a key they are its letters.
    """
    try:
        if "://" in uri or uri.startswith(("/", "~")):
            return storage.resolve(uri)
        if storage.is_remote(folder) and uri.startswith(("./", "../")):
            bucket, _, key = folder.removeprefix("s3://").partition("/")
            return storage.join(f"s3://{bucket}", posixpath.normpath(f"/{key}/{uri}"))
        return storage.resolve(storage.join(folder, uri))
    except UserError as error:
        raise UserError(f"{source}, row {number}: {error}") from error


def open_for_arrow(uri: str) -> Any:
    """Open a file or object that pyarrow reads pieces of; a member of a packed archive is read whole."""
    if is_member(uri):
        return pa.BufferReader(storage.read_bytes(uri))
    filesystem, path = storage.arrow_filesystem(uri)
    return filesystem.open_input_file(path)


def csv_batches(
    file: Any, columns: Sequence[str], included: Sequence[str], *, header: bool = True
) -> Iterator[pa.RecordBatch]:
    """Yield the `included` columns of a CSV file, all values as text; without a header `columns` are its names.

    As text, since a patient 007 is not patient 7, and a label "NA" is not an absent label.
    """
    yield from pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(block_size=_BLOCK, column_names=None if header else list(columns)),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), include_columns=list(included)
        ),
    )
