"""Objects as `btray.storage` lists, reads and writes them, and the process's S3 clients; use that module instead.

Every request is made by s3fs, which is also the filesystem of pyarrow and Ray. The bodies of whole objects are fetched
by obstore (Rust's object_store) for a fifth of the CPU time, in the good case only: whatever goes wrong there is asked
again through s3fs, which says what it is and retries. Endpoint, region and credentials are those that botocore finds.
"""

from __future__ import annotations

import contextlib
import mimetypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import botocore.exceptions  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import obstore
import s3fs
from fsspec.asyn import sync_wrapper
from obstore.exceptions import BaseError
from obstore.store import S3Store

from btray.storage.errors import StorageError, check_file, code_of_response, storage_errors_for, suppress_missing
from btray.storage.file_info import FileInfo, is_hidden
from btray.storage.retry import retry_async

Check = Callable[[int, str], None]
"""Given the size of an object and its entity tag (without quotes) before the body is fetched; may raise."""

_CONNECT_SECONDS, _READ_SECONDS = 3, 20
# Keys that object_store would write otherwise, or not at all: empty, `.` and `..` parts, control characters.
_REWRITTEN = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")
_CREDENTIALS_HOLD = timedelta(minutes=1)  # botocore, asked again, renews those that run out
_KEYS_PER_DELETE = 1000  # the most that DeleteObjects takes


# ---- clients


class _Client(s3fs.S3FileSystem):
    retries = 2  # s3fs's own, for bodies of ranges that break off

    async def _call_s3(self, method: str, *options: Any, **arguments: Any) -> Any:
        """Repeat every request, also those of pyarrow and Ray, here and nowhere else."""
        request = super()._call_s3
        return await retry_async(lambda: request(method, *options, **arguments))

    call_s3 = sync_wrapper(_call_s3)

    async def _get_whole(self, bucket: str, key: str, check: Check) -> tuple[bytes, str, dict[str, str]]:
        """Return body, entity tag and headers of an object; also repeated if the body breaks off."""
        request = super()._call_s3

        async def attempt() -> tuple[bytes, str, dict[str, str]]:
            response = await request("get_object", Bucket=bucket, Key=key)
            try:
                check(response.get("ContentLength", 0), _unquoted(response.get("ETag")))
                return await response["Body"].read(), response["ETag"], response["ResponseMetadata"]["HTTPHeaders"]
            finally:
                response["Body"].close()

        return await retry_async(attempt)

    get_whole = sync_wrapper(_get_whole)

    async def _mkdir(self, path: str, acl: Any = False, create_parents: bool = True, **kwargs: Any) -> None:
        """Do nothing: folders need no making, and a misspelt bucket must fail, not spring into being."""

    mkdir = sync_wrapper(_mkdir)


def client() -> _Client:
    """Return the process's one client: fsspec keeps it by arguments and process id and runs it in one thread."""
    return _Client(
        use_listings_cache=False,  # other processes write too
        config_kwargs={
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "max_pool_connections": 64,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # of botocore: `_call_s3` repeats requests
        },
    )


def reconnect() -> None:
    """Forget the clients, so that the next request finds endpoint and credentials anew: they changed, say in a test."""
    _Client.clear_instance_cache()
    _body_store.cache_clear()


@cache
def _body_store(bucket: str) -> S3Store | None:
    """Return obstore's client for one bucket; None if botocore finds no credentials."""
    session = botocore.session.get_session()
    try:
        credentials = session.get_credentials()
        if credentials is None:
            return None
        aws = session.create_client("s3")
        signed = aws.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
    except botocore.exceptions.BotoCoreError:
        return None
    # of a signed URL, since only the signer knows whether the bucket goes into the path or the host name
    endpoint = signed.partition("?")[0].removesuffix("/k")

    def current_credentials() -> Any:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_HOLD,
        }

    return S3Store(
        bucket,
        endpoint=endpoint.removesuffix(f"/{bucket}"),
        region=aws.meta.region_name,
        virtual_hosted_style_request=not endpoint.endswith(f"/{bucket}"),
        credential_provider=current_credentials,
        client_options={
            "allow_http": True,
            "connect_timeout": f"{_CONNECT_SECONDS}s",
            "read_timeout": f"{_READ_SECONDS}s",
            "timeout": "10min",
        },
        retry_config={"max_retries": 0},  # what fails goes through s3fs, by the one retry policy
    )


@cache
def _first_user() -> int:
    """Return the process that obstore's threads belong to: one forked from it has none."""
    return os.getpid()


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


def _pages(uri: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """Yield the pages of a listing of what lies below `uri`, one request each. Raises StorageError."""
    arguments["Prefix"] = prefix_of(uri)
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
    bucket, key = split(uri)
    prefix = prefix_of(uri)
    empty = True
    for page in _pages(uri):
        for item in page.get("Contents", ()):
            empty = False
            below = item["Key"].removeprefix(prefix)
            # `_$folder$` is how Hadoop marks an empty folder
            marker = item["Size"] == 0 and (item["Key"].endswith("/") or below.endswith("_$folder$"))
            if not marker and not is_hidden(below):
                yield _info(f"s3://{bucket}/{item['Key']}", item["Size"], item)
    if empty and key:
        yield describe(uri)


def _info(uri: str, size: int, item: dict[str, Any]) -> FileInfo:
    return FileInfo(uri, size, item.get("ETag", "").strip('"'), item["LastModified"].timestamp())


def list_names(uri: str) -> list[str]:
    """Return the names directly below a prefix, sorted. Raises StorageError."""
    prefix = prefix_of(uri)
    keys: list[str] = []
    for page in _pages(uri, Delimiter="/"):
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
            data, _, _ = read_tagged(uri, check)
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
    if _REWRITTEN.search(key) or _first_user() != os.getpid():
        return None
    store = _body_store(bucket)
    if store is None:
        return None
    try:
        response = obstore.get(store, key)
    except (BaseError, OSError, ValueError):
        return None
    check(response.meta["size"], _unquoted(response.meta["e_tag"]))
    try:
        return response.bytes().to_bytes()
    except (BaseError, OSError):
        return None


def read_tagged(uri: str, check: Check = lambda size, etag: None) -> tuple[bytes, str, dict[str, str]]:
    """Return the whole object, its entity tag and the headers, names in lower case. Raises StorageError."""
    with storage_errors_for(uri):
        tagged: tuple[bytes, str, dict[str, str]] = client().get_whole(*split(uri), check)
        return tagged


def _unquoted(etag: str | None) -> str:
    """Return an entity tag as listings give it, without quotes and without the mark of proxies that compress."""
    return (etag or "").removeprefix("W/").strip('"')


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


def put_if(uri: str, data: bytes, match: str | None = None) -> str | None:
    """Write an object if its entity tag is `match` (None: if nothing is there) and return the new tag; else None.

    A request that is repeated because its response was lost finds its own object and gives None. Raises StorageError.
    """
    condition = {"IfNoneMatch": "*"} if match is None else {"IfMatch": match}
    try:
        response = call(uri, "put_object", Key=split(uri)[1], Body=data, **condition)
    except StorageError as error:
        if error.detail.startswith(("PreconditionFailed", "412")) or (match and error.code == "not_found"):
            return None
        raise
    return str(response["ETag"])


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
