"""The one place that opens local paths and s3:// objects: lists, reads with retry, writes whole files.

URIs are absolute local paths or `s3://bucket/key`, taken literally: `%`, `#`, `?`, `+`, spaces and unicode are neither
encoded nor decoded. Endpoint, region and credentials are found the standard AWS way (environment, profile, instance
role), by botocore, for objects, Parquet files and checkpoints alike. Every failure is a `StorageError` with a code.
Safe in threads and in Ray workers.
"""

from __future__ import annotations

import errno
import json
import logging
import mimetypes
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow.fs

from btray.core.errors import UserError
from btray.storage import local as local_files
from btray.storage import packed, s3
from btray.storage.errors import (
    StorageError,
    backoff_delays,
    check_found,
    storage_errors_for,
    suppress_missing,
    user_error,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileInfo:
    """One file as listed: size in bytes, entity tag (see `list_files`), modification time in seconds since 1970."""

    uri: str
    size: int
    etag: str
    modified: float
    place: str = ""
    """Where its bytes are read from, if not from `uri`: its member URI in a packed archive."""


# ---- names


def resolve(uri: str | Path) -> str:
    """Absolute local path or s3:// URI, without a trailing slash.

    Raises:
        UserError: the URI is empty, names no bucket, or has a scheme other than s3.
    """
    text = str(uri)
    if not text or "\0" in text:
        raise UserError(f"{text!r} is no path: give a local path or s3://bucket/key.")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text)
    if scheme is None:
        return os.path.abspath(os.path.expanduser(text))
    if scheme[1] != "s3":
        raise UserError(f"{text}: {scheme[1]}:// is not supported; give a local path or s3://bucket/key.")
    if not s3.split(text)[0]:
        raise UserError(f"{text} names no bucket: write s3://bucket/key.")
    return text.rstrip("/")


def is_remote(uri: str) -> bool:
    """Whether `uri` lies in object storage."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri` and `parts` with one slash between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def name(uri: str) -> str:
    """The last part of `uri`."""
    return uri.rstrip("/").rpartition("/")[2]


# ---- looking


def exists(uri: str) -> bool:
    """Whether a file or folder is there. Raises StorageError where that cannot be told (forbidden, unavailable)."""
    return _present(lambda: _require_file(uri)) or is_folder(uri)


def is_folder(uri: str) -> bool:
    """Whether `uri` is a local folder, or a bucket or prefix below which an object or marker lies."""
    return _present(lambda: _require_folder(uri))


def is_file(uri: str) -> bool:
    """Whether a file or object is there that is no folder. Raises StorageError where that cannot be told."""
    return _present(lambda: _require_file(uri)) and not is_folder(uri)


def _present(require: Callable[[], None]) -> bool:
    with suppress_missing():
        require()
        return True
    return False


def _require_file(uri: str) -> None:
    if not is_remote(uri):
        with storage_errors_for(uri):
            os.stat(uri)
    elif s3.split(uri)[1]:
        s3.call(uri, "head_object", Key=s3.split(uri)[1])
    else:
        s3.require_folder(uri)


def _require_folder(uri: str) -> None:
    if is_remote(uri):
        s3.require_folder(uri)
        return
    with storage_errors_for(uri):
        if not stat.S_ISDIR(os.stat(uri).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")


def list_files(uri: str) -> Iterator[FileInfo]:
    """Every file below a folder, at any depth, whatever its name; of a file, itself. Streams, sorted in each folder.

    Left out: directory markers, and every part below `uri` that begins with `.` or `_`. Symbolic links are followed.
    What cannot be examined (a broken link, say) is listed with size 0 and an empty etag: reading it tells why. The etag
    is S3's without quotes; locally `SIZE-MTIME_NS`. A local name that is no UTF-8 is listed with backslash escapes and
    a warning.

    Raises, when the first item is asked for or later:
        StorageError: not_found for a missing folder or bucket, forbidden for an unreadable (sub)folder, and so on.
    """
    return _list_s3(uri) if is_remote(uri) else _list_local(uri)


def _list_s3(uri: str) -> Iterator[FileInfo]:
    bucket, key = s3.split(uri)
    prefix = s3.prefix_of(uri)
    found = False
    for page in s3.pages(uri):
        for item in page.get("Contents", ()):
            found = True
            below = item["Key"].removeprefix(prefix)
            marker = item["Size"] == 0 and (item["Key"].endswith("/") or below.endswith("_$folder$"))
            if not marker and not any(part.startswith((".", "_")) for part in below.split("/")):
                yield _info_s3(f"s3://{bucket}/{item['Key']}", item["Size"], item)
    if not found and key:
        yield describe(uri)


def describe(uri: str) -> FileInfo:
    """One file as `list_files` would list it, without reading it. Raises StorageError."""
    if is_remote(uri):
        answer = s3.call(uri, "head_object", Key=s3.split(uri)[1])
        return _info_s3(uri, answer["ContentLength"], answer)
    with storage_errors_for(uri):
        return _info_local(uri, os.stat(uri))


def _info_s3(uri: str, size: int, item: dict[str, Any]) -> FileInfo:
    return FileInfo(uri, size, item.get("ETag", "").strip('"'), item["LastModified"].timestamp())


def _list_local(path: str) -> Iterator[FileInfo]:
    with storage_errors_for(path):
        status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        yield from _walk(path, {(status.st_dev, status.st_ino)})
    else:
        yield _info_local(path, status)


def _walk(folder: str, above: set[tuple[int, int]]) -> Iterator[FileInfo]:
    with storage_errors_for(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    for entry in names:
        if entry.startswith((".", "_")):
            continue
        path = join(folder, entry)
        try:
            status = os.stat(path)
        except OSError:
            yield FileInfo(_readable(path), 0, "", 0.0)
            continue
        identity = (status.st_dev, status.st_ino)
        if not stat.S_ISDIR(status.st_mode):
            yield _info_local(path, status)
        elif identity not in above:  # a link back to a folder above: its files are listed there
            yield from _walk(path, above | {identity})


def _info_local(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(_readable(path), status.st_size, _etag_of(status), status.st_mtime)


def _etag_of(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _readable(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        _log.warning("%r is no UTF-8 name and will be reported as not_found: rename the file.", path)
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    return path


def list_names(uri: str, *, missing_ok: bool = False) -> list[str]:
    """Return the sorted names of the files and folders directly in a folder, hidden ones too.

    Raises:
        StorageError: not_found if there is no such folder (with `missing_ok`, it has no names), forbidden and so on.
    """
    try:
        return _list_names(uri)
    except StorageError as error:
        if missing_ok and error.code == "not_found":
            return []
        raise


def _list_names(uri: str) -> list[str]:
    if not is_remote(uri):
        with storage_errors_for(uri):
            return sorted(os.listdir(uri))
    prefix = s3.prefix_of(uri)
    found: list[str] = []
    for page in s3.pages(uri, Delimiter="/"):
        found += [item["Key"] for item in page.get("Contents", ())]
        found += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
    if prefix and not found:
        raise StorageError("not_found", uri, "no object below this prefix")
    return sorted({key.removeprefix(prefix).rstrip("/") for key in found} - {""})


# ---- reading


def read_bytes(uri: str, *, max_bytes: int | None = None, etag: str = "") -> bytes:
    """The whole file or object. A store that throttles or does not answer is asked again for PATIENCE seconds.

    `etag` is the one that it was listed with, where other bytes than those are not wanted; members of packs have none.

    Raises:
        StorageError: too_large above `max_bytes` or changed where the etag differs (both before the body is fetched),
            is_directory, not_found and so on.
    """
    if packed.is_member(uri):
        return packed.read(uri, read_bytes, max_bytes)
    return s3.read(uri, max_bytes, etag) if is_remote(uri) else _read_local(uri, max_bytes, etag)


def _read_local(path: str, max_bytes: int | None, etag: str) -> bytes:
    pauses = backoff_delays()
    while True:
        try:
            with storage_errors_for(path), open(path, "rb", opener=_without_waiting) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
                check_found(path, status.st_size, _etag_of(status), max_bytes=max_bytes, etag=etag)
                return file.read()
        except StorageError as error:  # retryable: a network file system, say, that comes back
            pause = next(pauses, None)
            if pause is None or not error.retryable:
                raise
        time.sleep(pause)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe that nobody writes to would wait for ever


def open_ranges(uri: str) -> IO[bytes]:
    """The file or object open for reading pieces of it: each read of an object is one request. Raises StorageError."""
    with storage_errors_for(uri):
        file: IO[bytes] = s3.open_ranges(uri) if is_remote(uri) else open(uri, "rb")  # noqa: SIM115 - the caller's
        return file


def read_text(uri: str) -> str:
    """The file as UTF-8 text. Raises StorageError; `failed` where it is no UTF-8."""
    data = read_bytes(uri)
    with storage_errors_for(uri):
        return data.decode()


def read_json(uri: str) -> Any:
    """The file as JSON. Raises StorageError; `failed` where it is no JSON."""
    text = read_text(uri)
    with storage_errors_for(uri):
        return json.loads(text)


# ---- writing


def require_writable(folder: str, flag: str) -> None:
    """Raise UserError, naming `flag`, unless files can be written below `folder`: before hours of work, not after."""
    try:
        (s3 if is_remote(folder) else local_files).require_writable(folder)
    except StorageError as error:
        if error.retryable:
            raise
        raise UserError(f"{flag} {user_error(StorageError(error.code, folder, error.detail))}") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file or object whole or not at all, over what was there; makes folders. Raises StorageError."""
    if is_remote(uri):
        content = mimetypes.guess_type(name(uri))[0] or "application/octet-stream"
        s3.call(uri, "put_object", Key=s3.split(uri)[1], Body=data, ContentType=content)
    else:
        local_files.replace(uri, lambda file: file.write(data))


def write_new(uri: str, data: bytes) -> bool:
    """`write_bytes` where nothing is there; False, and nothing done, where something is: of two writers one wins."""
    if is_remote(uri):
        return s3.put_if(uri, data) is not None
    return local_files.create(uri, data)


def write_text(uri: str, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(uri, text.encode())


def write_json(uri: str, obj: Any) -> None:
    """`write_bytes` of indented JSON; NaN and infinity, which JSON does not have, raise ValueError."""
    write_text(uri, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def upload_file(local: Path, uri: str) -> None:
    """Copy a local file of any size to `uri`, whole or not at all. Raises StorageError."""
    with storage_errors_for(str(local)), open(local, "rb") as source:
        if is_remote(uri):
            s3.upload(str(local), uri)
        else:
            local_files.replace(uri, lambda file: shutil.copyfileobj(source, file))


def delete(uri: str) -> None:
    """Delete one file or object; nothing happens where it is not there. Raises StorageError."""
    if is_remote(uri):
        s3.call(uri, "delete_object", Key=s3.split(uri)[1])
        return
    with storage_errors_for(uri):
        Path(uri).unlink(missing_ok=True)


def delete_many(uris: Sequence[str]) -> None:
    """`delete` of files in one folder or objects in one bucket, of which a thousand take one request."""
    if uris and is_remote(uris[0]):
        s3.delete_many(uris)
        return
    for uri in uris:
        delete(uri)


def arrow_filesystem(uri: str | Path) -> tuple[pyarrow.fs.FileSystem, str]:
    """A pyarrow filesystem and the path in it, for Ray Train and Parquet: the same client, credentials and endpoint."""
    where = resolve(uri)
    if is_remote(where):
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(s3.client())), where.removeprefix("s3://")
    return pyarrow.fs.LocalFileSystem(), where
