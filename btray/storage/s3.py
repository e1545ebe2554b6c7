"""Objects as `btray.storage` lists, reads and writes them; use that module instead. Its clients: `s3_clients`."""

from __future__ import annotations

import contextlib
import mimetypes
from collections.abc import Iterator, Sequence
from typing import Any

from btray.storage.errors import StorageError, check_file, code_of_response, storage_errors_for, suppress_missing
from btray.storage.file_info import FileInfo, is_hidden
from btray.storage.s3_clients import Check, client, lean_store, or_slower, unquoted

_KEYS_PER_DELETE = 1000  # the most that DeleteObjects takes


# ---- names and requests


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def prefix_of(uri: str) -> str:
    """Return what the keys below the folder `uri` begin with; empty for a bucket."""
    key = split(uri)[1].rstrip("/")
    return f"{key}/" if key else ""


def call(uri: str, method: str, **arguments: Any) -> dict[str, Any]:
    """Return the response to one request, named as in botocore, to the bucket of `uri`. Raises StorageError."""
    with storage_errors_for(uri):
        response: dict[str, Any] = client().call_s3(method, Bucket=split(uri)[0], **arguments)
        return response


def pages_of(uri: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield the pages of a listing of what lies below `uri`, one request each. Raises StorageError."""
    arguments.setdefault("Prefix", prefix_of(uri))
    while True:
        page = call(uri, "list_objects_v2", **arguments)
        yield page
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


# ---- looking


def is_folder(uri: str) -> bool:
    """Return whether `uri` is a bucket or has something below it. Raises StorageError if that cannot be told."""
    prefix = prefix_of(uri)
    with suppress_missing():  # there is no such bucket
        return bool(call(uri, "list_objects_v2", Prefix=prefix, MaxKeys=1).get("Contents")) or not prefix
    return False


def describe(uri: str) -> FileInfo:
    """Return one object as it would be listed. Raises StorageError; a bucket is not_found."""
    key = split(uri)[1]
    if not key:
        raise StorageError("not_found", uri, "a bucket is not an object")
    head = call(uri, "head_object", Key=key)
    return _info(uri, head["ContentLength"], head)


def list_files(uri: str) -> Iterator[FileInfo]:
    """List an object, or all objects below a prefix, as `btray.storage.list_files` says."""
    empty = True
    for page in pages_of(uri):
        empty = empty and not page.get("Contents")
        yield from files_of(uri, page)
    if empty and split(uri)[1]:
        yield describe(uri)


def files_of(uri: str, page: dict[str, Any]) -> Iterator[FileInfo]:
    """Yield the objects of a page of a listing of what lies below `uri`, but no markers and hidden ones."""
    bucket, prefix = split(uri)[0], prefix_of(uri)
    for item in page.get("Contents", ()):
        below = item["Key"].removeprefix(prefix)
        # `_$folder$` is how Hadoop marks an empty folder
        marker = item["Size"] == 0 and (item["Key"].endswith("/") or below.endswith("_$folder$"))
        if not marker and not is_hidden(below):
            yield _info(f"s3://{bucket}/{item['Key']}", item["Size"], item)


def _info(uri: str, size: int, item: dict[str, Any]) -> FileInfo:
    return FileInfo(uri, size, unquoted(item.get("ETag")), item["LastModified"].timestamp())


def list_names(uri: str) -> list[str]:
    """Return the names directly below a prefix, sorted. Raises StorageError."""
    prefix = prefix_of(uri)
    keys: list[str] = []
    for page in pages_of(uri, Delimiter="/"):
        keys += [item["Key"] for item in page.get("Contents", ())]
        keys += [item["Prefix"] for item in page.get("CommonPrefixes", ())]
    if prefix and not keys:
        raise StorageError("not_found", uri, "no object below this prefix")
    return sorted({key.removeprefix(prefix).rstrip("/") for key in keys} - {""})


# ---- reading


def read(uri: str, max_bytes: int | None, etag: str = "") -> bytes:
    """Return the whole object, with one GET. Raises StorageError, also if its entity tag is not `etag`; empty: any."""
    bucket, key = split(uri)
    if not key:
        raise StorageError("is_directory", uri, "a bucket")

    def check(size: int, actual_etag: str) -> None:
        check_file(uri, size, max_bytes, actual_etag, etag)

    try:
        data = fetch_body(bucket, key, check)
        if data is None:
            with storage_errors_for(uri):
                data = client().get_whole(bucket, key, check)
    except StorageError as error:
        if error.code == "not_found" and "NoSuchBucket" not in error.detail and _is_surely_folder(uri):
            raise StorageError("is_directory", uri, "a prefix of other objects") from error
        raise
    if not data and key.endswith("/"):
        raise StorageError("is_directory", uri, "a directory marker")
    return data


def _is_surely_folder(uri: str) -> bool:
    try:
        return is_folder(uri)
    except StorageError:
        return False  # at most the more telling code is lost


def fetch_body(bucket: str, key: str, check: Check) -> bytes | None:
    """Return the object's bytes by way of obstore; None if they could not be had this way."""
    if store := lean_store(bucket, key):
        with or_slower(bucket):
            response = store.get(key)
            check(response.meta["size"], unquoted(response.meta["e_tag"]))
            return response.bytes().to_bytes()
    return None


def open_ranges(uri: str) -> Any:
    """Return the object as a file of which each read is one GET of just that range. Raises StorageError."""
    with storage_errors_for(uri):
        return client().open("/".join(split(uri)), "rb", cache_type="none")


# ---- writing


def require_writable(uri: str) -> None:
    """Raise StorageError unless objects can be written below `uri`: an empty one is, and is deleted again."""
    bucket, _ = split(uri)
    try:
        if not is_folder(f"s3://{bucket}"):  # some stores make a bucket that is written to
            raise StorageError("not_found", uri, f"there is no bucket {bucket}")
    except StorageError as error:
        if error.code != "forbidden":  # whoever may write below a prefix may be forbidden to list the bucket
            raise
    key = f"{prefix_of(uri)}_writable"
    call(uri, "put_object", Key=key, Body=b"")
    with contextlib.suppress(StorageError):  # nor need they be allowed to delete
        call(uri, "delete_object", Key=key)


def write(uri: str, data: bytes) -> None:
    """Write an object over what was there. Raises StorageError."""
    content_type = mimetypes.guess_type(uri.rpartition("/")[2])[0] or "application/octet-stream"
    call(uri, "put_object", Key=split(uri)[1], Body=data, ContentType=content_type)


def create(uri: str, data: bytes) -> bool:
    """Write an object if nothing is there yet; return False if something is. Raises StorageError.

    A request that is repeated because its response was lost finds its own object and gives False. No other condition is
    used: Ceph's gateway (16.2) refuses `If-Match` with the tag of the object that is there.
    """
    bucket, key = split(uri)
    if store := lean_store(bucket, key):
        with or_slower(bucket):
            store.put(key, data, mode="create", use_multipart=False)
            return True
    try:
        call(uri, "put_object", Key=key, Body=data, IfNoneMatch="*")
    except StorageError as error:
        if error.detail.startswith(("PreconditionFailed", "412")):
            return False
        if error.detail.startswith(("NotImplemented", "501")):
            raise StorageError("failed", uri, f"this store has no If-None-Match: {error.detail}") from error
        raise
    return True


def upload(path: str, uri: str) -> None:
    """Write a local file to an object, whole or not at all; in parts if it is large. Raises StorageError."""
    with storage_errors_for(uri):
        client().put_file(path, uri)


def delete(uri: str) -> None:
    """Delete an object, if it is there. Raises StorageError."""
    call(uri, "delete_object", Key=split(uri)[1])


def delete_many(uris: Sequence[str]) -> None:
    """Delete objects of one bucket, a thousand per request. Raises StorageError."""
    for start in range(0, len(uris), _KEYS_PER_DELETE):
        keys = [{"Key": split(uri)[1]} for uri in uris[start : start + _KEYS_PER_DELETE]]
        response = call(uris[start], "delete_objects", Delete={"Objects": keys, "Quiet": True})
        for error in response.get("Errors", ())[:1]:
            code, message = code_of_response(str(error.get("Code"))), str(error.get("Message"))
            raise StorageError(code, f"s3://{split(uris[0])[0]}/{error.get('Key')}", message)
