"""The one place that opens local paths and s3:// objects: lists, reads with retry, writes whole files.

URIs are absolute local paths or `s3://bucket/key`, taken literally: `%`, `#`, `?`, `+`, spaces and unicode are neither
encoded nor decoded. Endpoint, region and credentials are found the standard AWS way (environment, profile, instance
role), by botocore, for objects, Parquet files and checkpoints alike. Every failure is a `StorageError` with a code.
Safe in threads and in Ray workers.
"""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow.fs

from btray.core.errors import UserError
from btray.core.uris import resolve
from btray.storage import local as local_files
from btray.storage import packed, s3, s3_listing
from btray.storage.errors import StorageError, storage_errors_for, suppress_missing
from btray.storage.file_info import FileInfo

# ---- names


def is_remote(uri: str) -> bool:
    """Return whether `uri` lies in object storage."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """Return `uri` and `parts` with one slash between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """Return the last part of `uri`."""
    return uri.rstrip("/").rpartition("/")[2]


# ---- looking


def exists(uri: str) -> bool:
    """Return whether a file or folder is there. Raises StorageError if that cannot be told (forbidden, unavailable)."""
    with suppress_missing():
        describe(uri)
        return True
    return is_folder(uri)


def is_folder(uri: str) -> bool:
    """Return whether `uri` is a local folder, or a bucket or prefix below which an object or marker lies."""
    return s3.is_folder(uri) if is_remote(uri) else local_files.is_folder(uri)


def is_file(uri: str) -> bool:
    """Return whether a file or object that is not a folder is there. Raises StorageError if that cannot be told."""
    with suppress_missing():
        describe(uri)
        return not is_folder(uri)
    return False


def describe(uri: str) -> FileInfo:
    """Return one file as `list_files` would list it, without reading it. Raises StorageError."""
    return s3.describe(uri) if is_remote(uri) else local_files.describe(uri)


def list_files(uri: str) -> Iterator[FileInfo]:
    """Yield every file below a folder, at any depth, whatever its name; of a file, itself. Sorted in each folder.

    Left out: directory markers, and what is hidden below `uri` (`is_hidden`). Symbolic links are followed.
    What cannot be examined (a broken link, say) is listed with size 0 and an empty etag: reading it tells why. The etag
    is S3's without quotes; locally `SIZE-MTIME_NS`. A local name that is not UTF-8 is listed with backslash escapes and
    a warning that does not name it.

    Raises, when the first item is asked for or later:
        StorageError: not_found for a missing folder or bucket, forbidden for an unreadable (sub)folder, and so on.
    """
    return s3.list_files(uri) if is_remote(uri) else local_files.list_files(uri)


def list_files_unordered(uri: str) -> Iterator[FileInfo]:
    """Yield what `list_files` does, in any order; many requests at a time, if it lies in object storage."""
    return s3_listing.list_files_unordered(uri) if is_remote(uri) else local_files.list_files(uri)


def list_names(uri: str, *, missing_ok: bool = False) -> list[str]:
    """Return the sorted names of the files and folders directly in a folder, hidden ones too.

    Raises:
        StorageError: not_found if there is no such folder (with `missing_ok`, it has no names), forbidden and so on.
    """
    try:
        return s3.list_names(uri) if is_remote(uri) else local_files.list_names(uri)
    except StorageError as error:
        if missing_ok and error.code == "not_found":
            return []
        raise


# ---- reading


def read_bytes(uri: str, *, max_bytes: int | None = None, etag: str = "") -> bytes:
    """Return the whole file or object. A store that throttles or does not answer is asked again: see `retry_timeout`.

    Args:
        uri: Of a file or object, or of a member of a packed archive.
        max_bytes: The largest size that is welcome; None: any is.
        etag: The one that the file was listed with, if no other bytes are wanted; members of packs have none.

    Raises:
        StorageError: too_large above `max_bytes` or changed if the etag differs (both before the body is fetched),
            is_directory, not_found and so on.
    """
    if packed.is_member(uri):
        return packed.read(uri, read_bytes, max_bytes)
    return (s3.read if is_remote(uri) else local_files.read)(uri, max_bytes, etag)


def open_ranges(uri: str) -> IO[bytes]:
    """Open a file or object for reading pieces of it: each read of an object is one request. Raises StorageError."""
    with storage_errors_for(uri):
        file: IO[bytes] = s3.open_ranges(uri) if is_remote(uri) else open(uri, "rb")  # noqa: SIM115 - the caller's
        return file


def read_text(uri: str) -> str:
    """Return the file as text: UTF-8, or UTF-16 with a byte-order mark. Raises StorageError; `failed` if it is not."""
    data = read_bytes(uri)
    with storage_errors_for(uri):
        return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")


def read_json(uri: str, *, missing_ok: bool = False) -> Any:
    """Return the file as JSON; None if it is not there and may be missing.

    Raises:
        StorageError: not_found and so on; `failed` if it is not JSON.
    """
    try:
        text = read_text(uri)
    except StorageError as error:
        if missing_ok and error.code == "not_found":
            return None
        raise
    with storage_errors_for(uri):
        return json.loads(text)


# ---- writing


def require_writable(folder: str, flag: str) -> None:
    """Raise UserError, naming `flag`, unless files can be written below `folder`: before hours of work, not after."""
    try:
        (s3 if is_remote(folder) else local_files).require_writable(folder)
    except StorageError as error:
        if error.retryable:
            raise  # a store that is down is not wrong use: the job exits with 1, not with 2
        raise UserError(f"{flag} {StorageError(error.code, folder, error.detail)}") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file or object whole or not at all, over what was there; makes folders. Raises StorageError."""
    if is_remote(uri):
        s3.write(uri, data)
    else:
        local_files.replace(uri, lambda file: file.write(data))


def write_new(uri: str, data: bytes) -> bool:
    """Write a file only if nothing is there; return False if something is: of two writers one wins."""
    return (s3 if is_remote(uri) else local_files).create(uri, data)


def write_text(uri: str, text: str) -> None:
    """Write UTF-8 text like `write_bytes`."""
    write_bytes(uri, text.encode())


def write_json(uri: str, obj: Any) -> None:
    """Write indented JSON like `write_bytes`; NaN and infinity, which JSON does not have, raise ValueError."""
    write_text(uri, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def upload_file(local: Path, uri: str) -> None:
    """Copy a local file of any size to `uri`, whole or not at all. Raises StorageError."""
    with storage_errors_for(str(local)), open(local, "rb") as source:
        if is_remote(uri):
            s3.upload(str(local), uri)
        else:
            local_files.replace(uri, lambda file: shutil.copyfileobj(source, file))


def delete(uri: str) -> None:
    """Delete one file or object; nothing happens if it is not there. Raises StorageError."""
    if is_remote(uri):
        s3.delete(uri)
        return
    with storage_errors_for(uri):
        Path(uri).unlink(missing_ok=True)


def delete_many(uris: Sequence[str]) -> None:
    """Delete files of one folder, or objects of one bucket, of which a thousand take one request."""
    if uris and is_remote(uris[0]):
        s3.delete_many(uris)
        return
    for uri in uris:
        delete(uri)


def arrow_filesystem(uri: str | Path) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return a pyarrow filesystem and the path in it, for Ray Train and Parquet: the same client and endpoint."""
    location = resolve(uri)
    if is_remote(location):
        with storage_errors_for(location):
            return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(s3.client())), location.removeprefix("s3://")
    return pyarrow.fs.LocalFileSystem(), location
