"""The process's S3 clients, by which `btray.storage.s3` makes its requests.

Every request is made by s3fs, which is also the filesystem of pyarrow and Ray. The bodies of whole objects are fetched,
and objects that must be new are put, by obstore (Rust's object_store) for a fifth of the CPU time, in the good case
only: whatever goes wrong there is asked again through s3fs, which says what it is and retries. Endpoint, region,
credentials and the certificates of a private authority (`AWS_CA_BUNDLE`) are those that botocore finds, as are
`AWS_NO_SIGN_REQUEST` (for public buckets) and `AWS_REQUEST_PAYER`.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import botocore.exceptions  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import s3fs
from fsspec.asyn import sync_wrapper
from obstore.exceptions import BaseError, GenericError
from obstore.store import S3Store

from btray.storage import errors
from btray.storage.retry import retry_async

_log = logging.getLogger(__name__)

Check = Callable[[int, str], None]
"""Given the size of an object and its entity tag (without quotes) before the body is fetched; may raise."""

_CONNECT_SECONDS, _READ_SECONDS = 3, 20
# Keys that object_store would write otherwise, or not at all: empty, `.` and `..` parts, control characters.
_REWRITTEN = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]")
_CREDENTIALS_HOLD = timedelta(minutes=1)  # botocore, asked again, renews those that run out
_CONNECTING = threading.Lock()  # of the threads that want a bucket the first finds its region
_silent_until: dict[str, float] = {}  # when a bucket that gave no answer is looked for again
_slow: set[str] = set()  # buckets of which the log says that the slower client was needed
# Settings that botocore lacks, named as in GDAL and object_store: in ~/.aws/config, variables, default, conversion
_SETTINGS = {
    "no_sign_request": ("no_sign_request", ["AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE"], "", str.casefold),
    "request_payer": ("request_payer", "AWS_REQUEST_PAYER", "", str.casefold),
}
_YES = ("1", "true", "yes", "on", "requester")


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
                check(response.get("ContentLength", 0), unquoted(response.get("ETag")))
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
    _slow.clear()


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
    authority = session.get_config_variable("ca_bundle")

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
            **({"root_certificate": Path(authority).read_bytes()} if authority else {}),
        },
        retry_config={"max_retries": 0},  # what fails goes through s3fs, by the one retry policy
    )


@cache
def _first_user() -> int:
    """Return the process that obstore's threads belong to: one forked from it has none."""
    return os.getpid()


def lean_store(bucket: str, key: str) -> S3Store | None:
    """Return obstore's client, if an object can be read or written by it."""
    if _REWRITTEN.search(key) or _first_user() != os.getpid():
        return None
    with _CONNECTING:
        if time.monotonic() > _silent_until.get(bucket, 0.0):
            try:
                return _store_of(bucket)
            except (*errors.FAILURES, BaseError) as error:
                _report_slow(bucket, error)
                _silent_until[bucket] = time.monotonic() + _READ_SECONDS  # else each thread would wait for it in turn
    return None


@contextmanager
def or_slower(bucket: str) -> Iterator[None]:
    """Leave the block if obstore fails, for s3fs to ask again."""
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        _report_slow(bucket, error)


def _report_slow(bucket: str, error: Exception) -> None:
    """Log, once per bucket, that obstore failed by itself; a certificate that it does not know would go unnoticed.

    Its other errors are responses of the store, such as "not found", which s3fs gets too.
    """
    if isinstance(error, GenericError) and bucket not in _slow and "status code" not in str(error):
        _slow.add(bucket)
        reason = " ".join(str(error).split())
        _log.warning("s3://%s: the fast client failed, so a slower one is used: %s", bucket, reason)


def unquoted(etag: str | None) -> str:
    """Return an entity tag as listings give it, without quotes and without the mark of proxies that compress."""
    return (etag or "").removeprefix("W/").strip('"')
