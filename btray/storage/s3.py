"""The process's S3 client and the few requests that `btray.storage` makes; use that module instead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import s3fs
from fsspec.asyn import sync, sync_wrapper

from btray.storage import s3_bodies
from btray.storage.errors import (
    FAILURES,
    StorageError,
    as_storage_error,
    backoff_delays,
    check_found,
    storage_errors_for,
)


class _Client(s3fs.S3FileSystem):
    retries = 2  # s3fs's own, for bodies that break off

    async def _call_s3(self, method: str, *options: Any, **arguments: Any) -> Any:
        """Every request, also those of pyarrow and Ray, is repeated here and nowhere else."""
        pauses = backoff_delays()
        while True:
            try:
                return await super()._call_s3(method, *options, **arguments)
            except FAILURES as error:
                pause = next(pauses, None)
                if pause is None or not as_storage_error(error, "").retryable:
                    raise
            await asyncio.sleep(pause)

    call_s3 = sync_wrapper(_call_s3)

    async def _mkdir(self, path: str, acl: Any = False, create_parents: bool = True, **kwargs: Any) -> None:
        """Do nothing: folders need no making, and a misspelt bucket must fail, not spring into being."""

    mkdir = sync_wrapper(_mkdir)


def client() -> _Client:
    """The process's one client: fsspec keeps it by arguments and process id and runs its requests in one thread."""
    return _Client(
        use_listings_cache=False,  # other processes write too
        config_kwargs={
            "connect_timeout": 3,
            "read_timeout": 20,
            "max_pool_connections": 64,
            "retries": {"mode": "standard", "total_max_attempts": 1},
        },
    )


def reconnect() -> None:
    """Forget the client, so that the next request finds endpoint and credentials anew: they changed, say in a test."""
    _Client.clear_instance_cache()
    s3_bodies.forget()


def split(uri: str) -> tuple[str, str]:
    """Bucket and key."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def prefix_of(uri: str) -> str:
    """What the keys below the folder `uri` begin with; empty for a bucket."""
    key = split(uri)[1].rstrip("/")
    return f"{key}/" if key else ""


def call(uri: str, method: str, **arguments: Any) -> dict[str, Any]:
    """The answer to one request, named as in botocore, to the bucket of `uri`. Raises StorageError."""
    with storage_errors_for(uri):
        answer: dict[str, Any] = client().call_s3(method, Bucket=split(uri)[0], **arguments)
        return answer


def pages(uri: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """The pages of a listing of what lies below `uri`, one request each. Raises StorageError."""
    arguments["Prefix"] = prefix_of(uri)
    while True:
        page = call(uri, "list_objects_v2", **arguments)
        yield page
        if not page.get("IsTruncated"):
            return
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def require_folder(uri: str) -> None:
    """Raise StorageError unless `uri` is a bucket, or a prefix below which an object or marker lies."""
    prefix = prefix_of(uri)
    if not call(uri, "list_objects_v2", Prefix=prefix, MaxKeys=1).get("Contents") and prefix:
        raise StorageError("not_found", uri, "no object below this prefix")


def require_writable(uri: str) -> None:
    """Raise StorageError unless objects can be written below `uri`: an empty one is, and is deleted again."""
    bucket, _ = split(uri)
    try:
        require_folder(f"s3://{bucket}")  # some stores make a bucket that is written to
    except StorageError as error:
        if error.code == "not_found":
            raise StorageError("not_found", uri, f"there is no bucket {bucket}") from error
        if error.code != "forbidden":  # whoever may write below a prefix may be forbidden to list the bucket
            raise
    key = f"{prefix_of(uri)}_writable"
    call(uri, "put_object", Key=key, Body=b"")
    with contextlib.suppress(StorageError):  # nor need they be allowed to delete
        call(uri, "delete_object", Key=key)


def read(uri: str, max_bytes: int | None, etag: str = "") -> bytes:
    """The whole object, with one GET. Raises StorageError, also where its entity tag is not `etag`; empty: any is."""
    bucket, key = split(uri)
    if not key:
        raise StorageError("is_directory", uri, "a bucket")

    def check(size: int, tag: str) -> None:
        check_found(uri, size, tag, max_bytes=max_bytes, etag=etag)

    try:
        found = s3_bodies.fetch(bucket, key, check)
        data = _got(uri, check) if found is None else found
    except StorageError as error:
        if error.code == "not_found" and "NoSuchBucket" not in error.detail and _is_folder(uri):
            raise StorageError("is_directory", uri, "a prefix of other objects") from error
        raise
    if not data and key.endswith("/"):
        raise StorageError("is_directory", uri, "a directory marker")
    return data


def open_ranges(uri: str) -> Any:
    """The object as a file of which each read is one GET of just that range. Raises StorageError."""
    with storage_errors_for(uri):
        return client().open("/".join(split(uri)), "rb", cache_type="none")


def read_tagged(uri: str) -> tuple[bytes, str, dict[str, str]]:
    """The whole object, its entity tag and the headers of the answer, names in lower case. Raises StorageError."""
    s3 = client()
    with storage_errors_for(uri):
        found: tuple[bytes, str, dict[str, str]] = sync(s3.loop, _get_tagged, s3, uri)
    return found


def put_if(uri: str, data: bytes, match: str | None = None) -> str | None:
    """Write an object where its entity tag is `match` (None: where nothing is there) and give the new tag; else None.

    A request that is repeated because its answer was lost finds its own object and gives None. Raises StorageError.
    """
    condition = {"IfNoneMatch": "*"} if match is None else {"IfMatch": match}
    try:
        answer = call(uri, "put_object", Key=split(uri)[1], Body=data, **condition)
    except StorageError as error:
        if error.detail.startswith(("PreconditionFailed", "412")) or (match and error.code == "not_found"):
            return None
        raise
    return str(answer["ETag"])


def delete_many(uris: Sequence[str]) -> None:
    """Delete objects of one bucket, a thousand with a request. Raises StorageError."""
    for start in range(0, len(uris), 1000):
        keys = [{"Key": split(uri)[1]} for uri in uris[start : start + 1000]]
        failed = call(uris[start], "delete_objects", Delete={"Objects": keys, "Quiet": True}).get("Errors", ())
        for error in failed[:1]:
            code = "forbidden" if error.get("Code") == "AccessDenied" else "failed"
            raise StorageError(code, f"s3://{split(uris[0])[0]}/{error.get('Key')}", str(error.get("Message")))


def upload(path: str, uri: str) -> None:
    """Write a local file to an object, whole or not at all; in parts where it is large. Raises StorageError."""
    with storage_errors_for(uri):
        client().put_file(path, uri)


def _is_folder(uri: str) -> bool:
    try:
        require_folder(uri)
    except StorageError:
        return False  # at most the more telling code is lost
    return True


def _got(uri: str, check: Callable[[int, str], None]) -> bytes:
    s3 = client()
    with storage_errors_for(uri):
        data: bytes = sync(s3.loop, _get, s3, *split(uri), check)
        return data


async def _get(s3: _Client, bucket: str, key: str, check: Callable[[int, str], None]) -> bytes:
    pauses = backoff_delays()
    while True:
        answer = await s3._call_s3("get_object", Bucket=bucket, Key=key)
        try:
            check(answer.get("ContentLength", 0), s3_bodies.plain(answer.get("ETag")))
            data: bytes = await answer["Body"].read()
            return data
        except FAILURES:  # the body broke off
            pause = next(pauses, None)
            if pause is None:
                raise
        finally:
            answer["Body"].close()
        await asyncio.sleep(pause)


async def _get_tagged(s3: _Client, uri: str) -> tuple[bytes, str, dict[str, str]]:
    bucket, key = split(uri)
    answer = await s3._call_s3("get_object", Bucket=bucket, Key=key)
    try:
        return await answer["Body"].read(), str(answer["ETag"]), answer["ResponseMetadata"]["HTTPHeaders"]
    finally:
        answer["Body"].close()
