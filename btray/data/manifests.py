"""Manifests and lists: files that name objects, one per row or line, streamed.

Each may also be the folder of part files that Spark makes of one. Text is UTF-8 or UTF-16, with a byte-order mark or
without one, its lines end as on Unix, Windows or old Macs, and it may be packed by gzip. A CSV is separated by commas,
semicolons, tabs or bars.

A name counts as it is given, since keys may hold spaces, quotes and backslashes. Only if nothing is there, it counts
without the spaces and quotes around it, then with slashes for its backslashes, and then in Unicode's other form.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import posixpath
import re
import unicodedata
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.storage import FileInfo
from btray.storage.packed import is_member
from btray.storage.read_many import until_dead

Kind = Literal["manifest", "list"]
_Row = TypeVar("_Row")

_BLOCK = 4 << 20  # bytes; a row must fit into one, so that newlines in quoted values are found
ENDINGS: dict[str, Kind] = {
    ".csv.gz": "manifest", ".tsv.gz": "manifest", ".txt.gz": "list",
    ".parquet": "manifest", ".csv": "manifest", ".tsv": "manifest", ".txt": "list",
}  # fmt: skip
"""How files that name objects are called, in lower case."""
_SEPARATORS = ",;\t|"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Without a mark it shows by three Latin letters in a row, such as those of a suffix.
_UTF16 = {
    "utf-16-le": re.compile(rb"(?:..)*?(?:[^\0]\0){3}", re.DOTALL),
    "utf-16-be": re.compile(rb"(?:..)*?(?:\0[^\0]){3}", re.DOTALL),
}
_QUOTED = re.compile(r"""(["'`]).+\1|\u201c.+\u201d|\u2018.+\u2019|<.+>""")
# spaces, and marks without width, around a name
_UNSEEN = re.compile(
    r"^[\s\ufeff\u200b-\u200f\u202a-\u202e\u2060-\u2069]+|[\s\ufeff\u200b-\u200f\u202a-\u202e\u2060-\u2069]+$"
)
_HEAD = 1 << 16  # bytes in which they are looked for
_LOOKED_UP_AT_A_TIME = 1024
_LOOKERS = 32  # threads


def kind_of(uri: str) -> Kind | None:
    """Return what a file, or a folder of part files, is by its name; None: it names no objects. Raises StorageError."""
    kind = _kind_by_ending(uri)
    if not storage.is_folder(uri):
        return kind
    if kind is None and not storage.exists(storage.join(uri, "_SUCCESS")):
        return None  # to list what may be a large archive would take long
    kinds = {_kind_by_ending(part) or (kind if "/part-" in part else None) for part in parts_of(uri)}
    return kinds.pop() if len(kinds) == 1 else None


def _kind_by_ending(uri: str) -> Kind | None:
    return next((kind for ending, kind in ENDINGS.items() if uri.lower().endswith(ending)), None)


def parts_of(uri: str) -> list[str]:
    """Return the files that a manifest or list consists of: itself, or those in its folder. Raises StorageError."""
    if not storage.is_folder(uri):
        return [uri]
    return [storage.join(uri, name) for name in storage.list_names(uri) if not name.startswith((".", "_"))]


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
    """Yield the objects that a file list names, one URI per line; all are unexamined. Raises UserError.

    A line that begins with # is a comment, unless an object of this name is there.
    """
    for uri, _ in _as_found((spellings, None) for spellings in _lines(listing)):
        if uri is not None:
            yield FileInfo(uri, 0, "", 0.0)


def _lines(listing: str) -> Iterator[list[str | None]]:
    folder = listing.rpartition("/")[0]
    for part in parts_of(listing):
        with _manifest_errors(part), _open_text(part) as file:
            # DOS ends a text with the byte 1A
            lines = (line.rstrip(b"\r\n") for line in io.BufferedReader(file, _BLOCK) if line.strip(b"\x1a \t\r\n"))
            for number, line in enumerate(lines, start=1):
                try:
                    name = line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{part}: the line {line!r} is not UTF-8; write the list as UTF-8, one URI per line."
                    ) from error
                yield [*_spellings(part, number, folder, name), *([None] if name.lstrip().startswith("#") else [])]


def read_manifest(
    manifest: str,
    columns: Sequence[str],
    *,
    required: Sequence[str],
    folder: str | None = None,
    known: Container[str] = (),
) -> Iterator[tuple[int, list[str | None]]]:
    """Yield number (from 1) and values of each row of a CSV manifest, or one in Parquet; values are text or None.

    Args:
        manifest: URI of the file.
        columns: Names of the columns to read, in any case. The first one holds URIs and is made absolute.
        required: The first ones of `columns`, which must be there and hold something in each row; others may be absent.
        folder: What relative URIs start from; by default the manifest's folder.
        known: URIs that are there, for names that may be meant in several ways.

    Raises:
        UserError: the file is not a manifest, lacks a column, or has a row without a value or with a malformed URI.
        StorageError: the manifest is not there, and so on.
    """
    folder = manifest.rpartition("/")[0] if folder is None else folder

    def rows() -> Iterator[tuple[list[str | None], tuple[int, Sequence[str | None]]]]:
        for part in parts_of(manifest):
            with _manifest_errors(part):
                for number, values in enumerate(_values(part, columns, required, part != manifest), start=1):
                    for name, value in zip(required, values, strict=False):
                        if not value or not value.strip():
                            facts = ", ".join(map("{} {!r}".format, required, values))
                            raise UserError(
                                f"{part}, row {number}: {name} is empty ({facts}); fill it or drop the row."
                            )
                    yield [*_spellings(part, number, folder, str(values[0]))], (number, values[1:])

    for uri, (number, others) in _as_found(rows(), known):
        yield number, [uri, *others]


def copy_rows(part: str, kept: Sequence[bool], copy: str) -> None:
    """Write those rows of one file of a manifest that are `kept` to `copy`, which may be the file itself.

    The format stays; text becomes UTF-8 without a byte-order mark.
    """
    body = io.BytesIO()
    if _is_csv(part):
        with _open_text(part) as file:
            separator, skipped, _ = _header(part)
            lines = csv.reader(io.TextIOWrapper(file, newline=""), delimiter=separator)
            header, *rows = [line for line in lines if line][skipped:]
        text = io.StringIO()
        writer = csv.writer(text, delimiter=separator, lineterminator="\n")
        writer.writerows([header, *(row for row, keep in zip(rows, kept, strict=True) if keep)])
        data = text.getvalue().encode()
        storage.write_bytes(copy, gzip.compress(data) if part.lower().endswith(".gz") else data)
        return
    rows = pa.parquet.read_table(pa.BufferReader(storage.read_bytes(part)))
    pa.parquet.write_table(rows.filter(pa.array(kept, pa.bool_())), body)
    storage.write_bytes(copy, body.getvalue())


def column_names(manifest: str) -> dict[str, str]:
    """Return the names of a manifest's columns, by what they are in lower case. Raises UserError and StorageError."""
    names: list[str] = []
    for part in parts_of(manifest):
        with _manifest_errors(part):
            if _is_csv(part):
                names = _header(part)[2]
            else:
                with open_for_arrow(part) as file:
                    names = pa.parquet.read_schema(file).names
        if names:  # Spark leaves empty parts too
            break
    return {name.strip().casefold(): name for name in reversed(names)}  # of equal names the first one counts


@contextmanager
def _manifest_errors(manifest: str) -> Iterator[None]:
    with storage.storage_errors_for(manifest):
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError, csv.Error) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{manifest} cannot be read as a manifest ({reason}); write it as UTF-8 CSV or Parquet."
            ) from error


def _is_csv(part: str) -> bool:
    return not part.lower().endswith(".parquet")


def _header(part: str) -> tuple[str, int, list[str]]:
    """Return what separates the values of a CSV, how many lines stand before its header, and the header's names."""
    with _open_text(part) as file:
        reader = io.BufferedReader(file, _BLOCK)
        first = next((line for line in reader if line.strip()), b"").decode().rstrip("\r\n")
        if mark := re.fullmatch("sep=(.)", first, re.IGNORECASE):  # Excel's
            return mark[1], 1, next(csv.reader([reader.readline().decode().rstrip("\r\n")], delimiter=mark[1]), [])
    headers = {separator: next(csv.reader([first], delimiter=separator), []) for separator in _SEPARATORS}
    best = max(headers, key=lambda separator: "uri" in (name.strip().casefold() for name in headers[separator]))
    return best, 0, headers[best]


def _values(
    part: str, columns: Sequence[str], required: Sequence[str], is_one_of_many: bool
) -> Iterator[Sequence[str | None]]:
    by_name = column_names(part)
    if not by_name and is_one_of_many:
        return
    if missing := [name for name in required if name not in by_name]:
        known = ", ".join(reversed(by_name.values()))
        spec = ",".join(required) + "".join(f"[,{name}]" for name in columns if name not in required)
        raise UserError(f"{part} has no column {' and '.join(missing)} (it has {known}); the columns are {spec}.")
    present = [by_name[name] for name in columns if name in by_name]
    # opened anew: the reader of the header has read ahead
    with _open_text(part) if _is_csv(part) else open_for_arrow(part) as file:
        if _is_csv(part):
            separator, skipped, _ = _header(part)
            batches = csv_batches(file, present, present, separator=separator, skip_rows=skipped)
        else:
            batches = pa.parquet.ParquetFile(file).iter_batches(columns=present)
        for batch in batches:
            texts = [
                batch.column(batch.schema.get_all_field_indices(by_name[name])[0]).cast(pa.string()).to_pylist()
                if name in by_name
                else [None] * len(batch)
                for name in columns
            ]
            yield from zip(*texts, strict=True)


def _as_found(
    rows: Iterable[tuple[list[str | None], _Row]], known: Container[str] = ()
) -> Iterator[tuple[str | None, _Row]]:
    """Yield with each row the first of its spellings that is `known` or there, or None; the first if none of them is.

    A row with one spelling needs no look, and so takes no time.
    """
    describe = until_dead(storage.describe)

    def found(row: tuple[list[str | None], _Row]) -> tuple[str | None, _Row]:
        spellings, rest = row
        if len(spellings) == 1:
            return spellings[0], rest
        there = (uri for uri in spellings if uri is None or uri in known or isinstance(describe(uri), FileInfo))
        return next(there, spellings[0]), rest

    iterator = iter(rows)
    with ThreadPoolExecutor(_LOOKERS) as pool:
        while chunk := list(islice(iterator, _LOOKED_UP_AT_A_TIME)):
            plain = all(len(spellings) == 1 for spellings, _ in chunk)
            yield from map(found, chunk) if plain else pool.map(found, chunk)


def _spellings(source: str, number: int, folder: str, given: str) -> list[str]:
    """Return the absolute URIs that a name may mean, the name as given first. Raises UserError."""
    trimmed = _UNSEEN.sub("", given)
    unquoted = trimmed[1:-1].strip() if _QUOTED.fullmatch(trimmed) else trimmed
    forms = (given, trimmed, unquoted, unquoted.replace("\\", "/"))
    names = dict.fromkeys((*forms, *(unicodedata.normalize(form, forms[-1]) for form in ("NFC", "NFD"))))
    return list(dict.fromkeys(_locate(source, number, folder, name) for name in names if name))


def _locate(source: str, number: int, folder: str, uri: str) -> str:
    """Return the absolute URI of what a row of a manifest names: relative ones start at `folder`. Raises UserError.

    `./` and `../` with which a URI begins are steps in object storage too; elsewhere in a key they are its letters.
    """
    try:
        if "://" in uri or uri == "~" or uri.startswith(("/", "~/")):
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


def _open_text(uri: str) -> Any:
    """Open a text file as UTF-8 without a byte-order mark, unpacked and transcoded, whose lines end with newlines.

    Raises UserError if it is in another encoding that shows.
    """
    file = io.BufferedReader(open_for_arrow(uri), _BLOCK)
    if file.peek(2).startswith(b"\x1f\x8b"):
        file = io.BufferedReader(gzip.GzipFile(fileobj=file), _BLOCK)
    if encoding := _utf16_of(file.peek(_HEAD)[:_HEAD]):
        if encoding == "unknown":
            raise UserError(f"{uri} holds NUL characters, as text does not; write it as UTF-8.")
        file = io.BufferedReader(pa.transcoding_input_stream(pa.PythonFile(file, mode="r"), encoding, "utf-8"), _BLOCK)
    while file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    if b"\r" in (head := file.peek(_HEAD)) and b"\n" not in head:  # as old Macs end lines
        return pa.TransformInputStream(pa.PythonFile(file, mode="r"), lambda block: bytes(block).replace(b"\r", b"\n"))
    return file


def _utf16_of(head: bytes) -> str | None:
    """Return how a text is encoded that begins so, if it is UTF-16; "unknown" if it is neither that nor UTF-8."""
    if b"\0" not in head:
        return None
    if head.startswith(_UTF16_MARKS) and head[2:4] != b"\0\0":  # UTF-32 begins so
        return "utf-16"
    return next((encoding for encoding, pattern in _UTF16.items() if pattern.match(head)), "unknown")


def csv_batches(
    file: Any,
    columns: Sequence[str],
    included: Sequence[str],
    *,
    header: bool = True,
    separator: str = ",",
    skip_rows: int = 0,
) -> Iterator[pa.RecordBatch]:
    """Yield the `included` columns of a CSV file, all values as text; without a header `columns` are its names.

    As text, since a patient 007 is not patient 7, and a label "NA" is not an absent label.
    """
    yield from pa.csv.open_csv(
        file,
        read_options=pa.csv.ReadOptions(
            block_size=_BLOCK, column_names=None if header else list(columns), skip_rows=skip_rows
        ),
        parse_options=pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()), include_columns=list(included)
        ),
    )
