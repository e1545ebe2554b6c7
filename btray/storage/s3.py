"""Objects as `btray.storage` lists, reads and writes them, and the process's S3 clients; use that module instead.

Every request is made by s3fs, which is also the filesystem of pyarrow and Ray. The bodies of whole objects are fetched,
and objects that must be new are put, by obstore (Rust's object_store) for a fifth of the CPU time, in the good case
only: whatever goes wrong there is asked again through s3fs, which says what it is and retries. Endpoint, region and
credentials are those that botocore finds, as are `AWS_NO_SIGN_REQUEST` (for public buckets) and `AWS_REQUEST_PAYER`.
"""

from __future__ import annotations

import contextlib
import mimetypes
import os
import re
import threading
import time
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

from btray.storage import errors
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
_CONNECTING = threading.Lock()  # of the threads that want a bucket the first finds its region
_silent_until: dict[str, float] = {}  # when a bucket that gave no answer is looked for again
# Settings that botocore lacks, named as in GDAL and object_store: in ~/.aws/config, variables, default, conversion
_SETTINGS = {
    "no_sign_request": ("no_sign_request", ["AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE"], "", str.casefold),
    "request_payer": ("request_payer", "AWS_REQUEST_PAYER", "", str.casefold),
}
_YES = ("1", "true", "yes", "on", "requester")


# ---- clients


class _Client(s3fs.S3FileSystem):
    retries = 2  # s3fs's own, for bodies of ranges that break off

    async def _call_s3(self, method: str, *options: Any, **arguments: Any) -> Any:
        """Repeat every request, also those of pyarrow and Ray, here and nowhere else."""
        request = super()._call_s3
        return await retry_async(lambda: request(method, *options, **arguments))

    call_s3 = sync_wrapper(_call_s3)

    async def _get_whole(self, bucket: str, key: str, check: Check) -> bytes:
        """Return the body of an object; also repeated if it breaks off."""
        request = super()._call_s3

        async def attempt() -> bytes:
            response = await request("get_object", Bucket=bucket, Key=key)
            try:
                check(response.get("ContentLength", 0), _unquoted(response.get("ETag")))
                data: bytes = await response["Body"].read()
                return data
            finally:
                response["Body"].close()

        return await retry_async(attempt)

    get_whole = sync_wrapper(_get_whole)

    async def _endpoint_of(self, bucket: str) -> tuple[str, str]:
        """Return the URL of a bucket and the region that requests are signed for, where a redirect has led."""
        events = (await self.set_session()).meta.events
        sent: list[Any] = []
        events.register_last("before-send.s3.HeadBucket", lambda request, **_: sent.append(request), "endpoint")
        try:
            await super()._call_s3("head_bucket", Bucket=bucket)
        except errors.FAILURES as error:
            if not isinstance(error.__cause__, botocore.exceptions.ClientError):
                raise  # there was no answer: whoever may not list the bucket gets one that leads there all the same
        finally:
            events.unregister("before-send.s3.HeadBucket", unique_id="endpoint")
        signed = re.search(r"Credential=[^,]*/\d{8}/([^/]+)/s3/", str(sent[-1].headers.get("Authorization")))
        return sent[-1].url, signed[1] if signed else "us-east-1"

    endpoint_of = sync_wrapper(_endpoint_of)

    async def _mkdir(self, path: str, acl: Any = False, create_parents: bool = True, **kwargs: Any) -> None:
        """Do nothing: folders need no making, and a misspelt bucket must fail, not spring into being."""

    mkdir = sync_wrapper(_mkdir)


def client() -> _Client:
    """Return the process's one client: fsspec keeps it by arguments and process id and runs it in one thread."""
    _, anonymous, requester_pays = _aws()
    return _Client(
        anon=anonymous,
        requester_pays=requester_pays,
        use_listings_cache=False,  # other processes write too
        local_expiry_check=True,  # whether a file changed between two ranges: not by If-Match, see `create`
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
    _aws.cache_clear()
    _store_of.cache_clear()
    _silent_until.clear()


@cache
def _aws() -> tuple[Any, bool, bool]:
    """Return what finds region and credentials; whether requests go unsigned; whether the requester pays for them."""
    session = botocore.session.Session(_SETTINGS)
    anonymous, requester_pays = (session.get_config_variable(name) in _YES for name in _SETTINGS)
    return session, anonymous, requester_pays


@cache
def _store_of(bucket: str) -> S3Store | None:
    """Return obstore's client for one bucket; None if botocore finds no credentials. Raises one of FAILURES."""
    session, anonymous, requester_pays = _aws()
    credentials = session.get_credentials()
    if credentials is None and not anonymous:
        return None
    # object_store follows no redirect to another region: without this each object would be asked for twice
    url, region = client().endpoint_of(bucket)
    endpoint = url.rstrip("/")

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
        region=region,
        virtual_hosted_style_request=not endpoint.endswith(f"/{bucket}"),
        credential_provider=None if anonymous else current_credentials,
        skip_signature=anonymous,
        request_payer=requester_pays,
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
    return FileInfo(uri, size, _unquoted(item.get("ETag")), item["LastModified"].timestamp())


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


def lean_store(bucket: str, key: str) -> S3Store | None:
    """Return obstore's client, if an object can be read or written by it."""
    if _REWRITTEN.search(key) or _first_user() != os.getpid():
        return None
    with _CONNECTING:
        if time.monotonic() > _silent_until.get(bucket, 0.0):
            try:
                return _store_of(bucket)
            except errors.FAILURES:
                _silent_until[bucket] = time.monotonic() + _READ_SECONDS  # else each thread would wait for it in turn
    return None


def fetch_body(bucket: str, key: str, check: Check) -> bytes | None:
    """Return the object's bytes by way of obstore; None if they could not be had this way."""
    if store := lean_store(bucket, key):
        with contextlib.suppress(BaseError, OSError, ValueError):
            response = obstore.get(store, key)
            check(response.meta["size"], _unquoted(response.meta["e_tag"]))
            return response.bytes().to_bytes()
    return None


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


def create(uri: str, data: bytes) -> bool:
    """Write an object if nothing is there yet; return False if something is. Raises StorageError.

    A request that is repeated because its response was lost finds its own object and gives False. No other condition is
    used: Ceph's gateway (16.2) refuses `If-Match` with the tag of the object that is there.
    """
    bucket, key = split(uri)
    if store := lean_store(bucket, key):
        with contextlib.suppress(BaseError, OSError, ValueError):
            obstore.put(store, key, data, mode="create", use_multipart=False)
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
